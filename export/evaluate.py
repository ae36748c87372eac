"""Graphs run on the workstation, to compare them: with ONNX Runtime where it is installed, else
with onnx's own reference evaluator; and when two results are the same.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.errors import ExportError, first_line

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 2e-2}
"""Per precision: how far a row may move with the size of its batch, per largest value."""


def run_graph(
    path: str | os.PathLike[str],
    batches: Sequence[Mapping[str, NDArray]],
    *,
    reference: bool | None = None,
    fix: str = "If the inputs made up for the model do not suit it, give real ones (--data, an "
    ".npz with two rows or more); else check the file with the tool that wrote it.",
) -> list[dict[str, NDArray]]:
    """Runs a graph file on several batches. Returns every output, by name.

    Operators run one by one, unfused, so that a graph and its pieces round alike.

    Args:
        reference: Use onnx's reference evaluator; None: only if ONNX Runtime is not installed.
        fix: What to tell the user to do if it does not run.

    Raises:
        ExportError: It does not run, with the evaluator's reason.
    """
    if reference is None:
        reference = importlib.util.find_spec("onnxruntime") is None
    path = Path(path)
    name = "onnx's reference evaluator" if reference else "ONNX Runtime"
    try:
        if reference:
            from onnx.reference import ReferenceEvaluator

            evaluator: Any = ReferenceEvaluator(str(path))
            names = list(evaluator.output_names)
            return [
                dict(zip(names, map(np.asarray, evaluator.run(None, dict(batch))), strict=True))
                for batch in batches
            ]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = _session(path, options)
        names = [output.name for output in session.get_outputs()]
        return [dict(zip(names, session.run(None, dict(batch)), strict=True)) for batch in batches]
    except Exception as error:
        # Evaluators raise whatever their operators do; all of it means that the graph does not run.
        raise ExportError(
            f"{path.name}: {name} cannot run it: {first_line(error)}", fix=fix
        ) from error


def _session(path: Path, options: Any) -> Any:
    """A session on the host, also in a process that has installed ONNX Runtime's global pool: no
    session may have a pool of its own beside that."""
    import onnxruntime

    provider = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=provider)
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        options.use_per_session_threads = False
        return onnxruntime.InferenceSession(str(path), options, providers=provider)


def tolerance_of(graph: ir.Graph, precision: str) -> float:
    """How far results may lie apart. Scales that are found at run time tie rows to each other by
    about one step, which must be seen: such graphs are held to what float32 promises."""
    if any(node.op_type == "DynamicQuantizeLinear" for node in graph.all_nodes()):
        precision = "float32"
    return TOLERANCES[precision]


def close(found: NDArray, expected: NDArray, tolerance: float) -> bool:
    """Whether two results are equal within `tolerance` times their largest value; one step where
    quantised, exactly where they are integers or truth values."""
    if found.shape != expected.shape:
        return False
    if found.dtype.name in ("int8", "uint8"):
        return bool(np.all(np.abs(found.astype(np.int64) - expected.astype(np.int64)) <= 1))
    if found.dtype.kind in "biu":
        return bool(np.array_equal(found, expected))
    left, right = found.astype(np.float64), expected.astype(np.float64)
    finite = np.abs(right[np.isfinite(right)])
    scale = float(finite.max()) if finite.size else 1.0
    return bool(np.allclose(left, right, rtol=0, atol=tolerance * scale, equal_nan=True))


__all__ = ["TOLERANCES", "close", "run_graph", "tolerance_of"]
