"""Rows are found wherever they are, or the user says where; what cannot be cut says why."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeexit.bundle.reader import open_bundle
from edgeexit.cli.export_onnx import _labels, _row_axis
from edgeexit.errors import DataError, ExportError, InputError, UsageError
from edgeexit.export import export_onnx
from edgeexit.measure.check import check
from edgeexit.measure.data import open_data
from edgeexit.measure.inspect import axis_sizes, describe
from edgeexit.runtime import load
from tests.export.cut.test_cut import HEAD, STRAIGHT, answers_of, check_bundle, main, write

EXITS = ["a", "b", "c"]
RANDOM = np.random.default_rng(2)

TIME_FIRST = (
    HEAD
    + """
g (float[T, N, 8] x) => (float[N, 3] a, float[N, 3] b) {
    h1 = MatMul(x, w1)
    m1 = ReduceMean <keepdims = 0> (h1, zero)
    a = MatMul(m1, va)
    h2 = MatMul(h1, w2)
    m2 = ReduceMean <keepdims = 0> (h2, zero)
    b = MatMul(m2, vb)
}
"""
)
ZERO = {"zero": np.array([0])}
MATCHING = (
    HEAD
    + """
g (float[images, 8] pixels, float[texts, 8] words) => (float[images, texts] a, float[images, texts] b) {
    h1 = MatMul(pixels, w1)
    turned = Transpose <perm = [1, 0]> (words)
    a = MatMul(h1, turned)
    r1 = Relu(h1)
    h2 = MatMul(r1, w2)
    b = MatMul(h2, turned)
}
"""  # noqa: E501
)
POOLED = (
    HEAD
    + """
