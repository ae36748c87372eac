"""Two results of `bench` beside each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.bench import command
from edgeexit.errors import InputError, UsageError
from edgeexit.measure.bench.bench import Options, bench
from edgeexit.measure.bench.compare import SCHEMA, compare_results, read_result


@pytest.fixture(scope="module")
def measured(toy_bundle: Bundle) -> dict[str, Any]:
    return bench(toy_bundle, Options(seconds=0.3, threads="blocking"))


def other(result: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same with exits that take `factor` of the time, on another processor."""
    changed = copy.deepcopy(result)
    for exit_ in changed["exits"]:
        for name in ("p50_ms", "ratio_to_unsplit"):
            exit_[name] *= factor
    changed["environment"]["processor"] = "another"
    return changed


def test_a_result_compared_with_itself_shows_no_difference(measured: dict[str, Any]) -> None:
    found = compare_results(measured, measured)
    names = [one.name for one in found.figures]
    exits = [exit_["name"] for exit_ in measured["exits"]]
    assert names == ["unsplit", "all layers, every exit asked", *exits]
    assert all(one.ratio == 1 for one in found.figures)
    assert [one.verdict for one in found.figures] == [None] + ["within the spread"] * (
        len(names) - 1
    )
    assert not found.missing and not found.differences


def test_a_change_beyond_the_spread_is_told_with_what_differs(measured: dict[str, Any]) -> None:
    for exit_ in measured["exits"]:
        assert exit_["ratio_spread"] >= 0
    found = compare_results(measured, other(measured, 0.01))
    exits = found.figures[2:]
    assert {one.verdict for one in exits} == {"faster"}
    assert all(one.ratio == pytest.approx(0.01) for one in exits)
    assert any(text.startswith("processor: ") for text in found.differences)
    back = compare_results(other(measured, 0.01), measured)
    assert {one.verdict for one in back.figures[2:]} == {"slower"}


def test_exits_that_only_one_has_are_named(measured: dict[str, Any]) -> None:
    fewer = copy.deepcopy(measured)
    gone = fewer["exits"].pop(0)["name"]
    del fewer["exits"][-1]["ratio_spread"]
    found = compare_results(fewer, measured)
    assert found.missing == [gone]
    assert found.figures[-1].verdict == "spread not known"


def test_the_command_prints_and_writes_a_comparison(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, result in zip(files, (measured, other(measured, 0.01)), strict=True):
        Path(path).write_text(json.dumps(result))
    assert read_result(files[0])["schema"] == SCHEMA
    output = tmp_path / "c.json"
    ran = CliRunner().invoke(command, ["--compare", *files, "-o", str(output)])
    assert ran.exit_code == 0, ran.output
    assert "faster" in ran.output and "differs: processor: " in ran.output
    written = json.loads(output.read_text())
    told = CliRunner().invoke(command, ["--compare", *files, "--json"])
    assert json.loads(told.output) == written
    assert written["figures"][2]["verdict"] == "faster"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a result of bench"),
        ('{"mode": "latency"}', "it has no 'unsplit'"),
        ("schema", "has the version 99"),
        ("mode", "of different kinds: latency and throughput"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_result_is_refused(
    text: str | None, message: str, measured: dict[str, Any], tmp_path: Path
) -> None:
    changed = {"schema": measured | {"schema": 99}, "mode": measured | {"mode": "throughput"}}
    good, bad = tmp_path / "a.json", tmp_path / "b.json"
    good.write_text(json.dumps(measured))
    if text is not None:
        bad.write_text(json.dumps(changed[text]) if text in changed else text)
    ran = CliRunner().invoke(command, ["--compare", str(good), str(bad)])
    assert isinstance(ran.exception, InputError) and message in str(ran.exception)


def test_a_bundle_or_a_comparison_is_asked_for(tmp_path: Path) -> None:
    compare = ["--compare", "a.json", "b.json"]
    for arguments in ([], ["bundle", *compare], [*compare, "--data", "rows.npz"]):
        ran = CliRunner().invoke(command, arguments)
        assert isinstance(ran.exception, UsageError)
