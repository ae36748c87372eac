"""What test_device.py runs in processes of its own, where the driver is that of driver.c.

LD_LIBRARY_PATH=folder-of-libcuda python on_host_driver.py NAME
"""

from __future__ import annotations

import gc
import sys
import threading

import numpy as np

from edgeexit.errors import EngineError
from edgeexit.runtime.engines.cuda.device import Device, DeviceSlot, require_room
from edgeexit.runtime.engines.cuda.driver import describe_device
from edgeexit.runtime.engines.cuda.replay import Replays
from edgeexit.runtime.engines.cuda.staging import Staging
from edgeexit.runtime.engines.tensorrt.engine import Scratch

FLOAT = np.dtype(np.float32)


def _fill(device: Device, slot: DeviceSlot, values: np.ndarray) -> None:
    pinned = device.allocate_host(values.nbytes)
    pinned.array(values.dtype, values.shape)[...] = values
    device.to_device(slot.pointer, pinned.pointer, values.nbytes)


def _read(device: Device, slot: DeviceSlot, shape: tuple[int, ...]) -> np.ndarray:
    pinned = device.allocate_host(int(np.prod(shape)) * 4)
    device.to_host(pinned.pointer, slot.pointer, int(np.prod(shape)) * 4)
    device.wait()
    return pinned.array(FLOAT, shape).copy()


def the_device_is_described() -> None:
    found = describe_device()
    assert found["gpu"] == "Host pretending to be a GPU" and found["compute_capability"] == 86
    assert found["multiprocessors"] == 4 and found["cuda"] == 13000


def rows_move_to_the_front_and_nothing_is_allocated_twice() -> None:
    device = Device()
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 8, 5)).astype(np.float32)
    slot = device.allocate(values.nbytes)
    for turn in range(20):
        axis = turn % 3
        rows = np.flatnonzero(random.random(values.shape[axis]) < 0.5)
        _fill(device, slot, values)
        slot.keep_rows(FLOAT, values.shape, axis, rows)
        kept = np.take(values, rows, axis=axis)
        np.testing.assert_array_equal(_read(device, slot, kept.shape), kept)
        assert device.counts.allocations == 1


def host_arrays_that_are_dropped_are_copied_as_they_were() -> None:
    device = Device()
    values = np.arange(4096, dtype=np.float32)
    slot = device.allocate(values.nbytes)
    slot.array(FLOAT, (64, 64))[...] = values.reshape(64, 64).T + 0  # strided, and then gone
    for _ in range(8):
        np.full(values.shape, np.nan, np.float32)
    found = _read(device, slot, (64, 64))
    np.testing.assert_array_equal(found, values.reshape(64, 64).T)


def pinned_memory_stays_while_an_array_is_over_it() -> None:
    device = Device()
    arrays = [device.allocate_host(4 * 1024).array(FLOAT, (1024,)) for _ in range(16)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays))


def memory_comes_back_when_nobody_holds_it() -> None:
    device = Device()
    before = device.free_bytes()
    slots = [device.allocate(1 << 20) for _ in range(4)]
    assert device.free_bytes() == before - (4 << 20)
    slots.clear()
    gc.collect()
    assert device.free_bytes() == before


def every_thread_may_use_a_device_and_drop_its_memory() -> None:
    device = Device()
    before = device.free_bytes()
    slots = [device.allocate(64)]
    found = []

    def elsewhere() -> None:
        device.settle()
        slots.append(device.allocate(64))
        _fill(device, slots[0], np.arange(16, dtype=np.float32))
        found.append(_read(device, slots[0], (16,)))
        slots.clear()

    for _ in range(3):  # threads that come one behind the other may have one name
        slots[:] = [device.allocate(64)]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(found) == 3
    for values in found:
        np.testing.assert_array_equal(values, np.arange(16))
    gc.collect()
    assert device.free_bytes() == before
    device.settle()
    device.allocate(4)


