"""Reads, checks and normalises an ONNX file.

`read_onnx` refuses files that are not a complete ONNX model. `normalise` returns a graph whose
outputs are the exits, without functions and constant nodes, in an opset that bundles support.
Next, `find_rows` finds the row axis, `axis_names` resolves shapes and `cut` splits the graph.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeexit.errors import ExportError, UsageError, first_line
from edgeexit.export.cut.opsets import EXPORT_AGAIN, convert, inline
from edgeexit.export.cut.parse_onnx import made_of, parse_onnx
from edgeexit.export.describe import Precision
from edgeexit.export.library_errors import root_cause, translated
from edgeexit.export.quiet import quiet
from edgeexit.export.trace.torch_graph import IR_VERSION

logger = logging.getLogger(__name__)

DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}
"""Types that the manifest supports."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
EXIT_NAME_LENGTH = 100
"""Longest exit name: scores are named after their exit, and names have 128 characters at most."""
_RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
    "Multinomial",
})  # fmt: skip


def read_onnx(path: str | os.PathLike[str]) -> ir.Model:
    """Reads a model; its weights stay in their files until they are used.

    Raises:
        UsageError: There is no such file.
        ExportError: It is not an ONNX model, or is incomplete.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {kind}", fix="Give the path of an .onnx file.")
    try:
        # Parsing raises protobuf's DecodeError; conversion of the message raises many others.
        model = parse_onnx(path)
    except (MemoryError, ExportError):
        raise
    except Exception as error:
        raise ExportError(
            f"{path}: not an ONNX model, or incomplete ({first_line(root_cause(error))})",
            fix="Copy or export the file again; only ONNX files can be read.",
        ) from error
    if not model.opset_imports or not len(model.graph):
        lacks = "operators" if model.opset_imports else "opset"
        raise ExportError(
            f"{path}: not an ONNX model (no {lacks} in it)",
            fix="Give the .onnx file that an exporter wrote.",
        )
    _check_wiring(model.graph, path)
    _open_sizes(model.graph)
    with translated(path, "its weights cannot be found", "Copy the file and its weights again."):
        _check_external(model.graph, path)
    return model


def normalise(
    model: ir.Model, exits: Sequence[str], what: str, *, turned: Mapping[str, int] | None = None
) -> ir.Model:
    """Brings a model into the same form, whichever tool wrote it.

    Args:
        model: Result of `read_onnx`; changed in place.
        exits: Names of the exits' logits, from shallow to deep.
        what: Name of the file, for messages.
        turned: Exit -> its row axis, where that is not the first; it becomes the first.

    Returns:
        A model whose outputs are the exits, in the given order and with valid names.
    """
    fix = f"Check it with onnx.checker.check_model. {EXPORT_AGAIN}"
    with quiet(), translated(what, "its graph is not valid", fix):
        model = inline(model, what)
        passes.RemoveInitializersFromInputsPass()(model)
    _choose_outputs(model, exits, what)
    with quiet(), translated(what, "its graph is not valid", fix):
        passes.RemoveUnusedNodesPass()(model)
        model = convert(model, what)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _drop_identities(model)
        passes.ClearMetadataAndDocStringPass()(model)
    _check_deterministic(model.graph, what)
    _forget_shapes(model.graph)
    for name, axis in (turned or {}).items():
        _turn(model.graph, list(exits).index(name), axis)
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    _name_values(model.graph, what)
    model.graph.sort()
    return model


def _forget_shapes(graph: ir.Graph) -> None:
    """Removes inner shapes: a file may declare wrong ones, because engines ignore them.
    `axis_names` infers them again."""
    for node in graph.all_nodes():
        for value in node.outputs:
            value.shape = None


def _turn(graph: ir.Graph, position: int, axis: int) -> None:
    """Transposes an exit ``[classes, rows]``."""
    value = graph.outputs[position]
    if axis != 1:
        return
    node = ir.node("Transpose", [value], {"perm": [1, 0]})
    turned = node.outputs[0]
    turned.name, turned.type = value.name, value.type
    value.name = f"{value.name}_by_class"
    graph.append(node)
    graph.outputs[position] = turned


def _drop_identities(model: ir.Model) -> None:
    """Removes Identity nodes, but not those in branches and loop bodies: there an Identity may
    return an outer value, which a graph cannot return directly."""
    if not any(subgraphs(node) for node in model.graph):
        passes.IdentityEliminationPass()(model)
        return
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Identity" and node.domain == "" else None
        if source is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def float_outputs(graph: ir.Graph, what: str) -> None:
    """Casts exits to float32. `axis_names.resolve_shapes` must run first: it finds their types."""
    for position, value in enumerate(list(graph.outputs)):
        if value.dtype not in FLOATS:
            kind = "an unknown type" if value.dtype is None else str(value.dtype).lower()
            raise ExportError(
                f"{what}: exit {value.name} gives {kind}, not floating-point logits",
                fix="Name the tensor of class logits that it is computed from.",
            )
        if value.dtype == ir.DataType.FLOAT:
            continue
        name = value.name
        value.name = f"{name}_{str(value.dtype).lower()}"
        node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        output = node.outputs[0]
        output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, value.shape
        graph.append(node)
        graph.outputs[position] = output


def precision_of(model: ir.Model) -> Precision:
    """Precision of a graph: the smallest type among its weights and quantised operators."""
    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph):
        return "int8"
    if any(_has_small_weights(node) for node in model.graph.all_nodes()):
        return "int4"
    kinds = {value.dtype for value in model.graph.initializers.values()}
    if ir.DataType.FLOAT16 in kinds:
        return "float16"
    return "bfloat16" if ir.DataType.BFLOAT16 in kinds else "float32"


def _has_small_weights(node: ir.Node) -> bool:
    """Whether a node takes weights that are quantised in blocks, with a scale for each."""
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return True
    return node.op_type == "DequantizeLinear" and node.attributes.get_int("block_size", 0) > 0


def valid_name(name: str, taken: set[str]) -> str:
    """A unique name that the manifest accepts; adds it to `taken`."""
    base = re.sub(r"[^A-Za-z0-9_.:/-]", "_", name).lstrip(".:/-")[:EXIT_NAME_LENGTH] or "tensor"
    unique, count = base, 1
    while unique in taken:
        count += 1
        unique = f"{base}_{count}"
    taken.add(unique)
    return unique


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node's attributes (branches of an If, body of a Loop)."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def _open_sizes(graph: ir.Graph) -> None:
    """Makes sizes of -1 of inputs and outputs dynamic, as ONNX Runtime does (it does not for 0),
    and those named ``?``, which need not be equal to each other."""
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is None:
            continue
        dims = [d if isinstance(d, int) else d.value for d in value.shape]
        is_open = [d == "?" or (isinstance(d, int) and d < 0) for d in dims]
        value.shape = ir.Shape([None if o else d for d, o in zip(dims, is_open, strict=True)])


def _check_wiring(graph: ir.Graph, path: Path) -> None:
    for value in [*(v for node in graph for v in node.inputs), *graph.outputs]:
        if value is None or value.is_graph_input() or value.is_initializer():
            continue
        if value.producer() is None:
            raise ExportError(
                f"{path}: no node computes {value.name!r}; the model is incomplete",
                fix="Copy the file again, or export it again.",
            )


def _check_external(graph: ir.Graph, path: Path) -> None:
    for owner in [graph, *graph.subgraphs()]:
        for value in owner.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            file = _weight_file(tensor, value.name or "", path)
            if not file.is_file():
                kind = "is not a file" if file.exists() else "does not exist"
                raise ExportError(
                    f"{path}: {value.name!r} is stored in {file.name}, which {kind}",
                    fix="Copy the weight file to the folder of the .onnx file.",
                )
            if tensor.length and tensor.length < tensor.nbytes:
                raise ExportError(
                    f"{path}: {value.name!r} has {tensor.nbytes} bytes by its shape, but a length "
                    f"of {tensor.length} in {file.name}",
                    fix="The file is damaged; copy or export it again.",
                )
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            if end > file.stat().st_size:
                raise ExportError(
                    f"{path}: {value.name!r} ends at byte {end} of {file.name}, which has "
                    f"{file.stat().st_size} bytes",
                    fix="Copy the weight file again; it is incomplete.",
                )
            if file.resolve() != Path(tensor.path).absolute():  # a link, as in the hub's cache
                real = file.resolve()
                value.const_value = ir.ExternalTensor(
                    real.name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name or "",
                    base_dir=str(real.parent),
                )


def _weight_file(tensor: ir.ExternalTensor, name: str, path: Path) -> Path:
    """The file that stores a weight. Refuses paths outside the .onnx file's folder, for security;
    a file in it may be a link."""
    location = Path(tensor.location)
    if location.is_absolute() or ".." in location.parts:
        raise ExportError(
            f"{path}: {name!r} is stored in {location}, outside the file's folder",
            fix="Move the weights beside the .onnx file and save it again with that location "
            "(onnx.save_model(..., save_as_external_data=True, location=...)).",
        )
    return Path(tensor.path)


def _choose_outputs(model: ir.Model, exits: Sequence[str], what: str) -> None:
    """Makes the exits the only outputs of the graph; they may be inner tensors."""
    graph = model.graph
    values = {value.name: value for value in [*graph.inputs, *graph.initializers.values()]}
    values |= {value.name: value for value in graph.outputs}
    for node in graph:
        values |= {value.name: value for value in node.outputs if value.name}
    outputs = [value.name for value in graph.outputs]
    for name in exits:
        if name not in values:
            inside = next((n for n in graph if name in _inner_names(n)), None)
            if inside is not None:
                raise ExportError(
                    f"{what}: {name!r} is inside {inside.op_type} {inside.name}, in a branch or "
                    "loop body; the operator runs as a whole",
                    fix="Choose an exit outside of it, or export the model again with the branch "
                    "decided.",
                )
            if (source := made_of(model, name)) is not None:
                raise ExportError(
                    f"{what}: {name!r} is a list of maps, not a tensor",
                    fix=f"Name {source}, which it is computed from.",
                )
            close = difflib.get_close_matches(name, [str(v) for v in values], 1, 0.8)
            guess = f"Did you mean {close[0]!r}? " if close else ""
            raise ExportError(
                f"{what}: there is no output {name!r}",
                fix=f"{guess}Its outputs are {', '.join(map(str, outputs))}; inner tensors are "
                "accepted too.",
            )
        if values[name].producer() is None:
            raise ExportError(
                f"{what}: {name!r} is an input or a weight",
                fix="Name outputs that hold class logits.",
            )
        if name not in outputs:
            logger.info("%s: %s is an inner tensor; it becomes an output", what, name)
    if left_out := [str(name) for name in outputs if name not in exits]:
        logger.warning("%s: outputs that are not exits are left out: %s", what, ", ".join(left_out))
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in exits)


def _inner_names(node: ir.Node) -> set[str | None]:
    """Names of the tensors computed in a node's branches and loop bodies."""
    names: set[str | None] = set()
    for graph in subgraphs(node):
        for inner in graph:
            names |= {value.name for value in inner.outputs} | _inner_names(inner)
    return names


