"""Opsets of a file: functions inlined, operators converted to what bundles hold.

A number alone is no reason to refuse a file: where no operator that it has changed between its
opset and one that bundles hold, it is taken to have that one.
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
from edgeexit.export.quiet import quiet

logger = logging.getLogger(__name__)

OPSETS = range(18, 24)
"""Opsets that graphs of a bundle may have; older files are converted up to the first."""


def inline(model: ir.Model, what: str) -> ir.Model:
    """Puts functions in the place of their calls, whatever opset they are written in."""
    opset = _opset(model)
    written_in = {function.opset_imports.get("", opset) for function in model.functions.values()}
    if written_in <= {opset}:
        passes.InlinePass()(model)
        return model
    weights = dict(model.graph.initializers)
    try:
        typed = onnx.shape_inference.infer_shapes(ir.to_proto(model))  # conversion needs types
        proto = onnx.inliner.inline_local_functions(typed, convert_version=True)
    except Exception as error:
        raise ExportError(
            f"{what}: a function is written in opset {min(written_in - {opset})}, the graph in "
            f"{opset}, and it cannot be inlined ({first_line(error)})",
            fix="Export it again with opset_version=20.",
        ) from error
    inlined = ir.from_proto(proto)
    for name, value in inlined.graph.initializers.items():
        if name in weights:  # those in files beside it know where these are
            value.const_value = weights[name].const_value
    inlined.metadata_props.update(model.metadata_props)
    return inlined


def convert(model: ir.Model, what: str) -> ir.Model:
    """Converts a model's operators to an opset of `OPSETS`.

    Raises:
        ExportError: They cannot be, naming the operator that cannot.
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
            f"{what}: it has opset {opset}, of which {', '.join(changed)} changed since {target}; "
            f"bundles hold opset {OPSETS[0]} to {target}",
            fix="Export it again with opset_version=20, which every supported engine reads.",
        )
    if opset < 9 and "Scan" in changed:  # its batch axis went; no converter writes that
        raise _not_convertible(what, opset, "Scan changed its meaning in opset 9", ["Scan"])
    try:
        with quiet():
            made = version_converter.ConvertVersionPass(target, fallback=True)(model).model
    except Exception as error:
        raise _not_convertible(what, opset, first_line(error), changed) from error
    if made.graph.opset_imports.get("") != target:
        raise _not_convertible(what, opset, "the converter has no rule", changed)
    logger.info("%s: converted from opset %d to %d", what, opset, target)
    return made


def _opset(model: ir.Model) -> int:
    """The opset of standard operators, which some files call ``ai.onnx``."""
    imports = model.graph.opset_imports
    return imports.setdefault("", imports.pop("ai.onnx", 1))


def _changed(model: ir.Model, opset: int, target: int) -> list[str]:
    """Operators of a model whose definition is not the same in two opsets."""
    kinds = sorted({node.op_type for node in model.graph.all_nodes() if node.domain == ""})
    return [kind for kind in kinds if _since(kind, opset) != _since(kind, target)]


def _since(kind: str, opset: int) -> int:
    """The opset that defined an operator as it is in another; 0: it has none there, or what defines
    it is newer than this onnx."""
    try:
        return int(onnx.defs.get_schema(kind, opset).since_version)
    except onnx.defs.SchemaError:
        return 0


def _not_convertible(what: str, opset: int, why: str, changed: list[str]) -> ExportError:
    return ExportError(
        f"{what}: it has opset {opset}, and {', '.join(changed)} cannot be "
        f"converted to {OPSETS[0]} ({why})",
        fix="Export it again with opset_version=20.",
    )


__all__ = ["OPSETS", "convert", "inline"]
