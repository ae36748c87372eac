"""A small model with exits, written as ONNX by hand: bundles in milliseconds, without torch.

Each segment is ``h' = tanh(scale h W + shift)``, its exit ``logits = h' H`` and the three scores.
`shift` is an input of the program that every segment takes, so it must be compacted with the rows;
`scale` is the same for all rows and must not be. `reference` computes the same in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeexit.bundle.manifest import Chain, Exit, File, Manifest, Segment, Tensor, Variant
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter

WIDTH, CLASSES = 6, 3
SCORE_NAMES = ("max_prob", "margin", "entropy")


@dataclass(frozen=True)
class Toy:
    """Weights of the model and how its bundle describes it.

    Attributes:
        layers: ``(W [taken, made], H [made, CLASSES])`` per segment; the first takes WIDTH.
        rows: As in `edgeexit.bundle.manifest.Chain`.
        open_axes: The states' sizes are left open (null) in the manifest.
        rows_last: States are ``[WIDTH, batch]``, with rows along axis 1.
    """

    layers: list[tuple[NDArray, NDArray]]
    rows: Literal["independent", "together"] = "independent"
    open_axes: bool = False
    rows_last: bool = False


def make_toy(widths: tuple[int, ...] = (WIDTH,) * 4, *, seed: int = 0, **options: object) -> Toy:
    """Random weights, large enough that scores differ between rows and exits.

    `widths` are the sizes of the states that the segments make.
    """
    random = np.random.default_rng(seed)
    layers = [
        (
            random.normal(0, 1.2, (taken, made)).astype(np.float32),
            random.normal(0, 1.5, (made, CLASSES)).astype(np.float32),
        )
        for taken, made in zip((WIDTH, *widths), widths)  # noqa: B905 the last makes nothing more
    ]
    return Toy(layers, **options)  # type: ignore[arg-type]


def make_inputs(rows: int, *, seed: int = 1) -> dict[str, NDArray]:
    """Inputs of the toy."""
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(rows, WIDTH)).astype(np.float32),
        "shift": random.normal(0, 0.5, (rows, 1)).astype(np.float32),
        "scale": np.array([1.25], np.float32),
    }


def reference(toy: Toy, inputs: dict[str, NDArray]) -> list[dict[str, NDArray]]:
    """Every exit's logits and scores, in float64."""
    state = inputs["x"].astype(np.float64)
    found = []
    for weights, head in toy.layers:
        state = np.tanh(state @ weights.astype(np.float64) * inputs["scale"] + inputs["shift"])
        logits = state @ head.astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        ordered = np.sort(p, -1)
        found.append(
            {
                "logits": logits,
                "max_prob": ordered[:, -1],
                "margin": ordered[:, -1] - ordered[:, -2],
                "entropy": 1 + (p * np.log(p)).sum(-1) / math.log(CLASSES),
            }
        )
    return found


def write_toy(toy: Toy, output: Path, *, overwrite: bool = False) -> Bundle:
    """Writes the toy as a bundle."""
    with BundleWriter(output, overwrite=overwrite) as writer:
        return writer.commit(fill_toy(toy, writer.folder))


def fill_toy(toy: Toy, folder: Path) -> Manifest:
    """Writes graphs, weights and samples into `folder`; returns the manifest to commit."""
    store = bytearray()
    places = [tuple(_store(store, array) for array in layer) for layer in toy.layers]
    (folder / "graphs").mkdir(exist_ok=True)
    (folder / "graphs/weights.bin").write_bytes(bytes(store))
    inputs = [
        Tensor(name="x", dtype="float32", axes=["batch", WIDTH]),
        Tensor(name="shift", dtype="float32", axes=["batch", 1]),
        Tensor(name="scale", dtype="float32", axes=[1], row_axis=None),
    ]
    logits = Tensor(name="logits", dtype="float32", axes=["batch", CLASSES])
    segments = []
    for number in range(len(toy.layers)):
        _write_segment(toy, folder, number, places[number])
        segments.append(_segment(toy, number, inputs))
    _write_unsplit(toy, folder, places)
    (folder / "samples").mkdir(exist_ok=True)
    sample = make_inputs(4, seed=7)
    exits = {
        f"exit_{number + 1}/{name}": value.astype(np.float32)
        for number, record in enumerate(reference(toy, sample))
        for name, value in record.items()
    }
    exits["unsplit/logits"] = exits[f"exit_{len(toy.layers)}/logits"]
    np.savez(
        folder / "samples/reference.npz",
        **{f"input/{name}": value for name, value in sample.items()},
        **exits,
    )
    return Manifest(
        format="1.0",
        name="toy",
        task="image-classification",
        program="forward",
        inputs=inputs,
        outputs=[logits],
        chains={"forward": Chain(segments=segments, rows=toy.rows)},
        unsplit=[Variant(graph="graphs/unsplit.onnx")],
        files={"graphs/unsplit.onnx": File(sha256="0" * 64, bytes=0)},
        samples=["samples/reference.npz"],
    )


