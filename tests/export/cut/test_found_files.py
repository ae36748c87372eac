"""ONNX files as they are found: links, control flow, odd names, probabilities."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export_onnx
from edgeexit.export.trace.scores import reference_scores
from edgeexit.runtime import load
from tests.export.cut.test_cut import STRAIGHT, WEIGHTS_8, answers_of, check_bundle, write

FEEDS = {"x": np.random.RandomState(1).randn(5, 8).astype(np.float32)}
SOFT = STRAIGHT.replace("a = MatMul(r1, va)", "za = MatMul(r1, va)\n    a = Softmax(za)")
SOFT = SOFT.replace("b = MatMul(r2, vb)", "zb = MatMul(r2, vb)\n    b = Softmax(zb)")
SOFT = SOFT.replace("c = MatMul(h3, vc)", "zc = MatMul(h3, vc)\n    c = Softmax(zc)")


def outside(path: Path, location: str, **entries: str) -> Path:
    """A file whose weights are said to be at `location`, with other entries of their place."""
    model = onnx.load(write(path / "whole.onnx", STRAIGHT))
    folder = path / "weights"
    folder.mkdir()
    onnx.save(
        model, folder / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
            entry.value = entries.get(entry.key, entry.value)
    place = path / "place"
    place.mkdir()
    (place / "m.onnx").write_bytes(model.SerializeToString())
    return place / "m.onnx"


def test_links_are_followed_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    path = outside(tmp_path, "w.data")
    blob = tmp_path / "blobs"
    blob.mkdir()
    os.replace(tmp_path / "weights/w.data", blob / "0123abcd")
    os.replace(path, blob / "4567cdef")
    path.symlink_to(blob / "4567cdef")
    (path.parent / "w.data").symlink_to(blob / "0123abcd")
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b", "c"])
    check_bundle(bundle, tmp_path / "whole.onnx", ["a", "b", "c"], FEEDS)


@pytest.mark.parametrize(
    "entries,words",
    [
        ({"offset": "-4"}, "in w.data with the offset '-4', which is not a number of bytes"),
        ({"offset": "banana"}, "in w.data with the offset 'banana'"),
        ({"length": "1e3"}, "in w.data with the length '1e3'"),
        ({"length": "8"}, "256 bytes by its shape, but a length of 8 in w.data"),
    ],
)
def test_a_wrong_place_of_weights_is_named(
    entries: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = outside(tmp_path, "w.data", **entries)
    os.replace(tmp_path / "weights/w.data", path.parent / "w.data")
    with pytest.raises(ExportError, match=words):
        export_onnx(path, tmp_path / "b", exits=["a", "b", "c"])


@pytest.mark.parametrize("where", ["parent", "absolute"])
def test_weights_outside_of_the_folder_are_refused(tmp_path: Path, where: str) -> None:
    location = "../weights/w.data" if where == "parent" else str(tmp_path / "weights/w.data")
    with pytest.raises(ExportError, match=r"outside the file's folder.*Move the weights"):
        export_onnx(outside(tmp_path, location), tmp_path / "b", exits=["a", "b", "c"])


def test_a_size_of_minus_one_is_any_size(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, path)
    check_bundle(
        export_onnx(path, tmp_path / "b", exits=["a", "b", "c"]), path, ["a", "b", "c"], FEEDS
    )


def passes_on(name: str, operator: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph(
        [helper.make_node(operator, ["r1"], [name])], f"{name}_graph", [], [value]
    )


def with_branches(path: Path, *, in_loop: bool) -> Path:
    """An If whose two branches return the same outer value; or the same If inside a Loop."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("MatMul", ["r1", "va"], ["a"]),
        helper.make_node("Shape", ["r1"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["width"]),
        helper.make_node("Greater", ["width", "one"], ["wide"]),
    ]
    if in_loop:
        bool_, float_ = TensorProto.BOOL, TensorProto.FLOAT
        info = helper.make_tensor_value_info
        choice = helper.make_node(
            "If",
            ["wide"],
            ["chosen"],
            then_branch=passes_on("i1", "Identity"),
            else_branch=passes_on("n1", "Neg"),
        )
        body = helper.make_graph(
            [
                choice,
                helper.make_node("Add", ["state", "chosen"], ["next"]),
                helper.make_node("Identity", ["on"], ["still"]),
            ],
            "body",
            [info("i", TensorProto.INT64, []), info("on", bool_, []), info("state", float_, None)],
            [info("still", bool_, []), info("next", float_, None)],
        )
        nodes.append(helper.make_node("Loop", ["three", "true", "r1"], ["joined"], body=body))
    else:
        for number in (1, 2):
            branches = {
                "then_branch": passes_on(f"i{number}", "Identity"),
                "else_branch": passes_on(f"n{number}", "Neg"),
            }
            nodes.append(helper.make_node("If", ["wide"], [f"br{number}"], **branches))
        nodes.append(helper.make_node("Add", ["br1", "br2"], ["joined"]))
    nodes += [
        helper.make_node("MatMul", ["joined", "w2"], ["h2"]),
        helper.make_node("MatMul", ["h2", "vb"], ["b"]),
    ]
    seed = np.random.RandomState(3)
    weights = [
        numpy_helper.from_array(seed.randn(*WEIGHTS_8[name]).astype(np.float32) / 3, name)
        for name in ("w1", "w2", "va", "vb")
    ]
    weights += [
        numpy_helper.from_array(np.array(1), "one"),
        numpy_helper.from_array(np.array(3), "three"),
        numpy_helper.from_array(np.array(True), "true"),
    ]
    rows = {name: ["N", size] for name, size in (("x", 8), ("a", 3), ("b", 3))}
    value = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in rows.items()
    }
    graph = helper.make_graph(nodes, "g", [value["x"]], [value["a"], value["b"]], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("in_loop", [False, True])
def test_branches_may_hand_outer_values_on(tmp_path: Path, in_loop: bool) -> None:
    path = with_branches(tmp_path / "m.onnx", in_loop=in_loop)
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b"])
    expected = answers_of(path, ["a", "b"], FEEDS)
    with load(bundle) as model:
        made = model.trace(FEEDS).outputs
    for found, wanted in zip(made, expected, strict=True):
        np.testing.assert_allclose(found["logits"], wanted, rtol=1e-3, atol=1e-5)


def test_probabilities_are_seen_and_scored_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "m.onnx", SOFT)
    with caplog.at_level(logging.WARNING):
        bundle = export_onnx(path, tmp_path / "b", exits=["a", "b", "c"])
    assert "the exits give probabilities (output of a Softmax)" in caplog.text
    expected = answers_of(path, ["a", "b", "c"], FEEDS)
    with load(bundle, all_scores=True) as model:
        trace = model.trace(FEEDS)
    for made, scores, wanted in zip(trace.outputs, trace.scores, expected, strict=True):
        np.testing.assert_allclose(made["logits"], wanted, rtol=1e-4, atol=1e-6)
        assert np.allclose(scores["max_prob"], wanted.max(-1), atol=1e-6)
        for name, value in reference_scores(np.log(wanted)).items():
            np.testing.assert_allclose(scores[name], value, atol=1e-5)


