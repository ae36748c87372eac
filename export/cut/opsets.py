"""Opset conversion: inlines functions and converts operators to an opset that bundles support.

A file is not refused for its opset number alone: if none of its operators changed between its opset
and a supported one, it only gets the supported number.
"""

from __future__ import annotations

import logging

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import version_converter

from edgeexit.errors import ExportError, first_line
from edgeexit.export.library_errors import root_cause, translated
from edgeexit.export.quiet import quiet

logger = logging.getLogger(__name__)

EXPORT_AGAIN = "Export it again with opset_version=20."
OPSETS = range(18, 24)
"""Opsets that a bundle's graphs may have; older files are converted to the first."""


def inline(model: ir.Model, what: str) -> ir.Model:
    """Replaces function calls by the functions' nodes, converted to the graph's opset."""
    opset = _opset(model)
    written_in = {function.opset_imports.get("", opset) for function in model.functions.values()}
    if written_in <= {opset}:
        with translated(what, "its functions cannot be inlined", EXPORT_AGAIN):
            passes.InlinePass()(model)
        return model
    weights = dict(model.graph.initializers)
    try:
        typed = onnx.shape_inference.infer_shapes(ir.to_proto(model))  # conversion needs types
        proto = onnx.inliner.inline_local_functions(typed, convert_version=True)
        inlined = ir.from_proto(proto)
    except Exception as error:
        raise ExportError(
            f"{what}: a function is written in opset {min(written_in - {opset})}, the graph in "
            f"{opset}, and it cannot be inlined "
            f"({first_line(root_cause(error))})",
            fix=EXPORT_AGAIN,
        ) from error
    for name, value in inlined.graph.initializers.items():
        if name in weights:  # keeps the references to external files
            value.const_value = weights[name].const_value
    inlined.metadata_props.update(model.metadata_props)
    return inlined


def convert(model: ir.Model, what: str) -> ir.Model:
    """Converts a model's operators to an opset of `OPSETS`.

    Raises:
        ExportError: An operator cannot be converted.
    """
    opset = _opset(model)
    if opset in OPSETS:
        return model
    target = OPSETS[-1] if opset > OPSETS[-1] else OPSETS[0]
    changed = _changed(model, opset, target)
    if not changed:
        model.graph.opset_imports[""] = target
        return model
    if opset > target:
        raise ExportError(
            f"{what}: it has opset {opset}, where {', '.join(changed)} differs from opset "
            f"{target}; bundles support opset {OPSETS[0]} to {target}",
            fix="Export it again with opset_version=20, which every supported engine reads.",
        )
    if opset < 9 and "Scan" in changed:  # opset 9 removed its batch axis; no converter does that
        raise _not_convertible(what, opset, "Scan changed its meaning in opset 9", ["Scan"])
    try:
        with quiet():
            converted = version_converter.ConvertVersionPass(target, fallback=True)(model).model
    except Exception as error:
        raise _not_convertible(what, opset, first_line(error), changed) from error
    if converted.graph.opset_imports.get("") != target:
        raise _not_convertible(what, opset, "the converter has no rule", changed)
    logger.info("%s: converted from opset %d to %d", what, opset, target)
    return converted


def _opset(model: ir.Model) -> int:
    """The opset of the standard operators, whose domain some files name ``ai.onnx``."""
    imports = model.graph.opset_imports
    return imports.setdefault("", imports.pop("ai.onnx", 1))


def _changed(model: ir.Model, opset: int, target: int) -> list[str]:
    """Operators of a model whose definitions differ between two opsets."""
    kinds = sorted({node.op_type for node in model.graph.all_nodes() if node.domain == ""})
    return [kind for kind in kinds if _since(kind, opset) != _since(kind, target)]


def _since(kind: str, opset: int) -> int:
    """The opset that introduced an operator's definition valid in `opset`; 0 if there is none, or
    if it is newer than the installed onnx."""
    try:
        return int(onnx.defs.get_schema(kind, opset).since_version)
    except onnx.defs.SchemaError:
        return 0


def _not_convertible(what: str, opset: int, why: str, changed: list[str]) -> ExportError:
    return ExportError(
        f"{what}: it has opset {opset}, and {', '.join(changed)} cannot be "
        f"converted to {OPSETS[0]} ({why})",
        fix=EXPORT_AGAIN,
    )


__all__ = ["OPSETS", "convert", "inline"]
