"""Many clients at once: the queue, deadlines, clients that go away, and the end of a server."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.runtime import load
from tests.decoder_toys import make_decoder_toy
from tests.decoder_words import write_with_words
from tests.serve.conftest import Start
from tests.serve.servers import Server, post

REQUESTS, CLIENTS = 1000, 8
POSITIONS = 9000
PROMPTS = ["def f(", "class A", "x = 1", "import os", "for i in", "return", "# a"]
LONG = {"prompt": PROMPTS[0], "stream": True}


def wait_until(holds: Callable[[], bool]) -> None:
    """Waits for what must come; the limit is only there to end a failing test."""
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def endless_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model whose texts do not end before the capacity, thousands of tokens away."""
    toy = make_decoder_toy(capacity=POSITIONS, stop_tokens=())
    return write_with_words(toy, tmp_path_factory.mktemp("endless") / "bundle")


@pytest.fixture
def slow(serve: Start, endless_bundle: Bundle) -> Callable[..., Server]:
    """Starts servers of a model whose longest texts take seconds."""
    return lambda *options: serve(endless_bundle, *options)


def begin(server: Server, **body: object) -> socket.socket:
    """Begins a long text and reads its first piece."""
    connection = server.raw()
    connection.sendall(post(json.dumps(LONG | {"max_tokens": 8000} | body).encode()))
    head = b""
    while b"data: " not in head:
        part = connection.recv(4096)
        assert part, head
        head += part
    assert head.startswith(b"HTTP/1.1 200")
    return connection


def rest_of(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"0\r\n\r\n") and (part := connection.recv(65536)):
        found += part
    return found


def is_idle(server: Server) -> bool:
    return bool(server.ask("/health").json == {"status": "ok", "running": 0, "waiting": 0})


class Crowd:
    """Clients that ask at once; some of them are rude.

    Attributes:
        wrong: What was not as it must be.
        counts: Kind of request -> how many.
    """

    def __init__(self, server: Server, texts: dict[str, str], tokens: int) -> None:
        self.server, self.texts, self.tokens = server, texts, tokens
        self.wrong: list[str] = []
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def ask(self, number: int) -> None:
        rng = random.Random(number)
        kinds = (self.whole, self.stream, self.hang_up, self.half, self.too_much, self.too_long)
        kind = rng.choices(kinds, weights=(40, 30, 10, 8, 6, 6))[0]
        try:
            kind(rng.choice(PROMPTS), rng)
        except Exception as error:
            self.wrong.append(f"{kind.__name__}: {error!r}")
        with self._lock:
            self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1

    def expect(self, holds: bool, what: object) -> None:
        if not holds:
            self.wrong.append(str(what))

    def whole(self, prompt: str, rng: random.Random) -> None:
        found = self.server.complete(prompt, max_tokens=self.tokens)
        self.expect(found.status == 200, found)
        self.expect(found.json["choices"][0]["text"] == self.texts[prompt], found)

    def stream(self, prompt: str, rng: random.Random) -> None:
        found = self.server.complete(prompt, max_tokens=self.tokens, stream=True)
        text = "".join(event["choices"][0]["text"] for event in found.events)
        self.expect(text == self.texts[prompt], found)

    def hang_up(self, prompt: str, rng: random.Random) -> None:
        body = {"prompt": prompt, "max_tokens": 80, "stream": rng.random() < 0.5}
        with self.server.raw() as connection:
            connection.sendall(post(json.dumps(body).encode()))
            if rng.random() < 0.5:
                connection.recv(16)

    def half(self, prompt: str, rng: random.Random) -> None:
        with self.server.raw() as connection:
            connection.sendall(post(b'{"prompt": "de', length=rng.randint(20, 10**6)))

    def too_much(self, prompt: str, rng: random.Random) -> None:
        if rng.random() < 0.5:
            found = self.server.complete(prompt, max_tokens=10**6)
            self.expect(found.status == 400, found)
            self.expect(found.json["error"]["code"] == "context_length_exceeded", found)
        else:
            found = self.server.complete("x" * 200_000)
            self.expect(found.status == 413, found)

    def too_long(self, prompt: str, rng: random.Random) -> None:
        found = self.server.complete(prompt * 100)
        self.expect(found.status == 400 and "96 tokens at most" in found.message, found)


