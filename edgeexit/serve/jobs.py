"""`Jobs`: one request at a time on the model's only thread; others wait in a bounded queue.

All bookkeeping happens on the event loop, so nothing here needs a lock. A job's thread tells the
loop what it computed by `Job.emit`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from edgeexit.serve.refusals import Refusal, busy, stopping, too_late

LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Done:
    """The last event of a job that went well, with what its work returned."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """The last event of any other job."""

    error: BaseException


class Job:
    """A request for the model. Create it on the event loop.

    Args:
        work: What to compute, on the model's thread; it asks `ended_by` now and then.
        seconds: Time until the job's deadline.

    Attributes:
        events: What `work` emits, in order; the last one is `Done` or `Failed`.
    """

    def __init__(self, work: Callable[[Job], object], seconds: float) -> None:
        self.work = work
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.arrived = self._loop.time()
        self.deadline = self.arrived + seconds
        self.started: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._reason: str | None = None

    def end(self, reason: str) -> None:
        """Asks the work to end. The first reason counts."""
        self._reason = self._reason or reason

    def ended_by(self) -> str | None:
        """Why the work should end now; None: it need not."""
        if self._reason is None and self._loop.time() >= self.deadline:
            self._reason = "deadline"
        return self._reason

    def emit(self, event: object) -> None:
        """Adds an event, from any thread."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Jobs:
    """Runs jobs in the order of their arrival.

    Args:
        most_waiting: Jobs beyond this number are refused.
        on_begin: Called with the seconds that a job waited.

    Attributes:
        running: The job that the model works on.
    """

    def __init__(self, most_waiting: int, on_begin: Callable[[float], object]) -> None:
        self._most, self._on_begin = most_waiting, on_begin
        self._waiting: deque[Job] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._mean_s = 1.0
        self.running: Job | None = None
        self.is_stopping = False

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    def start(self, job: Job) -> None:
        """Runs a job, now or in its turn.

        Raises:
            Refusal: The queue is full, or the server is shutting down.
        """
        if self.is_stopping:
            raise stopping()
        if self.running is None:
            self._begin(job)
            return
        if len(self._waiting) >= self._most:
            raise busy(self._retry_s())
        self._waiting.append(job)
        loop = asyncio.get_running_loop()
        job.timer = loop.call_at(job.deadline, self._drop, job, too_late())

    def leave(self, job: Job) -> None:
        """Ends a job whose client is gone. Does nothing if it has ended."""
        if job in self._waiting:
            self._drop(job, Refusal(499, "The client is gone."))
        else:
            job.end("gone")

    def stop(self) -> None:
        """Refuses what waits and what comes; what runs goes on."""
        self.is_stopping = True
        for job in list(self._waiting):
            self._drop(job, stopping())

    def end(self) -> None:
        """Ends what runs, too: a text at its next token."""
        self.stop()
        if self.running is not None:
            self.running.end("shutdown")

    def close(self) -> None:
        """Waits until the thread has ended."""
        self._thread.shutdown(wait=True)

    def _retry_s(self) -> int:
        """Seconds until there is probably room: the mean job's time for each that is before."""
        return max(1, min(LONGEST_RETRY_S, math.ceil(self._mean_s * (len(self._waiting) + 1))))

    def _drop(self, job: Job, why: Refusal) -> None:
        self._waiting.remove(job)
        if job.timer is not None:
            job.timer.cancel()
        job.events.put_nowait(Failed(why))

    def _begin(self, job: Job) -> None:
        if job.timer is not None:
            job.timer.cancel()
        self.running = job
        job.started = asyncio.get_running_loop().time()
        self._on_begin(job.started - job.arrived)
        self._thread.submit(self._run, job, asyncio.get_running_loop())

    def _run(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """On the model's thread."""
        try:
            event: Done | Failed = Done(job.work(job))
        except Exception as error:  # it is the client's answer, and logged there
            event = Failed(error)
        loop.call_soon_threadsafe(self._next, job, event)

    def _next(self, job: Job, event: Done | Failed) -> None:
        """On the event loop, when a job has ended."""
        job.events.put_nowait(event)
        assert job.started is not None
        took = asyncio.get_running_loop().time() - job.started
        self._mean_s += 0.2 * (took - self._mean_s)
        self.running = None
        if self._waiting:
            self._begin(self._waiting.popleft())


__all__ = ["Done", "Failed", "Job", "Jobs"]