def _segment(toy: Toy, number: int, inputs: list[Tensor]) -> Segment:
    state = inputs[0] if number == 0 else _state(toy, number - 1)
    outputs = [Tensor(name=f"logits_{number}", dtype="float32", axes=["batch", CLASSES])]
    outputs += [Tensor(name=f"{s}_{number}", dtype="float32", axes=["batch"]) for s in SCORE_NAMES]
    if number + 1 < len(toy.layers):
        outputs.insert(0, _state(toy, number))
    return Segment(
        name=f"s{number}",
        variants=[Variant(graph=f"graphs/s{number}.onnx")],
        inputs=[state, *inputs[1:]],
        outputs=outputs,
        exits=[
            Exit(
                name=f"exit_{number + 1}",
                outputs={"logits": f"logits_{number}"},
                scores={score: f"{score}_{number}" for score in SCORE_NAMES},
            )
        ],
    )


def _state(toy: Toy, number: int) -> Tensor:
    wide = None if toy.open_axes else toy.layers[number][0].shape[1]
    axes: list[str | int | None] = [wide, "batch"] if toy.rows_last else ["batch", wide]
    return Tensor(name=f"h{number}", dtype="float32", axes=axes, row_axis=int(toy.rows_last))


def _store(store: bytearray, array: NDArray) -> tuple[int, int]:
    offset = len(store)
    store += array.tobytes()
    return offset, array.nbytes


def _external(name: str, shape: tuple[int, ...], place: tuple[int, int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", place[0]), ("length", place[1])):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _layer(number: int, state: str, made: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", [state, f"W{number}"], [f"product{number}"]),
        helper.make_node("Mul", [f"product{number}", "scale"], [f"scaled{number}"]),
        helper.make_node("Add", [f"scaled{number}", "shift"], [f"sum{number}"]),
        helper.make_node("Tanh", [f"sum{number}"], [made]),
    ]


def _write_segment(
    toy: Toy, folder: Path, number: int, places: tuple[tuple[int, int], ...]
) -> None:
    last = number + 1 == len(toy.layers)
    weights, head = toy.layers[number]
    taken = "x" if number == 0 else f"h{number - 1}"
    nodes = []
    state = taken
    if toy.rows_last and number > 0:
        nodes.append(helper.make_node("Transpose", [taken], ["turned"], perm=[1, 0]))
        state = "turned"
    made = f"h{number}_rows" if toy.rows_last else f"h{number}"
    nodes += _layer(number, state, made)
    if toy.rows_last and not last:
        nodes.append(helper.make_node("Transpose", [made], [f"h{number}"], perm=[1, 0]))
    n = str(number)
    nodes += [
        helper.make_node("MatMul", [made, f"H{n}"], [f"logits_{n}"]),
        helper.make_node("Softmax", [f"logits_{n}"], ["p"], axis=-1),
        helper.make_node("LogSoftmax", [f"logits_{n}"], ["log_p"], axis=-1),
        helper.make_node("ReduceMax", ["p", "last_axis"], [f"max_prob_{n}"], keepdims=0),
        helper.make_node("TopK", ["p", "two"], ["top", "places"], axis=-1),
        helper.make_node("Split", ["top"], ["top1", "top2"], axis=-1, num_outputs=2),
        helper.make_node("Sub", ["top1", "top2"], ["lead"]),
        helper.make_node("Squeeze", ["lead", "last_axis"], [f"margin_{n}"]),
        helper.make_node("Mul", ["p", "log_p"], ["p_log_p"]),
        helper.make_node("ReduceSum", ["p_log_p", "last_axis"], ["negative_h"], keepdims=0),
        helper.make_node("Div", ["negative_h", "log_classes"], ["relative"]),
        helper.make_node("Add", ["relative", "one"], [f"entropy_{n}"]),
    ]
    initializers = [
        _external(f"W{n}", weights.shape, places[0]),
        _external(f"H{n}", head.shape, places[1]),
        helper.make_tensor("last_axis", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("two", TensorProto.INT64, [1], [2]),
        helper.make_tensor("log_classes", TensorProto.FLOAT, [], [math.log(CLASSES)]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    ]
    taken_axes, made_axes = (
        [size, "batch"] if toy.rows_last else ["batch", size] for size in weights.shape
    )
    outputs = [_value(f"logits_{n}", ["batch", CLASSES])]
    outputs += [_value(f"{score}_{n}", ["batch"]) for score in SCORE_NAMES]
    if not last:
        outputs.insert(0, _value(f"h{n}", made_axes))
    first = _value(taken, ["batch", WIDTH] if number == 0 else taken_axes)
    _save(nodes, [first], outputs, initializers, folder / f"graphs/s{n}.onnx")


def _write_unsplit(toy: Toy, folder: Path, places: list[tuple[tuple[int, int], ...]]) -> None:
    nodes, initializers = [], []
    for number, (place, _) in enumerate(places):
        nodes += _layer(number, "x" if number == 0 else f"h{number - 1}", f"h{number}")
        initializers.append(_external(f"W{number}", toy.layers[number][0].shape, place))
    last = len(places) - 1
    nodes.append(helper.make_node("MatMul", [f"h{last}", "H"], ["logits"]))
    initializers.append(_external("H", toy.layers[last][1].shape, places[last][1]))
    outputs = [_value("logits", ["batch", CLASSES])]
    path = folder / "graphs/unsplit.onnx"
    _save(nodes, [_value("x", ["batch", WIDTH])], outputs, initializers, path)


def _value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[TensorProto],
    path: Path,
) -> None:
    inputs = [*inputs, _value("shift", ["batch", 1]), _value("scale", [1])]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
