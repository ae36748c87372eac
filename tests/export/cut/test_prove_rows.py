"""Rows that depend on each other exit together, however the file makes them depend."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from edgeexit.errors import ExportError
from edgeexit.export import export_onnx
from edgeexit.measure.check import check
from edgeexit.runtime import load
from tests.export.cut.test_cut import STRAIGHT, WEIGHTS_8, main, vector_feeds, write

EXITS = ["a", "b", "c"]
BRANCH = (
    "{0} = If (is_above) <then_branch = t{0} () => (float[N, 8] p{0}) {{ p{0} = Relu({1}) }},"
    " else_branch = e{0} () => (float[N, 8] m{0}) {{ m{0} = Neg({1}) }}>"
)
CONDITIONS = {
    "mean": "whole = ReduceMean <keepdims = 0> (x)\n    is_above = Greater(whole, limit)",
    "sum of a state": "whole = ReduceSum <keepdims = 0> (h1)\n    is_above = Greater(whole, limit)",
    "first row": "whole = Slice(x, zero, one)\n    row = ReduceSum <keepdims = 0> (whole)\n"
    "    is_above = Greater(row, limit)",
}


@pytest.mark.parametrize("limit", [0.0, 5.0])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_exit_together_when_a_branch_depends_on_the_batch(
    condition: str, limit: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of 5 is above those of the samples, all of which take one branch."""
    branch = f"{CONDITIONS[condition]}\n    {BRANCH.format('r1', 'h1')}"
    arrays = {"limit": np.float32(limit), "zero": np.array([0]), "one": np.array([1])}
    text = STRAIGHT.replace("r1 = Relu(h1)", branch)
    path = write(tmp_path / "m.onnx", text, WEIGHTS_8, arrays)
    with caplog.at_level(logging.WARNING):
        bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    assert main(bundle).rows == "together"
    assert "exits apply to the whole batch" in caplog.text
    with load(bundle, all_scores=True) as model:
        check(model).require()


def test_rows_exit_together_when_the_largest_of_all_rows_chooses(tmp_path: Path) -> None:
    mixed = (
        "rest = Relu(h1)\n    top = ReduceMax <keepdims = 0> (x)\n"
        "    is_above = Greater(top, limit)\n    r1 = Where(is_above, rest, h1)"
    )
    text = STRAIGHT.replace("r1 = Relu(h1)", mixed)
    path = write(tmp_path / "m.onnx", text, WEIGHTS_8, {"limit": np.float32(10)})
    assert main(export_onnx(path, tmp_path / "b", exits=EXITS)).rows == "together"


def test_rows_exit_alone_when_a_branch_depends_on_the_number_of_inputs_only(
    tmp_path: Path,
) -> None:
    branch = (
        "size = Shape <start = 1, end = 2> (x)\n    is_above = Greater(size, limit)\n    "
        + BRANCH.format("r1", "h1")
    )
    text = STRAIGHT.replace("r1 = Relu(h1)", branch)
    path = write(tmp_path / "m.onnx", text, WEIGHTS_8, {"limit": np.array([4])})
    assert main(export_onnx(path, tmp_path / "b", exits=EXITS)).rows == "independent"


@pytest.mark.parametrize(
    "weight,number,words",
    [
        ("w1", np.nan, "exit a: logits hold NaN in 4 of 4 sample rows"),
        ("vb", np.inf, "exit b: logits hold (NaN|infinity) in 4 of 4 sample rows"),
    ],
)
def test_weights_that_give_no_number_are_refused(
    weight: str, number: float, words: str, tmp_path: Path
) -> None:
    arrays = {weight: np.full(WEIGHTS_8[weight], number, np.float32)}
    path = write(tmp_path / "m.onnx", STRAIGHT, WEIGHTS_8, arrays)
    with pytest.raises(ExportError, match=words):
        export_onnx(path, tmp_path / "b", exits=EXITS)
    assert not (tmp_path / "b").exists()


def test_samples_that_are_nan_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT)
    feeds = vector_feeds()
    feeds["x"][2] = np.nan
    with pytest.raises(ExportError, match="hold NaN in 1 of 4 sample rows.*samples for NaN"):
        export_onnx(path, tmp_path / "b", exits=EXITS, samples=feeds)


def test_a_class_that_is_never_answered_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = STRAIGHT.replace("c = MatMul(h3, vc)", "all = MatMul(h3, vc)\n    c = Add(all, masked)")
    masked = np.array([0, -np.inf, 0], np.float32)
    path = write(tmp_path / "m.onnx", text, WEIGHTS_8, {"masked": masked})
    with caplog.at_level(logging.WARNING):
        bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    assert "exit c gives -inf for some classes" in caplog.text
    with load(bundle, all_scores=True) as model:
        report = check(model)
    report.require()
    assert any("c: score entropy: the reference itself is NaN" in note for note in report.notes)


def test_an_odd_row_that_the_graph_refuses_is_left_out(tmp_path: Path) -> None:
    """The graph counts with the inputs: rows above 20 give an index outside of the table."""
    index = (
        "big = ReduceMax <keepdims = 0> (x, last)\n    capped = Max(big, none)\n"
        "    at = Cast <to = 7> (capped)\n    looked_up = Gather(table, at)\n"
        "    r1 = Add(looked_up, h1)"
    )
    text = STRAIGHT.replace("r1 = Relu(h1)", index)
    arrays = {"last": np.array([1]), "none": np.float32(0)}
    arrays["table"] = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    bundle = export_onnx(
        write(tmp_path / "m.onnx", text, WEIGHTS_8, arrays), tmp_path / "b", exits=EXITS
    )
    assert main(bundle).rows == "independent"
