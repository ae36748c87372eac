"""Takes shape arithmetic out of a graph that its own shape annotations make unnecessary.

Tracing turns ``x.view(batch, seq, heads, size)`` into Shape, Gather and Concat nodes that compute
what the annotations already say. A Reshape whose target keeps axes of its input needs none of
them: 0 copies an axis, -1 stands for one that is left. Segments gain most: each would compute
shapes anew.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes


def simplify(model: ir.Model) -> int:
    """Folds Reshape targets, then removes what nothing uses. Returns how many were folded."""
    folded = 0
    for node in list(model.graph):
        if node.op_type == "Reshape" and node.domain == "" and len(node.inputs) == 2:
            folded += _fold_reshape(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    return folded


def _fold_reshape(graph: ir.Graph, node: ir.Node) -> bool:
    data, target = node.inputs
    made = node.outputs[0]
    if data is None or target is None or target.is_initializer() or target.const_value is not None:
        return False
    if data.shape is None or made.shape is None:
        return False
    sizes, free = [], 0
    for axis, size in enumerate(made.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(data.shape) and _same(size, data.shape[axis]):
            sizes.append(0)
        else:
            sizes.append(-1)
            free += 1
    if free > 1 or 0 in [size for size in made.shape if isinstance(size, int)]:
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
    """Whether two axes have the same size for certain: equal names (unknown ones are not)."""
    if isinstance(left, int) or isinstance(right, int):
        return left == right
    return left.value is not None and left.value == right.value
