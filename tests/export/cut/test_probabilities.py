"""What exits are said to give is compared with what they give for the samples."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from edgeexit.errors import ExportError
from edgeexit.export import export_onnx
from edgeexit.measure.check import check
from edgeexit.runtime import load
from tests.export.cut.test_cut import STRAIGHT, WEIGHTS_8, main, write

EXITS = ["a", "b", "c"]
HEADS = {"a": "MatMul(r1, va)", "b": "MatMul(r2, vb)", "c": "MatMul(h3, vc)"}
ARRAYS = {"hundred": np.float32(100), "one": np.float32(1), "sides": np.array([2, 3])}
SIGMOID = (
    "n{0} = Neg({1})\n    e{0} = Exp(n{0})\n    s{0} = Add(e{0}, one)\n    {0} = Div(one, s{0})"
)
PERCENT = "p{0} = Softmax({1})\n    {0} = Mul(p{0}, hundred)"


def with_heads(path: Path, end: str) -> Path:
    """The model with more operators behind every head; `end` takes the exit and its logits."""
    text = STRAIGHT
    for name, head in HEADS.items():
        text = text.replace(
            f"    {name} = {head}", f"    z{name} = {head}\n    {end.format(name, 'z' + name)}"
        )
    return write(path, text, WEIGHTS_8, ARRAYS)


@pytest.mark.parametrize(
    "end,outputs,words",
    [
        ("{0} = Identity({1})", "probabilities", "gives values from -.*not probabilities"),
        (PERCENT, "probabilities", r"gives values from .* to [5-9]\d.*not probabilities"),
        ("{0} = Softmax <axis = 0> ({1})", "probabilities", "another axis than the classes"),
        ("{0} = Softmax <axis = 0> ({1})", None, "another axis than the classes.*add up to"),
        ("{0} = HardSigmoid({1})", None, "the output of a HardSigmoid"),
        ("{0} = LogSoftmax({1})", "probabilities", "not probabilities"),
    ],
)
def test_outputs_that_are_no_probabilities_are_refused(
    end: str, outputs: str | None, words: str, tmp_path: Path
) -> None:
    path = with_heads(tmp_path / "m.onnx", end)
    with pytest.raises(ExportError, match=words):
        export_onnx(path, tmp_path / "b", exits=EXITS, outputs=outputs)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("end", ["{0} = Sigmoid({1})", SIGMOID, "{0} = HardSigmoid({1})"])
def test_a_sigmoid_is_scored_as_it_is_when_the_user_says_so(
    end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_heads(tmp_path / "m.onnx", end)
    with caplog.at_level(logging.WARNING):
        bundle = export_onnx(path, tmp_path / "b", exits=EXITS, outputs="probabilities")
    assert "its classes are not exclusive" in caplog.text
    with load(bundle, all_scores=True) as model:
        check(model).require()
        trace = model.trace({"x": np.eye(4, 8, dtype=np.float32)})
    for made, scores in zip(trace.outputs, trace.scores, strict=True):
        np.testing.assert_allclose(scores["max_prob"], made["logits"].max(-1), atol=1e-6)


@pytest.mark.parametrize(
    "end,words",
    [
        (SIGMOID, "look like probabilities; they are taken for logits. If they are"),
        (PERCENT, "add up to 100 in every row"),
    ],
)
def test_logits_that_look_like_probabilities_are_told(
    end: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export_onnx(with_heads(tmp_path / "m.onnx", end), tmp_path / "b", exits=EXITS)
    assert words in caplog.text


def test_plain_logits_are_told_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        export_onnx(write(tmp_path / "m.onnx", STRAIGHT), tmp_path / "b", exits=EXITS)
    assert not caplog.text


def test_a_softmax_over_the_batch_is_cut_as_logits_with_rows_together(tmp_path: Path) -> None:
    path = with_heads(tmp_path / "m.onnx", "{0} = Softmax <axis = 0> ({1})")
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS, outputs="logits")
    assert main(bundle).rows == "together"
    with load(bundle, all_scores=True) as model:
        check(model).require()


def test_a_softmax_over_classes_on_another_axis_is_one(tmp_path: Path) -> None:
    """``[N, classes, 1, 1]`` with a Softmax over axis 1, flattened, as convolutions give it."""
    end = (
        "f{0} = Unsqueeze({1}, sides)\n    p{0} = Softmax <axis = 1> (f{0})\n"
        "    {0} = Squeeze(p{0}, sides)"
    )

    bundle = export_onnx(with_heads(tmp_path / "m.onnx", end), tmp_path / "b", exits=EXITS)
    with load(bundle, all_scores=True) as model:
        check(model).require()
        trace = model.trace({"x": np.eye(4, 8, dtype=np.float32)})
    made, scores = trace.outputs[-1]["logits"], trace.scores[-1]["max_prob"]
    np.testing.assert_allclose(made.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(scores, made.max(-1), atol=1e-6)
