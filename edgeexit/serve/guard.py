"""`Guard`: what every request passes first: who may ask, and how large and how slow a body may be.

It reads the whole body before the application runs, so the routes only see complete requests of
known size. It also logs and counts every request.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeexit.serve.metrics import Metrics
from edgeexit.serve.refusals import FORBIDDEN, GONE, SLOW, TOO_LARGE, Refusal
from edgeexit.serve.settings import Settings

logger = logging.getLogger(__name__)

OPEN = ("/", "/health")
"""What needs no token: the page asks for it, and health says nothing of anybody's requests."""

DISCARDED_BYTES = 64 << 20
"""Most bytes of a body that is too large that are read, so that its client gets to the answer."""

CLOSE = {"Connection": "close"}


class Guard:
    """An ASGI application around another one.

    Args:
        app: The application.
        settings: Token, hosts, sizes.
        metrics: Counts requests.
        endpoints: Paths that are counted under their own name.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, endpoints: Collection[str]
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, statuses = time.perf_counter(), [GONE]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self._answer(scope, receive, noting)
        finally:
            self._note(scope, statuses[-1], time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
            self._check_asker(scope["path"], headers)
            body = await self._read(headers, receive)
        except Refusal as refusal:
            await refusal.response(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _again(body, receive), send)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        endpoint = path if path in self._endpoints else "other"
        self._metrics.requests.labels(endpoint, status).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        logger.info("%s %a %d %.1f ms", scope["method"], path[:100], status, seconds * 1e3)

    def _check_asker(self, path: str, headers: dict[str, bytes]) -> None:
        token = self._settings.token
        if token is None:
            self._check_browser(headers)
        elif path not in OPEN:
            kind, _, given = headers.get("authorization", b"").partition(b" ")
            same = hmac.compare_digest(given.strip(), token.encode())
            if kind.lower() != b"bearer" or not same:
                raise Refusal(
                    401,
                    "The token is missing or wrong. Send the header Authorization: Bearer TOKEN.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"} | CLOSE,
                )

    def _check_browser(self, headers: dict[str, bytes]) -> None:
        """Without a token, pages of other sites must not use a browser on this machine as their
        way in: neither directly (``Origin``) nor by a name that leads here (``Host``)."""
        host = _name(b"//" + headers.get("host", b""))
        origin = headers.get("origin")
        for what, name in (("Host", host), ("Origin", host if origin is None else _name(origin))):
            if name not in self._settings.hosts:
                raise Refusal(
                    FORBIDDEN,
                    f"{what} {name[:80]!a} is not a name of this server. Use one of "
                    f"{', '.join(self._settings.hosts)}, or start the server with a token.",
                    headers=CLOSE,
                )

    async def _read(self, headers: dict[str, bytes], receive: Receive) -> bytes | None:
        """The body. None: the client is gone."""
        limit = self._settings.body_bytes
        length = headers.get("content-length", b"")
        if b"100-continue" in headers.get("expect", b"").lower() and int(length or b"0") > limit:
            raise self._too_large()
        try:
            with anyio.fail_after(self._settings.body_s):
                body = await _read_all(receive, limit)
        except TimeoutError:
            raise Refusal(
                SLOW,
                f"The body did not arrive within {self._settings.body_s:g} s. Send it at once.",
                headers=CLOSE,
            ) from None
        if body is not None and len(body) > limit:
            raise self._too_large()
        return body

    def _too_large(self) -> Refusal:
        return Refusal(
            TOO_LARGE,
            f"The body has more than {self._settings.body_bytes} bytes. Send less, or start the "
            "server with a larger --max-body.",
            code="request_too_large",
            headers=CLOSE,
        )


async def _read_all(receive: Receive, limit: int) -> bytes | None:
    """A body; of one that is too large, its first `limit` + 1 bytes. None: the client is gone."""
    body, read = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        read += len(part)
        body += part[: limit + 1 - len(body)]
        if not message.get("more_body", False) or read > limit + DISCARDED_BYTES:
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and then what follows."""
    given: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return given.pop() if given else await receive()

    return next_message


def _name(address: bytes) -> str:
    """The host of an address, without its port; empty if there is none.

    >>> _name(b"http://LocalHost:8000"), _name(b"//[::1]:80"), _name(b"null"), _name(b"//[")
    ('localhost', '::1', '', '')
    """
    try:
        return urlsplit(address.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


__all__ = ["Guard"]
