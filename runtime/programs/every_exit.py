"""Evaluates every exit of a language model at every token of given texts (teacher forcing).

At each token, an exit gives the next token that it predicts, and the log-probability of the text's
actual next token (``next_log_prob``), from which perplexity is computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.next_tokens import NEXT_LOG_PROB, NO_TOKEN, log_probs, next_tokens
from edgeexit.errors import UsageError
from edgeexit.runtime.executor.blocks import Block, even_chunk, standing
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.forward import Trace


def trace_texts(session: Session, tokens: NDArray[np.int64], step: int | None) -> Trace:
    """Runs every component over new texts ``[batch, seq]``, `step` tokens at a time (None: as many
    as possible), and evaluates every exit at every token.

    Returns:
        Outputs of each exit: ``token`` and ``next_log_prob`` ``[batch, seq]`` (natural logarithm;
        NaN for the last token of a text), ``logits`` ``[batch, vocabulary]`` of the last token.
        Behind a gate that dropped a token, its ``token`` is `NO_TOKEN`, its scores are NaN.

    Raises:
        UsageError: `step` is not a number of tokens, or the model must read prompts in one run.
    """
    rows, length = tokens.shape
    if step is not None and (not isinstance(step, int) or step < 1):
        raise UsageError(f"step is {step!r}", fix="Use a whole number from 1 up.")
    if session.gates.whole_prompts and step is not None and step < length:
        raise UsageError(
            f"step is {step}, but this model must read all {length} tokens of a text in one run",
            fix="Leave step out.",
        )
    step = step or even_chunk(length, session.chunk)
    exits = [(n, exit_) for n, exit_ in enumerate(session.exits) if exit_ is not None]
    heads: dict[int, Head] = {}
    if not session.answers_itself:
        heads = {n: session.head(n, e.scores, logits=True) for n, e in exits}
    given = {number: _Collected(exit_.scores) for number, exit_ in exits}
    for number, exit_ in exits:
        session.token_scores.open(number, exit_.scores)
    following = next_tokens(tokens)
    times_ms: list[list[float]] = []
    for start in range(0, length, step):
        part = np.ascontiguousarray(tokens[:, start : start + step])
        session.embed(part, start)
        block = Block(part.shape[1], [part.shape[1]] * rows)
        times_ms.append([])
        for number in range(len(session.parts)):
            started = time.perf_counter_ns()
            before, block = block, session.run(number, block)
            left = block.positions is None or any(block.counts)
            answers = (
                _ask(session, number, heads.get(number), before, block)
                if number in given and left
                else None
            )
            times_ms[-1].append((time.perf_counter_ns() - started) / 1e6)
            if number in given:
                given[number].add(answers, block, start, following[:, start : start + step])
    return Trace(
        [exit_.name for _, exit_ in exits],
        [given[number].outputs() for number, _ in exits],
        [given[number].scores() for number, _ in exits],
        [sum(of_component) for of_component in zip(*times_ms, strict=True)],
        step_times_ms=times_ms,
    )


class _Collected:
    """What an exit answers at every token of texts, collected from runs of some tokens.

    Args:
        scores: Names of its scores.
    """

    def __init__(self, scores: Iterable[str]) -> None:
        self._names = ["token", *scores]
        self._made: dict[str, list[NDArray[Any]]] = {
            name: [] for name in [*self._names, NEXT_LOG_PROB]
        }
        self._logits: NDArray[Any] | None = None

    def add(
        self, answers: Answers | None, block: Block, start: int, following: NDArray[np.int64]
    ) -> None:
        """Adds the answers for a run of tokens; None: all of them were dropped.

        Args:
            start: Position of the first token.
            following: Next tokens ``[batch, seq]`` of the run, before tokens were dropped.
        """
        rows = len(following)
        made: dict[str, NDArray[Any]] = {
            name: np.full(following.shape, NO_TOKEN if name == "token" else np.nan)
            for name in self._made
        }
        if answers is not None:
            logits = np.array(answers["logits"])
            logits = logits.reshape(rows, -1, logits.shape[-1])
            own = {name: np.array(answers[name]).reshape(rows, -1) for name in self._names}
            if block.positions is None:
                # The unsplit graph answers only for the last token of a run.
                own[NEXT_LOG_PROB] = log_probs(logits, following[:, -logits.shape[1] :])
                made, self._logits = own, logits[:, -1]
            else:
                places = [np.array(p, np.int64) - start for p in standing(block, [start] * rows)]
                nexts = np.full(logits.shape[:2], NO_TOKEN)
                for row, kept in enumerate(places):
                    nexts[row, : len(kept)] = following[row, kept]
                own[NEXT_LOG_PROB] = log_probs(logits, nexts)
                for name, values in own.items():
                    made[name] = made[name].astype(values.dtype)
                    for row, kept in enumerate(places):
                        made[name][row, kept] = values[row, : len(kept)]
                self._logits = logits[np.arange(rows), np.array(block.counts) - 1]
        for name, values in made.items():
            self._made[name].append(values)

    def outputs(self) -> dict[str, NDArray[Any]]:
        """As in `Trace.outputs`."""
        assert self._logits is not None  # a prompt does not end with tokens that are dropped
        return {name: self._whole(name) for name in ("token", NEXT_LOG_PROB)} | {
            "logits": self._logits
        }

    def scores(self) -> dict[str, NDArray[Any]]:
        """As in `Trace.scores`."""
        return {name: self._whole(name) for name in self._names[1:]}

    def _whole(self, name: str) -> NDArray[Any]:
        own = self._made[name]
        return np.concatenate([values.astype(own[-1].dtype) for values in own], axis=1)


def segment_times(session: Session, tokens: NDArray[np.int64]) -> list[float]:
    """Milliseconds of each component for one prompt ``[seq]``, in chunks as in generation, and of
    the last exit's head for its last token."""
    times_ns = [0.0] * len(session.parts)
    chunk = even_chunk(len(tokens), session.chunk)
    for start in range(0, len(tokens), chunk):
        part = np.ascontiguousarray(tokens[None, start : start + chunk])
        session.embed(part, start)
        block = Block(part.shape[1], [part.shape[1]])
        for number in range(len(session.parts)):
            started = time.perf_counter_ns()
            block = session.run(number, block)
            session.engine.settle()
            times_ns[number] += time.perf_counter_ns() - started
    if not session.answers_itself:
        states = session.boundary(len(session.parts), block.new)[:, block.counts[0] - 1]
        head = session.head(len(session.parts) - 1)
        started = time.perf_counter_ns()
        head(states)
        times_ns.append(time.perf_counter_ns() - started)
    return [time_ns / 1e6 for time_ns in times_ns]


def _ask(session: Session, number: int, head: Head | None, before: Block, block: Block) -> Answers:
    """An exit's answers for all tokens of a block behind its component. `before`: the block that
    the component ran over, from which a gate may have dropped tokens."""
    if head is None:
        return session.parts[number].answers
    own = session.token_scores.every(number, before.new)
    if block.positions is not None:
        ends = session.parts[number].states.positions
        starts = [end - count for end, count in zip(ends, before.counts, strict=True)]
        stood = [list(places) for places in standing(before, starts)]
        left = standing(block, starts)
        for score, values in own.items():
            own[score] = np.full((len(values), block.new), np.nan, np.float32)
            for row, places in enumerate(left):
                kept = [stood[row].index(place) for place in places]
                own[score][row, : len(kept)] = values[row, kept]
    states = session.adapters.run(number, block)
    return {**head(states.reshape(-1, states.shape[-1])), **own}


__all__ = ["segment_times", "trace_texts"]
