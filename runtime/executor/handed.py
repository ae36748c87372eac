"""`Handed`: tensors that earlier steps pass to the chain that writes text, the same for all
tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.engines.base import Array, Bound, Engine, Slot


@dataclass
class Handed:
    """Tensors that earlier steps pass to the chain that writes text.

    Attributes:
        bound: Tensor -> its memory, dtype and shape.
        slots: Tensor -> its memory, which may be larger.
        epoch: Number of changes of memory or shapes; bindings of earlier epochs are invalid.
    """

    bound: dict[str, Bound] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    epoch: int = 0

    def put(self, name: str, value: NDArray, engine: Engine) -> None:
        """Copies an array into the tensor of that name."""
        place = self.room(name, value.dtype, value.shape, engine)
        place[...] = value

    def room(self, name: str, dtype: np.dtype, shape: tuple[int, ...], engine: Engine) -> Array:
        """Memory for a tensor of that dtype and shape. Starts a new epoch if the memory or the
        shape changes."""
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        slot = self.slots.get(name)
        if slot is None or slot.bytes < size_bytes:
            slot = self.slots[name] = engine.allocate(size_bytes)
            self.epoch += 1
        if name not in self.bound or self.bound[name][2] != shape:
            self.epoch += 1
        self.bound[name] = (slot, dtype, shape)
        array: Array = slot.array(dtype, shape)
        return array


__all__ = ["Handed"]
