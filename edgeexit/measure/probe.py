"""Runs inputs through all exits of a chain: outputs and scores per row, or per token of texts.

`check`, `trace` and `quantisation_effect` use it. Arrays are named ``EXIT/NAME``, as in the samples
of a bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Run
from edgeexit.bundle.policy import Policy, Rule
from edgeexit.errors import UsageError
from edgeexit.measure.batches import row_count, take_rows
from edgeexit.runtime import Model


@dataclass(frozen=True)
class Answers:
    """Outputs and scores of all exits of a chain for a batch.

    Attributes:
        arrays: ``EXIT/NAME`` -> outputs and scores ``[batch, ...]``; for texts, ``token`` and
            scores ``[batch, seq]``, and ``logits`` of each row's last token ``[batch,
            vocabulary]``.
        times_ms: Per exit, milliseconds of the components since the exit before.
    """

    arrays: dict[str, NDArray]
    times_ms: list[float]


def ask(
    model: Model,
    inputs: Mapping[str, NDArray],
    *,
    chain: str | None = None,
    step: int | None = None,
    asked: Sequence[int] | None = None,
) -> Answers:
    """Runs every exit of a chain on a batch. Arguments as for `Model.trace`."""
    trace = model.trace(inputs, chain=chain, step=step, asked=asked)
    pairs = zip(trace.exits, trace.outputs, trace.scores, strict=True)
    arrays = {f"{e}/{k}": v for e, outputs, scores in pairs for k, v in (outputs | scores).items()}
    return Answers(arrays, times_to_exits(chain_named(model, chain), trace.times_ms))


def times_to_exits(chain: Chain, times_ms: Sequence[float]) -> list[float]:
    """Adds up the times of a chain's components from exit to exit."""
    ends = [chain.components.index(exit_.behind) + 1 for exit_ in chain.stops]
    starts = [0, *ends]
    return [sum(times_ms[start:end]) for start, end in zip(starts, ends, strict=False)]


def ask_in_batches(
    model: Model,
    inputs: Mapping[str, NDArray],
    size: int,
    *,
    chain: str | None = None,
) -> dict[str, NDArray]:
    """Runs every exit of a chain on the rows, or texts, batch by batch."""
    parts = []
    rows = row_count(model.bundle, inputs)
    for start in range(0, rows, size):
        part = take_rows(model.bundle, inputs, np.arange(start, min(start + size, rows)))
        parts.append(ask(model, part, chain=chain).arrays)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def predictions(arrays: Mapping[str, NDArray], exit_: str) -> NDArray[np.int64]:
    """The class, or token, that an exit predicts: ``[row]``, or ``[text, seq]``."""
    token = arrays.get(f"{exit_}/token")
    return arrays[f"{exit_}/logits"].argmax(-1) if token is None else token


def chain_named(model: Model, name: str | None) -> Chain:
    """A chain of a model; None: the answering chain. Raises `UsageError` for an unknown name."""
    name = model.chain_name if name is None else name
    if name not in model.chains:
        raise UsageError(
            f"there is no chain {name!r}", fix=f"Use one of {', '.join(model.chains)}."
        )
    return model.chains[name]


def chains_before(model: Model) -> dict[str, Chain]:
    """The chains that run before the one that answers, by name."""
    runs = [step.chain for step in model.bundle.manifest.steps if isinstance(step, Run)]
    return {name: model.chains[name] for name in runs if name != model.chain_name}


@contextmanager
def full_depth(model: Model) -> Iterator[None]:
    """Runs every chain to its last exit, as the references did, and restores the policy.

    Without, the earlier chains of a model that writes text stop where the policy says, and what all
    exits of its last chain answer depends on that.
    """
    before = model.policy
    model.policy = Policy(rules={name: Rule() for name in model.chains})
    try:
        yield
    finally:
        model.policy = before
