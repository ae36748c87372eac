"""`Refusal`: an answer that is an error, in OpenAI's form, and which errors become which status."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Response

from edgeexit.errors import DataError, EdgeExitError, InputError, PolicyError, UsageError

logger = logging.getLogger(__name__)

OF_THE_REQUEST = (DataError, InputError, PolicyError, UsageError)
"""Errors whose cause is the request; the others are the server's."""

BAD, FORBIDDEN, GONE, TOO_LARGE, SLOW = 400, 403, 499, 413, 408
"""Statuses. `GONE` is never sent: it marks clients that hung up."""

NO_RETRY = {"x-should-retry": "false"}
"""Tells OpenAI's client not to ask the same again."""


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: What is wrong and how to fix it.
        param: The parameter that it is about.
        code: OpenAI's name of the error, for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}

    @property
    def response(self) -> Response:
        """The answer."""
        return json_response(self.body, self.status, self.headers)


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON. NaN and infinity become null."""
    raw = msgspec.json.encode(value)
    return Response(raw, status, dict(headers or {}), media_type="application/json")


def refusal_of(error: BaseException) -> Refusal:
    """The refusal for any error. Those of our own and bugs are logged; the text of a bug is not
    shown to clients."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, OF_THE_REQUEST):
        return Refusal(BAD, str(error))
    if isinstance(error, EdgeExitError):
        logger.error("%s", error)
        return Refusal(500, str(error), headers=NO_RETRY)
    logger.error("a request failed", exc_info=error)
    message = "The server failed on this request; its log has the reason."
    return Refusal(500, message, headers=NO_RETRY)


def invalid_request(errors: Sequence[Any]) -> Refusal:
    """The refusal of a body in another form, from what pydantic says about it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(BAD, f"The body is not JSON ({first.get('ctx', {}).get('error', '')}).")
    # Of the forms that a value may have, the one that fits furthest.
    deepest = max(
        errors, key=lambda error: (error["loc"][:2] == first["loc"][:2], len(error["loc"]))
    )
    places = [str(part) for part in deepest["loc"] if part != "body"]
    places = [part for part in places if part not in ("str", "int") and "[" not in part]
    if not places:
        message = "The body is not a JSON object. Send one, with Content-Type: application/json."
        return Refusal(BAD, message)
    return Refusal(BAD, f"{'.'.join(places)}: {deepest['msg']}.", param=places[0])


def busy(retry_s: int) -> Refusal:
    """The refusal where the queue is full."""
    return Refusal(
        503,
        "The queue is full: too many requests wait for the model. Retry later.",
        code="queue_full",
        headers={"Retry-After": str(retry_s)},
    )


def stopping() -> Refusal:
    """The refusal of what has not begun at a shutdown."""
    headers = {"Retry-After": "5", "Connection": "close"}
    return Refusal(503, "The server is shutting down.", code="shutting_down", headers=headers)


def too_late() -> Refusal:
    """The refusal of what has not begun at its deadline."""
    message = "The deadline passed before the model could begin. Allow more time, or retry when "
    message += "less is asked of the server."
    return Refusal(504, message, code="deadline_exceeded", headers=NO_RETRY)


__all__ = [
    "Refusal",
    "busy",
    "invalid_request",
    "json_response",
    "refusal_of",
    "stopping",
    "too_late",
]
