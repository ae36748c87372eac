"""Servers that tests share, and such that they may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from edgeexit.bundle.reader import Bundle
from tests.serve.servers import Server, start

Start = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Start]:
    """Starts servers, and ends them after the test."""
    started: list[Server] = []

    def begin(bundle: Bundle, *options: str, **more: dict[str, str]) -> Server:
        started.append(start(bundle.path, *options, **more))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def talker(chat_bundle: Bundle) -> Iterator[Server]:
    """A server of a small language model that chats. Its texts do not end before their limit."""
    server = start(chat_bundle.path, "--name", "talker", "--mode", "exact", "--queue", "64")
    yield server
    code, errors = server.stop()
    assert (code, errors) == (0, "")


@pytest.fixture(scope="module")
def painter(vit_bundle: Bundle) -> Iterator[Server]:
    """A server of a small image classifier, with exits that some images take."""
    server = start(vit_bundle.path, "--name", "vit", "--threshold", "0.95", "-q")
    yield server
    code, errors = server.stop()
    assert (code, errors) == (0, "")
