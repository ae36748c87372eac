"""Traces: what every exit says about a data set, recorded once and replayed under any policy.

One run executes every segment for every row and keeps, per row and exit, the scores and the
predicted class, the label if there is one, and the time of every segment. `replay` then tells in
milliseconds where each row would have left under a policy: for a ``forward`` program that is exact,
because an exit changes nothing that was computed before it. A trace is a ``.npz`` without pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Exit
from edgeexit.bundle.policy import decide
from edgeexit.errors import DataError, MeasurementError
from edgeexit.measure.data import DataSet, read_npz
from edgeexit.measure.files import write_atomic
from edgeexit.runtime import Model, Policy

TRACE_FORMAT = "1.0"
_FIX = "Give a file that `edgeexit trace -o` wrote."


@dataclass(frozen=True)
class Trace:
    """A recorded data set.

    Attributes:
        bundle: Digest of the bundle.
        engine: What computed it (`Model.describe_engine`).
        data: ``name`` and ``digest`` of the data set.
        exits: Names in order; the last one always answers.
        scores: Score name -> ``[exit, row]`` float32.
        predictions: ``[exit, row]``, the class with the largest logit.
        labels: ``[row]`` class indices, or None.
        batch_rows: ``[batch]``, rows of each batch that ran.
        times_ms: ``[batch, segment]`` milliseconds; segment k ends at exit k.
        batch_size: Rows per batch that were asked for; the last batch may have fewer.
        independent: Whether rows of a batch may leave at different exits.
    """

    bundle: str
    engine: dict[str, str]
    data: dict[str, str]
    exits: list[str]
    scores: dict[str, NDArray[np.float32]]
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    batch_rows: NDArray[np.int64]
    times_ms: NDArray[np.float64]
    batch_size: int
    independent: bool = True

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.predictions.shape[1])

    def segment_ms(self) -> NDArray[np.float64]:
        """Median time of each segment over the batches of full size, in ms per batch."""
        full = self.batch_rows == self.batch_rows.max()
        return np.asarray(np.median(self.times_ms[full], axis=0), np.float64)


def record(
    model: Model,
    data: DataSet,
    batch_size: int,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trace:
    """Runs every segment for every row of a data set.

    The first batch runs once more before it counts, so that its times are those of a warm engine.

    Raises:
        MeasurementError: An exit gives no logits, or the exits share no score.
        DataError: The data cannot be read or does not fit.
    """
    if missing := [leave.name for leave in model.exits if "logits" not in leave.outputs]:
        raise MeasurementError(
            f"exit {missing[0]} gives no logits, so it predicts no class",
            fix="A trace needs a classifier whose exits answer with logits.",
        )
    names = sorted(set.intersection(*(set(leave.scores) for leave in model.exits)))
    if not names:
        raise MeasurementError("the exits share no score", fix="Export again with scores.")
    scores: dict[str, list[NDArray]] = {name: [] for name in names}
    predictions: list[NDArray] = []
    labels: list[NDArray] = []
    sizes: list[int] = []
    times: list[list[float]] = []
    done = 0
    for batch in data.batches(batch_size):
        if not sizes:
            model.trace(batch.inputs)
        made = model.trace(batch.inputs)
        for name in names:
            scores[name].append(np.stack([one[name] for one in made.scores]))
        predictions.append(np.stack([one["logits"].argmax(-1) for one in made.outputs]))
        if batch.labels is not None:
            labels.append(batch.labels)
        sizes.append(batch.rows)
        times.append(made.times_ms)
        done += batch.rows
        if progress is not None:
            progress("rows", done, data.rows or 0)
    (chain,) = model.bundle.manifest.chains.values()
    return Trace(
        bundle=model.bundle.digest,
        engine=model.describe_engine(),
        data={"name": data.name, "digest": data.digest},
        exits=[leave.name for leave in model.exits],
        scores={name: np.concatenate(parts, axis=1) for name, parts in scores.items()},
        predictions=np.concatenate(predictions, axis=1).astype(np.int64),
        labels=np.concatenate(labels) if labels else None,
        batch_rows=np.asarray(sizes, np.int64),
        times_ms=np.asarray(times, np.float64),
        batch_size=batch_size,
        independent=chain.rows == "independent",
    )


def replay(trace: Trace, policy: Policy) -> NDArray[np.int64]:
    """Index of the exit ``[row]`` where each row leaves under a policy.

    Raises:
        PolicyError: The policy does not fit the bundle that the trace was made with.
    """
    exits = [
        Exit(name=name, outputs={}, scores=dict.fromkeys(trace.scores, "")) for name in trace.exits
    ]
    decisions = decide(policy, exits, digest=trace.bundle)
    taken = np.full(trace.rows, len(exits) - 1, np.int64)
    alive = np.ones(trace.rows, np.bool_)
    previous, streak = np.full(trace.rows, -1, np.int64), np.zeros(trace.rows, np.int64)
    for number, decision in enumerate(decisions[:-1]):
        if not decision.consult:
            continue
        fires = alive & (trace.scores[policy.score][number] >= decision.threshold)
        if policy.patience:
            predicted = trace.predictions[number]
            streak = np.where(predicted == previous, streak + 1, 0)
            previous = predicted
            fires &= streak >= policy.patience
        if not trace.independent:
            starts = np.cumsum(trace.batch_rows) - trace.batch_rows
            fires = np.repeat(np.logical_and.reduceat(fires, starts), trace.batch_rows)
        taken[fires] = number
        alive &= ~fires
    return taken


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Writes a trace, whole or not at all."""
    about = {
        "format": TRACE_FORMAT,
        "bundle": trace.bundle,
        "engine": trace.engine,
        "data": trace.data,
        "exits": trace.exits,
        "scores": list(trace.scores),
        "batch_size": trace.batch_size,
        "independent": trace.independent,
    }
    arrays: dict[str, Any] = {
        "about": np.asarray(json.dumps(about)),
        "predictions": trace.predictions,
        "batch_rows": trace.batch_rows,
        "times_ms": trace.times_ms,
    }
    arrays |= {f"score/{name}": value for name, value in trace.scores.items()}
    if trace.labels is not None:
        arrays["labels"] = trace.labels
    write_atomic(path, lambda file: np.savez(file, **arrays))


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace. Raises `DataError` naming what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {kind}", fix=_FIX)
    arrays = read_npz(path)
    try:
        about = json.loads(str(_take(arrays, "about", np.str_, 0)))
        version = str(about["format"])
        if version.split(".")[0] != TRACE_FORMAT.split(".")[0]:
            raise ValueError(f"trace format {version}, this edgeexit reads {TRACE_FORMAT}")
        exits, names = _strings(about["exits"]), _strings(about["scores"])
        if not exits or not names or len(set(exits)) != len(exits):
            raise ValueError("it names no exits or scores, or an exit twice")
        predictions = _take(arrays, "predictions", np.int64, 2)
        rows = predictions.shape[1]
        batch_rows = _take(arrays, "batch_rows", np.int64, 1)
        times_ms = _take(arrays, "times_ms", np.float64, 2)
        scores = {name: _take(arrays, f"score/{name}", np.float32, 2) for name in names}
        labels = _take(arrays, "labels", np.int64, 1) if "labels" in arrays else None
        shapes = {
            "predictions": (predictions.shape, (len(exits), rows)),
            "times_ms": (times_ms.shape, (len(batch_rows), len(exits))),
            "labels": ((rows,) if labels is None else labels.shape, (rows,)),
        } | {f"score/{name}": (value.shape, (len(exits), rows)) for name, value in scores.items()}
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"{name} has the shape {list(found)}, expected {list(expected)}")
        if any(np.isinf(value).any() for value in scores.values()):
            raise ValueError("a score is infinite")
        if batch_rows.size and batch_rows.max() > rows:
            raise ValueError(f"a batch holds {batch_rows.max()} rows, its predictions {rows}")
        if not 1 <= int(about["batch_size"]) < 2**31:
            raise ValueError(f"batch_size is {about['batch_size']}")
        if rows == 0 or batch_rows.min() < 1 or batch_rows.sum() != rows:
            raise ValueError(f"its batches hold {batch_rows.sum()} rows, its predictions {rows}")
        if not (np.isfinite(times_ms).all() and (times_ms >= 0).all()):
            raise ValueError("times_ms holds values that are not times")
        return Trace(
            bundle=str(about["bundle"]),
            engine={str(k): str(v) for k, v in about["engine"].items()},
            data={str(k): str(v) for k, v in about["data"].items()},
            exits=exits,
            scores=scores,
            predictions=predictions,
            labels=labels,
            batch_rows=batch_rows,
            times_ms=times_ms,
            batch_size=int(about["batch_size"]),
            independent=about["independent"] is True,
        )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not a trace ({reason})", fix=_FIX) from error


def _take(arrays: dict[str, NDArray], name: str, kind: type, axes: int) -> NDArray[Any]:
    value = arrays[name]
    if not np.issubdtype(value.dtype, kind) or value.ndim != axes:
        raise ValueError(f"{name} is {value.dtype.name} with {value.ndim} axes")
    return value


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{value!r:.60} is not a list of names")
    return value
