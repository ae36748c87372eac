"""ONNX Runtime's own operators in place of several standard ones, for graphs that only it runs.

Writing one token is mostly reading weights; the small nodes between the matrices are what a graph
can save. `fuse` makes one node of each RMS norm (torch writes seven), one of a residual sum and the
norm behind it, and one matrix of those for queries, keys and values. What that is worth is in
benchmarks/README.md.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

MICROSOFT = "com.microsoft"


def fuse(model: ir.Model) -> None:
    """Fuses what is there to fuse in a graph from torch that asks for ``onnxruntime-operators``."""
    fuse_rms_normalization(model)
    if not any(_mixed(node) for node in model.graph):
        fuse_skip_rms_normalization(model)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention"):
            _pack(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[MICROSOFT] = 1


def _mixed(node: ir.Node) -> bool:
    """Whether a norm takes states in one precision to another, which the one of a sum cannot."""
    if node.op_type != "SimplifiedLayerNormalization":
        return False
    state, weight = node.inputs[:2]
    return state is None or weight is None or state.dtype != weight.dtype


def _pack(graph: ir.Graph, attention: ir.Node) -> None:
    """Gives attention one matrix product for queries, keys and values where nothing stands between.

    The weights stay three in the file, which other forms share; the engine joins them when it loads
    the graph.
    """
    products = [None if value is None else value.producer() for value in attention.inputs[:3]]
    weights = []
    for product in products:
        if product is None or product.op_type != "MatMul":
            return
        state, weight = product.inputs
        if state is not products[0].inputs[0] or weight is None or not weight.is_initializer():  # type: ignore[union-attr]
            return
        weights.append(weight)
    joined = ir.node("Concat", weights, {"axis": 1})
    packed = ir.node("MatMul", [state, joined.outputs[0]])
    graph.insert_before(attention, [joined, packed])
    attention.replace_input_with(0, packed.outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


__all__ = ["fuse"]
