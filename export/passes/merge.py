"""Merges segments into one graph: the opposite of splitting.

`merge` joins the graphs of a chain, keeps the wanted outputs and removes all nodes that these do
not need, mostly exits. The baseline of every figure is the faster of such a graph and the model's
direct export. A plan that skips exits merges the segments between the exits that it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeexit.errors import ExportError


def merge(graphs: Sequence[ir.Model], outputs: Sequence[str], *, name: str = "merged") -> ir.Model:
    """Merges graphs in order; a later graph takes an earlier one's outputs by their names.

    Args:
        graphs: Consumed: their nodes move into the result.
        outputs: Names of outputs of any graph, in the wanted order.
        name: Name of the new graph.

    Returns:
        A model whose inputs are those that no graph computes. Only tensors that cross a boundary
        keep their shapes: the axis names of others have a different meaning in each graph.
    """
    known: dict[str, ir.Value] = {}
    inputs: list[ir.Value] = []
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    opsets: dict[str, int] = {}
    for number, model in enumerate(graphs):
        graph = model.graph
        opsets |= model.opset_imports
        for value in list(graph.inputs):
            if value.name in known:
                value.replace_all_uses_with(known[value.name])
            else:
                inputs.append(value)
                known[str(value.name)] = value
        made = {str(value.name): value for value in graph.outputs}
        graph.inputs.clear()
        graph.outputs.clear()
        for value in list(graph.initializers.values()):
            del graph.initializers[str(value.name)]
            value.name = f"{number}/{value.name}"
            initializers.append(value)
        for node in list(graph):
            graph.remove(node)
            node.name = f"{number}/{node.name or len(nodes)}"
            for value in node.outputs:
                if value.name and made.get(value.name) is not value:
                    value.name = f"{number}/{value.name}"
                    value.shape = None
            nodes.append(node)
        known |= made
    if missing := [output for output in outputs if output not in known]:
        raise ExportError(
            f"{name}: no segment gives {missing[0]}",
            fix="Name outputs of the segments that are merged.",
        )
    merged = ir.Model(
        ir.Graph(
            inputs,
            [known[output] for output in outputs],
            nodes=nodes,
            initializers=initializers,
            opset_imports=opsets,
            name=name,
        ),
        ir_version=graphs[0].ir_version,
    )
    passes.RemoveUnusedNodesPass()(merged)
    return merged
