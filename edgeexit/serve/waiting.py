"""Runs a job for a request: starts it, and ends it when its client is gone."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from edgeexit.serve.jobs import Failed, Job, Jobs
from edgeexit.serve.refusals import GONE, Refusal, refusal_of


async def next_event(request: Request, jobs: Jobs, job: Job) -> Any:
    """The next event of a job that was started.

    Raises:
        Refusal: The job failed, or the client is gone, which ended the job.
    """
    watch = asyncio.create_task(_leave_when_gone(request, jobs, job))
    try:
        event = await job.events.get()
    except BaseException:
        jobs.leave(job)
        raise
    finally:
        watch.cancel()
    if watch.done() and not watch.cancelled():
        raise Refusal(GONE, "The client is gone.")
    return raised(event)


def raised(event: Any) -> Any:
    """An event. Raises `Refusal` if it is a failure."""
    if isinstance(event, Failed):
        raise refusal_of(event.error) from event.error
    return event


async def _leave_when_gone(request: Request, jobs: Jobs, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    jobs.leave(job)


__all__ = ["next_event", "raised"]
