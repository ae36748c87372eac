"""``edgeexit serve`` in a process of its own, as a user starts it, and raw requests to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """An answer: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """What an error says."""
        said: str = self.json["error"]["message"]
        return said

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without its end, which must be there."""
        parts = self.body.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@dataclass
class Server:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    url: str
    token: str | None = None
    _errors: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> Answer:
        """Sends bytes as they are, anything else as JSON."""
        given = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        data = body
        if body is not None and not isinstance(body, bytes):
            data = json.dumps(body).encode()
            given["Content-Type"] = "application/json"
        request = urllib.request.Request(
            self.url + path, data, given | dict(headers or {}), method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as found:
                return Answer(found.status, _lower(found.headers), found.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _lower(error.headers), error.read())

    def complete(self, prompt: object, **options: object) -> Answer:
        return self.ask("/v1/completions", {"prompt": prompt, **options})

    def raw(self) -> socket.socket:
        """A connection of its own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def metric(self, name: str) -> float:
        """A value of ``/metrics``, by its name with labels."""
        text = self.ask("/metrics").body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{name} is not in\n{text}"
        return float(found[1])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ends it by a signal. Returns its exit code and what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


def start(bundle: Path, *options: str, environment: Mapping[str, str] | None = None) -> Server:
    """Starts a server on a free port and waits until it takes requests."""
    command = [sys.executable, "-m", "edgeexit", "serve", str(bundle), "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, *options],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    said = ""
    for line in process.stdout:
        said += line
        if line == "}\n":
            return Server(process, json.loads(said)["url"])
    raise AssertionError(f"the server ended: {process.stderr.read()}")


def post(body: bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A request as bytes, to be sent in parts; `length` is what its head says."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
