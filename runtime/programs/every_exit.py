"""Every exit of a model that writes, asked for every token of given texts (teacher forcing)."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import UsageError
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.forward import Trace


def trace_texts(session: Session, tokens: NDArray[np.int64], step: int | None) -> Trace:
    """Runs every component over texts ``[batch, seq]`` that begin anew, so many tokens at a time
    (None: as many as it can), and asks every exit about every token.

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
        number: {name: [] for name in ("token", *exit_.scores)} for number, exit_ in exits
    }
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
                for name, kept in found[number].items():
                    kept.append(np.array(answers[name]).reshape(rows, -1))
                logits[number] = np.array(answers["logits"]).reshape(rows, -1, _width(answers))[
                    :, -1
                ]
            times_ns[number] += time.perf_counter_ns() - started
    made = {n: {k: np.concatenate(v, axis=1) for k, v in own.items()} for n, own in found.items()}
    return Trace(
        [exit_.name for _, exit_ in exits],
        [{"token": made[n]["token"], "logits": logits[n]} for n, _ in exits],
        [{name: made[n][name] for name in exit_.scores} for n, exit_ in exits],
        [time_ns / 1e6 for time_ns in times_ns],
    )


def _ask(session: Session, number: int, head: Head | None, block: Block) -> Answers:
    if head is None:
        return session.parts[number].answers
    states = session.adapt(number, block)
    return head(states.reshape(-1, states.shape[-1]))


def _width(answers: Answers) -> int:
    return int(answers["logits"].shape[-1])


__all__ = ["trace_texts"]
