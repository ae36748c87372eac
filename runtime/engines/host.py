"""Memory on the host, for tensors that engines on the CPU compute with and that callers read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.engines.base import Array, Bound

ALIGNMENT = 64
"""Bytes; of what the host allocates."""


def fetch(array: Array, *, beside: bool = False) -> NDArray[Any]:
    """An array's values on the host. Those that a device has are copied and waited for; fetching
    the same array again overwrites them.

    Args:
        beside: They are there already: what the device was given since is not waited for.
    """
    return array if isinstance(array, np.ndarray) else array.read(beside=beside)  # type: ignore[attr-defined, no-any-return]


@dataclass(slots=True)
class Window:
    """A stretch of a slot, for binding one row of what the slot holds."""

    device: str
    pointer: int


def row_of(bound: Bound, row: int) -> Bound:
    """One row (of the first axis) of a bound tensor, as a tensor of one row; no copy."""
    place, dtype, shape = bound
    size = int(np.prod(shape[1:])) * dtype.itemsize
    return Window(place.device, place.pointer + row * size), dtype, (1, *shape[1:])


class HostSlot:
    """Memory on the host that tensors take turns in."""

    device = "cpu"

    def __init__(self, size_bytes: int) -> None:
        raw = np.zeros(size_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self._bytes: NDArray[np.uint8] = raw[start : start + size_bytes]
        self.pointer: int = self._bytes.ctypes.data

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self._bytes.nbytes

    def array(
        self,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> NDArray[Any]:
        """The beginning of the slot as an array of that form; no copy."""
        if strides is not None:
            return np.ndarray(shape, dtype, self._bytes, strides=strides)
        size = int(np.prod(shape)) * dtype.itemsize
        return self._bytes[:size].view(dtype).reshape(shape)

    def keep_rows(
        self, dtype: np.dtype, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
    ) -> None:
        """Moves the given rows (ascending) to the front; the slot then holds only those."""
        kept = np.take(self.array(dtype, shape), rows, axis=axis)
        self.array(dtype, kept.shape)[...] = kept