def _check_deterministic(graph: ir.Graph, what: str) -> None:
    for node in graph.all_nodes():
        training = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
        switch = ir.convenience.get_const_tensor(training) if training is not None else None
        if node.op_type in _RANDOM or (switch is not None and bool(switch.numpy())):
            raise ExportError(
                f"{what}: it draws random numbers ({node.op_type} {node.name}), so its outputs "
                "cannot be compared",
                fix="Export the model in evaluation mode: model.eval() before torch.onnx.export.",
            )


def _name_values(graph: ir.Graph, what: str) -> None:
    """Renames inputs and exits to names that the manifest accepts; keeps the scores' names free."""
    taken: set[str] = set()
    named = [*graph.inputs, *graph.outputs]
    wanted = [valid_name(value.name or "", taken) for value in named]
    prefixes = tuple(f"{name}/" for name in wanted[len(graph.inputs) :])
    others = [value for value in graph.initializers.values() if value not in named]
    others += [value for node in graph.all_nodes() for value in node.outputs if value not in named]
    for owner in graph.subgraphs():
        others += [*owner.inputs, *owner.initializers.values()]
    taken |= {value.name for value in others if value.name}
    for value in others:
        name = value.name or ""
        if name and (name in wanted or name.startswith(prefixes)):
            value.name = valid_name(f"inner_{name}", taken)
    for value, name in zip(named, wanted, strict=True):
        if value.name != name:
            logger.info("%s: %s is named %s in the bundle", what, value.name, name)
            value.name = name
