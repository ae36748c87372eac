"""`Device`: one GPU with its memory, one stream, and marks on the stream.

A thin layer over cuda-bindings. It counts allocations and copied bytes, so that tests and `bench`
can show that a warm chain allocates nothing, and that each exit copies four bytes per row to the
host.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import EngineError
from edgeexit.runtime.engines.cuda.arrays import Block, DeviceArray
from edgeexit.runtime.engines.cuda.driver import ask, import_driver
from edgeexit.runtime.engines.host import HostSlot
from edgeexit.runtime.memory import available_bytes

Waiting = Literal["spin", "block"]


@dataclass
class Counts:
    """Device allocations and their bytes, pinned host allocations, and copied bytes so far."""

    allocations: int = 0
    allocated_bytes: int = 0
    pinned: int = 0
    to_host_bytes: int = 0
    to_device_bytes: int = 0
    within_bytes: int = 0


class DeviceMemoryError(EngineError, MemoryError):
    """Not enough memory on the GPU, or not enough pinned memory."""


class Device:
    """One GPU: its primary context, which TensorRT uses too, and one stream.

    Args:
        number: Index of the GPU.
        waiting: How the host waits for the stream: ``spin`` returns sooner, ``block`` frees the
            core for other threads.

    Attributes:
        stream: The stream's handle, as a number; `raw_stream` is the driver's object.
        busy: Copies between host and device were put on the stream since the last wait.
        shares_memory: The GPU uses the host's memory (a Jetson): pinned memory is not copied.
    """

    def __init__(self, number: int = 0, waiting: Waiting = "spin") -> None:
        self.driver = driver = import_driver()
        self.waiting = waiting
        self.counts = Counts()
        self.busy = False
        device = ask(driver.cuDeviceGet(number))
        integrated = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        self.shares_memory = bool(ask(driver.cuDeviceGetAttribute(integrated, device)))
        self._handles = _Handles(driver, device)
        self._context, self.raw_stream = self._handles.context, self._handles.stream
        self.stream = int(self.raw_stream)
        self._end = self.mark()
        self._held: list[NDArray[Any]] = []
        self._beside: Any = None

    def release_with(self, owner: object, how: str, what: Any) -> None:
        """Frees a resource with a driver call when its owner is garbage-collected."""
        weakref.finalize(owner, _release, self._handles, how, what)

    def _event(self, *, timed: bool) -> Any:
        kind = self.driver.CUevent_flags
        flags = kind.CU_EVENT_DEFAULT if timed else kind.CU_EVENT_DISABLE_TIMING
        if self.waiting == "block":
            flags |= kind.CU_EVENT_BLOCKING_SYNC
        return ask(self.driver.cuEventCreate(flags))

    def mark(self, *, timed: bool = False) -> Mark:
        """A mark for the stream. If `timed`, it records the time at which the stream reaches
        it."""
        event = self._event(timed=timed)
        mark = Mark(self, event)
        self.release_with(mark, "cuEventDestroy", event)
        return mark

    def enter(self) -> None:
        """Makes the device's context current in the calling thread: driver calls go to the
        current context, which other code may have changed."""
        ask(self.driver.cuCtxSetCurrent(self._context))

    def free_bytes(self) -> int:
        """Free device memory. On devices that share the host's memory, this includes memory that
        the system can reclaim, which the driver does not count."""
        if self.shares_memory:
            return available_bytes()
        self.enter()
        return int(ask(self.driver.cuMemGetInfo())[0])

    def allocate(self, size_bytes: int) -> DeviceSlot:
        """Device memory, set to zero: computations read padding that was never written, so it must
        be finite.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """
        self.enter()
        status, pointer = self.driver.cuMemAlloc(max(size_bytes, 1))
        if int(status) == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise DeviceMemoryError(
                f"not enough memory on the GPU: {size_bytes} bytes requested, {self.free_bytes()} "
                "are free",
                fix="Close other programs, or use fewer rows at a time or a smaller capacity.",
            )
        ask((status,))
        self.counts.allocations += 1
        self.counts.allocated_bytes += size_bytes
        ask(self.driver.cuMemsetD8Async(pointer, 0, max(size_bytes, 1), self.raw_stream))
        slot = DeviceSlot(self, int(pointer), size_bytes)
        self.release_with(slot, "cuMemFree", pointer)
        return slot

    def allocate_host(self, size_bytes: int) -> PinnedSlot:
        """Pinned host memory, which the GPU reads and writes directly. It is freed when no array
        uses it."""
        self.enter()
        status, pointer = self.driver.cuMemHostAlloc(
            max(size_bytes, 1), self.driver.CU_MEMHOSTALLOC_DEVICEMAP
        )
        if int(status) == 2:
            raise DeviceMemoryError(
                f"not enough pinned memory: {size_bytes} bytes requested",
                fix="Close other programs, or use fewer rows at a time.",
            )
        ask((status,))
        self.counts.pinned += 1
        mapped = int(ask(self.driver.cuMemHostGetDevicePointer(pointer, 0)))
        address = int(pointer)
        memory = (ctypes.c_uint8 * max(size_bytes, 1)).from_address(address)
        view = np.ctypeslib.as_array(memory)
        self.release_with(memory, "cuMemFreeHost", pointer)
        return PinnedSlot(self, view[:size_bytes], address, mapped)

    def hold(self, source: NDArray[Any]) -> NDArray[Any]:
        """A contiguous host array for a copy to the device. It stays allocated until the next wait
        for the stream, because the copy may be executed later."""
        source = np.ascontiguousarray(source)
        self._held.append(source)
        return source

    def to_device(self, target: int, source: int, size_bytes: int) -> None:
        """Puts a copy from the host on the stream."""
        self.enter()
        ask(self.driver.cuMemcpyHtoDAsync(target, source, size_bytes, self.raw_stream))
        self.counts.to_device_bytes += size_bytes
        self.busy = True

    def to_host(self, target: int, source: int, size_bytes: int) -> None:
        """Puts a copy to the host on the stream."""
        self.enter()
        ask(self.driver.cuMemcpyDtoHAsync(target, source, size_bytes, self.raw_stream))
        self.counts.to_host_bytes += size_bytes
        self.busy = True

    def within(self, target: int, source: int, size_bytes: int) -> None:
        """Puts a copy within the device on the stream. The regions must not overlap."""
        self.enter()
        ask(self.driver.cuMemcpyDtoDAsync(target, source, size_bytes, self.raw_stream))
        self.counts.within_bytes += size_bytes

    def copy(self, target: int, source: int, block: Block) -> None:
        """Puts a copy of a block within the device on the stream."""
        if block.height == 1:
            self.within(target + block.target, source + block.source, block.width)
            return
        self.enter()
        device = self.driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        what = self.driver.CUDA_MEMCPY3D()
        what.srcMemoryType = what.dstMemoryType = device
        what.srcDevice, what.dstDevice = source + block.source, target + block.target
        what.srcPitch, what.dstPitch = block.source_pitch, block.target_pitch
        what.srcHeight, what.dstHeight = block.source_lines, block.target_lines
        what.WidthInBytes, what.Height, what.Depth = block.width, block.height, block.depth
        ask(self.driver.cuMemcpy3DAsync(what, self.raw_stream))
        self.counts.within_bytes += block.width * block.height * block.depth

    def settle(self) -> None:
        """Waits if the stream may still read host memory. Call it before writing to that
        memory."""
        if self.busy:
            self.wait()

    def wait(self) -> None:
        """Waits until all work on the stream is done."""
        self.busy = False
        self._end.set()
        self._end.wait()
        self._held.clear()

    def read_beside(self, target: int, source: int, size_bytes: int) -> None:
        """Copies values that are already complete to the host, without waiting for later work on
        the stream."""
        self.enter()
        if self._beside is None:
            flags = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._beside = ask(self.driver.cuStreamCreate(flags))
            self.release_with(self, "cuStreamDestroy", self._beside)
        ask(self.driver.cuMemcpyDtoHAsync(target, source, size_bytes, self._beside))
        self.counts.to_host_bytes += size_bytes
        ask(self.driver.cuStreamSynchronize(self._beside))


class Mark:
    """A point on a device's stream: after all work that was on it when `set` was called. Created by
    `Device.mark`."""

    def __init__(self, device: Device, event: Any) -> None:
        self._driver, self._context = device.driver, device._context
        self._raw_stream, self._event = device.raw_stream, event
        self._spins = device.waiting == "spin"

    def set(self) -> None:
        """Puts the mark at the current end of the stream."""
        ask(self._driver.cuCtxSetCurrent(self._context))
        ask(self._driver.cuEventRecord(self._event, self._raw_stream))

    def wait(self) -> None:
        """Waits until the stream has reached the mark."""
        if not self._spins:
            ask(self._driver.cuEventSynchronize(self._event))
            return
        not_ready = self._driver.CUresult.CUDA_ERROR_NOT_READY
        query = self._driver.cuEventQuery
        while True:
            (status,) = query(self._event)
            if status != not_ready:
                ask((status,))
                return

    def ms_since(self, other: Mark) -> float:
        """Milliseconds from another mark to this one. Both must be timed and reached."""
        return float(ask(self._driver.cuEventElapsedTime(other._event, self._event)))


class _Handles:
    """Context and stream of a device. Every resource holds a reference to them until it is freed,
    so they are always released last."""

    def __init__(self, driver: Any, device: Any) -> None:
        self.driver = driver
        self.context = ask(driver.cuDevicePrimaryCtxRetain(device))
        ask(driver.cuCtxSetCurrent(self.context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = ask(driver.cuStreamCreate(flags))
        weakref.finalize(self, _let_go, driver, device, self.stream)


def _let_go(driver: Any, device: Any, stream: Any) -> None:
    driver.cuStreamDestroy(stream)
    driver.cuDevicePrimaryCtxRelease(device)


def _release(handles: _Handles, how: str, what: Any) -> None:
    """Frees a resource after the stream has finished with it. Can be called from any thread."""
    driver = handles.driver
    (status,) = driver.cuCtxPushCurrent(handles.context)
    if int(status) != 0:  # the driver is shutting down and frees everything
        return
    driver.cuStreamSynchronize(handles.stream)
    getattr(driver, how)(what)
    driver.cuCtxPopCurrent()


class PinnedSlot(HostSlot):
    """Pinned host memory. `mapped` is its address on the GPU."""

    def __init__(self, owner: Device, view: NDArray[np.uint8], pointer: int, mapped: int) -> None:
        self.owner = owner
        self._bytes = view
        self.pointer = pointer
        self.mapped = mapped


class DeviceSlot:
    """GPU memory that several tensors use in turn."""

    device = "cuda"

    def __init__(self, owner: Device, pointer: int, size_bytes: int) -> None:
        self.owner = owner
        self.pointer = pointer
        self.bytes = size_bytes

    def array(
        self,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> DeviceArray:
        """An array over the start of the slot, without a copy."""
        return DeviceArray.over(self, dtype, shape, strides)

    def keep_rows(
        self, dtype: np.dtype, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
    ) -> None:
        """Moves the given rows (ascending) along an axis to the front."""
        for source, target, size in row_moves(dtype.itemsize, shape, axis, rows):
            self.owner.within(self.pointer + target, self.pointer + source, size)


def row_moves(
    item_bytes: int, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
) -> list[tuple[int, int, int]]:
    """The copies that keep only some rows (ascending) of a tensor.

    >>> row_moves(4, (4, 2), 0, np.array([0, 2, 3]))
    [(16, 8, 8), (24, 16, 8)]

    Returns:
        ``(from, to, bytes)``, for copies in this order, in place: bytes that a copy overwrites
        were moved before or belong to dropped rows, and no copy overlaps itself.
    """
    inner = item_bytes * int(np.prod(shape[axis + 1 :], dtype=np.int64))
    outer = int(np.prod(shape[:axis], dtype=np.int64))
    moves: list[tuple[int, int, int]] = []
    target = 0
    for block in range(outer):
        start = block * shape[axis] * inner
        for row in rows.tolist():
            source = start + row * inner
            if source != target:
                first, to, size = moves[-1] if moves else (0, 0, 0)
                joins = first + size == source and to + size == target
                if joins and size + inner <= first - to:
                    moves[-1] = (first, to, size + inner)
                else:
                    moves.append((source, target, inner))
            target += inner
    return moves


def require_room(device: Device, size_bytes: int, what: str) -> None:
    """Raises `EngineError` if the device has less free memory."""
    free = device.free_bytes()
    if size_bytes > free:
        raise EngineError(
            f"{what} needs {size_bytes / (1 << 20):.0f} MiB on the GPU, {free / (1 << 20):.0f} MiB "
            "are free",
            fix="Close other programs, or build with smaller --max-shapes or a --memory-limit.",
        )


__all__ = [
    "Counts",
    "Device",
    "DeviceSlot",
    "Mark",
    "PinnedSlot",
    "Waiting",
    "require_room",
    "row_moves",
]
