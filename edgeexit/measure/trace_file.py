"""Reads and writes trace files: ``.npz`` without pickles, with all arrays checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.files import read_npz, write_atomic
from edgeexit.bundle.paths import not_a_file, shown
from edgeexit.bundle.policy_file import rules_from_json, rules_to_json
from edgeexit.errors import DataError
from edgeexit.measure.trace import Trace

TRACE_FORMAT = "2.0"

_FIX = "Give a file that `edgeexit trace -o` wrote."
_ABOUT = (
    *("bundle", "engine", "data", "exits", "batch_size", "independent"),
    *("chain", "other_chains"),
)
_ARRAYS = {"predictions": (np.int64, 2), "batch_rows": (np.int64, 1), "times_ms": (np.float64, 2)}
_OPTIONAL = {
    **dict.fromkeys(("labels", "groups", "timed_rows"), (np.int64, 1)),
    "next_log_probs": (np.float32, 2),
}


def write_trace(trace: Trace, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Writes a trace as `edgeexit.bundle.files.write_atomic` does."""
    about = {name: getattr(trace, name) for name in _ABOUT}
    about |= {"format": TRACE_FORMAT, "scores": list(trace.scores)}
    about |= {
        "of_answers": trace.of_answers,
        "gates": trace.gates,
        "policy": rules_to_json(trace.policy),
    }
    arrays = {name: getattr(trace, name) for name in (*_ARRAYS, *_OPTIONAL)}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    arrays |= {f"score/{name}": value for name, value in trace.scores.items()}
    arrays["about"] = np.asarray(json.dumps(about))
    write_atomic(path, lambda file: np.savez(file, **arrays), overwrite=overwrite)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace. Raises `DataError` with the cause if it is invalid."""
    path = Path(path)
    if reason := not_a_file(path):
        raise DataError(f"{shown(path)} {reason}", fix=_FIX)
    arrays = read_npz(path, _FIX)
    try:
        about = json.loads(str(_take(arrays, "about", np.str_, 0)))
        version = str(about["format"])
        if version.split(".")[0] != TRACE_FORMAT.split(".")[0]:
            raise ValueError(f"trace format {version}, this edgeexit reads {TRACE_FORMAT}")
        required: dict[str, Any] = {
            name: _take(arrays, name, *form) for name, form in _ARRAYS.items()
        }
        optional: dict[str, Any] = {
            name: _take(arrays, name, *form) if name in arrays else None
            for name, form in _OPTIONAL.items()
        }
        trace = Trace(
            bundle=str(about["bundle"]),
            engine={str(k): str(v) for k, v in about["engine"].items()},
            data={str(k): str(v) for k, v in about["data"].items()},
            exits=_strings(about["exits"]),
            scores={
                name: _take(arrays, f"score/{name}", np.float32, 2)
                for name in _strings(about["scores"])
            },
            batch_size=int(about["batch_size"]),
            independent=about["independent"] is True,
            chain=str(about["chain"]),
            other_chains={str(k): str(v) for k, v in about["other_chains"].items()},
            of_answers=about.get("of_answers") is True,
            gates=about.get("gates") is True,
            policy=rules_from_json(about.get("policy", {})),
            **required,
            **optional,
        )
        _check(trace)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not a trace ({reason})", fix=_FIX) from error
    return trace


def _check(trace: Trace) -> None:
    """Raises `ValueError` if the arrays are invalid or inconsistent."""
    rows, exits, batch_rows = trace.rows, len(trace.exits), trace.batch_rows
    if not exits or not trace.scores or len(set(trace.exits)) != exits:
        raise ValueError("it has no exits or scores, or an exit twice")
    runs = len(batch_rows) if trace.timed_rows is None else len(trace.timed_rows)
    shapes: dict[str, tuple[NDArray[Any] | None, tuple[int, ...]]] = {
        "predictions": (trace.predictions, (exits, rows)),
        "times_ms": (trace.times_ms, (runs, exits)),
        "labels": (trace.labels, (rows,)),
        "groups": (trace.groups, (rows,)),
        "next_log_probs": (trace.next_log_probs, (exits, rows)),
    }
    shapes |= {f"score/{name}": (value, (exits, rows)) for name, value in trace.scores.items()}
    for name, (found, expected) in shapes.items():
        if found is not None and found.shape != expected:
            raise ValueError(f"{name} has the shape {list(found.shape)}, expected {list(expected)}")
    if trace.next_log_probs is not None and (trace.next_log_probs > 0).any():
        raise ValueError("a probability is above 1")
    if any(np.isinf(value).any() for value in trace.scores.values()):
        raise ValueError("a score is infinite")
    if batch_rows.size and batch_rows.max() > rows:
        raise ValueError(f"a batch holds {batch_rows.max()} rows, its predictions {rows}")
    if not 1 <= trace.batch_size < 2**31:
        raise ValueError(f"batch_size is {trace.batch_size}")
    if rows == 0 or batch_rows.min() < 1 or batch_rows.sum() != rows:
        raise ValueError(f"its batches hold {batch_rows.sum()} rows, its predictions {rows}")
    if trace.timed_rows is not None and (runs == 0 or trace.timed_rows.min() < 1):
        raise ValueError("timed_rows has invalid numbers of rows")
    if not (np.isfinite(trace.times_ms).all() and (trace.times_ms >= 0).all()):
        raise ValueError("times_ms has invalid times")
    if trace.groups is not None and trace.groups.min() < 0:
        raise ValueError("groups has invalid indices of texts")


def _take(arrays: dict[str, NDArray], name: str, kind: type, axes: int) -> NDArray[Any]:
    value = arrays[name]
    if not np.issubdtype(value.dtype, kind) or value.ndim != axes:
        raise ValueError(f"{name} is {value.dtype.name} with {value.ndim} axes")
    return value


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{value!r:.60} is not a list of names")
    return value
