"""Where tensors live while a chain runs: a plan of shared slots.

`assign_slots` is a pure function of the chain: tensors of the same form whose lives do not overlap
share a slot, so a chain of any length needs two states. Slots are as large as the largest shape
seen; a smaller batch uses their beginning, so compacting rows never allocates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from edgeexit.bundle.manifest import Cache, Segment, Tensor
from edgeexit.errors import EngineError


def assign_slots(
    inputs: Sequence[Tensor],
    segments: Sequence[Segment],
    on_host: Set[str] = frozenset(),
    *,
    ahead: bool = False,
) -> dict[str, int]:
    """Gives every tensor of a chain a slot.

    A tensor lives from the segment that makes it to the last one that takes it (an answer only in
    its own segment, where it is read at once, or also in the next one if that is launched `ahead`).
    Two tensors share a slot only if they have the same dtype and axes, none of them open, are both
    on the host or both not, and never live in the same segment.
    """
    born = {tensor.name: -1 for tensor in inputs}
    forms = {tensor.name: tensor for tensor in inputs}
    for number, segment in enumerate(segments):
        born |= {tensor.name: number for tensor in segment.outputs}
        forms |= {tensor.name: tensor for tensor in segment.outputs}
    dies = {name: number + (ahead and number >= 0) for name, number in born.items()}
    for number, segment in enumerate(segments):
        dies |= {t.name: max(number, dies[t.name]) for t in segment.inputs}
    slots: dict[str, int] = {}
    taken: list[tuple[object, int]] = []  # per slot, its form and the last segment it is needed in
    for name in sorted(born, key=lambda name: born[name]):
        tensor = forms[name]
        # A tensor with an open axis shares with none: the other may be larger, and a slot that
        # grows in the middle of a run leaves what was bound before pointing at freed memory.
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
    """Shape of a tensor for given axis sizes; None when the manifest leaves an axis open."""
    shape = []
    for axis in tensor.axes:
        if axis is None or (isinstance(axis, str) and axis not in sizes):
            return None
        shape.append(sizes[axis] if isinstance(axis, str) else axis)
    return tuple(shape)


def dtype_of(tensor: Tensor | Cache) -> np.dtype[Any]:
    """What numpy calls a tensor's dtype; raises `EngineError` for one that it does not have."""
    try:
        return np.dtype(tensor.dtype)
    except TypeError as error:
        raise EngineError(
            f"{tensor.name} is {tensor.dtype}, which buffers of this engine cannot hold",
            fix="Export the model in float32 or float16.",
        ) from error