def test_probabilities_of_nothing_but_one_class_have_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", SOFT)
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b", "c"], outputs="probabilities")
    with load(bundle, all_scores=True) as model:
        trace = model.trace({"x": 1e4 * FEEDS["x"]})
    for scores in trace.scores:
        for name, value in scores.items():
            np.testing.assert_allclose(value, 1.0, atol=1e-4, err_msg=name)


def test_the_user_says_what_exits_give(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", SOFT)
    bundle = export_onnx(path, tmp_path / "b", exits=["a", "b", "c"], outputs="logits")
    [expected] = answers_of(path, ["a"], FEEDS)
    with load(bundle, all_scores=True) as model:
        found = model.trace(FEEDS).scores[0]["max_prob"]
    np.testing.assert_allclose(found, reference_scores(expected)["max_prob"], atol=1e-6)
    with pytest.raises(UsageError, match="outputs='odds'"):
        export_onnx(path, tmp_path / "c", exits=["a", "b"], outputs="odds")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, message",
    [
        (SOFT.replace("a = Softmax(za)", "a = Sigmoid(za)"), "exit a is the output of a Sigmoid"),
        (SOFT.replace("a = Softmax(za)", "a = Relu(za)"), "exit b gives probabilities"),
    ],
)
def test_what_is_no_distribution_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(write(tmp_path / "m.onnx", text), tmp_path / "b", exits=["a", "b", "c"])


def test_a_name_that_is_nearly_one_gets_a_hint(tmp_path: Path) -> None:
    text = STRAIGHT.replace(" a,", " head_1_output,").replace("    a =", "    head_1_output =")
    path = write(tmp_path / "m.onnx", text)
    with pytest.raises(ExportError, match=r"Did you mean 'head_1_output'\?"):
        export_onnx(path, tmp_path / "b", exits=["head_1_outputs", "c"])


def test_an_export_works_beside_the_pool_of_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", STRAIGHT)
    code = (
        "import sys, numpy as np\n"
        "from edgeexit.export import export_onnx\n"
        "from edgeexit.runtime import load\n"
        "path, folder = sys.argv[1:]\n"
        "export_onnx(path, f'{folder}/b1', exits=['a', 'c'])\n"
        "with load(f'{folder}/b1', threads='process') as model:\n"
        "    model({'x': np.zeros((1, 8), np.float32)})\n"
        "export_onnx(path, f'{folder}/b2', exits=['a', 'c'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b2/manifest.json").is_file()
