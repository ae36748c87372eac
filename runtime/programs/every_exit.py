"""Evaluates every exit of a language model at every token of given texts (teacher forcing).

At each token, an exit gives the next token that it predicts, and the log-probability of the text's
actual next token (``next_log_prob``), from which perplexity is computed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import UsageError
from edgeexit.runtime.executor.blocks import Block, even_chunk
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.forward import Trace

NEXT_LOG_PROB = "next_log_prob"
NO_TOKEN = -1


def trace_texts(session: Session, tokens: NDArray[np.int64], step: int | None) -> Trace:
    """Runs every component over new texts ``[batch, seq]``, `step` tokens at a time (None: as many
    as possible), and evaluates every exit at every token.

    Returns:
        Outputs of each exit: ``token`` and ``next_log_prob`` ``[batch, seq]`` (natural logarithm;
        NaN for the last token of a text), ``logits`` ``[batch, vocabulary]`` of the last token.

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
    heads = {} if session.answers_itself else {n: session.head(n, e.scores) for n, e in exits}
    answered: dict[int, dict[str, list[NDArray]]] = {
        number: {name: [] for name in ("token", NEXT_LOG_PROB, *exit_.scores)}
        for number, exit_ in exits
    }
    scores = {number: list(exit_.scores) for number, exit_ in exits}
    following = np.concatenate([tokens[:, 1:], np.full((rows, 1), NO_TOKEN)], axis=1)
    logits: dict[int, NDArray] = {}
    times_ms: list[list[float]] = []
    for start in range(0, length, step):
        part = np.ascontiguousarray(tokens[:, start : start + step])
        shape = part.shape
        session.embed(part, start)
        block = Block(shape[1], [shape[1]] * rows)
        times_ms.append([])
        for number in range(len(session.parts)):
            started = time.perf_counter_ns()
            block = session.run(number, block)
            if number in answered:
                answers = _ask(session, number, heads.get(number), block)
                for name in ("token", *scores[number]):
                    answered[number][name].append(np.array(answers[name]).reshape(rows, -1))
            times_ms[-1].append((time.perf_counter_ns() - started) / 1e6)
            if number in answered:
                own = np.array(answers["logits"])
                own = own.reshape(rows, -1, own.shape[-1])
                logits[number] = own[:, -1]
                # The unsplit graph answers only for the last token of a run.
                next_tokens = following[:, start : start + step][:, -own.shape[1] :]
                answered[number][NEXT_LOG_PROB].append(_log_probs(own, next_tokens))
    whole = {
        n: {k: np.concatenate(v, axis=1) for k, v in own.items()} for n, own in answered.items()
    }
    return Trace(
        [exit_.name for _, exit_ in exits],
        [
            {name: whole[n][name] for name in ("token", NEXT_LOG_PROB)} | {"logits": logits[n]}
            for n, _ in exits
        ],
        [{name: whole[n][name] for name in exit_.scores} for n, exit_ in exits],
        [sum(of_component) for of_component in zip(*times_ms, strict=True)],
        step_times_ms=times_ms,
    )


def segment_times(session: Session, tokens: NDArray[np.int64]) -> list[float]:
    """Milliseconds of each component for one prompt ``[seq]``, in chunks as in generation."""
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
    return [time_ns / 1e6 for time_ns in times_ns]


def _ask(session: Session, number: int, head: Head | None, block: Block) -> Answers:
    if head is None:
        return session.parts[number].answers
    states = session.adapt(number, block)
    return head(states.reshape(-1, states.shape[-1]))


def _log_probs(logits: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Log-probabilities ``[batch, seq]`` of tokens, from logits ``[batch, seq, vocabulary]``; NaN
    for `NO_TOKEN`. Computed token by token, because a copy of all logits may not fit in memory."""
    log_probs = np.full(tokens.shape, np.nan, np.float32)
    for row, place in np.argwhere(tokens != NO_TOKEN):
        own = logits[row, place].astype(np.float32)
        own -= own.max()
        log_probs[row, place] = own[tokens[row, place]] - np.log(np.exp(own).sum())
    return log_probs


__all__ = ["NEXT_LOG_PROB", "segment_times", "trace_texts"]
