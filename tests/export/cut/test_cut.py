"""An ONNX file with exit outputs becomes a bundle that answers like the file, at every exit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from edgeexit.bundle.manifest import Chain, Component
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import EdgeExitError, ExportError, OutputExistsError, UsageError
from edgeexit.export import export_onnx
from edgeexit.export.cut.prove_rows import row_axis
from edgeexit.export.evaluate import run_graph
from edgeexit.runtime import Rule, load

TEXT_EXITS = ["exit_1", "exit_2", "logits"]
IMAGE_EXITS = ["early", "middle", "final"]
EXITS = ["a", "b", "c"]
HEAD = '<ir_version: 8, opset_import: ["" : 18]>\n'

STRAIGHT = (
    HEAD
    + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b, float[N, 3] c) {
    h1 = MatMul(x, w1)
    r1 = Relu(h1)
    a = MatMul(r1, va)
    h2 = MatMul(r1, w2)
    r2 = Relu(h2)
    b = MatMul(r2, vb)
    h3 = MatMul(r2, w3)
    c = MatMul(h3, vc)
}
"""
)
WEIGHTS_8 = {"w1": (8, 8), "w2": (8, 8), "w3": (8, 8), "va": (8, 3), "vb": (8, 3), "vc": (8, 3)}


def write(
    path: Path,
    text: str,
    shapes: Mapping[str, Sequence[int]] = WEIGHTS_8,
    arrays: Mapping[str, np.ndarray] | None = None,
    dtype: type = np.float32,
) -> Path:
    """Writes a graph given as text, with random weights of the given shapes."""
    seed = np.random.default_rng(7)
    model = onnx.parser.parse_model(text)
    found = {n: seed.standard_normal(s).astype(dtype) / 3 for n, s in shapes.items()} | dict(
        arrays or {}
    )
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in found.items())
    onnx.save(model, path)
    return path


