"""Runs recorded as CUDA graphs: one call launches everything that the run puts on the stream,
including copies.

This is faster where a run consists of many small kernels, as for one token of a language model.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

from edgeexit.errors import EdgeExitError
from edgeexit.runtime.engines.cuda.device import Device
from edgeexit.runtime.engines.cuda.driver import ask

logger = logging.getLogger(__name__)

MOST_BYTES = 256 << 20
"""Limit of the device memory of all recordings together, in bytes."""


class Replays:
    """The recordings of one stream.

    A run is recorded after its second execution, because many sizes occur only once. Runs that the
    engine cannot record, or that exceed the limit, are executed without a recording.

    Args:
        device: The device of the stream.
        most_bytes: Limit of the device memory of all recordings together; 0: record nothing.
    """

    def __init__(self, device: Device, most_bytes: int = MOST_BYTES) -> None:
        self._device, self._most = device, most_bytes
        self.taken_bytes = 0
        self._epoch = 0

    def forget(self) -> None:
        """Discards all recordings. Call it when memory that they use was replaced."""
        self._epoch += 1

    def of(
        self, body: Callable[[], object], prepare: Callable[[], object] = lambda: None
    ) -> Callable[[], None]:
        """A call that executes `body` or, once it is recorded, launches the recording.

        Args:
            body: The run; it only puts work on the stream.
            prepare: Called before the last run without a recording. That run does one-time work,
                which must not be recorded.
        """
        recording: _Recording | None = None
        runs, epoch = 0, self._epoch

        def run() -> None:
            nonlocal recording, runs, epoch
            if epoch != self._epoch:
                recording, runs, epoch = None, 0, self._epoch
            if recording is not None:
                recording.launch()
                return
            runs += 1
            if runs != 2 or self.taken_bytes >= self._most:
                body()
                return
            free = self._device.free_bytes()
            prepare()
            body()
            recording = self._record(body)
            if recording is not None:
                taken = max(0, free - self._device.free_bytes())
                self.taken_bytes += taken
                weakref.finalize(recording, self._give_back, taken)

        return run

    def _give_back(self, taken: int) -> None:
        self.taken_bytes -= taken

    def _record(self, body: Callable[[], object]) -> _Recording | None:
        device, driver = self._device, self._device.driver
        before = dataclasses.replace(device.counts)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        failure = None
        collecting = gc.isenabled()
        gc.disable()  # freeing memory would abort the recording
        try:
            ask(driver.cuStreamBeginCapture(device.raw_stream, mode))
            try:
                body()
            except EdgeExitError as error:
                failure = error
            finally:
                status, graph = driver.cuStreamEndCapture(device.raw_stream)
        finally:
            if collecting:
                gc.enable()
        counted = {}
        for field in dataclasses.fields(before):
            was = getattr(before, field.name)
            counted[field.name] = getattr(device.counts, field.name) - was
            setattr(device.counts, field.name, was)
        executable = None
        if int(status) == 0:
            if failure is None:
                status, executable = driver.cuGraphInstantiate(graph, 0)
            ask(driver.cuGraphDestroy(graph))
        if failure is not None or int(status) != 0:
            logger.info("a run cannot be recorded as a CUDA graph: %s", failure or status.name)
            return None
        return _Recording(device, executable, counted)


class _Recording:
    """A recorded run, and its contribution to the device's counts."""

    def __init__(self, device: Device, executable: Any, counted: dict[str, int]) -> None:
        self._device, self._executable, self._counted = device, executable, counted
        device.release_with(self, "cuGraphExecDestroy", executable)

    def launch(self) -> None:
        """Puts the recorded run on the stream."""
        device = self._device
        ask(device.driver.cuGraphLaunch(self._executable, device.raw_stream))
        counts = device.counts
        for name, number in self._counted.items():
            if number:
                setattr(counts, name, getattr(counts, name) + number)
        device.busy = True


__all__ = ["MOST_BYTES", "Replays"]
