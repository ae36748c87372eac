"""Assigns the tensors of a chain to memory slots, and computes their shapes.

`assign_slots` is a pure function of the chain: tensors with the same dtype and axes whose lifetimes
do not overlap share a slot, so a chain of any length needs two hidden states. A slot is as large as
the largest shape so far; smaller batches use its start, so compacting rows never allocates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeexit.bundle.manifest import Chain, Component, Tensor, TokenState
from edgeexit.errors import EngineError


@dataclass(frozen=True)
class Stage:
    """Tensors that one component of a chain and the exits behind it take and make."""

    takes: Sequence[str]
    makes: Sequence[Tensor]


def stages(chain: Chain, components: Mapping[str, Component]) -> list[Stage]:
    """The stages of a chain, in order."""
    order = []
    for name in chain.components:
        takes = [tensor.name for tensor in components[name].inputs]
        makes = list(components[name].outputs)
        for exit_ in chain.exits:
            for call in exit_.path if exit_.behind == name else ():
                own = components[call.component]
                takes += [call.inputs.get(tensor.name, tensor.name) for tensor in own.inputs]
                makes += own.outputs
        order.append(Stage(takes, makes))
    return order


def assign_slots(
    inputs: Sequence[Tensor],
    stages: Sequence[Stage],
    on_host: Set[str] = frozenset(),
    *,
    ahead: bool = False,
) -> dict[str, int]:
    """Gives every tensor of a chain a slot.

    A tensor lives from the stage that makes it to the last stage that takes it. Answers live only
    in their own stage, where they are read at once, or also in the next if that is launched
    `ahead`. Two tensors share a slot if they have the same dtype and axes, all axes are known, both
    or neither are on the host, and they never live in the same stage.
    """
    born = {tensor.name: -1 for tensor in inputs}
    forms = {tensor.name: tensor for tensor in inputs}
    dies = {tensor.name: -1 for tensor in inputs}
    for number, stage in enumerate(stages):
        for tensor in stage.makes:
            born.setdefault(tensor.name, number)
            forms.setdefault(tensor.name, tensor)
            dies[tensor.name] = number + ahead
    for number, stage in enumerate(stages):
        dies |= {name: max(number, dies[name]) for name in stage.takes if name in dies}
    slots: dict[str, int] = {}
    taken: list[tuple[object, int]] = []  # per slot: dtype, axes, ... and the last stage using it
    for name in sorted(born, key=lambda name: born[name]):
        tensor = forms[name]
        # A tensor with an unknown axis does not share: a slot that grows during a run would leave
        # earlier bindings pointing to freed memory.
        own = name if None in tensor.axes else ""
        form = (tensor.dtype, tuple(tensor.axes), name in on_host, own)
        fits = (
            slot for slot, (held, last) in enumerate(taken) if held == form and last < born[name]
        )
        slot = next(fits, len(taken))
        taken[slot : slot + 1] = [(form, dies[name])]
        slots[name] = slot
    return slots


def shape_of(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """Shape of a tensor for these axis sizes; None if the manifest does not give an axis."""
    shape = []
    for axis in tensor.axes:
        if axis is None or (isinstance(axis, str) and axis not in sizes):
            return None
        shape.append(sizes[axis] if isinstance(axis, str) else axis)
    return tuple(shape)


def dtype_of(tensor: Tensor | TokenState) -> np.dtype[Any]:
    """The numpy dtype of a tensor. Raises `EngineError` if numpy does not have it."""
    try:
        return np.dtype(tensor.dtype)
    except TypeError as error:
        raise EngineError(
            f"{tensor.name} is {tensor.dtype}, which this engine's buffers do not support",
            fix="Export the model in float32 or float16.",
        ) from error


__all__ = ["Stage", "assign_slots", "dtype_of", "shape_of", "stages"]
