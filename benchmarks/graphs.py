"""Builds the graphs that the chain is compared with: the same model with the same weights.

- `merged`: all segments as one graph without exits.
- `first K`: the segments up to exit K and its head as one graph, that is, a truncated model.
- `nested`: one graph with an ``If`` behind every exit, nested in the ``else`` of the exit before.

All are stored next to a copy of the bundle's weight store, so that `Bundle` and
`runtime.load(unsplit=True)` open them like the bundle's unsplit graph.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeexit.bundle.manifest import Component, File, Tensor, Variant
from edgeexit.bundle.reader import WEIGHTS, Bundle, open_bundle, sha256_of
from edgeexit.export.passes.merge import merge
from edgeexit.export.trace.torch_graph import save_graph

THRESHOLDS = "thresholds"
"""Input of the nested graph: one threshold per early exit, so that any path can be forced."""


def build(bundle: Bundle, folder: Path) -> None:
    """Writes every graph."""
    (folder / "graphs").mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    shutil.copyfile(bundle.path / WEIGHTS, weights)  # readers refuse links
    exits = bundle.manifest.last_chain.stops
    for count in range(1, len(exits) + 1):
        name = "merged" if count == len(exits) else f"first_{count}"
        answer = exits[count - 1].outputs["logits"]
        model = merge(_segments(bundle)[:count], [answer], name=name)
        value = model.graph.outputs[0]
        value.name = "logits"
        save_graph(model, str(folder / f"graphs/{name}.onnx"))
    save_graph(_nested(bundle), str(folder / "graphs/nested.onnx"))


def open_graph(bundle: str, folder: str, name: str) -> Bundle:
    """The bundle with one of these graphs instead of its unsplit graph."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    file = f"graphs/{name}.onnx"
    path = Path(folder) / file
    chain = manifest.last_chain
    inputs = list(manifest.inputs)
    if name == "nested":
        early = len(chain.stops) - 1
        inputs.append(Tensor(name=THRESHOLDS, dtype="float32", axes=[early], row_axis=None))
    listed = manifest.files | {file: File(sha256=sha256_of(path), bytes=path.stat().st_size)}
    unsplit = Component(variants=[Variant(graph=file)], inputs=inputs, outputs=chain.outputs)
    manifest = msgspec.structs.replace(
        manifest,
        inputs=inputs,
        components=manifest.components | {chain.unsplit[-1]: unsplit},
        files=listed,
    )
    return Bundle(path=Path(folder), manifest=manifest, digest=opened.digest)


def _segments(bundle: Bundle) -> list[ir.Model]:
    manifest = bundle.manifest
    parts = [manifest.components[name] for name in manifest.last_chain.components]
    return [ir.load(bundle.path / part.variants[0].graph) for part in parts]


def _nested(bundle: Bundle, score: str = "max_prob") -> ir.Model:
    exits = bundle.manifest.last_chain.stops
    models = _segments(bundle)
    early = len(models) - 1
    thresholds = ir.Value(
        name=THRESHOLDS, shape=ir.Shape([early]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    initializers: list[ir.Value] = []
    inputs = list(models[0].graph.inputs)
    known = {str(value.name): value for value in inputs}
    bodies: list[list[ir.Node]] = []
    for number, model in enumerate(models):
        graph = model.graph
        if number:
            for value in list(graph.inputs):
                value.replace_all_uses_with(known[str(value.name)])
        known |= {str(value.name): value for value in graph.outputs}
        made = set(map(id, graph.outputs))
        graph.inputs.clear()
        graph.outputs.clear()
        for value in list(graph.initializers.values()):
            del graph.initializers[str(value.name)]
            value.name = f"{number}/{value.name}"
            initializers.append(value)
        nodes = list(graph)
        for node in nodes:
            graph.remove(node)
            for value in node.outputs:
                if value.name and id(value) not in made:
                    value.name = f"{number}/{value.name}"
                    value.shape = None
        bodies.append(nodes)
    answers = [known[exit_.outputs["logits"]] for exit_ in exits]
    result, inner = answers[-1], bodies[-1]
    for number in reversed(range(early)):
        index = ir.Value(
            name=f"{number}/index", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)
        )
        index.const_value = ir.tensor(np.array([number], np.int64), name=index.name)
        initializers.append(index)
        threshold = ir.node("Gather", [thresholds, index], name=f"{number}/threshold")
        score_value = known[exits[number].scores[score]]
        fires = ir.node(
            "GreaterOrEqual", [score_value, threshold.outputs[0]], name=f"{number}/fires"
        )
        copy = ir.node("Identity", [answers[number]], name=f"{number}/answer")
        branch = ir.node(
            "If",
            [fires.outputs[0]],
            {
                "then_branch": ir.Graph([], copy.outputs, nodes=[copy], name=f"exit_{number}"),
                "else_branch": ir.Graph([], [result], nodes=inner, name=f"on_{number}"),
            },
            name=f"{number}/if",
        )
        copy.outputs[0].name = f"{number}/answer_then"
        threshold.outputs[0].name = f"{number}/threshold_now"
        fires.outputs[0].name = f"{number}/fires_now"
        branch.outputs[0].name = f"{number}/result"
        for value, like in ((copy.outputs[0], result), (branch.outputs[0], result)):
            value.type, value.shape = like.type, like.shape
        inner = [*bodies[number], threshold, fires, branch]
        result = branch.outputs[0]
    result.name = "logits"
    model = ir.Model(
        ir.Graph(
            [*inputs, thresholds],
            [result],
            nodes=inner,
            initializers=initializers,
            opset_imports=models[0].opset_imports,
            name="nested",
        ),
        ir_version=models[0].ir_version,
    )
    passes.RemoveUnusedNodesPass()(model)
    return model