g (float[images, 8] pixels, float[texts, 8] words) => (float[images, 3] a, float[images, 3] b) {
    mean = ReduceMean <keepdims = 1> (words, zero)
    x = Add(pixels, mean)
    h1 = MatMul(x, w1)
    a = MatMul(h1, va)
    r1 = Relu(h1)
    h2 = MatMul(r1, w2)
    b = MatMul(h2, vb)
}
"""
)
TWO_NAMES = STRAIGHT.replace("(float[N, 8] x)", "(float[N, 8] x, float[M, 8] y)").replace(
    "h1 = MatMul(x, w1)", "s = Add(x, y)\n    h1 = MatMul(s, w1)"
)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_rows_of_an_input_are_found_when_they_are_on_its_second_axis(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", TIME_FIRST, arrays=ZERO)
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"])
    assert bundle.manifest.inputs[0].axes == ["T", "batch", 8]
    assert main(bundle).rows == "independent"
    x = numbers(5, 6, 8)
    assert len(set(check_bundle(bundle, path, ["a", "b"], {"x": x}))) == 2


def test_other_axes_than_rows_may_have_the_name_batch(tmp_path: Path) -> None:
    text = TIME_FIRST.replace("float[T, N, 8]", "float[batch, N, 8]")
    bundle = export_onnx(
        write(tmp_path / "m.onnx", text, arrays=ZERO), tmp_path / "b", exits=["a", "b"]
    )
    assert bundle.manifest.inputs[0].axes == ["batch_axis", "batch", 8]


def test_inputs_of_unlike_numbers_of_rows_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", POOLED, arrays=ZERO)
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"])
    assert [t.row_axis for t in bundle.manifest.inputs] == [0, None]
    assert main(bundle).rows == "independent"
    feeds = {"pixels": numbers(3, 8), "words": numbers(7, 8)}
    check_bundle(bundle, path, ["a", "b"], feeds)


def test_classes_that_another_input_counts_are_fixed_as_in_the_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "m.onnx", MATCHING)
    feeds = {"pixels": numbers(3, 8), "words": numbers(7, 8)}
    with caplog.at_level(logging.WARNING):
        bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"], samples=feeds)
    assert "the axis texts sets the number of classes; it is fixed to 7" in caplog.text
    assert [t.axes for t in bundle.manifest.inputs] == [["batch", 8], [7, 8]]
    check_bundle(bundle, path, ["a", "b"], {"pixels": numbers(5, 8), "words": numbers(7, 8)})


def test_axes_of_two_names_are_one_when_they_must_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", TWO_NAMES)
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    assert [t.axes for t in bundle.manifest.inputs] == [["batch", 8]] * 2
    check_bundle(bundle, path, EXITS, {"x": numbers(4, 8), "y": numbers(4, 8)})


def test_a_name_that_is_a_question_mark_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", TIME_FIRST, arrays=ZERO)
    model = onnx.load(path)
    for dim in list(model.graph.input[0].type.tensor_type.shape.dim)[:2]:
        dim.dim_param = "?"
    onnx.save(model, path)
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"])
    check_bundle(bundle, path, ["a", "b"], {"x": numbers(5, 6, 8)})


def test_an_axis_of_size_0_is_refused_as_onnxruntime_does(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"x has an axis of size 0 \(\[0, 8\]\)"):
        export_onnx(path, tmp_path / "b", exits=EXITS, rows={"x": 0})


def test_outputs_that_are_no_exits_are_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export_onnx(write(tmp_path / "m.onnx", STRAIGHT), tmp_path / "b", exits=["a", "c"])
    assert "outputs that are not exits are left out: b" in caplog.text


def test_a_file_that_takes_one_row_gives_a_bundle_that_does(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT.replace("N, 8", "1, 8"))
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS, samples={"x": numbers(4, 8)})
    assert bundle.manifest.limits == {"batch": 1}
    check_bundle(bundle, path, EXITS, {"x": numbers(1, 8)}, threshold=0.0)
    with load(bundle, all_scores=True) as model:
        assert check(model).comparisons
        with pytest.raises(InputError, match="batch is 2, the model takes at most 1"):
            model({"x": numbers(2, 8)})
        np.savez(tmp_path / "data.npz", x=numbers(3, 8))
        rows = [batch.rows for batch in open_data(tmp_path / "data.npz", bundle).batches(8)]
    assert rows == [1, 1, 1]


def test_a_fixed_axis_is_opened_when_the_user_says_that_it_counts_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT.replace("N, 8", "1, 8"))
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS, rows={"x": 0})
    assert not bundle.manifest.limits and main(bundle).rows == "independent"
    many = write(tmp_path / "many.onnx", STRAIGHT)
    assert len(set(check_bundle(bundle, many, EXITS, {"x": numbers(6, 8)}))) > 1


def test_a_fixed_number_of_rows_is_named_on_any_axis(tmp_path: Path) -> None:
    text = TIME_FIRST.replace("float[T, N, 8]", "float[5, 2, 8]").replace("[N, 3]", "[2, 3]")
    path = write(tmp_path / "m.onnx", text, arrays=ZERO)
    with pytest.raises(ExportError, match=r"fixed to 2 \(axis 1 of input x, \[5, 2, 8\]") as caught:
        export_onnx(path, tmp_path / "b", exits=["a", "b"])
    assert "--rows x:1" in caught.value.fix and '"x": {1: "batch"}' in caught.value.fix
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"], rows={"x": 1})
    assert main(bundle).rows == "independent"


def test_a_fixed_number_of_rows_is_opened_in_whole_runs_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT.replace("N, 8", "3, 8"))
    bundle = export_onnx(
        path, tmp_path / "b", exits=EXITS, rows={"x": 0}, samples={"x": numbers(7, 8)}
    )
    with np.load(bundle.file(bundle.manifest.samples[0])) as file:
        assert file["input/x"].shape == (6, 8)
    with pytest.raises(UsageError, match="there are 2 rows, the file takes 3 at a time"):
        export_onnx(path, tmp_path / "c", exits=EXITS, rows={"x": 0}, samples={"x": numbers(2, 8)})


def test_samples_tell_axes_apart_that_have_one_name(tmp_path: Path) -> None:
    text = POOLED.replace("images", "N").replace("texts", "N")
    path = write(tmp_path / "m.onnx", text, arrays=ZERO)
    feeds = {"pixels": numbers(3, 8), "words": numbers(7, 8)}
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"], samples=feeds)
    assert [t.row_axis for t in bundle.manifest.inputs] == [0, None]
    check_bundle(bundle, path, ["a", "b"], feeds)


def test_a_fixed_axis_stays_when_the_graph_is_made_for_its_size(tmp_path: Path) -> None:
    text = STRAIGHT.replace("N, 8", "2, 8").replace("r1 = Relu(h1)", "r1 = Mul(h1, each)")
    path = write(tmp_path / "m.onnx", text, arrays={"each": numbers(2, 1)})
    samples = {"x": numbers(4, 8)}
    with pytest.raises(UsageError, match="cannot run with 4 rows on that axis"):
        export_onnx(path, tmp_path / "b", exits=EXITS, rows={"x": 0}, samples=samples)
    text = STRAIGHT.replace("N, 8", "2, 8").replace(
        "r1 = Relu(h1)", "mean = ReduceMean(h1, zero)\n    r1 = Sub(h1, mean)"
    )
    path = write(tmp_path / "m.onnx", text, arrays=ZERO)
    with pytest.raises(ExportError, match="different outputs for 4 rows at once than for 2"):
        export_onnx(path, tmp_path / "b", exits=EXITS, rows={"x": 0}, samples=samples)


def test_rows_of_an_exit_are_told_when_classes_come_first(tmp_path: Path) -> None:
    text = STRAIGHT.replace("b = MatMul(r2, vb)", "mb = MatMul(r2, vb)\n    b = Transpose(mb)")
    path = write(tmp_path / "m.onnx", text.replace("float[N, 3] b", "float[3, N] b"))
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS, rows={"b": 1})
    feeds = {"x": numbers(6, 8)}
    expected = answers_of(path, EXITS, feeds)
    with load(bundle) as model:
        made = model.trace(feeds).outputs
    np.testing.assert_allclose(made[1]["logits"], expected[1].T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "rows, words",
    [
        ({"nope": 0}, r"--rows nope:0.*no input and no exit nope.*Its inputs are x"),
        ({"x": 3}, r"--rows x:3: x has 3 axes.*Count axes from 0"),
        ({"x": 0}, r"for 4 rows of the inputs, the exits of m\.onnx give"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, rows: dict[str, int], words: str) -> None:
    path = write(tmp_path / "m.onnx", TIME_FIRST, arrays=ZERO)
    with pytest.raises(UsageError, match=words):
        export_onnx(path, tmp_path / "b", exits=["a", "b"], rows=rows)


def test_a_row_axis_on_which_the_file_fails_is_blamed_and_not_the_file(tmp_path: Path) -> None:
    text = TIME_FIRST.replace("float[T, N, 8] x", "float[N, 3, 8] x").replace(
        "h1 = MatMul(x, w1)", "moved = Add(x, each)\n    h1 = MatMul(moved, w1)"
    )
    path = write(tmp_path / "m.onnx", text, arrays=ZERO | {"each": numbers(3, 1)})
    with pytest.raises(UsageError, match=r"--rows: m\.onnx cannot run with 6 rows .*Give another"):
        export_onnx(path, tmp_path / "b", exits=["a", "b"], rows={"x": 1})


def test_sizes_of_a_file_with_a_fixed_batch_of_one_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT.replace("N, ", "1, "))
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    parts = describe(bundle, axis_sizes(bundle))["chains"]["main"]["components"]
    assert [part["boundary_bytes"] for part in parts] == [32, 32, 0]


def test_the_command_line_takes_rows_and_labels_of_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT.replace("N, 8", "1, 8"))
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nbird\r\n\r\n")
    words = ["export", "-m", str(path), "--exits", "a,c", "-o", str(tmp_path / "b"), "--json"]
    words += ["--rows", "x:0", "--labels", str(tmp_path / "labels.txt")]
    done = subprocess.run(
        [sys.executable, "-m", "edgeexit", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.labels == ["cat", "dog", "bird"] and not manifest.limits


@pytest.mark.parametrize("text", ["x", "x:", ":0", "x:one", "x:-1"])
def test_rows_without_an_axis_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not NAME:AXIS"):
        _row_axis(text)
    assert _row_axis("onnx::Flatten_0:1") == ("onnx::Flatten_0", 1)


@pytest.mark.parametrize(
    "content, words",
    [
        ("cat\n\ndog\n", "line 2 is blank"),
        ("cat\ndog\ncat\n", r"two classes have the name 'cat' \(lines 1, 3\)"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "labels.txt").write_text(content)
    with pytest.raises(DataError, match=words):
        _labels(tmp_path / "labels.txt")


def test_an_input_that_no_exit_needs_is_none_of_the_bundle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = STRAIGHT.replace("(float[N, 8] x)", "(float[N, 8] x, int64 rate)")
    with caplog.at_level(logging.WARNING):
        bundle = export_onnx(write(tmp_path / "m.onnx", text), tmp_path / "b", exits=EXITS)
    assert "no exit needs the input rate" in caplog.text
    assert [t.name for t in bundle.manifest.inputs] == ["x"]
    with load(bundle, all_scores=True) as model:
        assert all(one.passed for one in check(model).comparisons)


def test_shapes_that_a_file_declares_wrongly_do_no_harm(tmp_path: Path) -> None:
    text = STRAIGHT.replace("a = MatMul(r1, va)", "a0 = MatMul(r1, va)\n    a = Squeeze(a1, mid)")
    text = text.replace("a = Squeeze", "a1 = Unsqueeze(a0, mid)\n    a = Squeeze")
    path = write(tmp_path / "m.onnx", text, arrays={"mid": np.array([1])})
    model = onnx.load(path)
    wrong = onnx.helper.make_tensor_value_info("a1", onnx.TensorProto.FLOAT, ["N", 3])
    model.graph.value_info.append(wrong)
    onnx.save(model, path)
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    check_bundle(bundle, path, EXITS, {"x": numbers(5, 8)})


def test_a_softmax_that_is_written_out_is_seen(tmp_path: Path) -> None:
    text = STRAIGHT
    for name, state in (("a", "r1"), ("b", "r2"), ("c", "h3")):
        text = text.replace(
            f"{name} = MatMul({state}, v{name})",
            f"l{name} = MatMul({state}, v{name})\n    e{name} = Exp(l{name})\n"
            f"    s{name} = ReduceSum(e{name}, one)\n    {name} = Div(e{name}, s{name})",
        )
    path = write(tmp_path / "m.onnx", text, arrays={"one": np.array([1])})
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    feeds = {"x": numbers(5, 8)}
    expected = answers_of(path, EXITS, feeds)
    with load(bundle, all_scores=True) as model:
        trace = model.trace(feeds)
    for scores, wanted in zip(trace.scores, expected, strict=True):
        np.testing.assert_allclose(scores["max_prob"], wanted.max(-1), atol=1e-5)


def test_a_tensor_inside_of_a_branch_is_said_to_be_there(tmp_path: Path) -> None:
    from tests.export.cut.test_found_files import with_branches

    path = with_branches(tmp_path / "m.onnx", in_loop=False)
    with pytest.raises(ExportError, match="'n1' is inside If"):
        export_onnx(path, tmp_path / "b", exits=["n1", "b"])
