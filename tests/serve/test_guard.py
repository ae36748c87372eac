"""Who may ask, and how: tokens, other sites' pages, bodies of any size and speed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edgeexit.bundle.reader import Bundle
from tests.serve.conftest import Start
from tests.serve.servers import Server, post, start

TOKEN = "a-token-of-enough-characters"


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def test_a_token_is_required_where_one_is_set(serve: Start, toy_bundle: Bundle) -> None:
    server = serve(toy_bundle, environment={"EDGEEXIT_TOKEN": TOKEN})
    assert server.ask("/").status == server.ask("/health").status == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        assert server.ask(path).status == 401
    for wrong in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", TOKEN, "Bearer caf\xe9"):
        refused = server.ask("/v1/models", headers={"Authorization": wrong})
        assert refused.status == 401 and TOKEN not in refused.message
        assert refused.headers["www-authenticate"] == "Bearer"
    server.token = TOKEN
    assert server.ask("/v1/models").status == 200
    assert server.ask("/v1/models", headers={"Host": "board.local"}).status == 200


def test_a_token_comes_from_a_file(serve: Start, toy_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    server = serve(toy_bundle, "--host", "0.0.0.0", "--token-file", str(file))
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    assert server.ask("/v1/models").status == 401
    server.token = TOKEN
    assert server.ask("/v1/models").status == 200
    code, errors = server.stop()
    assert (code, errors) == (0, "")


def test_pages_of_other_sites_are_refused(painter: Server) -> None:
    for headers in (
        {"Host": "attacker.example"},
        {"Host": f"attacker.example:{painter.port}"},
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"Host": "[", "Origin": "http://localhost"},
    ):
        refused = painter.ask("/v1/models", headers=headers)
        assert refused.status == 403 and "is not a name of this server" in refused.message
    for headers in (
        {"Host": f"localhost:{painter.port}"},
        {"Host": "[::1]:80", "Origin": f"http://127.0.0.1:{painter.port}"},
    ):
        assert painter.ask("/v1/models", headers=headers).status == 200


def test_the_page_runs_nothing_from_elsewhere(painter: Server) -> None:
    page = painter.ask("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"http://" not in page.body and b"https://" not in page.body


def test_a_body_that_is_too_large_is_refused_and_read_to_its_end(
    serve: Start, toy_bundle: Bundle
) -> None:
    server = serve(toy_bundle, "--max-body", "64KiB")
    for _ in range(2):
        refused = server.ask("/v1/predict", b"x" * 300_000, {"Content-Type": "application/json"})
        assert refused.status == 413 and "65536 bytes" in refused.message
    with server.raw() as waiting:  # with this header, clients send nothing before they may
        head = post(b"", "/v1/predict", 300_000).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue")
        waiting.sendall(head + b"\r\n\r\n")
        assert read_all(waiting).startswith(b"HTTP/1.1 413")
    with server.raw() as chunked:
        head = post(b"", "/v1/predict").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        chunked.sendall(head + b"30d40\r\n" + b"x" * 200_000 + b"\r\n0\r\n\r\n")
        assert read_all(chunked).startswith(b"HTTP/1.1 413")
    assert server.ask("/health").json == {"status": "ok", "running": 0, "waiting": 0}


def test_half_a_request_keeps_nobody_else_waiting_and_is_ended(painter: Server) -> None:
    """All of them wait together for the limit of ten seconds."""
    with painter.raw() as body, painter.raw() as head, painter.raw() as silent:
        body.sendall(post(b'{"inputs"', "/v1/predict", length=1000))
        head.sendall(b"POST /v1/predict HTTP/1.1\r\nHo")
        with painter.raw() as gone:
            gone.sendall(post(b'{"inputs"', "/v1/predict", length=1000))
        with painter.raw() as noise:
            noise.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
            assert read_all(noise).startswith(b"HTTP/1.1 400")
        assert painter.ask("/v1/models").status == 200
        answer = read_all(body)
        assert answer.startswith(b"HTTP/1.1 408") and b"Send it at once" in answer
        assert read_all(head) == read_all(silent) == b""
    assert painter.ask("/health").status == 200


def refused_start(bundle: Path, *options: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "edgeexit", "serve", str(bundle), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_in_use_is_said_before_the_model_is_loaded(toy_bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, errors = refused_start(toy_bundle.path, "--port", port)
    assert code == 2 and "the port is in use" in errors and f"--port {port}" in errors
    assert len(errors.splitlines()) == 1


def test_addresses_and_tokens_that_do_not_do_are_refused(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    path = toy_bundle.path
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("abc")
    binary.write_bytes(b"\xff\xfe" * 20)
    for options, said in (
        (("--host", "no-such-host.invalid"), "not an address"),
        (("--host", "192.0.2.1"), "does not have that address"),
        (("--host", "0.0.0.0"), "need a token"),
        (("--token-file", str(tmp_path / "none")), "cannot be read"),
        (("--token-file", str(tmp_path)), "cannot be read"),
        (("--token-file", str(short)), "at least 16"),
        (("--token-file", str(binary)), "not UTF-8"),
        (("--deadline", "60"), "is not a time"),
        (("--max-body", "16MB"), "is not a size"),
        (("--mode", "exact"), "--mode is for models that write text"),
        (("--threshold", "2"), "out of range"),
    ):
        code, errors = refused_start(path, "--port", "0", *options)
        assert code == 2 and said in errors, (options, errors)
    code, errors = refused_start(path, "--port", "0", EDGEEXIT_TOKEN="two words of a token")
    assert code == 2 and "EDGEEXIT_TOKEN: not a token" in errors
    code, errors = refused_start(tmp_path / "nothing", "--port", "0")
    assert code == 1 and "nothing" in errors


def test_a_token_that_others_can_read_is_warned_about(toy_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    server = start(toy_bundle.path, "--token-file", str(file))
    code, errors = server.stop()
    assert code == 0 and "chmod 600" in errors and TOKEN not in errors


@pytest.mark.parametrize("host", ["::1"])
def test_ipv6_works(serve: Start, toy_bundle: Bundle, host: str) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    server = serve(toy_bundle, "--host", host)
    assert server.url.startswith("http://[::1]:") and server.ask("/v1/models").status == 200
