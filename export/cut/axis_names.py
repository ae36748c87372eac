"""Shapes inside an ONNX graph: infers them, names their axes, and removes shape arithmetic.

Exporters compute sizes from any tensor that has the axis. A size read from a state ties its later
uses to the segment of that state. A size read from a program input would carry that input, an
image for example, from segment to segment only to read its shape. Axis names show which other
tensor has the same size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants

from edgeexit.export.cut.read_onnx import FLOATS
from edgeexit.export.passes.simplify import simplify
from edgeexit.export.quiet import quiet

_ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Where", "And", "Or", "Xor", "Equal",
    "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
})  # fmt: skip
_INFERENCE_ROUNDS = 8
Dims = tuple[int | str, ...]


def resolve_shapes(model: ir.Model) -> None:
    """Infers shapes and removes the shape arithmetic that they make unnecessary."""
    _infer(model)
    simplify(model)
    graph = model.graph
    _take_shapes(graph, graph.inputs, [node for node in graph if not _of_input(node)])
    with quiet():
        fold_constants(model, onnx_shape_inference=False)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.RemoveUnusedNodesPass()(model)
    graph.sort()


def drop_shape_inputs(model: ir.Model) -> None:
    """Removes inputs that a graph reads only for a size that another input has too."""
    graph = model.graph
    kept = [v for v in graph.inputs if any(not _is_shape(node) for node, _ in v.uses())]
    dropped = [v for v in graph.inputs if v not in kept and v.uses()]
    if not dropped or not kept:
        return
    readers = [node for value in dropped for node, _ in value.uses()]
    _take_shapes(graph, kept, readers)
    with quiet():
        passes.RemoveUnusedNodesPass()(model)
    for value in dropped:
        if not value.uses():
            graph.inputs.remove(value)


def _infer(model: ir.Model) -> None:
    """Infers shapes; unknown axes get the names of the inputs' axes where these are equal."""
    known = {
        d.value for v in model.graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim)
    }
    for _ in range(_INFERENCE_ROUNDS):
        with quiet():
            passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        same = _broadcast_axes(model.graph, known)
        if not same:
            break
        for node in model.graph:
            for value in node.outputs:
                if value.shape is None:
                    continue
                dims = [
                    same.get(d.value, d) if isinstance(d, ir.SymbolicDim) else d
                    for d in value.shape
                ]
                value.shape = ir.Shape(dims)
                if any(isinstance(d, ir.SymbolicDim) and _is_unknown(d.value) for d in value.shape):
                    value.shape = None  # infer it again: old unknown axes would block that
    _guess_types(model.graph)


def _guess_types(graph: ir.Graph) -> None:
    """Guesses types that inference cannot tell: operators of other domains keep float inputs float.

    A guess matters only for a tensor that crosses a cut; `prove_rows` checks its type.
    """
    for node in graph:
        floats = [v.dtype for v in node.inputs if v is not None and v.dtype in FLOATS]
        if node.outputs[0].dtype is None and floats:
            node.outputs[0].dtype = floats[0]


def _broadcast_axes(graph: ir.Graph, known: set[str | None]) -> dict[str | None, str]:
    """Unknown axes of element-wise results -> the axes of the program's inputs that they equal.

    Inference cannot follow the length of a Range or Slice, such as positions up to the length of
    the text. But a sum with ``[batch, seq, hidden]`` has the axis ``seq`` again, because the other
    operand's axis is ``seq`` or 1.
    """
    same: dict[str | None, str] = {}

    def read(value: ir.Value | None) -> list[int | str | None]:
        shape = value.shape if value is not None and value.shape is not None else ()
        return [d if isinstance(d, int) else same.get(d.value, d.value) for d in shape]

    for node in graph:
        output = node.outputs[0] if node.domain == "" and node.op_type in _ELEMENTWISE else None
        if output is None or output.shape is None:
            continue
        inputs = [read(value) for value in node.inputs]
        for position, axis in enumerate(reversed(read(output)), start=1):
            if not isinstance(axis, str) or not _is_unknown(axis):
                continue
            dims = {shape[-position] for shape in inputs if len(shape) >= position}
            named = [d for d in dims if isinstance(d, str) and d in known]
            if len(named) == 1 and not any(isinstance(d, int) and d > 1 for d in dims):
                same[axis] = named[0]
    return same