def answers_of(
    path: Path, exits: Sequence[str], feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(list(exits), dict(feeds))


def check_bundle(
    bundle: Bundle,
    path: Path,
    exits: Sequence[str],
    feeds: Mapping[str, np.ndarray],
    *,
    atol: float = 1e-5,
    threshold: float | None = None,
) -> list[str]:
    """Compares every exit and rows that leave alone with the file; returns the exits taken."""
    expected = answers_of(path, exits, feeds)
    with load(bundle) as model:
        trace = model.trace(feeds)
        for made, wanted in zip(trace.outputs, expected, strict=True):
            np.testing.assert_allclose(made["logits"], wanted, rtol=1e-3, atol=atol)
        if threshold is None:
            threshold = float(np.median(trace.scores[0]["max_prob"]))
        model.policy = Rule(score="max_prob", thresholds=threshold)
        result = model(feeds)
        for row, taken in enumerate(result.exits):
            wanted = expected[taken][row]
            np.testing.assert_allclose(result.outputs["logits"][row], wanted, rtol=1e-3, atol=atol)
    with load(bundle, unsplit=True) as model:
        np.testing.assert_allclose(
            model(feeds).outputs["logits"], expected[-1], rtol=1e-3, atol=atol
        )
    return result.exit_names


def crossing(bundle: Bundle) -> list[list[tuple[str, list[object], int | None]]]:
    """Per segment but the first: dtype, axes, row axis of what comes from other segments."""
    inputs = {tensor.name for tensor in bundle.manifest.inputs}
    return [
        [(t.dtype, list(t.axes), t.row_axis) for t in segment.inputs if t.name not in inputs]
        for segment in segments(bundle)[1:]
    ]


def main(bundle: Bundle) -> Chain:
    return bundle.manifest.chains["main"]


def segments(bundle: Bundle) -> list[Component]:
    return [bundle.manifest.components[name] for name in main(bundle).components]


def exit_names(bundle: Bundle) -> list[str]:
    return [exit_.name for exit_ in main(bundle).exits]


def text_feeds(rows: int, tokens: int) -> dict[str, np.ndarray]:
    seed = np.random.default_rng(rows * 100 + tokens)
    mask = np.ones((rows, tokens), np.int64)
    for row in range(1, rows):
        mask[row, tokens - row % tokens :] = 0
    mask[:, 0] = 1
    return {"input_ids": seed.integers(0, 500, (rows, tokens)), "attention_mask": mask}


def vector_feeds(rows: int = 4, name: str = "x") -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(3).standard_normal((rows, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("straight") / "straight.onnx", STRAIGHT)


def test_text_model_answers_like_its_file_when_cut(text_onnx: Path, tmp_path: Path) -> None:
    bundle = export_onnx(text_onnx, tmp_path / "bundle", exits=TEXT_EXITS, labels=["x", "y", "z"])
    assert exit_names(bundle) == TEXT_EXITS
    assert bundle.manifest.labels == ["x", "y", "z"]
    for rows, tokens in ((4, 7), (1, 1), (1, 12), (5, 3)):
        taken = check_bundle(bundle, text_onnx, TEXT_EXITS, text_feeds(rows, tokens))
        if rows > 1:
            assert len(set(taken)) > 1


def test_labels_of_another_number_than_classes_are_refused(text_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 labels for the 3 classes"):
        export_onnx(text_onnx, tmp_path / "bundle", exits=TEXT_EXITS, labels=["x", "y"])
    assert list(tmp_path.iterdir()) == []


def test_only_the_state_crosses_when_masks_and_shapes_are_recomputed(
    text_onnx: Path, tmp_path: Path
) -> None:
    bundle = export_onnx(text_onnx, tmp_path / "bundle", exits=TEXT_EXITS)
    assert crossing(bundle) == [[("float32", ["batch", "tokens", 32], 0)]] * 2
    assert main(bundle).rows == "independent"
    carried = [t.name for t in segments(bundle)[2].inputs]
    assert carried == ["attention_mask", carried[1]]


def test_image_model_answers_like_its_file_when_cut(image_onnx: Path, tmp_path: Path) -> None:
    bundle = export_onnx(image_onnx, tmp_path / "bundle", exits=IMAGE_EXITS)
    pixels = np.random.default_rng(1).standard_normal((6, 3, 16, 16)).astype(np.float32)
    taken = check_bundle(bundle, image_onnx, IMAGE_EXITS, {"pixels": pixels})
    assert len(set(taken)) > 1
    assert crossing(bundle) == [
        [("float32", ["batch", 8, 8, 8], 0)],
        [("float32", ["batch", 16, 4, 4], 0)],
    ]


def test_samples_hold_what_the_file_answers_when_inputs_are_made_up(
    text_onnx: Path, tmp_path: Path
) -> None:
    bundle = export_onnx(text_onnx, tmp_path / "bundle", exits=TEXT_EXITS)
    with np.load(bundle.file(bundle.manifest.samples[0])) as file:
        samples = dict(file)
    feeds = {name: samples[f"input/{name}"] for name in ("input_ids", "attention_mask")}
    assert feeds["input_ids"].shape[0] == 4 and feeds["input_ids"].max() < 500
    assert feeds["attention_mask"].min() == 0 and feeds["attention_mask"][:, 0].all()
    expected = answers_of(text_onnx, TEXT_EXITS, feeds)
    for name, wanted in zip(TEXT_EXITS, expected, strict=True):
        np.testing.assert_allclose(samples[f"{name}/logits"], wanted, atol=1e-5)
        odds = np.exp(wanted - wanted.max(-1, keepdims=True))
        largest = (odds / odds.sum(-1, keepdims=True)).max(-1)
        np.testing.assert_allclose(samples[f"{name}/max_prob"], largest, atol=1e-5)
    np.testing.assert_array_equal(samples["unsplit/logits"], samples["logits/logits"])


def test_samples_are_the_users_when_given(text_onnx: Path, tmp_path: Path) -> None:
    feeds = text_feeds(3, 9)
    given = feeds | {"label": np.zeros(3, np.int64)}
    bundle = export_onnx(text_onnx, tmp_path / "bundle", exits=TEXT_EXITS, samples=given)
    with np.load(bundle.file(bundle.manifest.samples[0])) as file:
        np.testing.assert_array_equal(file["input/input_ids"], feeds["input_ids"])


def test_weights_are_stored_once_when_segments_and_unsplit_share_them(
    text_onnx: Path, tmp_path: Path
) -> None:
    bundle = export_onnx(text_onnx, tmp_path / "bundle", exits=TEXT_EXITS)
    whole = onnx.load(text_onnx)
    weights = sum(numpy_helper.to_array(tensor).nbytes for tensor in whole.graph.initializer)
    assert bundle.file(WEIGHTS).stat().st_size <= 1.05 * weights


def test_bundle_is_the_same_when_exported_twice(straight: Path, tmp_path: Path) -> None:
    first = export_onnx(straight, tmp_path / "first", exits=EXITS)
    assert export_onnx(straight, tmp_path / "second", exits=EXITS).digest == first.digest


def test_external_weights_are_read_when_they_lie_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", STRAIGHT)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=1)
    bundle = export_onnx(path, tmp_path / "bundle", exits=EXITS)
    check_bundle(bundle, path, EXITS, vector_feeds())


def test_exits_inside_the_graph_are_promoted_when_named(straight: Path, tmp_path: Path) -> None:
    model = onnx.load(straight)
    del model.graph.output[0:2]
    path = tmp_path / "inner.onnx"
    onnx.save(model, path)
    bundle = export_onnx(path, tmp_path / "bundle", exits=EXITS)
    assert check_bundle(bundle, straight, EXITS, vector_feeds(), threshold=0.0) == ["a"] * 4


def test_names_are_made_valid_when_the_manifest_has_no_room_for_them(tmp_path: Path) -> None:
    text = STRAIGHT
    model = onnx.load(write(tmp_path / "plain.onnx", text))
    renamed = {
        "x": "/in put",
        "a": "/head.0/Gemm",
        "r1": "/körper/Relu",
        "b": "a/max_prob",
        "c": "out:0",
    }
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in [*model.graph.input, *model.graph.output]:
        value.name = renamed.get(value.name, value.name)
    path = tmp_path / "named.onnx"
    onnx.save(model, path)
    exits = ["/head.0/Gemm", "a/max_prob", "out:0"]
    bundle = export_onnx(path, tmp_path / "bundle", exits=exits)
    assert [t.name for t in bundle.manifest.inputs] == ["in_put"]
    assert exit_names(bundle) == ["head.0/Gemm", "a/max_prob", "out:0"]
    feeds = vector_feeds(name="in_put")
    with load(bundle) as model_:
        made = model_.trace(feeds)
    expected = answers_of(path, exits, {"/in put": feeds["in_put"]})
    for one, wanted in zip(made.outputs, expected, strict=True):
        np.testing.assert_allclose(one["logits"], wanted, atol=1e-5)


def test_answers_are_float32_when_the_file_computes_in_float16(tmp_path: Path) -> None:
    text = STRAIGHT.replace("float[", "float16[")
    path = write(tmp_path / "half.onnx", text, dtype=np.float16)
    bundle = export_onnx(path, tmp_path / "bundle", exits=EXITS)
    assert [output.dtype for output in bundle.manifest.outputs] == ["float32"]
    assert crossing(bundle)[0] == [("float16", ["batch", 8], 0)]
    assert bundle.manifest.components["unsplit"].variants[0].precision == "float16"
    feeds = {"x": vector_feeds()["x"].astype(np.float16)}
    check_bundle(bundle, path, EXITS, feeds, atol=5e-3)


def test_quantised_tensor_crosses_when_the_cut_follows_a_dequantize(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b) {
    h1 = MatMul(x, w1)
    q1 = QuantizeLinear(h1, scale, zero)
    r1 = DequantizeLinear(q1, scale, zero)
    a = MatMul(r1, va)
    h2 = MatMul(r1, w2)
    b = MatMul(h2, vb)
}
"""
    )
    extra = {"scale": np.float32(0.05), "zero": np.int8(0)}
    path = write(tmp_path / "qdq.onnx", text, arrays=extra)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert crossing(bundle) == [[("int8", ["batch", 8], 0)]]
    assert bundle.manifest.components["unsplit"].variants[0].precision == "int8"
    check_bundle(bundle, path, ["a", "b"], vector_feeds())


def test_rows_leave_together_when_scales_are_found_at_run_time(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b) {
    h1 = MatMul(x, w1)
    q1, scale, zero = DynamicQuantizeLinear(h1)
    r1 = DequantizeLinear(q1, scale, zero)
    a = MatMul(r1, va)
    h2 = MatMul(r1, w2)
    b = MatMul(h2, vb)
}
"""
    )
    path = write(tmp_path / "dynamic.onnx", text)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert main(bundle).rows == "together"
    assert check_bundle(bundle, path, ["a", "b"], vector_feeds(), threshold=0.0) == ["a"] * 4


def test_rows_are_counted_on_the_state_when_images_would_travel_for_it(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b) {
    h1 = MatMul(x, w1)
    a = MatMul(h1, va)
    rows = Shape <start = 0, end = 1> (x)
    target = Concat <axis = 0> (rows, four, two)
    token = Expand(start, target)
    pairs = Reshape(h1, split)
    joined = Add(pairs, token)
    flat = Flatten(joined)
    h2 = MatMul(flat, w2)
    b = MatMul(h2, vb)
}
"""
    )
    arrays = {
        "four": np.array([4]),
        "two": np.array([2]),
        "split": np.array([0, 4, 2]),
        "start": np.ones((1, 1, 2), np.float32),
    }
    path = write(tmp_path / "counted.onnx", text, arrays=arrays)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert [t.name for t in segments(bundle)[1].inputs] == ["h1"]
    assert len(set(check_bundle(bundle, path, ["a", "b"], vector_feeds(6)))) == 2


def test_axes_of_one_are_not_taken_for_the_batch_when_inference_lost_them(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (int64[N, T] ids) => (float[N, 3] a, float[N, 3] b) {
    shape = Shape(ids)
    length = Gather(shape, index)
    ends = Unsqueeze(length, zero)
    positions = Slice(table, zero, ends, axis)
    lost = Reshape(positions, target)
    words = Gather(vocabulary, ids)
    both = Add(words, lost)
    size = Shape(lost)
    more = ConstantOfShape(size)
    s0 = Add(both, more)
    h1 = MatMul(s0, w1)
    p1 = Gather <axis = 1> (h1, first)
    a = MatMul(p1, va)
    h2 = MatMul(h1, w2)
    more2 = ConstantOfShape(size)
    s2 = Add(h2, more2)
    p2 = Gather <axis = 1> (s2, first)
    b = MatMul(p2, vb)
}
"""
    )
    seed = np.random.default_rng(2)
    arrays = {
        "index": np.array(1),
        "first": np.array(0),
        "zero": np.array([0]),
        "axis": np.array([1]),
        "target": np.array([1, -1, 8]),
        "table": seed.standard_normal((1, 20, 8)).astype(np.float32),
        "vocabulary": seed.standard_normal((50, 8)).astype(np.float32),
    }
    path = write(tmp_path / "positions.onnx", text, arrays=arrays)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert crossing(bundle) == [[("float32", ["batch", "T", 8], 0)]]
    for rows, tokens in ((6, 5), (2, 1), (1, 9)):
        check_bundle(bundle, path, ["a", "b"], {"ids": seed.integers(0, 50, (rows, tokens))})


def test_operators_of_onnxruntime_are_carried_when_the_file_was_optimised(tmp_path: Path) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>'
        + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b) {
    h1 = MatMul(x, w1)
    s1 = com.microsoft.SkipLayerNormalization(h1, x, gain, shift)
    a = MatMul(s1, va)
    h2 = com.microsoft.FusedMatMul(s1, w2)
    b = MatMul(h2, vb)
}
"""
    )
    arrays = {"gain": np.ones(8, np.float32), "shift": np.zeros(8, np.float32)}
    path = write(tmp_path / "optimised.onnx", text, arrays=arrays)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert crossing(bundle) == [[("float32", ["batch", None], 0)]]
    assert len(set(check_bundle(bundle, path, ["a", "b"], vector_feeds()))) == 2


def test_branches_keep_what_they_use_when_the_graph_has_an_if(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (float[N, 8] x, bool flag) => (float[N, 3] a, float[N, 3] b) {
    h1 = MatMul(x, w1)
    a = MatMul(h1, va)
    h2 = If(flag) <
        then_branch = yes () => (float[N, 8] y) { t = MatMul(h1, w2)
            y = Add(t, x) },
        else_branch = no () => (float[N, 8] z) { z = Neg(h1) }
    >
    b = MatMul(h2, vb)
}
"""
    )
    path = write(tmp_path / "branches.onnx", text)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    taken = [tensor.name for tensor in segments(bundle)[1].inputs]
    assert taken == ["x", "flag", "h1"]
    for flag in (True, False):
        check_bundle(bundle, path, ["a", "b"], vector_feeds() | {"flag": np.array(flag)})


