"""`inspect` tells sizes that follow from the manifest and the files themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.bundle.reader import Bundle
from edgeexit.measure.inspect import axis_sizes, describe, tensor_bytes
from tests.decoder_toys import make_decoder_toy, write_decoder_toy


def test_describe_counts_what_crosses_each_boundary(bert_bundle: Bundle) -> None:
    found = describe(bert_bundle, axis_sizes(bert_bundle, {"seq": 10}))
    segments = found["chains"]["main"]["components"]
    state, mask = 10 * 32 * 4, 10 * 4
    assert [part["boundary_bytes"] for part in segments] == [state + mask] * 3 + [0]
    assert found["axis_sizes"] == {"batch": 1, "seq": 10}
    assert [leave["name"] for part in segments for leave in part["exits"]] == [
        f"exit_{number}" for number in range(1, 5)
    ]
    assert found["labels"] == ["bad", "fair", "good"]
    store = (bert_bundle.path / "graphs/weights.bin").stat().st_size
    graphs = [bert_bundle.path / part["graphs"][0]["graph"] for part in segments]
    inline = sum(map(inline_bytes, graphs))  # the unsplit graph holds the same weights
    assert found["weights_bytes"] == store + inline > store


def inline_bytes(path: Path) -> int:
    """Bytes of the weights that a graph holds itself."""
    graph = onnx.load(str(path), load_external_data=False).graph
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    inline = [t for t in graph.initializer if not t.external_data and t.data_type in kinds]
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in inline)


def test_weights_of_a_model_too_small_for_the_store_are_counted(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([1, 3]), "shape")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, 1, None) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:], [weight, shape])
    assert read_graph_file(onnx.helper.make_model(graph).SerializeToString()).inline_bytes == 24


def test_describe_counts_weights_of_each_graph(toy_bundle: Bundle) -> None:
    found = describe(toy_bundle, axis_sizes(toy_bundle))
    segments = found["chains"]["forward"]["components"]
    assert [part["graphs"][0]["weights_bytes"] for part in segments] == [(36 + 18 + 2) * 4] * 4
    assert found["chains"]["forward"]["unsplit"][0]["weights_bytes"] >= (4 * 36 + 18) * 4


def test_axis_sizes_are_those_of_the_samples_when_none_are_given(bert_bundle: Bundle) -> None:
    assert axis_sizes(bert_bundle) == {"batch": 1, "seq": 32}


@pytest.mark.parametrize(
    "axes,expected", [(["batch", 3], 24), (["batch", None], None), (["batch", "seq"], None)]
)
def test_tensor_bytes_are_unknown_when_an_axis_is(axes: list, expected: int | None) -> None:
    tensor = Tensor(name="t", dtype="float32", axes=axes)
    assert tensor_bytes(tensor, {"batch": 2}) == expected


@pytest.mark.parametrize("gone", [[], [2], [1, 4]])
def test_layers_without_attention_are_those_without_states(
    decoder_bundle: Callable[[str], Bundle], gone: list[int]
) -> None:
    """Also the last one: exits are named after layers, too."""
    bundle = decoder_bundle("llama")
    names = {f"layer_{number}" for number in gone}
    components = {
        name: msgspec.structs.replace(
            component,
            states=[state for state in component.states if state.name.split("/")[0] not in names],
        )
        for name, component in bundle.manifest.components.items()
    }
    manifest = msgspec.structs.replace(bundle.manifest, components=components)
    rewritten = dataclasses.replace(bundle, manifest=manifest)
    assert describe(rewritten, axis_sizes(rewritten))["layers_without_attention"] == gone


def test_describe_tells_states_exits_and_their_paths_of_every_chain(tmp_path: Path) -> None:
    toy = make_decoder_toy(gate=True, prefix=True, stateless=True, adapter=1)
    bundle = write_decoder_toy(toy, tmp_path / "bundle")
    found = describe(bundle, axis_sizes(bundle, {"new": 1}))
    assert found["writes"] and found["steps"][0] == "run vision (input)"
    parts = found["chains"]["decoder"]["components"]
    assert [part["state_bytes_per_token"] for part in parts] == [32, 32, 0, 32]
    assert [part["boundary_bytes"] for part in parts] == [32, 32, 32, 0]
    assert parts[2]["prompt_states"] == [{"name": "prompt_mean", "made_by": "mean"}]
    gate, stop = parts[1]["exits"]
    assert (gate["action"], gate["tokens"], stop["action"]) == ("drop", "image", "stop")
    assert [part["name"] for part in gate["path"]] == ["gate"]
    assert [part["name"] for part in stop["path"]] == ["adapter", "head"]
    assert stop["path"][0]["state_bytes_per_token"] == 32
    vision = found["chains"]["vision"]
    assert [part["boundary_bytes"] for part in vision["components"]] == [40, 0]
    assert [graph["graph"] for graph in vision["unsplit"]] == ["graphs/vision_unsplit.onnx"]
