"""Runs graphs on the workstation and compares results. Graphs run with ONNX Runtime if it is
installed, else with onnx's reference evaluator; `close` decides whether two results are equal.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.invalid_ids import invalid_id
from edgeexit.errors import ExportError

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 2e-2, "int4": 2e-2}
"""Precision -> how much a row's result may depend on its batch, relative to the largest value."""
REAL_INPUTS = (
    "If the generated inputs do not suit the model, give real ones (--data, an .npz with two rows "
    "or more); else check the file with the tool that wrote it."
)
VALID_IDS = "Give valid ids in the samples (--data)."
_FUNCTION = re.compile(
    r"^[^()]*\w+::[^()]*\([^()]*(\([^()]*\)[^()]*)*\)( const)?( \[with [^]]*\])? "
)
"""A C++ function with its arguments, as in messages of ONNX Runtime."""


def run_graph(
    path: str | os.PathLike[str],
    batches: Sequence[Mapping[str, NDArray]],
    *,
    reference: bool | None = None,
    fix: str = REAL_INPUTS,
) -> list[dict[str, NDArray]]:
    """Runs a graph file on several batches. Returns all outputs, by name.

    Raises:
        ExportError: The file does not run; the message has the evaluator's reason.
    """
    run = open_graph(path, reference=reference, fix=fix)
    return [run(batch) for batch in batches]


def open_graph(
    path: str | os.PathLike[str],
    *,
    content: bytes | None = None,
    optimised: bool = False,
    reference: bool | None = None,
    fix: str = REAL_INPUTS,
) -> Callable[[Mapping[str, NDArray]], dict[str, NDArray]]:
    """Opens a graph file. Returns a function from inputs to all outputs, by name.

    Operators run unfused, so that a graph and its segments round in the same way.

    Args:
        content: A model to run instead of the file's content; its weights are read from the file's
            folder.
        optimised: Use the default optimisation of ONNX Runtime.
        reference: Use onnx's reference evaluator; None: only if ONNX Runtime is not installed.
        fix: The error's fix if the graph does not run.

    Raises:
        ExportError: The graph cannot be loaded or run; the message has the evaluator's reason.
    """
    if reference is None:
        reference = importlib.util.find_spec("onnxruntime") is None
    path = Path(path)
    name = "onnx's reference evaluator" if reference else "ONNX Runtime"

    def refusal(error: Exception, does: str, fix: str) -> ExportError:
        return ExportError(f"{path.name}: {name} cannot {does} it: {engine_reason(error)}", fix=fix)

    # Operators may raise any error; all mean that the graph does not run.
    try:
        outputs, run = (
            _reference(path, content) if reference else _onnxruntime(path, content, optimised)
        )
    except Exception as error:
        cpu = "Check the file with the tool that wrote it; it must run on this machine's CPU."
        raise refusal(error, "load", cpu if fix == REAL_INPUTS else fix) from error

    def run_once(batch: Mapping[str, NDArray]) -> dict[str, NDArray]:
        try:
            return dict(zip(outputs, map(np.asarray, run(None, dict(batch))), strict=True))
        except Exception as error:
            if said := invalid_id(str(error), batch):
                raise ExportError(f"{path.name}: {said}", fix=VALID_IDS) from error
            raise refusal(error, "run", fix) from error

    return run_once


def _reference(path: Path, content: bytes | None) -> tuple[list[str], Any]:
    import onnx
    from onnx.external_data_helper import load_external_data_for_model
    from onnx.reference import ReferenceEvaluator

    if content is None:
        evaluator: Any = ReferenceEvaluator(str(path))
    else:
        model = onnx.load_from_string(content)
        load_external_data_for_model(model, str(path.parent))
        evaluator = ReferenceEvaluator(model)
    return list(evaluator.output_names), evaluator.run


def _onnxruntime(path: Path, content: bytes | None, optimised: bool) -> tuple[list[str], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    folder = "session.model_external_initializers_file_folder_path"
    if content is not None:
        options.add_session_config_entry(folder, str(path.parent.resolve()))
    session = host_session(str(path) if content is None else content, options)
    return [output.name for output in session.get_outputs()], session.run


def host_session(source: str | bytes, options: Any) -> Any:
    """A session on the host. It also works in a process that has installed ONNX Runtime's global
    thread pool, where sessions must not have their own."""
    import onnxruntime

    # With its fallback enabled, ONNX Runtime prints errors to standard output.
    settings: Any = {"providers": ["CPUExecutionProvider"], "enable_fallback": False}
    try:
        return onnxruntime.InferenceSession(source, options, **settings)
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        options.use_per_session_threads = False
        return onnxruntime.InferenceSession(source, options, **settings)


def engine_reason(error: BaseException) -> str:
    """ONNX Runtime's reason for an error, without the kind of error, locations in its sources and
    names of templates.

    >>> engine_reason(RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status "
    ...     "code returned while running Add node. Name:'a' Status Message: /src/math.cc:12 void "
    ...     "ort::Check(const T&) [with T = float] axis == 1 was false. Sizes 3 and 4 differ\\n"))
    "Add node 'a': axis == 1 was false. Sizes 3 and 4 differ"
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .+? failed: ?", "", text)
    node = re.match(r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' ", text)
    reason = text.split("Status Message: ", 1)[-1]
    reason = re.sub(r"^(\S+/)?[\w.]+\.(cc|h|cpp|hpp):\d+ ", "", reason)
    reason = _FUNCTION.sub("", reason)
    if node is not None:
        reason = f"{node[1]} node {node[2]!r}: {reason}"
    return reason if len(reason) <= 400 else f"{reason[:200]} ... {reason[-200:]}"


def tolerance_of(graph: ir.Graph, precision: str) -> float:
    """Allowed difference of results. Scales computed at run time make rows depend on each other by
    about one quantisation step. To detect that, such graphs get the tolerance of float32."""
    if any(node.op_type == "DynamicQuantizeLinear" for node in graph.all_nodes()):
        precision = "float32"
    return TOLERANCES[precision]


def close(result: NDArray, expected: NDArray, tolerance: float) -> bool:
    """Whether two results are equal: floats within `tolerance` times the largest value, 8-bit
    integers within 1, other integers and bools exactly."""
    if result.shape != expected.shape:
        return False
    if result.dtype.name in ("int8", "uint8"):
        return bool(np.all(np.abs(result.astype(np.int64) - expected.astype(np.int64)) <= 1))
    if result.dtype.kind in "biu":
        return bool(np.array_equal(result, expected))
    left, right = result.astype(np.float64), expected.astype(np.float64)
    finite = np.abs(right[np.isfinite(right)])
    scale = float(finite.max()) if finite.size else 1.0
    return bool(np.allclose(left, right, rtol=0, atol=tolerance * scale, equal_nan=True))


__all__ = [
    "TOLERANCES",
    "close",
    "engine_reason",
    "host_session",
    "open_graph",
    "run_graph",
    "tolerance_of",
]
