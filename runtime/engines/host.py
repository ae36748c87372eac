"""Host memory, for engines on the CPU and for tensors that callers read and write."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.engines.base import Array, Bound

ALIGNMENT = 64
"""Alignment of host allocations, in bytes."""


def fetch(array: Array, *, beside: bool = False) -> NDArray[Any]:
    """An array's values on the host. Values on a device are copied; the call waits for the copy.
    The next call for the same array overwrites them.

    Args:
        beside: The values are known to be complete: do not wait for later work on the device.
    """
    return array if isinstance(array, np.ndarray) else array.read(beside=beside)  # type: ignore[attr-defined, no-any-return]


@dataclass(slots=True)
class Window:
    """Part of a slot, starting at an address."""

    device: str
    pointer: int


def rows_of(bound: Bound, start: int, stop: int) -> Bound:
    """Rows (of the first axis) of a bound tensor, without a copy."""
    place, dtype, shape = bound
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    window = Window(place.device, place.pointer + start * row_bytes)
    return window, dtype, (stop - start, *shape[1:])


class HostSlot:
    """Host memory that several tensors use in turn.

    Args:
        size_bytes: Its size.
        sparse: Part of it may never be used. Pages are small and get memory when first written.
            numpy requests huge pages: a token's keys and values would then take one per head.

    Raises:
        MemoryError, ValueError, OverflowError: There is not enough memory.
    """

    device = "cpu"

    def __init__(self, size_bytes: int, *, sparse: bool = False) -> None:
        if sparse and size_bytes:
            raw = _small_pages(size_bytes + ALIGNMENT)
        else:
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
        """An array over the start of the slot, without a copy."""
        if strides is not None:
            return np.ndarray(shape, dtype, self._bytes, strides=strides)
        size = int(np.prod(shape)) * dtype.itemsize
        return self._bytes[:size].view(dtype).reshape(shape)

    def keep_rows(
        self, dtype: np.dtype, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
    ) -> None:
        """Moves the given rows (ascending) along an axis to the front; the others are lost."""
        kept = np.take(self.array(dtype, shape), rows, axis=axis)
        self.array(dtype, kept.shape)[...] = kept


def _small_pages(size_bytes: int) -> NDArray[np.uint8]:
    """Zeros in memory that the kernel allocates page by page, without huge pages."""
    try:
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    with contextlib.suppress(OSError):  # kernels without huge pages do not support this advice
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)
