"""A small model with exits, written as ONNX by hand: bundles in milliseconds, without torch.

Each segment is ``h' = tanh(scale h W + shift)``, its exit ``logits = h' H`` and the three scores.
`shift` is an input of the program that every segment takes, so it must be compacted with the rows;
`scale` is the same for all rows and must not be. The exits are outputs of the segments, or (with
`head`) of one component that all of them share. `reference` computes the same in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeexit.bundle.manifest import (
    Axis,
    Call,
    Chain,
    Component,
    Exit,
    File,
    Manifest,
    Run,
    Tensor,
    Variant,
)
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
        head: One component on the path of every exit gives logits and scores, by the last
            segment's H; all states have one width.
    """

    layers: list[tuple[NDArray, NDArray]]
    rows: Literal["independent", "together"] = "independent"
    open_axes: bool = False
    rows_last: bool = False
    head: bool = False

    def classifier(self, number: int) -> NDArray:
        """The matrix H of the exit behind a segment."""
        return self.layers[-1 if self.head else number][1]


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
    for number, (weights, _) in enumerate(toy.layers):
        state = np.tanh(state @ weights.astype(np.float64) * inputs["scale"] + inputs["shift"])
        logits = state @ toy.classifier(number).astype(np.float64)
        found.append({"logits": logits, **score_values(logits)})
    return found


