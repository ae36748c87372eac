"""The ONNX reader of the device: the same names as onnx finds, and a reason for everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgeexit.bundle.onnx_wire import (
    External,
    fix_axes,
    keep_outputs,
    read_graph_file,
    sign_numbers,
)
from edgeexit.bundle.reader import Bundle


@pytest.mark.parametrize("name", ["s0", "s1", "s2", "s3", "unsplit"])
def test_names_and_external_tensors_are_those_that_onnx_reads(
    toy_bundle: Bundle, name: str
) -> None:
    path = toy_bundle.path / f"graphs/{name}.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    found = read_graph_file(path.read_bytes())
    assert found.inputs == [value.name for value in graph.input]
    assert found.outputs == [value.name for value in graph.output]
    assert found.initializers == {tensor.name for tensor in graph.initializer}
    entries = [
        (tensor.name, {entry.key: entry.value for entry in tensor.external_data})
        for tensor in graph.initializer
        if tensor.external_data
    ]
    assert found.externals == [
        External(name, data["location"], int(data["offset"]), int(data["length"]))
        for name, data in entries
    ]
    assert found.externals


def test_a_trimmed_graph_gives_the_same_and_runs_nothing_else(toy_bundle: Bundle) -> None:
    path = toy_bundle.path / "graphs/s1.onnx"
    whole = onnx.load(path)
    outputs = [value.name for value in whole.graph.output]
    kept = [name for name in outputs if not name.startswith(("margin", "entropy"))]
    assert len(kept) == len(outputs) - 2
    trimmed = onnx.load_from_string(keep_outputs(whole.SerializeToString(), kept))
    assert [value.name for value in trimmed.graph.output] == kept
    assert len(trimmed.graph.node) < len(whole.graph.node)
    used = {name for node in trimmed.graph.node for name in node.input}
    assert {tensor.name for tensor in trimmed.graph.initializer} <= used
    onnx.checker.check_model(trimmed, full_check=True)
    generator = np.random.default_rng(0)
    initial = {tensor.name for tensor in whole.graph.initializer}
    feeds = {
        value.name: generator.normal(
            size=[axis.dim_value or 3 for axis in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in whole.graph.input
        if value.name not in initial
    }
    expected = ReferenceEvaluator(whole).run(kept, feeds)
    for made, right in zip(ReferenceEvaluator(trimmed).run(kept, feeds), expected, strict=True):
        np.testing.assert_array_equal(made, right)


def test_named_axes_become_numbers_wherever_they_stand(toy_bundle: Bundle) -> None:
    whole = onnx.load(toy_bundle.path / "graphs/s1.onnx")
    whole.graph.value_info.append(
        helper.make_tensor_value_info("between", TensorProto.FLOAT, ["batch", "other", 3, None])
    )
    raw = whole.SerializeToString()
    fixed = onnx.load_from_string(fix_axes(raw, {"batch": 5, "past": 7}))

    def axes(model: onnx.ModelProto) -> dict[str, list[object]]:
        graph = model.graph
        return {
            value.name: [
                getattr(axis, axis.WhichOneof("value")) if axis.WhichOneof("value") else None
                for axis in value.type.tensor_type.shape.dim
            ]
            for value in [*graph.input, *graph.output, *graph.value_info]
        }

    before = axes(whole)
    assert before["between"] == ["batch", "other", 3, None]
    assert axes(fixed) == {
        name: [5 if axis == "batch" else axis for axis in found] for name, found in before.items()
    }
    for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info):
        value.type.tensor_type.shape.Clear()
    for value in (*whole.graph.input, *whole.graph.output, *whole.graph.value_info):
        value.type.tensor_type.shape.Clear()
    assert fixed == whole
    assert onnx.load_from_string(fix_axes(raw, {})) == onnx.load_from_string(raw)


def test_trimming_keeps_what_a_subgraph_takes_from_outside() -> None:
    def branch(name: str, taken: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])
        return helper.make_graph([helper.make_node("Neg", [taken], [name])], name, [], [made])

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Abs", ["x"], ["outside"]),
            helper.make_node("Exp", ["x"], ["unused"]),
            helper.make_node(
                "If",
                ["flag"],
                ["y"],
                then_branch=branch("a", "outside"),
                else_branch=branch("b", "x"),
            ),
        ],
        "g",
        [value("x", TensorProto.FLOAT, [2]), value("flag", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [2]), value("unused", TensorProto.FLOAT, [2])],
    )
    data = keep_outputs(helper.make_model(graph).SerializeToString(), ["y"])
    assert [node.op_type for node in onnx.load_from_string(data).graph.node] == ["Abs", "If"]


def test_inputs_with_a_default_are_not_inputs() -> None:
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])],
    )
    found = read_graph_file(helper.make_model(graph).SerializeToString())
    assert (found.inputs, found.outputs) == ([], ["y"])


def external_tensor(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=f"{name}.bin")
    return tensor


def attribute_graph(tensor: TensorProto) -> onnx.GraphProto:
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    return helper.make_graph([node], "inner", [], [])


def sparse(name: str) -> onnx.SparseTensorProto:
    found = onnx.SparseTensorProto(dims=[4])
    found.values.CopyFrom(external_tensor(name))
    found.indices.CopyFrom(external_tensor(f"{name}_indices"))
    return found


def model_with_tensors_everywhere() -> onnx.ModelProto:
    """A model with an external tensor in every place that can hold one."""
    nodes = [
        helper.make_node("A", [], ["a"], value=external_tensor("attribute")),
        helper.make_node("B", [], ["b"], values=[external_tensor("listed")]),
        helper.make_node("C", [], ["c"], body=attribute_graph(external_tensor("nested"))),
        helper.make_node("D", [], ["d"], bodies=[attribute_graph(external_tensor("deep"))]),
        helper.make_node("E", [], ["e"], value=sparse("sparse_attribute")),
    ]
    graph = helper.make_graph(
        nodes, "g", [], [], [external_tensor("initializer")], sparse_initializer=[sparse("sparse")]
    )
    function = helper.make_function(
        "own", "F", [], ["f"],
        [helper.make_node("G", [], ["f"], value=external_tensor("function"))],
        [helper.make_opsetid("", 20)],
        attribute_protos=[helper.make_attribute("k", external_tensor("function_default"))],
    )  # fmt: skip
    return helper.make_model(graph, functions=[function])


def test_external_tensors_are_found_wherever_they_hide() -> None:
    found = read_graph_file(model_with_tensors_everywhere().SerializeToString())
    assert {one.tensor for one in found.externals} == {
        "attribute", "listed", "nested", "deep", "initializer", "function", "function_default",
        "sparse", "sparse_indices", "sparse_attribute", "sparse_attribute_indices",
    }  # fmt: skip
    assert all(one.length is None for one in found.externals)


def nested(depth: int) -> bytes:
    graph = attribute_graph(external_tensor("core"))
    for _ in range(depth):
        node = helper.make_node("If", [], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "outer", [], [])
    return helper.make_model(graph).SerializeToString()


def test_deep_nesting_is_read_to_a_limit_and_refused_beyond_it() -> None:
    assert [one.tensor for one in read_graph_file(nested(10)).externals] == ["core"]
    with pytest.raises(ValueError, match="nested deeper"):
        read_graph_file(nested(20))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "no graph"),
        (b"\x08\x0a", "no graph"),
        (b"\x3a\x00\x3a\x00", "more than one graph"),
        (b"\x3a\x05", "middle of a field"),
        (b"\x3a\xff", "middle of a number"),
        (b"\x3a" + b"\xff" * 11, "middle of a number"),
        (b"\x38\x01", "it has a number instead of a message"),
        (b"\x3b", "wire type 3"),
        (b"\xba\x80\x80\x80\x80\x01\x00", "field number too large"),
        (b"\xa2\x01\x00", "training"),
    ],
)
def test_other_bytes_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_graph_file(data)


@given(st.binary(max_size=200))
@example(b"\x3a\x02\x0a\xff")
def test_any_bytes_are_read_or_refused_with_value_error(data: bytes) -> None:
    try:
        found = read_graph_file(data)
    except ValueError as error:
        assert str(error)
    else:
        assert not set(found.inputs) & found.initializers


@given(st.data())
def test_cut_models_are_refused(data: st.DataObject) -> None:
    raw = model_with_tensors_everywhere().SerializeToString()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    try:
        model = onnx.ModelProto()
        model.ParseFromString(cut)
        whole = model.HasField("graph")
    except Exception:
        whole = False
    if whole:
        read_graph_file(cut)
    else:
        with pytest.raises(ValueError, match="."):
            read_graph_file(cut)


@pytest.mark.parametrize("kind", [TensorProto.UINT4, TensorProto.UINT8])
@pytest.mark.parametrize("apart", [False, True])
def test_numbers_in_blocks_become_signed_ones(
    kind: TensorProto.DataType, apart: bool, tmp_path: Path
) -> None:
    """Numbers in the file and in a file of their own; what is not in blocks stays."""
    random, rows, width, block = np.random.default_rng(1), 3, 32, 16
    bits = 4 if kind == TensorProto.UINT4 else 8
    half = 0x88 if bits == 4 else 0x80

    def numbers(name: str, shape: tuple[int, ...], fill: int | None = None) -> TensorProto:
        count = -(-int(np.prod(shape)) * bits // 8)
        raw = random.integers(0, 256, count) if fill is None else np.full(count, fill)
        return helper.make_tensor(name, kind, shape, raw.astype(np.uint8).tobytes(), raw=True)

    scales = helper.make_tensor("scales", TensorProto.FLOAT, (rows, 2), np.arange(1, 7) / 8)
    whole_scale = helper.make_tensor("scale", TensorProto.FLOAT, (), [0.5])
    tensors = [numbers("numbers", (rows, width)), scales, numbers("zero", (rows, 2), half)]
    tensors += [numbers("other", (rows, width)), whole_scale]
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["numbers", "scales", "zero"], ["y"], axis=1, block_size=block
        ),
        helper.make_node("DequantizeLinear", ["other", "scale"], ["z"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name in "yz"
    ]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    opset = [helper.make_opsetid("", 21)]
    path = tmp_path / "m.onnx"
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, path, save_as_external_data=apart, location="w.bin", size_threshold=16)
    expected = ReferenceEvaluator(onnx.load(path)).run(None, {})
    signed = onnx.load_from_string(sign_numbers(path.read_bytes(), tmp_path))
    types = {tensor.name: tensor.data_type for tensor in signed.graph.initializer}
    assert types["numbers"] == types["zero"] != types["other"] == kind
    zero = next(t for t in signed.graph.initializer if t.name == "zero")
    assert not any(zero.raw_data)
    onnx.load_external_data_for_model(signed, str(tmp_path))
    for made, right in zip(ReferenceEvaluator(signed).run(None, {}), expected, strict=True):
        np.testing.assert_array_equal(made, right)
