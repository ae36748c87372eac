"""What few files hold: scans, functions of other opsets, maps, sparse weights, shadowed names; and
what ONNX Runtime says of files that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeexit.errors import ExportError, InputError
from edgeexit.export import export_onnx
from edgeexit.export.evaluate import engine_reason, run_graph
from edgeexit.measure.data import open_data
from edgeexit.measure.trace import record
from edgeexit.runtime import load
from tests.export.cut.test_cut import STRAIGHT, check_bundle, write

EXITS = ["a", "b"]
SEED = np.random.default_rng(11)
WEIGHTS = {"w1": (8, 8), "w2": (8, 8), "va": (8, 3), "vb": (8, 3)}


def numbers(*shape: int) -> np.ndarray:
    return SEED.standard_normal(shape).astype(np.float32) / 3


def value(name: str, shape: Sequence[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def between(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    opset: int = 18,
    functions: Sequence[onnx.FunctionProto] = (),
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """Two exits, with nodes between them that make ``r1`` of ``h1``."""
    arrays = {name: numbers(*shape) for name, shape in WEIGHTS.items()} | (more or {})
    every = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"]),
        *nodes,
        helper.make_node("MatMul", ["r1", "va"], ["a"]),
        helper.make_node("MatMul", ["r1", "w2"], ["h2"]),
        helper.make_node("MatMul", ["h2", "vb"], ["b"]),
    ]
    graph = helper.make_graph(
        every,
        "g",
        [value("x", ["N", 8])],
        [value("a", ["N", 3]), value("b", ["N", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in {f.domain for f in functions}]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=list(functions), ir_version=4 if opset < 10 else 9
    )
    onnx.save(model, path)
    return path


def exported(tmp_path: Path, path: Path) -> None:
    bundle = export_onnx(path, tmp_path / "bundle", exits=EXITS, overwrite=True)
    assert bundle.manifest.chains["main"].rows == "independent"
    check_bundle(bundle, path, EXITS, {"x": 3 * numbers(5, 8)})


def test_a_scan_may_use_what_is_made_outside_of_it(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["xi", "outer"], ["q"]),
            helper.make_node("Add", ["s", "q"], ["n"]),
            helper.make_node("Identity", ["n"], ["y"]),
        ],
        "body",
        [value("s"), value("xi")],
        [value("n"), value("y")],
    )
    nodes = [
        helper.make_node("Relu", ["h1"], ["outer"]),
        helper.make_node("Unsqueeze", ["h1", "one"], ["steps"]),
        helper.make_node(
            "Scan",
            ["h1", "steps"],
            ["r1", "every"],
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[1],
            scan_output_axes=[1],
        ),
    ]
    exported(tmp_path, between(tmp_path / "m.onnx", nodes, more={"one": np.array([1])}))


@pytest.mark.parametrize("opset", [13, 18])
def test_functions_are_inlined_whatever_opset_they_are_in(tmp_path: Path, opset: int) -> None:
    inside = [
        helper.make_node("ReduceSum", ["X", "A"], ["S"], keepdims=1),
        helper.make_node("Add", ["X", "S"], ["Y"]),
    ]
    function = helper.make_function(
        "own", "AddSum", ["X", "A"], ["Y"], inside, [helper.make_opsetid("", opset)]
    )
    call = helper.make_node("AddSum", ["h1", "one"], ["r1"], domain="own")
    path = between(tmp_path / "m.onnx", [call], functions=[function], more={"one": np.array([1])})
    exported(tmp_path, path)


def test_a_function_that_cannot_be_inlined_is_refused_with_the_reason(tmp_path: Path) -> None:
    """onnx's inliner converts both calls with the same names for their new constants."""
    inside = [
        helper.make_node("ReduceMean", ["X"], ["S"], axes=[1], keepdims=1),
        helper.make_node("Add", ["X", "S"], ["Y"]),
    ]
    function = helper.make_function(
        "own", "AddMean", ["X"], ["Y"], inside, [helper.make_opsetid("", 13)]
    )
    calls = [
        helper.make_node("AddMean", ["h1"], ["once"], domain="own"),
        helper.make_node("AddMean", ["once"], ["r1"], domain="own"),
    ]
    path = between(tmp_path / "m.onnx", calls, functions=[function])
    with pytest.raises(ExportError, match=r"in opset 13, the graph in 18.*redeclared"):
        export_onnx(path, tmp_path / "b", exits=EXITS)


IDS = """<ir_version: 8, opset_import: ["" : 18]>
g (int64[N, T] ids) => (float[N, 3] a, float[N, 3] b) {
    embedded = Gather(table, ids)
    h0 = ReduceMean <keepdims = 0> (embedded, one)
    h1 = MatMul(h0, w1)
    a = MatMul(h1, va)
    h2 = MatMul(h1, w1)
    b = MatMul(h2, vb)
}
"""


def test_ids_outside_of_the_table_are_named(tmp_path: Path) -> None:
    shapes = {"table": (20, 8), "w1": (8, 8), "va": (8, 3), "vb": (8, 3)}
    path = write(tmp_path / "m.onnx", IDS, shapes, {"one": np.array([1])})
    ids = np.arange(12).reshape(3, 4)
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS, samples={"ids": ids})
    ids[2, 1] = 20
    said = (
        r"ids: the id 20 \(row 2 of the batch, position 1\) is not in the model's table \(0 to 19\)"
    )
    with pytest.raises(ExportError, match=said):
        export_onnx(path, tmp_path / "c", exits=EXITS, samples={"ids": ids})
    with load(bundle) as model:
        for answer in (model, model.trace):
            with pytest.raises(InputError, match=said):
                answer({"ids": ids})
        with pytest.raises(InputError, match=r"ids: the id 20 \(position 1\)"):
            model({"ids": ids[2:]})
        np.savez(tmp_path / "data.npz", ids=ids)
        data = open_data(tmp_path / "data.npz", bundle)
        with pytest.raises(InputError, match="row 2: ids: the id 20"):
            record(model, data, batch_size=1)