def test_row_axis_is_found_when_rows_do_not_come_first(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (float[N, T, 8] x) => (float[N, 3] a, float[N, 3] b) {
    turned = Transpose <perm = [1, 0, 2]> (x)
    h1 = MatMul(turned, w1)
    m1 = ReduceMean <keepdims = 0> (h1, zero)
    a = MatMul(m1, va)
    h2 = MatMul(h1, w2)
    m2 = ReduceMean <keepdims = 0> (h2, zero)
    b = MatMul(m2, vb)
}
"""
    )
    path = write(tmp_path / "turned.onnx", text, arrays={"zero": np.array([0])})
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert crossing(bundle) == [[("float32", ["T", "batch", 8], 1)]]
    x = np.random.default_rng(0).standard_normal((6, 5, 8)).astype(np.float32)
    assert len(set(check_bundle(bundle, path, ["a", "b"], {"x": x}))) == 2


def test_rows_leave_together_when_a_tensor_mixes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        HEAD
        + """
g (float[N, T, 8] x) => (float[N, 3] a, float[N, 3] b) {
    flat = Reshape(x, rows)
    h1 = MatMul(flat, w1)
    shape = Shape(x)
    back = Reshape(h1, shape)
    m1 = ReduceMean <keepdims = 0> (back, one)
    a = MatMul(m1, va)
    h2 = MatMul(h1, w2)
    back2 = Reshape(h2, shape)
    m2 = ReduceMean <keepdims = 0> (back2, one)
    b = MatMul(m2, vb)
}
"""
    )
    arrays = {"rows": np.array([-1, 8]), "one": np.array([1])}
    path = write(tmp_path / "flat.onnx", text, arrays=arrays)
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert main(bundle).rows == "together"
    assert crossing(bundle) == [[("float32", [None, 8], None)]]
    assert "whole batch" in caplog.text and "h1" in caplog.text
    x = np.random.default_rng(0).standard_normal((6, 5, 8)).astype(np.float32)
    assert check_bundle(bundle, path, ["a", "b"], {"x": x}) == ["b"] * 6


def test_shape_of_a_state_is_taken_again_when_its_axes_are_not_the_inputs(tmp_path: Path) -> None:
    text = (
        HEAD
        + """
g (float[N, T, 8] x) => (float[N, 3] a, float[N, 3] b) {
    wide = Concat <axis = 1> (x, x)
    h1 = MatMul(wide, w1)
    m1 = ReduceMean <keepdims = 0> (h1, one)
    a = MatMul(m1, va)
    shape = Shape(h1)
    noise = ConstantOfShape(shape)
    h2 = MatMul(h1, w2)
    s2 = Add(h2, noise)
    m2 = ReduceMean <keepdims = 0> (s2, one)
    b = MatMul(m2, vb)
}
"""
    )
    path = write(tmp_path / "wide.onnx", text, arrays={"one": np.array([1])})
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert crossing(bundle) == [[("float32", ["batch", None, 8], 0)]]
    x = np.random.default_rng(0).standard_normal((6, 5, 8)).astype(np.float32)
    assert len(set(check_bundle(bundle, path, ["a", "b"], {"x": x}))) == 2


@pytest.mark.parametrize("opset", [11, 13, 17, 21, 23])
def test_opset_is_kept_or_raised_to_18_when_the_file_is_older(tmp_path: Path, opset: int) -> None:
    path = write(tmp_path / "old.onnx", STRAIGHT.replace(": 18]", f": {opset}]"))
    bundle = export_onnx(path, tmp_path / "bundle", exits=EXITS)
    assert bundle.manifest.provenance["opset"] == str(max(opset, 18))
    for segment in segments(bundle):
        graph = onnx.load(bundle.file(segment.variants[0].graph), load_external_data=False)
        assert graph.ir_version == 10 and graph.opset_import[0].version == max(opset, 18)
    check_bundle(bundle, path, EXITS, vector_feeds())


def test_inputs_without_rows_are_given_to_every_row_when_their_first_axis_is_no_batch(
    tmp_path: Path,
) -> None:
    text = (
        HEAD
        + """
g (float[N, T, 8] x, float[T] gain) => (float[N, 3] a, float[N, 3] b) {
    column = Unsqueeze(gain, one)
    h1 = MatMul(x, w1)
    s1 = Mul(h1, column)
    m1 = ReduceMean <keepdims = 0> (s1, one)
    a = MatMul(m1, va)
    h2 = MatMul(s1, w2)
    s2 = Mul(h2, column)
    m2 = ReduceMean <keepdims = 0> (s2, one)
    b = MatMul(m2, vb)
}
"""
    )
    path = write(tmp_path / "gain.onnx", text, arrays={"one": np.array([1])})
    bundle = export_onnx(path, tmp_path / "bundle", exits=["a", "b"])
    assert [t.row_axis for t in bundle.manifest.inputs] == [0, None]
    seed = np.random.default_rng(0)
    feeds = {
        "x": seed.standard_normal((6, 5, 8)).astype(np.float32),
        "gain": seed.standard_normal(5).astype(np.float32),
    }
    assert len(set(check_bundle(bundle, path, ["a", "b"], feeds))) == 2


def test_progress_counts_to_its_end_when_told(straight: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export_onnx(
        straight, tmp_path / "bundle", exits=EXITS, progress=lambda *step: told.append(step)
    )
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert {total for _, _, total in told} == {len(told)}


SIDE_BRANCH = (
    HEAD
    + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b, float[N, 3] c) {
    h1 = MatMul(x, w1)
    h2 = MatMul(x, w2)
    a = MatMul(h1, va)
    b = MatMul(h2, vb)
    h3 = Add(h1, h2)
    c = MatMul(h3, vc)
}
"""
)
SAME_PLACE = (
    HEAD
    + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] b, float[N, 3] c) {
    h1 = MatMul(x, w1)
    a = MatMul(h1, va)
    b = MatMul(h1, vb)
    h2 = MatMul(h1, w2)
    c = MatMul(h2, vc)
}
"""
)
NOTHING_SHARED = (
    HEAD
    + """
