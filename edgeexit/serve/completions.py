"""The routes of models that write text: ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from edgeexit.runtime import Model
from edgeexit.serve.jobs import Done, Job, Jobs
from edgeexit.serve.openai_answers import Answers, event
from edgeexit.serve.openai_requests import ChatRequest, CompletionRequest
from edgeexit.serve.refusals import Refusal, json_response
from edgeexit.serve.settings import Settings
from edgeexit.serve.texts import Delta, Texts, Written
from edgeexit.serve.waiting import next_event, raised

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def check_model(given: str | None, name: str) -> None:
    """Raises `Refusal` if a request asks for another model."""
    if given is not None and given != name:
        message = f"There is no model {given[:80]!a}. Use {name}, or leave model out."
        raise Refusal(404, message, param="model", code="model_not_found")


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, its job ends, too."""

    def __init__(self, events: AsyncIterator[bytes], jobs: Jobs, job: Job) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._jobs, self._job = jobs, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._jobs.leave(self._job)


def text_routes(model: Model, texts: Texts, jobs: Jobs, settings: Settings) -> APIRouter:
    """The routes."""
    router = APIRouter()

    async def answer(
        request: Request, asked: CompletionRequest | ChatRequest, *, chats: bool
    ) -> Response:
        check_model(asked.model, settings.name)
        what = asked.asked(model.default_sampling, settings.new_tokens)
        mode = settings.generating.get("mode", "full")
        answers = Answers(settings.name, chats, asked.with_usage, mode)
        seconds = min(settings.deadline_s, asked.deadline_s or settings.deadline_s)
        job = Job(lambda job: texts.write(what, job), seconds)
        jobs.start(job)
        first = await next_event(request, jobs, job)
        if not what.streams:
            return json_response(answers.whole(first.value))
        return EventStream(_events(answers, first, job), jobs, job)

    @router.post(COMPLETIONS)
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        """Continues a text."""
        return await answer(request, asked, chats=False)

    @router.post(CHATS)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answers a conversation."""
        return await answer(request, asked, chats=True)

    return router


async def _events(answers: Answers, first: Any, job: Job) -> AsyncIterator[bytes]:
    """The events of a stream. Those that are ready are sent together."""
    begun = -1  # the text whose beginning was sent
    given, ended = first, False
    while not ended:
        ready = bytearray()
        while True:
            if isinstance(given, (Delta, Written)) and given.number > begun:
                ready += answers.first(given.number)
                begun = given.number
            if isinstance(given, Delta):
                ready += answers.piece(given.number, given.text)
            elif isinstance(given, Written):
                ready += answers.end(given)
            else:
                ready += _last(answers, given)
                ended = True
            if job.events.empty():
                break
            given = job.events.get_nowait()
        if ready:
            yield bytes(ready)
        if not ended:
            given = await job.events.get()


def _last(answers: Answers, given: Any) -> bytes:
    """The last event: usage, or why the text is not complete."""
    try:
        done = raised(given)
    except Refusal as refusal:
        return event(refusal.body)
    assert isinstance(done, Done)
    return answers.last(done.value)


__all__ = ["CHATS", "COMPLETIONS", "check_model", "text_routes"]
