"""Replaces standard operators by ONNX Runtime's own, for graphs that only ONNX Runtime runs.

Most of the time of one token goes into reading weights; a graph can only save the small nodes
between matrices. `fuse` makes one node of each RMS norm (torch writes seven), one of a residual sum
and the norm after it, and one matrix product of those for queries, keys and values.
benchmarks/README.md has the effect.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

MICROSOFT = "com.microsoft"


def fuse(model: ir.Model) -> None:
    """Fuses operators of a graph from torch that requires ``onnxruntime-operators``."""
    fuse_rms_normalization(model)
    if not any(_mixed(node) for node in model.graph):
        fuse_skip_rms_normalization(model)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention"):
            _pack(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[MICROSOFT] = 1


def _mixed(node: ir.Node) -> bool:
    """Whether a norm's state and weight differ in type, which the fused sum and norm forbids."""
    if node.op_type != "SimplifiedLayerNormalization":
        return False
    state, weight = node.inputs[:2]
    return state is None or weight is None or state.dtype != weight.dtype


def _pack(graph: ir.Graph, attention: ir.Node) -> None:
    """Merges the products for queries, keys and values, and their biases, if attention takes them
    directly.

    The file keeps three weights, because other forms share them; the engine joins them when it
    loads the graph.
    """
    parts = [_projection(value) for value in attention.inputs[:3]]
    states, weights, biases = zip(*parts, strict=True)
    if None in weights or any(state is not states[0] for state in states):
        return
    joined = ir.node("Concat", weights, {"axis": 1})
    packed = ir.node("MatMul", [states[0], joined.outputs[0]])
    nodes = [joined, packed]
    if None not in biases:
        bias = ir.node("Concat", biases, {"axis": 0})
        nodes += [bias, ir.node("Add", [packed.outputs[0], bias.outputs[0]])]
    elif any(bias is not None for bias in biases):
        return
    graph.insert_before(attention, nodes)
    attention.replace_input_with(0, nodes[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def _projection(value: ir.Value | None) -> tuple[ir.Value | None, ...]:
    """State, weight and bias of a product with a weight; the bias is None if it has none, all are
    None for anything else."""
    node, bias = None if value is None else value.producer(), None
    if node is not None and node.op_type == "Add":
        product, bias = node.inputs
        if product is None or bias is None or not bias.is_initializer():
            return None, None, None
        node = product.producer()
    if node is None or node.op_type != "MatMul":
        return None, None, None
    state, weight = node.inputs
    if weight is None or not weight.is_initializer():
        return None, None, None
    return state, weight, bias


__all__ = ["fuse"]
