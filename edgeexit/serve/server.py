"""`serve`: binds an address, and answers requests there until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgeexit.errors import UsageError
from edgeexit.runtime import Model
from edgeexit.serve.app import App, make_app
from edgeexit.serve.settings import Settings

logger = logging.getLogger(__name__)

HEAD_S = 10.0
"""Seconds that the head of a request may take."""

IDLE_S = 75
"""Seconds that a connection is kept for a client's next request."""

UNREAD_MS = 30_000
"""A client that takes nothing of its answer for that long is disconnected, by the kernel."""

MOST_CONNECTIONS = 512


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the model is there.

    Raises:
        UsageError: The address cannot be used.
    """
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(
            f"--host {host}: not an address of this machine ({error})",
            fix="Use 127.0.0.1, or 0.0.0.0 for all addresses.",
        ) from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Accepted connections inherit both.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_bind(host, port, error) from error
    return bound


def _cannot_bind(host: str, port: int, error: OSError) -> UsageError:
    where = f"--host {host} --port {port}"
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"{where}: the port is in use",
            fix=f"Stop what uses it (ss -ltnp 'sport = :{port}'), or give another --port; 0 takes "
            "a free one.",
        )
    if error.errno == errno.EACCES:
        return UsageError(
            f"{where}: ports below 1024 need privileges", fix="Give a --port from 1024 up."
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(
            f"{where}: this machine does not have that address",
            fix="Use 127.0.0.1, or 0.0.0.0 for all addresses.",
        )
    return UsageError(f"{where}: cannot be used ({error.strerror})", fix="Give another address.")


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, as browsers take it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    model: Model, settings: Settings, bound: socket.socket, ready: Callable[[], object]
) -> None:
    """Answers requests until SIGTERM or SIGINT. What runs then is finished, for `grace_s` at most;
    a second SIGINT does not wait.

    Args:
        bound: From `bind`.
        ready: Called when requests are taken.

    Raises:
        UsageError: Another server took the port meanwhile.
    """
    disable_created_metrics()
    app = make_app(model, settings)
    config = uvicorn.Config(
        app.asgi,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=int(settings.grace_s) + 10,
    )
    server = _Server(config, app, settings.grace_s, ready)
    try:
        server.run(sockets=[bound])
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _cannot_bind(host, port, error) from error
    finally:
        app.jobs.end()
        app.jobs.close()


class _Server(uvicorn.Server):
    """Stops the queue first, then the connections."""

    def __init__(
        self, config: uvicorn.Config, app: App, grace_s: float, ready: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._app, self._grace_s, self._ready = app, grace_s, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.jobs.stop()
        timer = asyncio.get_running_loop().call_later(self._grace_s, self._app.jobs.end)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A signal ends the server, which is no failure: it is not raised again afterwards."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """Disconnects clients that do not finish the head of a request."""

    _head_since = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_since = time.monotonic()
        self._limit_head()

    def data_received(self, data: bytes) -> None:
        if self._is_idle and self.timeout_keep_alive_task is not None and self._head_since == 0:
            self._head_since = time.monotonic()
        super().data_received(data)
        if self._is_idle and not self.transport.is_closing():
            self._limit_head()
        else:
            self._head_since = 0.0

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _limit_head(self) -> None:
        self._unset_keepalive_if_required()
        left = self._head_since + HEAD_S - time.monotonic()
        self.timeout_keep_alive_task = self.loop.call_later(
            max(0.0, left), self.timeout_keep_alive_handler
        )


__all__ = ["bind", "is_loopback", "serve", "url_of"]
