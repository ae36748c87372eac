"""`DeviceArray`: arrays in GPU memory with numpy's indexing. Assignments are copies on the stream.

Only `DeviceArray.read` waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import DeviceSlot, PinnedSlot


class DeviceArray:
    """Part of a slot of GPU memory.

    Indices are integers, slices and ``...``. ``a[key] = b`` copies an array of the same shape and
    dtype: another `DeviceArray`, or an array on the host. The host array must not change until
    `Device.settle` returns.

    Args:
        slot: The memory.
        view: A numpy array over GPU addresses, used only to compute addresses. Reading an element
            of it crashes the process.
    """

    device = "cuda"

    def __init__(self, slot: DeviceSlot, view: NDArray[Any]) -> None:
        self._slot, self._view = slot, view
        self._pinned: PinnedSlot | None = None

    @classmethod
    def over(
        cls,
        slot: DeviceSlot,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> DeviceArray:
        """An array over the start of a slot."""
        return cls(slot, np.asarray(_Addresses(slot.pointer, dtype, shape, strides)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._view.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements."""
        return self._view.dtype

    @property
    def pointer(self) -> int:
        """Address of the first element."""
        return int(self._view.__array_interface__["data"][0])

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self._slot, self._view[_basic(key)])

    def __setitem__(self, key: Any, value: DeviceArray | NDArray[Any]) -> None:
        target = self._view[_basic(key)]
        source = value._view if isinstance(value, DeviceArray) else value
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"{source.dtype}{list(source.shape)} into {target.dtype}{list(target.shape)}"
            )
        if target.size == 0:
            return
        device = self._slot.owner
        to = int(target.__array_interface__["data"][0])
        if isinstance(value, DeviceArray):
            blocks = plan_copy(target.shape, target.strides, source.strides, target.itemsize)
            for block in blocks:
                device.copy(to, value.pointer, block)
            return
        if not target.flags.c_contiguous:
            raise ValueError("copies from the host need a contiguous target")
        device.to_device(to, device.hold(source).ctypes.data, source.nbytes)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same elements in another shape. Raises `ValueError` if that needs a copy."""
        if not self._view.flags.c_contiguous:
            raise ValueError("an array with gaps cannot be reshaped")
        return DeviceArray(self._slot, self._view.reshape(*shape))

    def read(self, *, beside: bool = False) -> NDArray[Any]:
        """Copies the values to the host and waits for the copy. The next call overwrites them.

        Args:
            beside: The values are known to be complete: do not wait for later work on the stream.
        """
        view, device = self._view, self._slot.owner
        if not view.flags.c_contiguous:
            raise ValueError("copies to the host need a contiguous array")
        if self._pinned is None:
            self._pinned = device.allocate_host(view.nbytes)
        if beside:
            device.read_beside(self._pinned.pointer, self.pointer, view.nbytes)
        else:
            device.to_host(self._pinned.pointer, self.pointer, view.nbytes)
            device.wait()
        return self._pinned.array(view.dtype, view.shape)


class _Addresses:
    """Lets numpy create an array over addresses that are not on the host."""

    def __init__(
        self,
        pointer: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
    ) -> None:
        self.__array_interface__ = {
            "data": (pointer, False),
            "typestr": dtype.str,
            "shape": shape,
            "strides": strides,
            "version": 3,
        }


def _basic(key: Any) -> tuple[Any, ...]:
    """The index with ``...`` added, so that numpy returns a view. For a single element it would
    read GPU memory, which the host cannot access."""
    keys = key if isinstance(key, tuple) else (key,)
    for index in keys:
        if not (index is Ellipsis or isinstance(index, (int, slice, np.integer))):
            raise TypeError(f"{index!r}: device arrays take integers, slices and ... as indices")
    return keys if any(index is Ellipsis for index in keys) else (*keys, Ellipsis)


@dataclass(frozen=True)
class Block:
    """One copy: `depth` layers of `height` lines of `width` bytes.

    Attributes:
        target, source: Start, in bytes from the arrays' first elements.
        target_pitch, source_pitch: Bytes from one line to the next.
        target_lines, source_lines: Lines from one layer to the next.
    """

    target: int
    source: int
    width: int
    height: int = 1
    depth: int = 1
    target_pitch: int = 0
    source_pitch: int = 0
    target_lines: int = 0
    source_lines: int = 0


def plan_copy(
    shape: Sequence[int], target: Sequence[int], source: Sequence[int], item_bytes: int
) -> list[Block]:
    """The smallest number of driver copies that copy one array into another.

    >>> [block] = plan_copy((2, 8, 4), (400, 40, 4), (128, 16, 4), 4)
    >>> block.width, block.height, block.depth, block.target_pitch, block.target_lines
    (16, 8, 2, 40, 10)

    Args:
        shape: Shape of both arrays; no axis is empty.
        target, source: Strides in bytes, not negative.
        item_bytes: Size of an element.
    """
    axes: list[tuple[int, int, int]] = []  # size and the two strides, the innermost axis first
    for size, to, of in zip(reversed(shape), reversed(target), reversed(source), strict=True):
        if size == 1:
            continue
        if axes and (to, of) == (axes[-1][0] * axes[-1][1], axes[-1][0] * axes[-1][2]):
            inner, *strides = axes.pop()
            axes.append((size * inner, strides[0], strides[1]))
        else:
            axes.append((size, to, of))
    width = item_bytes
    if axes and axes[0][1:] == (item_bytes, item_bytes):
        width *= axes.pop(0)[0]
    first = Block(0, 0, width)
    if axes and min(axes[0][1:]) >= width:
        height, to_pitch, of_pitch = axes.pop(0)
        first = Block(0, 0, width, height, 1, to_pitch, of_pitch, height, height)
        if axes and axes[0][1] % to_pitch == 0 and axes[0][2] % of_pitch == 0:
            depth, to, of = axes[0]
            if min(to // to_pitch, of // of_pitch) >= height:
                lines = to // to_pitch, of // of_pitch
                first = Block(0, 0, width, height, depth, to_pitch, of_pitch, *lines)
                axes.pop(0)
    blocks = [first]
    for size, to, of in axes:
        blocks = [
            _moved(block, place * to, place * of) for place in range(size) for block in blocks
        ]
    return blocks


def _moved(block: Block, target: int, source: int) -> Block:
    shape = (block.width, block.height, block.depth, block.target_pitch, block.source_pitch)
    lines = block.target_lines, block.source_lines
    return Block(block.target + target, block.source + source, *shape, *lines)


__all__ = ["Block", "DeviceArray", "plan_copy"]
