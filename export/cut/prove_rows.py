"""Runs the segments, and proves which axis of every tensor holds the rows.

A graph does not show which axis of an inner tensor is the batch. So the segments run once with all
rows, again with some of them and with each one alone: the row axis is the one that loses exactly
the rows left out, with the other rows' values unchanged. They also run with one row out of the
ordinary, so that a condition on the whole batch (the mean of all rows, say) shows. If a tensor has
no such axis, exits apply to the whole batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Tensor
from edgeexit.errors import ExportError
from edgeexit.export.cut.cut import Cut
from edgeexit.export.evaluate import TOLERANCES, close, open_graph, run_graph

logger = logging.getLogger(__name__)

ODD_ROWS = ((0, 100.0), (0, -100.0), (-1, 100.0), (-1, -100.0))
"""A row that is out of the ordinary, and the factor of its float inputs."""
DEPENDS = "the values of a row depend on the other rows"


@dataclass(frozen=True)
class Proof:
    """Result of running the segments.

    Attributes:
        tensors: The cut's tensors with the axes and row axes that were found.
        independent: Whether rows can exit one by one.
        values: Every tensor for all rows.
    """

    tensors: dict[str, Tensor]
    independent: bool
    values: dict[str, NDArray]


def prove_rows(
    pieces: Cut,
    paths: Sequence[Path],
    inputs: Mapping[str, NDArray],
    what: str,
    tolerance: float = TOLERANCES["float32"],
) -> Proof:
    """Runs the segments with all rows and with some, and finds every tensor's row axis.

    Args:
        pieces: The cut.
        paths: The segments' graph files.
        inputs: Program inputs, two rows or more.
        what: Name of the file, for messages.
        tolerance: See `edgeexit.export.evaluate.close`.
    """
    tensors = dict(pieces.tensors)
    by_row = {name: _batch_axis(tensors[name]) for name in pieces.inputs}
    rows = next(inputs[name].shape[axis] for name, axis in by_row.items() if axis is not None)
    subsets = [np.arange(rows)[1::2]] if rows > 1 else []
    subsets += [np.array([row]) for row in range(rows)] if rows > 1 else []
    runs: list[dict[str, NDArray]] = [dict(inputs)]
    for subset in subsets:
        runs.append({k: take_rows(v, subset, by_row[k]) for k, v in inputs.items()})
    failed = _run_pieces(pieces, paths, runs)
    odd = _run_with_odd_row(pieces, paths, inputs, by_row, rows)
    for name, tensor in tensors.items():
        if runs[0][name].dtype.name != tensor.dtype:
            raise ExportError(
                f"{what}: {name} is {runs[0][name].dtype.name}, not {tensor.dtype} as inferred",
                fix="Choose other exits, or give the file from before an optimiser changed it.",
            )
    reasons = [f"a segment does not run with fewer rows ({failed})"] if failed else []
    sizes = [_axis_sizes(tensors, pieces.inputs, run) for run in runs]
    exits = {piece.exit for piece in pieces.pieces}
    for name, tensor in tensors.items():
        if name in by_row:
            tensors[name] = msgspec.structs.replace(tensor, row_axis=by_row[name])
            continue
        values = [run[name] for run in runs if name in run]
        axis: int | None = None
        try:
            if len(runs) > 1 and len(values) == len(runs):
                parts = list(zip(subsets, values[1:], strict=True))
                axis = row_axis(values[0], parts, rows, tolerance)
                for ordinary, run in odd:
                    found = take_rows(run[name], ordinary, axis)
                    if not close(found, take_rows(values[0], ordinary, axis), tolerance):
                        raise ValueError(DEPENDS)
            if name in exits and axis != 0 and subsets and not failed:
                raise ValueError("its first axis does not hold the rows")
        except ValueError as error:
            reasons.append(f"no row axis found in {name} ({error})")
        if name in exits:
            axis = 0
        axes = _axes(tensor, axis, values, sizes)
        tensors[name] = msgspec.structs.replace(tensor, axes=axes, row_axis=axis)
    if reasons:
        logger.warning("%s: exits apply to the whole batch: %s", what, reasons[0])
    return Proof(tensors=tensors, independent=not reasons, values=runs[0])


def _run_pieces(pieces: Cut, paths: Sequence[Path], runs: list[dict[str, NDArray]]) -> str:
    """Runs the segments and adds their outputs to the runs. Returns why a segment fails with fewer
    rows than in the first run; empty if none does."""
    failed = ""
    for piece, path in zip(pieces.pieces, paths, strict=True):
        feeds = [{name: run[name] for name in piece.inputs if name in run} for run in runs]
        bug = "The whole file ran, so this is a bug in edgeexit; please report it."
        runs[0] |= run_graph(path, feeds[:1], fix=bug)[0]
        try:
            outputs = [] if failed else run_graph(path, feeds[1:])
        except ExportError as error:
            failed, outputs = error.what, []
        for run, more in zip(runs[1:], outputs, strict=False):
            run |= more
    return failed


def _run_with_odd_row(
    pieces: Cut,
    paths: Sequence[Path],
    inputs: Mapping[str, NDArray],
    by_row: Mapping[str, int | None],
    rows: int,
) -> list[tuple[NDArray[np.intp], dict[str, NDArray]]]:
    """Runs the segments with one row's float inputs multiplied by a factor (`ODD_ROWS`). Returns
    the other rows, which must not change, and the tensors. Leaves out runs that fail: the odd row
    may be invalid for the graph."""
    axes = {name: axis for name, axis in by_row.items() if axis is not None}
    floats = {name: axis for name, axis in axes.items() if inputs[name].dtype.kind == "f"}
    runs: list[tuple[NDArray[np.intp], dict[str, NDArray]]] = []
    for row, factor in ODD_ROWS if floats and rows > 1 else ():
        known = dict(inputs)
        for name, axis in floats.items():
            value = inputs[name].copy()
            with np.errstate(over="ignore"):
                np.moveaxis(value, axis, 0)[row] *= value.dtype.type(factor)
            known[name] = value
        runs.append((np.delete(np.arange(rows), row), known))
    for piece, path in zip(pieces.pieces, paths, strict=True) if runs else ():
        evaluate = open_graph(path)
        for other in list(runs):
            known = other[1]
            try:
                known |= evaluate({name: known[name] for name in piece.inputs})
            except ExportError:
                runs = [run for run in runs if run is not other]
    return runs


def row_axis(
    whole: NDArray,
    parts: Sequence[tuple[NDArray[np.intp], NDArray]],
    rows: int,
    tolerance: float = TOLERANCES["float32"],
) -> int | None:
    """The axis that holds the rows; None for a tensor that is the same for all rows.

    >>> state = np.arange(12.0).reshape(3, 4)
    >>> row_axis(state, [(np.array([0, 2]), state[:, [0, 2]])], rows=4)
    1

    Args:
        whole: The tensor for all rows.
        parts: Chosen rows, and the tensor for those rows only.
        rows: Number of all rows.
        tolerance: See `edgeexit.export.evaluate.close`.

    Raises:
        ValueError: No axis or more than one fits; the message says why.
    """
    shrunk: set[int] = set()
    for _, part in parts:
        if part.ndim != whole.ndim:
            raise ValueError("its number of axes depends on the number of rows")
        shrunk |= {axis for axis in range(whole.ndim) if whole.shape[axis] != part.shape[axis]}
    if len(shrunk) > 1:
        raise ValueError(f"axes {sorted(shrunk)} all depend on the number of rows")
    axis = shrunk.pop() if shrunk else None
    for chosen, part in parts:
        if axis is not None and (whole.shape[axis], part.shape[axis]) != (rows, len(chosen)):
            raise ValueError(f"axis {axis} holds {whole.shape[axis]} entries for {rows} rows")
        expected = whole if axis is None else np.take(whole, chosen, axis=axis)
        if not close(part, expected, tolerance):
            raise ValueError(DEPENDS)
    return axis


def _batch_axis(tensor: Tensor) -> int | None:
    return tensor.axes.index("batch") if "batch" in tensor.axes else None


def take_rows(value: NDArray, rows: NDArray[np.intp], axis: int | None) -> NDArray:
    """Chosen rows of a tensor, which is returned whole if it has no row axis."""
    return value if axis is None else np.ascontiguousarray(np.take(value, rows, axis))


def _axis_sizes(
    tensors: Mapping[str, Tensor], inputs: Sequence[str], run: Mapping[str, NDArray]
) -> dict[str, int]:
    return {
        axis: size
        for name in inputs
        for axis, size in zip(tensors[name].axes, run[name].shape, strict=True)
        if isinstance(axis, str)
    }


def _axes(
    tensor: Tensor, axis: int | None, arrays: Sequence[NDArray], sizes: Sequence[Mapping[str, int]]
) -> list[str | int | None]:
    """Inferred axes that the runs confirm; None for the others."""
    rank = arrays[0].ndim
    inferred = tensor.axes if len(tensor.axes) == rank else [None] * rank
    axes: list[str | int | None] = []
    for position, name in enumerate(inferred):
        runs = zip(arrays, sizes, strict=False)
        if position == axis:
            axes.append("batch")
        elif name != "batch" and all(
            array.shape[position] == (run[name] if isinstance(name, str) else name)
            for array, run in runs
        ):
            axes.append(name)
        else:
            axes.append(None)
    return axes
