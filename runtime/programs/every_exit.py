"""Every exit of a model that writes, asked for every token of given texts (teacher forcing).

An exit says two things of a token: which one it expects next, and how likely it finds the one that
the text goes on with (``next_log_prob``), which perplexity is made of.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import UsageError
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.forward import Trace

NEXT_LOG_PROB = "next_log_prob"
NO_TOKEN = -1


def trace_texts(session: Session, tokens: NDArray[np.int64], step: int | None) -> Trace:
    """Runs every component over texts ``[batch, seq]`` that begin anew, so many tokens at a time
    (None: as many as it can), and asks every exit about every token.

    Returns:
        Outputs of each exit: ``token`` and ``next_log_prob`` ``[batch, seq]`` (natural logarithm;
        NaN for the last token of a text), ``logits`` ``[batch, vocabulary]`` of the last token.

    Raises:
        UsageError: `step` is no number of tokens, or something reads whole prompts.
    """
    rows, length = tokens.shape
    if step is not None and (not isinstance(step, int) or step < 1):
        raise UsageError(f"step is {step!r}", fix="Use a whole number from 1 up.")
    if session.gates.whole_prompts and step is not None and step < length:
        raise UsageError(
            f"step is {step}, and this model reads a text's {length} tokens in one run",
            fix="Leave step out.",
        )
    step = step or session.chunk
    exits = [(n, exit_) for n, exit_ in enumerate(session.exits) if exit_ is not None]
    heads = {} if session.answers_itself else {n: session.head(n, e.scores) for n, e in exits}
    found: dict[int, dict[str, list[NDArray]]] = {
        number: {name: [] for name in ("token", NEXT_LOG_PROB, *exit_.scores)}
        for number, exit_ in exits
    }
    scores = {number: list(exit_.scores) for number, exit_ in exits}
    following = np.concatenate([tokens[:, 1:], np.full((rows, 1), NO_TOKEN)], axis=1)
    logits: dict[int, NDArray] = {}
    times_ns = [0.0] * len(session.parts)
    for start in range(0, length, step):
        part = np.ascontiguousarray(tokens[:, start : start + step])
        shape = part.shape
        session.embed(part, start)
        block = Block(shape[1], [shape[1]] * rows)
        for number in range(len(session.parts)):
            started = time.perf_counter_ns()
            block = session.run(number, block)
            if number in found:
                answers = _ask(session, number, heads.get(number), block)
                for name in ("token", *scores[number]):
                    found[number][name].append(np.array(answers[name]).reshape(rows, -1))
            times_ns[number] += time.perf_counter_ns() - started
            if number in found:
                own = np.array(answers["logits"])
                own = own.reshape(rows, -1, own.shape[-1])
                logits[number] = own[:, -1]
                # Unsplit answers to the last token of a run alone.
                next_ones = following[:, start : start + step][:, -own.shape[1] :]
                found[number][NEXT_LOG_PROB].append(_log_probs(own, next_ones))
    made = {n: {k: np.concatenate(v, axis=1) for k, v in own.items()} for n, own in found.items()}
    return Trace(
        [exit_.name for _, exit_ in exits],
        [
            {name: made[n][name] for name in ("token", NEXT_LOG_PROB)} | {"logits": logits[n]}
            for n, _ in exits
        ],
        [{name: made[n][name] for name in exit_.scores} for n, exit_ in exits],
        [time_ns / 1e6 for time_ns in times_ns],
    )


def _ask(session: Session, number: int, head: Head | None, block: Block) -> Answers:
    if head is None:
        return session.parts[number].answers
    states = session.adapt(number, block)
    return head(states.reshape(-1, states.shape[-1]))


def _log_probs(logits: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Log-probabilities ``[batch, seq]`` of tokens by logits ``[batch, seq, vocabulary]``; NaN for
    `NO_TOKEN`. A token at a time: a copy of all logits may not fit beside them."""
    found = np.full(tokens.shape, np.nan, np.float32)
    for row, place in np.argwhere(tokens != NO_TOKEN):
        own = logits[row, place].astype(np.float32)
        own -= own.max()
        found[row, place] = own[tokens[row, place]] - np.log(np.exp(own).sum())
    return found


__all__ = ["NEXT_LOG_PROB", "trace_texts"]