def score_values(logits: NDArray) -> dict[str, NDArray]:
    """The three scores of logits ``[..., classes]``."""
    shifted = logits - logits.max(-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    ordered = np.sort(p, -1)
    return {
        "max_prob": ordered[..., -1],
        "margin": ordered[..., -1] - ordered[..., -2],
        "entropy": 1 + (p * np.log(p)).sum(-1) / math.log(logits.shape[-1]),
    }


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
    components = {}
    for number in range(len(toy.layers)):
        _write_segment(toy, folder, number, places[number])
        components[f"s{number}"] = _segment(toy, number, inputs)
    names = list(components)
    if toy.head:
        _write_head(toy, folder, places[-1][1])
        components["head"] = _component("head", [_head_input(toy)], _answers("head/{}"))
    _write_unsplit(toy, folder, places)
    components["unsplit"] = _component("unsplit", inputs, [logits])
    (folder / "samples").mkdir(exist_ok=True)
    sample = make_inputs(4, seed=7)
    arrays: dict[str, Any] = {f"input/{name}": value for name, value in sample.items()}
    for number, record in enumerate(reference(toy, sample)):
        for name, value in record.items():
            arrays[f"exit_{number + 1}/{name}"] = value.astype(np.float32)
    arrays["unsplit/logits"] = arrays[f"exit_{len(toy.layers)}/logits"]
    np.savez(folder / "samples/reference.npz", **arrays)
    chain = Chain(
        components=names,
        outputs=[logits],
        exits=[_exit(toy, number) for number in range(len(names))],
        unsplit=["unsplit"],
        rows=toy.rows,
    )
    return Manifest(
        format="2.0",
        name="toy",
        task="image-classification",
        inputs=inputs,
        components=components,
        chains={"forward": chain},
        steps=[Run(chain="forward", when="input")],
        files={"graphs/unsplit.onnx": File(sha256="0" * 64, bytes=0)},
        samples=["samples/reference.npz"],
    )


def _component(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Component:
    variant = Variant(graph=f"graphs/{name}.onnx")
    return Component(variants=[variant], inputs=inputs, outputs=outputs)


def _segment(toy: Toy, number: int, inputs: list[Tensor]) -> Component:
    state = inputs[0] if number == 0 else _state(toy, number - 1)
    outputs = [] if toy.head else _answers(f"{{}}_{number}")
    if toy.head or number + 1 < len(toy.layers):
        outputs.insert(0, _state(toy, number))
    return _component(f"s{number}", [state, *inputs[1:]], outputs)


def _answers(pattern: str) -> list[Tensor]:
    """Logits and scores of an exit, named by the pattern."""
    logits = Tensor(name=pattern.format("logits"), dtype="float32", axes=["batch", CLASSES])
    scores = [
        Tensor(name=pattern.format(score), dtype="float32", axes=["batch"]) for score in SCORE_NAMES
    ]
    return [logits, *scores]


def _exit(toy: Toy, number: int) -> Exit:
    pattern = "head/{}" if toy.head else f"{{}}_{number}"
    return Exit(
        name=f"exit_{number + 1}",
        behind=f"s{number}",
        outputs={"logits": pattern.format("logits")},
        scores={score: pattern.format(score) for score in SCORE_NAMES},
        path=[Call(component="head", inputs={"state": f"h{number}"})] if toy.head else [],
    )


def _head_input(toy: Toy) -> Tensor:
    return msgspec.structs.replace(_state(toy, len(toy.layers) - 1), name="state")


def _state(toy: Toy, number: int) -> Tensor:
    wide = None if toy.open_axes else toy.layers[number][0].shape[1]
    axes: list[Axis] = [wide, "batch"] if toy.rows_last else ["batch", wide]
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
    weights, head = toy.layers[number]
    taken = "x" if number == 0 else f"h{number - 1}"
    turns = toy.rows_last and number > 0
    gives = toy.head or number + 1 < len(toy.layers)
    made = f"h{number}_rows" if toy.rows_last else f"h{number}"
    nodes = [helper.make_node("Transpose", [taken], ["turned"], perm=[1, 0])] if turns else []
    nodes += _layer(number, "turned" if turns else taken, made)
    if toy.rows_last and gives:
        nodes.append(helper.make_node("Transpose", [made], [f"h{number}"], perm=[1, 0]))
    initializers = [_external(f"W{number}", weights.shape, places[0])]
    outputs = [_value(f"h{number}", _axes(toy, weights.shape[1]))] if gives else []
    if not toy.head:
        nodes += _answer_nodes(made, f"{{}}_{number}")
        initializers += [_external("H", head.shape, places[1]), *score_constants(CLASSES)]
        outputs += _answer_values(f"{{}}_{number}")
    first = _value(taken, ["batch", WIDTH] if number == 0 else _axes(toy, weights.shape[0]))
    path = folder / f"graphs/s{number}.onnx"
    _save(nodes, [first, *_conditions()], outputs, initializers, path)


def _write_head(toy: Toy, folder: Path, place: tuple[int, int]) -> None:
    head = toy.classifier(0)
    nodes, state = [], "state"
    if toy.rows_last:
        nodes, state = [helper.make_node("Transpose", ["state"], ["turned"], perm=[1, 0])], "turned"
    nodes += _answer_nodes(state, "head/{}")
    first = _value("state", _axes(toy, head.shape[0]))
    initializers = [_external("H", head.shape, place), *score_constants(CLASSES)]
    outputs = _answer_values("head/{}")
    _save(nodes, [first], outputs, initializers, folder / "graphs/head.onnx")


def _axes(toy: Toy, width: int) -> list[str | int]:
    return [width, "batch"] if toy.rows_last else ["batch", width]


def _answer_nodes(state: str, pattern: str) -> list[onnx.NodeProto]:
    """Logits of a state ``[batch, width]`` and their scores."""
    logits = pattern.format("logits")
    return [helper.make_node("MatMul", [state, "H"], [logits]), *score_nodes(logits, pattern)]


def score_nodes(logits: str, pattern: str) -> list[onnx.NodeProto]:
    """The three scores of logits ``[batch, classes]``, named by the pattern; they take
    `score_constants`."""
    max_prob, margin, entropy = (pattern.format(name) for name in SCORE_NAMES)
    return [
        helper.make_node("Softmax", [logits], ["p"], axis=-1),
        helper.make_node("LogSoftmax", [logits], ["log_p"], axis=-1),
        helper.make_node("ReduceMax", ["p", "last_axis"], [max_prob], keepdims=0),
        helper.make_node("TopK", ["p", "two"], ["top", "places"], axis=-1),
        helper.make_node("Split", ["top"], ["top1", "top2"], axis=-1, num_outputs=2),
        helper.make_node("Sub", ["top1", "top2"], ["lead"]),
        helper.make_node("Squeeze", ["lead", "last_axis"], [margin]),
        helper.make_node("Mul", ["p", "log_p"], ["p_log_p"]),
        helper.make_node("ReduceSum", ["p_log_p", "last_axis"], ["negative_h"], keepdims=0),
        helper.make_node("Div", ["negative_h", "log_classes"], ["relative"]),
        helper.make_node("Add", ["relative", "one"], [entropy]),
    ]


def _answer_values(pattern: str) -> list[onnx.ValueInfoProto]:
    scores = [_value(pattern.format(score), ["batch"]) for score in SCORE_NAMES]
    return [_value(pattern.format("logits"), ["batch", CLASSES]), *scores]


def score_constants(classes: int) -> list[TensorProto]:
    """Initializers of `score_nodes`."""
    return [
        helper.make_tensor("last_axis", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("two", TensorProto.INT64, [1], [2]),
        helper.make_tensor("log_classes", TensorProto.FLOAT, [], [math.log(classes)]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    ]


def _conditions() -> list[onnx.ValueInfoProto]:
    """What every segment takes beside the state."""
    return [_value("shift", ["batch", 1]), _value("scale", [1])]


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
    inputs = [_value("x", ["batch", WIDTH]), *_conditions()]
    _save(nodes, inputs, outputs, initializers, path)


def _value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[TensorProto],
    path: Path,
) -> None:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
