"""Language models on the command line: export, check, inspect, text in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeexit.bundle import Bundle
from tests.e2e.conftest import Cli


@pytest.fixture
def writer(decoder_bundle: Callable[[str], Bundle]) -> Path:
    return decoder_bundle("llama").path


def test_a_checkpoint_becomes_a_bundle_when_layers_are_named(
    cli: Cli, decoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = decoder_folder("llama")
    refused = cli("export", "-m", folder, "-o", tmp_path / "bundle")
    assert refused.code == 1 and "--exits 2,4" in refused.err
    assert not (tmp_path / "bundle").exists()
    half = cli("export", "-m", folder, "--exits", "2", "--dtype", "fp16", "-o", tmp_path / "bundle")
    assert half.code == 2 and "float32 only" in half.err
    made = cli("export", "-m", folder, "--exits", "2", "-o", tmp_path / "bundle", "--json")
    assert made.code == 0
    assert made.json["exits"] == ["exit_2", "exit_4"]


def test_check_compares_every_exit_and_inspect_shows_the_caches(cli: Cli, writer: Path) -> None:
    checked = cli("check", writer, "--json")
    assert checked.code == 0 and checked.json["passed"]
    places = {one["where"] for one in checked.json["comparisons"]}
    assert places == {"exit_1", "exit_2", "exit_4", "exact", "unsplit"}
    shown = cli("inspect", writer, "--json").json
    segments = shown["chains"]["main"]["segments"]
    assert [one["cache_bytes_per_token"] for one in segments] == [256, 256, 512]


def test_the_modes_write_text_and_say_where_it_came_from(cli: Cli, writer: Path) -> None:
    common = ("run", writer, "--prompt", "def f(", "--max-new-tokens", "12", "--json")
    full = cli(*common)
    assert full.code == 0
    exact = cli(*common, "--mode", "exact", "--drafts", "2")
    assert exact.json["texts"] == full.json["texts"]
    assert exact.json["statistics"]["acceptance"] is not None
    fast = cli(*common, "--mode", "fast", "--threshold", "0", "--audit")
    assert list(fast.json["statistics"]["exits"]) == ["exit_1"]
    assert fast.json["statistics"]["agreement"] is not None
    drawn = [cli(*common, "--temperature", "1", "--seed", "7").json["texts"] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_stream_shows_what_the_whole_shows(cli: Cli, writer: Path) -> None:
    common = ("run", writer, "--prompt", "def f(", "--max-new-tokens", "12")
    whole, stream = cli(*common), cli(*common, "--stream")
    assert whole.code == stream.code == 0
    assert stream.out == whole.out
    assert "tokens, first after" in stream.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompt", "x" * 200), "capacity is 96"),
        (("--prompt", ""), "a prompt is empty"),
        (("--prompt", "x", "--exit", "exit_1"), "--draft-exit"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--mode", "exact", "--draft-exit", "exit_9"), "exit_9"),
        (("--text", "x", "--mode", "exact"), "--prompt"),
        (("--text", "x"), "load_decoder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    cli: Cli, writer: Path, arguments: tuple[str, ...], message: str
) -> None:
    ran = cli("run", writer, *arguments)
    assert ran.code in (1, 2) and message in ran.err
    assert "Traceback" not in ran.err and ran.out == ""


def test_trace_takes_no_language_model_and_says_so(cli: Cli, writer: Path, tmp_path: Path) -> None:
    ran = cli("trace", writer, "--data", "x.npz", "-o", tmp_path / "t.npz")
    assert ran.code in (1, 2) and "Traceback" not in ran.err
    assert "language model" in ran.err or "writes text" in ran.err


def test_an_audit_is_told_as_json(cli: Cli, writer: Path) -> None:
    fast = ("--mode", "fast", "--threshold", "0.01", "--audit", "--max-new-tokens", "6")
    ran = cli("run", writer, "--prompt", "def f(x):", *fast, "--json")
    assert ran.code == 0 and 0 <= ran.json["statistics"]["agreement"] <= 1


def test_bench_tells_prefill_and_decode_of_every_mode(
    cli: Cli, writer: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x):"}\n')
    quick = ("--data", prompts, "--new-tokens", "4", "--time", "10ms", "--threads", "1")
    told = cli("bench", writer, *quick, "-o", tmp_path / "bench.json")
    assert told.code == 0
    assert all(word in told.out for word in ("unsplit", "full", "exact", "split tax"))
    assert (tmp_path / "bench.json").is_file()
    refused = cli("bench", writer, *quick, "--mode", "throughput")
    assert refused.code == 2 and "language model" in refused.err