@pytest.mark.parametrize("mode", ["exact"])
def test_a_thousand_requests_are_answered_rightly_and_leave_nothing(
    serve: Start, chat_bundle: Bundle, mode: str
) -> None:
    server = serve(
        chat_bundle,
        *("--mode", mode, "--max-body", "64KiB", "--queue", str(4 * CLIENTS)),
        *("--prefix-memory", "256KiB"),
    )
    with load(chat_bundle) as model:
        texts = {p: model.generate(p, max_new_tokens=24).finish().texts[0] for p in PROMPTS}
    crowd = Crowd(server, texts, 24)
    process = psutil.Process(server.process.pid)

    def run(first: int, last: int) -> tuple[int, int]:
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(crowd.ask, range(first, last)))
        wait_until(lambda: is_idle(server))
        wait_until(lambda: len(process.net_connections()) <= 2)  # the socket that listens
        return process.memory_info().rss, process.num_fds()

    before, files = run(0, REQUESTS // 2)
    after, files_after = run(REQUESTS // 2, REQUESTS)
    assert crowd.wrong == []
    assert sum(crowd.counts.values()) == REQUESTS and min(crowd.counts.values()) > 30
    assert after - before < 4 << 20
    assert files_after <= files + 1
    assert server.metric("edgeexit_queue_length") == 0
    written = 'edgeexit_requests_total{endpoint="/v1/completions",status="200"}'
    assert server.metric(written) >= crowd.counts["whole"] + crowd.counts["stream"]
    code, errors = server.stop()
    assert (code, errors) == (0, "")


def test_a_full_queue_refuses_and_says_when_to_come_back(slow: Callable[..., Server]) -> None:
    server = slow("--queue", "1")
    running = begin(server)
    waiting = server.raw()
    waiting.sendall(post(json.dumps({"prompt": "a", "max_tokens": 1}).encode()))
    wait_until(lambda: server.ask("/health").json["waiting"] == 1)
    refused = server.complete("b")
    assert refused.status == 503 and refused.json["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert server.metric("edgeexit_queue_length") == server.metric("edgeexit_running") == 1
    running.close()  # which ends its text, so the next one begins
    assert waiting.recv(4096).startswith(b"HTTP/1.1 200")
    waiting.close()
    wait_until(lambda: is_idle(server))
    assert server.metric('edgeexit_texts_total{reason="gone"}') == 1


def test_no_queue_at_all_is_a_choice(slow: Callable[..., Server]) -> None:
    server = slow("--queue", "0")
    running = begin(server)
    assert server.complete("b").status == 503
    running.close()
    wait_until(lambda: is_idle(server))
    assert server.complete("b", max_tokens=1).status == 200


def test_a_client_that_leaves_the_queue_is_not_computed(slow: Callable[..., Server]) -> None:
    server = slow()
    running = begin(server)
    for _ in range(3):
        left = server.raw()
        left.sendall(post(json.dumps({"prompt": "a", "max_tokens": 100}).encode()))
        wait_until(lambda: server.ask("/health").json["waiting"] == 1)
        left.close()
        wait_until(lambda: server.ask("/health").json["waiting"] == 0)
    running.close()
    wait_until(lambda: is_idle(server))
    assert server.metric("edgeexit_queue_seconds_count") == 1  # only the first one began


def test_the_server_answers_while_the_model_computes(slow: Callable[..., Server]) -> None:
    server = slow()
    running = begin(server)
    for _ in range(20):
        assert server.ask("/health").json["running"] == 1
        assert server.ask("/metrics").status == server.ask("/").status == 200
    running.close()


def test_a_deadline_ends_a_text_and_says_so(slow: Callable[..., Server]) -> None:
    server = slow("--deadline", "400ms")
    found = server.complete(PROMPTS[0], max_tokens=8000).json
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["edgeexit"]["ended_by"] == "deadline"
    assert 0 < found["usage"]["completion_tokens"] < 8000
    events = server.complete(PROMPTS[0], max_tokens=8000, stream=True).events
    assert events[-1]["edgeexit"]["ended_by"] == "deadline"
    shorter = server.complete(PROMPTS[0], max_tokens=8000, deadline_s=1e-3).json
    assert shorter["usage"]["completion_tokens"] <= found["usage"]["completion_tokens"]


def test_a_deadline_in_the_queue_is_a_refusal(slow: Callable[..., Server]) -> None:
    server = slow()
    running = begin(server)
    late = server.complete("a", deadline_s=0.05)
    assert late.status == 504 and late.json["error"]["code"] == "deadline_exceeded"
    assert late.headers["x-should-retry"] == "false"
    running.close()


def test_a_client_that_reads_nothing_does_not_hold_the_model(slow: Callable[..., Server]) -> None:
    server = slow()
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    lazy.connect(("127.0.0.1", server.port))
    lazy.sendall(post(json.dumps(LONG | {"max_tokens": 2000}).encode()))
    wait_until(lambda: server.ask("/health").json["running"] == 1)
    wait_until(lambda: is_idle(server))
    assert server.complete("a", max_tokens=3).status == 200
    lazy.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_refuses_what_waits(
    slow: Callable[..., Server], number: int
) -> None:
    server = slow()
    running = begin(server, max_tokens=1500)
    waiting = server.raw()
    waiting.sendall(post(json.dumps({"prompt": "a", "max_tokens": 1}).encode()))
    wait_until(lambda: server.ask("/health").json["waiting"] == 1)
    server.process.send_signal(number)
    refused = rest_of(waiting)
    assert refused.startswith(b"HTTP/1.1 503") and b"shutting_down" in refused
    assert b"retry-after" in refused.lower()
    with pytest.raises(ConnectionRefusedError):
        server.raw().close()
    last = rest_of(running)
    assert b'"ended_by":"length"' in last and b"data: [DONE]" in last
    running.close()
    waiting.close()
    assert server.stop() == (0, "")


def test_what_runs_longer_than_the_grace_is_ended(slow: Callable[..., Server]) -> None:
    server = slow("--grace", "200ms")
    running = begin(server)
    server.process.send_signal(signal.SIGTERM)
    last = rest_of(running)
    assert b'"ended_by":"shutdown"' in last and b"data: [DONE]" in last
    running.close()
    assert server.stop() == (0, "")


def test_a_second_interrupt_does_not_wait(slow: Callable[..., Server]) -> None:
    server = slow("--grace", "60s")
    running = begin(server)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: _is_refused(server))
    server.process.send_signal(signal.SIGINT)
    assert server.stop()[0] == 0
    running.close()


def _is_refused(server: Server) -> bool:
    try:
        server.raw().close()
    except ConnectionRefusedError:
        return True
    return False
