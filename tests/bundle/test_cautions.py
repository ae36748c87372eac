"""Warnings about a policy that is used in another way than it was calibrated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgeexit.bundle.cautions import cautions
from edgeexit.bundle.policy import ALWAYS
from edgeexit.bundle.reader import Bundle
from edgeexit.cli import cli
from edgeexit.errors import PolicyError
from edgeexit.runtime import Policy, Rule, load, read_policy, write_policy
from tests.toys import make_inputs, make_toy, write_toy

EARLY = Rule(thresholds=0.9)


def calibrated(rows: int, rule: Rule = EARLY) -> Policy:
    return Policy(rules={"forward": rule}, calibration={"batch_size": rows})


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose exits apply to the whole batch."""
    return write_toy(make_toy(rows="together"), tmp_path_factory.mktemp("together") / "bundle")


def test_another_batch_size_gives_a_warning_when_exits_apply_to_the_whole_batch(
    together: Bundle, toy_bundle: Bundle
) -> None:
    [found] = cautions(calibrated(8), together, batch_size=1)
    assert "calibrated on batches of 8 rows, this batch has 1 row:" in found
    assert "--batch-size 1 and edgeexit calibrate" in found
    assert cautions(calibrated(8), together, batch_size=8) == []
    assert cautions(calibrated(8), together) == []
    assert cautions(calibrated(8, Rule()), together, batch_size=1) == []
    assert cautions(calibrated(8), toy_bundle, batch_size=1) == []


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        ({"gate_1": 0.5}, ["gates of this bundle are untrained", "not calibrated"]),
        ({"gate_1": ALWAYS}, ["gates of this bundle are untrained"]),
        ({"gate_1": -0.5}, ["untrained", "gate_1 drops always: its scores are from 0 to 1", "not"]),
        ({"gate_1": 1.5}, ["untrained", "gate_1 never drops: its scores are from", "not calib"]),
        (
            {"drop_1": ALWAYS, "gate_1": 0.5},
            ["untrained", "gate_1 is never asked: drop_1 drops the tokens", "not calibrated"],
        ),
        ({"drop_1": ALWAYS}, []),
        ({}, []),
    ],
)
def test_gates_give_warnings_when_they_are_in_use(
    gated_bundle: Callable[[str], Bundle], thresholds: dict[str, float], words: list[str]
) -> None:
    policy = Policy(rules={"vision": Rule(), "main": Rule(thresholds=thresholds)})
    found = cautions(policy, gated_bundle("llava"))
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_a_model_warns_once_when_a_batch_has_another_size(
    together: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with load(together, policy=calibrated(8)) as model:
        for rows in (8, 8, 3, 8, 3):  # the last batch of a data set is smaller
            model(make_inputs(rows))
        assert not caplog.text
        model(make_inputs(3))
        assert "batches of 8 rows, this batch has 3 rows" in caplog.text
        model(make_inputs(1))
        assert caplog.text.count("this batch has") == 1
        model.policy = calibrated(1)
        model(make_inputs(2))
        assert "batches of 1 row, this batch has 2 rows" in caplog.text


@pytest.mark.parametrize("warnings", [[None], "a text", 3])
def test_warnings_that_are_not_texts_are_refused(warnings: object, toy_bundle: Bundle) -> None:
    policy = Policy(rules={"forward": EARLY}, calibration={"warnings": warnings})
    with pytest.raises(PolicyError, match="warnings is .*, not a list of texts. Leave it out"):
        load(toy_bundle, policy=policy)


def test_a_policy_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"format": "2.0", "rules": {}, "calibratoin": {}}))
    with pytest.raises(PolicyError, match="unknown field `calibratoin`"):
        read_policy(path)


@pytest.mark.parametrize("option", ["--atol", "--rtol"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_tolerance_that_is_not_finite_is_refused(
    option: str, value: str, toy_bundle: Bundle
) -> None:
    result = CliRunner().invoke(cli, ["check", str(toy_bundle.path), option, value])
    assert result.exit_code == 2 and f"{value} is not a finite number" in result.stderr


def test_run_and_bench_say_both_sizes_when_the_batch_size_differs(
    together: Bundle, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.json"
    write_policy(calibrated(8), policy)
    data = tmp_path / "rows.npz"
    np.savez(data, **make_inputs(16))
    given = [str(together.path), "--policy", str(policy), "--data", str(data), "--json"]
    words = "calibrated on batches of 8 rows, this batch has 1 row"

    def edgeexit(*arguments: str) -> subprocess.CompletedProcess[str]:
        # In a process of its own: a verb's thread setting may hold for the whole process.
        command = [sys.executable, "-m", "edgeexit", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    assert edgeexit("run", *given).stderr.count(words) == 1
    assert "this batch has" not in edgeexit("run", *given, "--batch-size", "8").stderr
    done = edgeexit("bench", *given, "--time", "1s")
    assert words in " ".join(json.loads(done.stdout)["warnings"])