def test_old_operators_are_converted_also_inside_of_branches(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Clip", ["h1"], ["c"], min=-1.0, max=1.0),
        helper.make_node("Unsqueeze", ["c"], ["u"], axes=[1]),
        helper.make_node("Upsample", ["u"], ["up"], mode="nearest", scales=[1.0, 1.0, 1.0]),
        helper.make_node("Squeeze", ["up"], ["r1"], axes=[1]),
    ]
    exported(tmp_path, between(tmp_path / "seven.onnx", nodes, opset=7))
    branch = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["h1"], ["q"], axes=[1], keepdims=1),
            helper.make_node("Mul", ["q", "h1"], ["t"]),
        ],
        "then",
        [],
        [value("t")],
    )
    other = helper.make_graph([helper.make_node("Neg", ["h1"], ["e"])], "else", [], [value("e")])
    nodes = [
        helper.make_node("Shape", ["h1"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["width"]),
        helper.make_node("Greater", ["width", "one"], ["wide"]),
        helper.make_node("If", ["wide"], ["r1"], then_branch=branch, else_branch=other),
    ]
    exported(
        tmp_path, between(tmp_path / "twelve.onnx", nodes, opset=12, more={"one": np.array(1)})
    )


def test_an_opset_is_no_reason_to_refuse_operators_that_did_not_change(tmp_path: Path) -> None:
    text = STRAIGHT.replace(": 18]", ": 25]")
    bundle = export_onnx(write(tmp_path / "m.onnx", text), tmp_path / "b", exits=["a", "b", "c"])
    assert bundle.manifest.provenance["opset"] == "23"


def test_an_operator_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "i"], ["n"]), helper.make_node("Identity", ["n"], ["y"])],
        "body",
        [value("s", [8]), value("i", [8])],
        [value("n", [8]), value("y", [8])],
    )
    nodes = [
        helper.make_node("Unsqueeze", ["h1"], ["u"], axes=[1]),
        helper.make_node("Scan", ["", "h1", "u"], ["r1", "every"], body=body, num_scan_inputs=1),
    ]
    path = between(tmp_path / "m.onnx", nodes, opset=8)
    with pytest.raises(ExportError, match="opset 8, and Scan cannot be converted to 18"):
        export_onnx(path, tmp_path / "b", exits=EXITS)


def test_maps_of_other_libraries_are_left_out_or_their_tensor_is_named(tmp_path: Path) -> None:
    path = between(tmp_path / "m.onnx", [helper.make_node("Relu", ["h1"], ["r1"])])
    model = onnx.load(path)
    model.graph.node.append(
        helper.make_node(
            "ZipMap", ["b"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
        )
    )
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, tensor))
    model.graph.output.append(helper.make_value_info("maps", maps))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, path)
    exported(tmp_path, path)
    with pytest.raises(
        ExportError, match="'maps' is a list of maps.*Name b, which it is computed from"
    ):
        export_onnx(path, tmp_path / "other", exits=["a", "maps"])


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_weights_become_dense(tmp_path: Path, flat: bool) -> None:
    path = between(tmp_path / "m.onnx", [helper.make_node("Relu", ["h1"], ["r1"])])
    model = onnx.load(path)
    [index] = [n for n, t in enumerate(model.graph.initializer) if t.name == "w1"]
    dense = numpy_helper.to_array(model.graph.initializer[index]).copy()
    dense[np.abs(dense) < 0.2] = 0
    del model.graph.initializer[index]
    places = np.flatnonzero(dense) if flat else np.argwhere(dense)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(dense[dense != 0], "w1"),
        numpy_helper.from_array(places.astype(np.int64), "places"),
        list(dense.shape),
    )
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, path)
    exported(tmp_path, path)


def test_names_inside_of_branches_may_shadow_names_outside(tmp_path: Path) -> None:
    shadow = helper.make_graph(
        [helper.make_node("Mul", ["h1", "w2"], ["h2"])],
        "then",
        [],
        [value("h2")],
        [numpy_helper.from_array(np.full(8, 0.5, np.float32), "w2")],
    )
    other = helper.make_graph([helper.make_node("Abs", ["h1"], ["h2"])], "else", [], [value("h2")])
    nodes = [
        helper.make_node("Shape", ["h1"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["width"]),
        helper.make_node("Greater", ["width", "one"], ["wide"]),
        helper.make_node("If", ["wide"], ["r1"], then_branch=shadow, else_branch=other),
    ]
    exported(tmp_path, between(tmp_path / "m.onnx", nodes, more={"one": np.array(1)}))


def test_reasons_of_onnxruntime_are_whole(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["h1", "long"], ["r1"], name="/encoder/layer.3/Add")]
    path = between(tmp_path / "m.onnx", nodes, more={"long": numbers(4, 8)})
    with pytest.raises(ExportError) as caught:
        run_graph(path, [{"x": numbers(3, 8)}])
    assert "/encoder/layer.3/Add" in str(caught.value)
    assert "axis == 1 || axis == largest was false" in str(caught.value)
    assert "3 by 4" in str(caught.value)
    assert ".cc:" not in str(caught.value) and "ONNXRuntimeError" not in str(caught.value)


def test_a_long_reason_keeps_its_end() -> None:
    said = engine_reason(
        RuntimeError("[ONNXRuntimeError] : 1 : FAIL : " + "x" * 900 + " the cause")
    )
    assert said.startswith("xxx") and said.endswith("the cause") and len(said) < 500