def too_much_is_a_memory_error_that_says_what_is_free() -> None:
    device = Device()
    try:
        device.allocate(1 << 40)
    except MemoryError as error:
        assert "are free" in str(error)
    else:
        raise AssertionError("a TiB was there")
    try:
        require_room(device, 1 << 30, "the engine of s0")
    except EngineError as error:
        assert "the engine of s0 needs 1024 MiB on the GPU, 64 MiB are free" in str(error)
        assert "--memory-limit" in str(error)
    else:
        raise AssertionError("a GiB was there")


def bytes_between_host_and_device_are_counted() -> None:
    device = Device(waiting="block")
    slot = device.allocate(64)
    _fill(device, slot, np.arange(16, dtype=np.float32))
    assert device.counts.to_device_bytes == 64 and device.counts.to_host_bytes == 0
    score = device.allocate_host(4)
    device.to_host(score.pointer, slot.pointer + 4, 4)
    device.wait()
    assert score.array(FLOAT, (1,))[0] == 1 and device.counts.to_host_bytes == 4


def scratch_is_as_large_as_the_largest_needs() -> None:
    class Context:
        def set_device_memory(self, pointer: int, size: int) -> None:
            self.memory = pointer, size

    device = Device()
    scratch, contexts = Scratch(device), [Context() for _ in range(4)]
    for context, size in zip(contexts, (100, 4000, 300, 4000), strict=True):
        scratch.lend(context, size)
    gc.collect()
    assert len({context.memory for context in contexts}) == 1
    assert contexts[0].memory[1] == 4000
    assert device.free_bytes() == (64 << 20) - 4000


def a_run_keeps_the_memory_it_copies_through() -> None:
    """A larger shape of the same tensor takes other memory; what was bound before goes on."""
    device = Device()
    staging = Staging(device)
    host = device.allocate_host(4096)
    target = device.allocate(4096)
    runs = []
    for size in (4, 400):
        layout = staging.lay_out({"x": (host, FLOAT, (size,))}, {})
        source = layout.addresses["x"]

        def execute(source: int = source, size: int = size) -> None:
            device.within(target.pointer, source, 4 * size)

        runs.append(staging.around(layout, execute, Replays(device).of))
        del layout
    gc.collect()
    for turn in range(4):
        for run, size in zip(runs, (4, 400), strict=True):
            device.settle()
            host.array(FLOAT, (size,))[...] = turn
            run()
            device.wait()
            assert (_read(device, target, (size,)) == turn).all()


def a_run_that_comes_again_is_recorded_and_reads_what_is_there_then() -> None:
    device = Device()
    replays, called = Replays(device), []
    source, target = device.allocate_host(16), device.allocate_host(16)
    inside = device.allocate(16)

    def body() -> None:
        called.append(None)
        device.to_device(inside.pointer, source.pointer, 16)
        device.to_host(target.pointer, inside.pointer, 16)

    run = replays.of(body)
    for turn in range(5):
        values = np.arange(turn, turn + 4, dtype=np.float32)
        source.array(FLOAT, (4,))[...] = values
        run()
        device.wait()
        np.testing.assert_array_equal(target.array(FLOAT, (4,)), values)
        assert device.counts.to_host_bytes == 16 * (turn + 1)
    assert len(called) == 3  # twice as it is, once recorded
    replays.forget()
    run()
    assert len(called) == 4
    small = Replays(device, most_bytes=0).of(body)
    for _ in range(3):
        small()
    assert len(called) == 7


def a_run_that_cannot_be_recorded_goes_on_as_before() -> None:
    device = Device()
    inside, pinned = device.allocate(4), device.allocate_host(4)
    tried = []

    def body() -> None:
        device.to_device(inside.pointer, pinned.pointer, 4)
        if tried:
            tried.append(None)
        if len(tried) == 3:
            raise EngineError("this engine computes outside of the stream", fix="none")

    run = Replays(device).of(body, prepare=lambda: tried.append(None))
    for turn in range(4):
        run()
        assert device.counts.to_device_bytes == 4 * (turn + 1)
    assert len(tried) == 5  # behind the second run it was tried once, and never again


if __name__ == "__main__":
    globals()[sys.argv[1]]()
