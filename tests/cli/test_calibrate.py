"""What `calibrate` says beside its tables: about looser thresholds, and about whole texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from edgeexit.cli.calibrate import command
from edgeexit.measure.trace import Trace
from edgeexit.measure.trace_file import write_trace


def trace_of(scores: list[list[float]], wrong: list[list[int]], *, texts: int = 0) -> Trace:
    """A trace of exits with these scores (the last has 1) that answer these rows differently."""
    rows = len(scores[0])
    predictions = np.zeros((len(scores) + 1, rows), np.int64)
    for number, own in enumerate(wrong):
        predictions[number][own] = 1
    return Trace(
        bundle="b" * 64,
        engine={"engine": "cpu"},
        data={"name": "rows", "digest": "d" * 64},
        exits=[f"exit_{number + 1}" for number in range(len(predictions))],
        scores={"max_prob": np.array([*scores, [1.0] * rows], np.float32)},
        predictions=predictions,
        labels=None,
        batch_rows=np.ones(rows, np.int64),
        times_ms=np.ones((rows, len(predictions))),
        batch_size=1,
        groups=np.arange(rows) * texts // rows if texts else None,
    )


def calibrate(folder: Path, trace: Trace, *options: str) -> Result:
    write_trace(trace, folder / "trace.npz")
    arguments = [str(folder / "trace.npz"), "-o", str(folder / "policy.json"), *options]
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


FALLING = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2]


def test_a_looser_threshold_that_looks_better_is_told(tmp_path: Path) -> None:
    """Three rows are wrong at the second exit, and right at the first."""
    trace = trace_of([[0.1] * 10, FALLING], [[], [0, 1, 2]])
    ran = calibrate(tmp_path, trace, "--max-risk", "20%")
    [note] = [line for line in ran.stdout.splitlines() if line.startswith("note:")]
    assert "0.1 keeps the risk, too (0.00 %, 1.000 ms)" in note
    assert "do not (up to 30.00 %): max_prob hardly tells right from wrong" in note
    ran = calibrate(tmp_path, trace, "--max-risk", "20%", "--per-exit", "--overwrite")
    assert ran.exit_code == 0 and "note:" not in ran.stdout


def test_no_looser_threshold_is_told_where_the_risk_grows(tmp_path: Path) -> None:
    ran = calibrate(tmp_path, trace_of([FALLING], [[2, 5]]), "--max-risk", "10%")
    assert ran.exit_code == 0 and "note:" not in ran.stdout


def test_few_texts_without_a_loss_are_a_warning(tmp_path: Path) -> None:
    ran = calibrate(tmp_path, trace_of([FALLING], [[1, 8]], texts=5), "--max-risk", "30%")
    assert "warning: only 60.00 % of 5 texts have no loss; the largest has 50.00 %." in ran.stderr
    assert "have no loss" not in ran.stdout


def test_texts_without_a_loss_are_told_in_the_summary(tmp_path: Path) -> None:
    ran = calibrate(tmp_path, trace_of([FALLING], [[]], texts=5), "--max-risk", "30%")
    assert "have no loss" not in ran.stderr
    assert "Of 5 texts, 100.00 % have no loss" in ran.stdout