g (float[N, 8] x) => (float[N, 3] a, float[N, 3] c) {
    a = MatMul(x, va)
    h1 = MatMul(x, w1)
    c = MatMul(h1, vc)
}
"""
)
RANDOM = STRAIGHT.replace("r1 = Relu(h1)", "noise = RandomNormalLike(h1)\n    r1 = Add(h1, noise)")


@pytest.mark.parametrize(
    "text, exits, error, words",
    [
        (STRAIGHT, ["a", "nope", "c"], ExportError, ["'nope'", "a, b, c"]),
        (STRAIGHT, ["a", "x", "c"], ExportError, ["'x'", "input"]),
        (STRAIGHT, ["a", "a", "c"], UsageError, ["a is given twice"]),
        (STRAIGHT, ["c"], UsageError, ["no early exit"]),
        (STRAIGHT, [], UsageError, ["no early exit"]),
        (STRAIGHT, ["a", "", "c"], UsageError, ["''"]),
        (STRAIGHT, ["b", "a", "c"], ExportError, ["not ordered", "--exits a,b,c"]),
        (STRAIGHT, ["a", "c", "b"], ExportError, ["exit c is deeper than the last one, b"]),
        (SIDE_BRANCH, EXITS, ExportError, ["a and b", "not ordered"]),
        (SAME_PLACE, EXITS, ExportError, ["a and b", "the same depth"]),
        (NOTHING_SHARED, ["a", "c"], ExportError, ["exit a", "share no computation"]),
        (
            STRAIGHT.replace("N, 8", "2, 8"),
            EXITS,
            ExportError,
            ["fixed to 2", "x", "dynamic_axes", "--rows x:0"],
        ),
        (
            STRAIGHT.replace(": 18]", ": 25]").replace("Relu(h1)", "Transpose(h1)"),
            EXITS,
            ExportError,
            ["opset 25", "Transpose", "opset_version=20"],
        ),
        (STRAIGHT, ["r1", "b", "c"], ExportError, ["exit r1 has 8 classes", "c", "3"]),
        (RANDOM, EXITS, ExportError, ["random numbers", "RandomNormalLike", "model.eval()"]),
        (
            STRAIGHT.replace("float[N, 3] a", "int64[N] a").replace(
                "a = MatMul(r1, va)",
                "la = MatMul(r1, va)\n    a = ArgMax <axis = 1, keepdims = 0> (la)",
            ),
            EXITS,
            ExportError,
            ["exit a", "int64"],
        ),
        (
            STRAIGHT.replace("float[N, 3] a", "float[N, 1, 3] a").replace(
                "a = MatMul(r1, va)", "la = MatMul(r1, va)\n    a = Unsqueeze(la, one)"
            ),
            EXITS,
            ExportError,
            ["exit a", "[4, 1, 3]", "[rows, classes]"],
        ),
        (STRAIGHT.replace("r1 = Relu(h1)", "r1 = Relu(gone)"), EXITS, ExportError, ["'gone'"]),
        (STRAIGHT.replace("x, w1", "x, va"), EXITS, ExportError, ["cannot load", "MatMul"]),
        (
            STRAIGHT.replace("r1 = Relu(h1)", "s = Shape(h1)\n    r1 = Reshape(va, s)"),
            EXITS,
            ExportError,
            ["cannot run it: Reshape node ''", "{8,3}", "{4,8}", "--data"],
        ),
    ],
)
def test_export_says_what_is_wrong_when_the_graph_cannot_be_cut(
    tmp_path: Path, text: str, exits: list[str], error: type[EdgeExitError], words: list[str]
) -> None:
    path = write(tmp_path / "model.onnx", text, arrays={"one": np.array([1])})
    with pytest.raises(error) as caught:
        export_onnx(path, tmp_path / "bundle", exits=exits)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_file_is_refused_when_it_is_missing_or_not_onnx(straight: Path, tmp_path: Path) -> None:
    whole = straight.read_bytes()
    (tmp_path / "text.onnx").write_text("this is not a model\n" * 40)
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.onnx").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name, error, word in (
        ("gone.onnx", UsageError, "does not exist"),
        ("folder.onnx", UsageError, "is a directory"),
        ("text.onnx", ExportError, "not an ONNX model"),
        ("empty.onnx", ExportError, "not an ONNX model"),
        ("half.onnx", ExportError, "not an ONNX model, or incomplete"),
    ):
        with pytest.raises(error, match=word) as caught:
            export_onnx(tmp_path / name, tmp_path / "bundle", exits=EXITS)
        assert name in caught.value.what
        assert sorted(os.listdir(tmp_path)) == before


def test_file_is_refused_when_its_weights_are_missing_or_short(
    straight: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.load(straight),
        path,
        save_as_external_data=True,
        location="model.data",
        size_threshold=1,
    )
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"model\.data, which has"):
        export_onnx(path, tmp_path / "bundle", exits=EXITS)
    data.unlink()
    with pytest.raises(ExportError, match=r"model\.data, which does not exist"):
        export_onnx(path, tmp_path / "bundle", exits=EXITS)
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_output_is_kept_when_it_exists(straight: Path, tmp_path: Path) -> None:
    export_onnx(straight, tmp_path / "bundle", exits=EXITS)
    with pytest.raises(OutputExistsError):
        export_onnx(straight, tmp_path / "bundle", exits=EXITS)
    again = export_onnx(straight, tmp_path / "bundle", exits=["a", "c"], overwrite=True)
    assert exit_names(again) == ["a", "c"]


@pytest.mark.parametrize(
    "samples, words",
    [
        ({}, ["x is missing"]),
        ({"y": np.zeros((4, 8), np.float32)}, ["x is missing"]),
        ({"x": np.zeros((4, 8), np.float32), "y": np.zeros(4)}, ["y is not an input"]),
        ({"x": np.zeros((4, 8))}, ["float64[4, 8]", "float32"]),
        ({"x": np.zeros((4, 9), np.float32)}, ["[4, 9]"]),
        ({"x": np.zeros((1, 8), np.float32)}, ["only one row"]),
        ({"x": np.zeros((0, 8), np.float32)}, ["there is no row"]),
    ],
)
def test_samples_are_refused_when_they_do_not_fit(
    straight: Path, tmp_path: Path, samples: dict[str, np.ndarray], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        export_onnx(straight, tmp_path / "bundle", exits=EXITS, samples=samples)
    for word in words:
        assert word in str(caught.value)
    assert not os.listdir(tmp_path)


def test_reference_evaluator_agrees_when_onnxruntime_is_not_used(straight: Path) -> None:
    feeds = vector_feeds()
    [plain] = run_graph(straight, [feeds], reference=True)
    [fast] = run_graph(straight, [feeds], reference=False)
    assert plain.keys() == fast.keys() == set(EXITS)
    for name, array in plain.items():
        np.testing.assert_allclose(array, fast[name], atol=1e-5)


def test_row_axis_is_refused_when_it_is_not_certain() -> None:
    state = np.random.default_rng(0).standard_normal((3, 4, 5))
    chosen = np.array([1, 3])
    assert row_axis(state, [(chosen, state[:, chosen])], rows=4) == 1
    assert row_axis(state, [(chosen, state)], rows=4) is None
    for part, reason in (
        (state[:, chosen][:, :, :2], "all depend"),
        (state[:, [0, 3]], "other rows"),
        (state + 1, "other rows"),
        (state[0], "number of axes"),
        (state[:, :, :2], "5 entries for 4 rows"),
    ):
        with pytest.raises(ValueError, match=reason):
            row_axis(state, [(chosen, part)], rows=4)


def test_weights_of_float16_are_not_widened_when_stored(tmp_path: Path) -> None:
    path = write(tmp_path / "half.onnx", STRAIGHT.replace("float[", "float16["), dtype=np.float16)
    bundle = export_onnx(path, tmp_path / "bundle", exits=EXITS)
    graph = onnx.load(bundle.file("graphs/unsplit.onnx"), load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert kinds["w1"] == TensorProto.FLOAT16
