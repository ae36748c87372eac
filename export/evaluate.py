"""Graphs run on the workstation, to compare them: with ONNX Runtime where it is installed, else
with onnx's own reference evaluator; and when two results are the same.
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

from edgeexit.errors import ExportError

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 2e-2, "int4": 2e-2}
"""Per precision: how far a row may move with the size of its batch, per largest value."""
REAL_INPUTS = (
    "If the inputs made up for the model do not suit it, give real ones (--data, an .npz with two "
    "rows or more); else check the file with the tool that wrote it."
)
_FUNCTION = re.compile(
    r"^[^()]*\w+::[^()]*\([^()]*(\([^()]*\)[^()]*)*\)( const)?( \[with [^]]*\])? "
)
"""A C++ function with its arguments, where ONNX Runtime says that it stopped."""


def run_graph(
    path: str | os.PathLike[str],
    batches: Sequence[Mapping[str, NDArray]],
    *,
    reference: bool | None = None,
    fix: str = REAL_INPUTS,
) -> list[dict[str, NDArray]]:
    """Runs a graph file on several batches. Returns every output, by name.

    Raises:
        ExportError: It does not run, with the evaluator's reason.
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
    """Opens a graph file to run it. Returns what gives every output, by name.

    Operators run one by one, unfused, so that a graph and its pieces round alike.

    Args:
        optimised: Run it as ONNX Runtime does when nobody says otherwise.
        content: What to take in the place of the file's own content; its weights are found as the
            file's are.
        reference: Use onnx's reference evaluator; None: only if ONNX Runtime is not installed.
        fix: What to tell the user to do if it does not run.

    Raises:
        ExportError: It cannot be opened or run, with the evaluator's reason.
    """
    if reference is None:
        reference = importlib.util.find_spec("onnxruntime") is None
    path = Path(path)
    name = "onnx's reference evaluator" if reference else "ONNX Runtime"

    def refusal(error: Exception, does: str, fix: str) -> ExportError:
        return ExportError(f"{path.name}: {name} cannot {does} it: {engine_reason(error)}", fix=fix)

    # Evaluators raise whatever their operators do; all of it means that the graph does not run.
    try:
        outputs, run = (
            _reference(path, content) if reference else _onnxruntime(path, content, optimised)
        )
    except Exception as error:
        own = "Check the file with the tool that wrote it; it must run on this machine's CPU."
        raise refusal(error, "load", own if fix == REAL_INPUTS else fix) from error

    def run_once(batch: Mapping[str, NDArray]) -> dict[str, NDArray]:
        try:
            return dict(zip(outputs, map(np.asarray, run(None, dict(batch))), strict=True))
        except Exception as error:
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
    """A session on the host, also in a process that has installed ONNX Runtime's global pool: no
    session may have a pool of its own beside that."""
    import onnxruntime

    # With its own fallback, ONNX Runtime prints what failed to standard output.
    settings: Any = {"providers": ["CPUExecutionProvider"], "enable_fallback": False}
    try:
        return onnxruntime.InferenceSession(source, options, **settings)
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        options.use_per_session_threads = False
        return onnxruntime.InferenceSession(source, options, **settings)


def engine_reason(error: BaseException) -> str:
    """What ONNX Runtime says went wrong, without what it puts before it: the kind of error, places
    in its own sources, names of templates.

    >>> engine_reason(RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status "
    ...     "code returned while running Add node. Name:'a' Status Message: /src/math.cc:12 void "
    ...     "ort::Check(const T&) [with T = float] axis == 1 was false. Sizes 3 and 4 differ\\n"))
    "Add node 'a': axis == 1 was false. Sizes 3 and 4 differ"
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .+? failed: ?", "", text)
    node = re.match(r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' ", text)
    said = text.split("Status Message: ", 1)[-1]
    said = re.sub(r"^(\S+/)?[\w.]+\.(cc|h|cpp|hpp):\d+ ", "", said)
    said = _FUNCTION.sub("", said)
    if node is not None:
        said = f"{node[1]} node {node[2]!r}: {said}"
    return said if len(said) <= 400 else f"{said[:200]} ... {said[-200:]}"


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


__all__ = [
    "TOLERANCES",
    "close",
    "engine_reason",
    "host_session",
    "open_graph",
    "run_graph",
    "tolerance_of",
]
