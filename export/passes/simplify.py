"""Removes shape arithmetic that a graph's shape annotations make unnecessary.

Tracing turns ``x.view(batch, seq, heads, size)`` into Shape, Gather and Concat nodes that compute
what the annotations already say. A Reshape to axes of its input needs none of them: 0 in its target
copies an axis, -1 stands for the remaining one. Segments gain most, because each of them would
compute the shapes again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes


def simplify(model: ir.Model) -> int:
    """Folds Reshape targets, then removes unused nodes. Returns the number of folded targets."""
    folded = 0
    for node in list(model.graph):
        if node.op_type == "Reshape" and node.domain == "" and len(node.inputs) == 2:
            folded += _fold_reshape(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    return folded


def _fold_reshape(graph: ir.Graph, node: ir.Node) -> bool:
    data, target = node.inputs
    output = node.outputs[0]
    if data is None or target is None or target.is_initializer() or target.const_value is not None:
        return False
    if data.shape is None or output.shape is None:
        return False
    sizes, free = [], 0
    for axis, size in enumerate(output.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(data.shape) and _same(size, data.shape[axis]):
            sizes.append(0)
        else:
            sizes.append(-1)
            free += 1
    if free > 1 or 0 in [size for size in output.shape if isinstance(size, int)]:
        return False
    name = "edgeexit/shape_" + "_".join(str(size).replace("-", "m") for size in sizes)
    if name not in graph.initializers:
        constant = ir.Value(
            name=name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64)
        )
        constant.const_value = ir.tensor(np.array(sizes, np.int64), name=name)
        graph.register_initializer(constant)
    node.replace_input_with(1, graph.initializers[name])
    node.attributes.pop("allowzero", None)
    return True


def _same(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    """Whether two axes certainly have the same size: equal numbers or names."""
    if isinstance(left, int) or isinstance(right, int):
        return left == right
    return left.value is not None and left.value == right.value