def _is_unknown(axis: str | None) -> bool:
    return axis is None or axis.startswith("unk__")


def _is_shape(node: ir.Node) -> bool:
    return node.op_type == "Shape" and node.domain == ""


def _of_input(node: ir.Node) -> bool:
    return _is_shape(node) and node.inputs[0] is not None and node.inputs[0].is_graph_input()


def _take_shapes(graph: ir.Graph, sources: Sequence[ir.Value], nodes: Iterable[ir.Node]) -> None:
    """Makes `nodes` read shapes from `sources`, where axis names allow it."""
    first = graph[0]
    home: dict[str, tuple[ir.Value, int]] = {}
    for value in sources:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value and not _is_unknown(size.value):
                home.setdefault(size.value, (value, axis))
    read: dict[Dims, ir.Value] = {}
    for node in list(nodes):
        dims = _dims(node)
        if dims is None or any(isinstance(d, str) and d not in home for d in dims):
            continue
        for dim in dims:
            if (dim,) in read:
                continue
            if isinstance(dim, int):
                read[(dim,)] = _constant(graph, [dim])
            else:
                source, axis = home[dim]
                reader = ir.node("Shape", [source], {"start": axis, "end": axis + 1})
                read[(dim,)] = _placed(graph, first, reader, f"edgeexit/size_of_{dim}", 1)
        if dims not in read:
            joined = ir.node("Concat", [read[(dim,)] for dim in dims], {"axis": 0})
            name = "edgeexit/sizes_" + "_".join(map(str, dims))
            read[dims] = _placed(graph, first, joined, name, len(dims))
        for user, _ in list(node.outputs[0].uses()):
            _fold_gather(graph, user, dims)
        node.outputs[0].replace_all_uses_with(read[dims], replace_graph_outputs=True)


def _dims(node: ir.Node) -> Dims | None:
    """Output of a Shape node, if every entry is a number or has a name."""
    data = node.inputs[0] if _is_shape(node) else None
    if data is None or data.shape is None:
        return None
    dims = [d if isinstance(d, int) else d.value for d in data.shape]
    start = node.attributes.get_int("start", 0)
    dims = dims[start : node.attributes.get_int("end", len(dims))]
    known = tuple(d for d in dims if d is not None)
    return known if known and len(known) == len(dims) else None


def _placed(graph: ir.Graph, before: ir.Node, node: ir.Node, name: str, length: int) -> ir.Value:
    value = node.outputs[0]
    value.name, value.dtype, value.shape = name, ir.DataType.INT64, ir.Shape([length])
    graph.insert_before(before, node)
    return value


def _constant(graph: ir.Graph, size: int | list[int]) -> ir.Value:
    kind, number = ("size", size[0]) if isinstance(size, list) else ("scalar", size)
    name = f"edgeexit/{kind}_{number}"
    if name not in graph.initializers:
        tensor = ir.tensor(size, dtype=ir.DataType.INT64, name=name)
        kind_of = ir.TensorType(ir.DataType.INT64)
        shape = ir.Shape([1] if isinstance(size, list) else [])
        graph.register_initializer(
            ir.Value(name=name, shape=shape, type=kind_of, const_value=tensor)
        )
    return graph.initializers[name]


def _fold_gather(graph: ir.Graph, node: ir.Node, dims: Dims) -> None:
    """Replaces a Gather of one fixed size from a shape by that size."""
    chosen = node.inputs[1] if node.op_type == "Gather" and node.domain == "" else None
    index = ir.convenience.get_const_tensor(chosen) if chosen is not None else None
    if index is None or index.numpy().ndim != 0:
        return
    position = int(index.numpy())
    if -len(dims) <= position < len(dims):
        size = dims[position]
        if isinstance(size, int):
            node.outputs[0].replace_all_uses_with(_constant(graph, size))
