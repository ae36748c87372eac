"""Runs what was cut: inputs to run it with, and the proof of which axis holds the rows.

A graph does not say which axis of an inner tensor belongs to the batch. So the segments run once
with all rows and again with some of them: an axis that loses exactly the rows left out, with the
values of the others unchanged, is the row axis. Where none does, rows can only leave together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Tensor
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.cut.cut import Cut
from edgeexit.export.cut.read_onnx import DTYPES
from edgeexit.export.evaluate import TOLERANCES, close, run_graph

logger = logging.getLogger(__name__)

MOST_ROWS = 16
"""Rows of a user's samples that are used; a few are enough for a reference."""
_SAME_VALUES = frozenset(
    {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"}
)
_TABLES = {"EmbedLayerNormalization": {0: 2, 1: 4}}
"""Operators of other domains that look ids up: input of ids -> input of the table."""


def sample_inputs(
    graph: ir.Graph, rows: int, samples: Mapping[str, NDArray] | None, names: Mapping[str, str]
) -> dict[str, NDArray]:
    """Inputs to run a graph with.

    Args:
        graph: A normalised graph.
        rows: How many rows to make up.
        samples: The user's inputs, at least two rows; None: inputs are made up.
        names: Name of an input in the user's file -> its name in the graph.
    """
    if samples is not None:
        return _given_inputs(graph, samples, names)
    seed = np.random.default_rng(0)
    sizes = {"batch": rows}
    for value in graph.inputs:
        for size in value.shape or ():
            if isinstance(size, ir.SymbolicDim) and size.value and size.value not in sizes:
                # Images shrink by strides, so their sides start large; no two sizes are equal.
                step = 32 if len(value.shape or ()) >= 4 else 1
                start = 64 if step == 32 else 6
                sizes[size.value] = start + step * len(sizes)
    found = {}
    for value in graph.inputs:
        shape = [d if isinstance(d, int) else sizes[d.value or ""] for d in value.shape or ()]
        found[value.name or ""] = _made_up(value, shape, seed)
    return found


@dataclass(frozen=True)
class Proof:
    """What running the segments showed.

    Attributes:
        tensors: The cut's tensors with their axes and row axes as found.
        independent: Whether every row can leave on its own.
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
        what: The file, for messages.
        tolerance: See `edgeexit.export.evaluate.close`.
    """
    tensors = dict(pieces.tensors)
    by_row = {name: _first_axis(tensors[name]) for name in pieces.inputs}
    rows = next(inputs[name].shape[0] for name, axis in by_row.items() if axis == 0)
    subsets = [np.arange(rows)[1::2], np.arange(rows)[-1:]]
    runs: list[dict[str, NDArray]] = [dict(inputs)]
    for subset in subsets:
        runs.append({k: v[subset] if by_row[k] == 0 else v for k, v in inputs.items()})
    failed = _run_pieces(pieces, paths, runs)
    for name, tensor in tensors.items():
        if runs[0][name].dtype.name != tensor.dtype:
            raise ExportError(
                f"{what}: {name} was taken to be {tensor.dtype} and is {runs[0][name].dtype.name}",
                fix="Cut elsewhere, or give the file without an optimiser's own operators.",
            )
    reasons = [f"with fewer rows, {failed}"] if failed else []
    sizes = [_axis_sizes(tensors, pieces.inputs, run) for run in runs]
    exits = {piece.exit for piece in pieces.pieces}
    for name, tensor in tensors.items():
        if name in by_row:
            tensors[name] = msgspec.structs.replace(tensor, row_axis=by_row[name])
            continue
        found = [run[name] for run in runs if name in run]
        axis: int | None = None
        try:
            if len(found) == len(runs):
                parts = list(zip(subsets, found[1:], strict=True))
                axis = row_axis(found[0], parts, rows, tolerance)
            if name in exits and axis != 0 and not failed:
                raise ValueError("its first axis does not hold them")
        except ValueError as error:
            reasons.append(f"{name}: {error}")
        if name in exits:
            axis = 0
        axes = _axes(tensor, axis, found, sizes)
        tensors[name] = msgspec.structs.replace(tensor, axes=axes, row_axis=axis)
    if reasons:
        logger.warning(
            "%s: rows of a batch leave together, because they cannot be told apart (%s)",
            what,
            reasons[0],
        )
    return Proof(tensors=tensors, independent=not reasons, values=runs[0])


def _run_pieces(pieces: Cut, paths: Sequence[Path], runs: list[dict[str, NDArray]]) -> str:
    """Runs the segments; adds what they make to the runs. Returns why they fail with fewer rows
    than in the first run, if they do."""
    failed = ""
    for piece, path in zip(pieces.pieces, paths, strict=True):
        feeds = [{name: run[name] for name in piece.inputs if name in run} for run in runs]
        bug = "The whole file ran: this is a bug in edgeexit; report it."
        runs[0] |= run_graph(path, feeds[:1], fix=bug)[0]
        try:
            made = [] if failed else run_graph(path, feeds[1:])
        except ExportError as error:
            failed, made = error.what, []
        for run, more in zip(runs[1:], made, strict=False):
            run |= more
    return failed


def row_axis(
    whole: NDArray,
    parts: Sequence[tuple[NDArray[np.intp], NDArray]],
    rows: int,
    tolerance: float = TOLERANCES["float32"],
) -> int | None:
    """The axis along which rows lie; None for a tensor that is the same for all rows.

    >>> state = np.arange(12.0).reshape(3, 4)
    >>> row_axis(state, [(np.array([0, 2]), state[:, [0, 2]])], rows=4)
    1

    Args:
        whole: The tensor for all rows.
        parts: Chosen rows, and the tensor for those rows only.
        rows: How many rows there are.
        tolerance: See `edgeexit.export.evaluate.close`.

    Raises:
        ValueError: With the reason why no axis, or more than one, fits.
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
            raise ValueError("the values of a row depend on the other rows")
    return axis


def _given_inputs(
    graph: ir.Graph, samples: Mapping[str, NDArray], names: Mapping[str, str]
) -> dict[str, NDArray]:
    given = {names.get(name, name): np.asarray(array) for name, array in samples.items()}
    if "label" not in {value.name for value in graph.inputs}:
        given.pop("label", None)  # data sets have it; the model does not take it
    wanted = [value.name or "" for value in graph.inputs]
    for name in [*sorted(set(wanted) - given.keys()), *sorted(given.keys() - set(wanted))]:
        kind = "is missing" if name in wanted else "is not an input"
        raise UsageError(f"samples: {name} {kind}", fix=f"The model takes {', '.join(wanted)}.")
    sizes: dict[str, int] = {}
    found = {}
    for value in graph.inputs:
        name, array = value.name or "", given[value.name or ""]
        expected = DTYPES.get(value.dtype) if value.dtype is not None else None
        dims = [d if isinstance(d, int) else d.value for d in value.shape or ()]
        fits = array.dtype.name == expected and array.ndim == len(dims)
        for dim, size in zip(dims, array.shape, strict=False):
            fits = fits and size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
        if not fits:
            raise UsageError(
                f"samples: {name} is {array.dtype.name}{list(array.shape)}, the model takes "
                f"{expected}{dims}",
                fix="Axes of the same name have the same size in all inputs.",
            )
        found[name] = array[:MOST_ROWS] if dims and dims[0] == "batch" else array
    if sizes["batch"] < 2:
        raise UsageError(
            "samples: there is only one row",
            fix="Give two or more, to see how rows are told apart.",
        )
    return found


def _made_up(value: ir.Value, shape: list[int], seed: np.random.Generator) -> NDArray:
    kind = DTYPES.get(value.dtype) if value.dtype is not None else None
    if kind is None or kind == "bfloat16":
        raise ExportError(
            f"input {value.name} has a type for which no values can be made up ({value.dtype})",
            fix="Put the conversion outside the model: engines take numbers.",
        )
    dtype = np.dtype(kind)
    bound = _bound(value)
    if bound is not None and dtype.kind in "iu":
        return seed.integers(0, bound, shape).astype(dtype)
    if dtype.kind in "biu" or "mask" in (value.name or "").lower():
        # A mask, most likely: ones, with padding behind every row but the first.
        ones = np.ones(shape, dtype)
        if len(shape) >= 2 and shape[-1] > 2:
            for row in range(1, shape[0]):
                ones[row, ..., shape[-1] - 1 - row % (shape[-1] // 2) :] = 0
        return ones
    return seed.standard_normal(shape).astype(dtype)


def _bound(value: ir.Value) -> int | None:
    """Entries of the smallest table that an input of ids is looked up in; None if there is none."""
    bounds = []
    stack, seen = [value], {value}
    while stack:
        for node, position in stack.pop().uses():
            table = None
            if node.op_type == "Gather" and position == 1:
                axis = node.attributes.get_int("axis", 0)
                table = node.inputs[0]
            elif position in _TABLES.get(node.op_type, {}):
                axis = 0
                table = node.inputs[_TABLES[node.op_type][position]]
            if table is not None and table.shape is not None and isinstance(table.shape[axis], int):
                bounds.append(int(table.shape[axis]))  # type: ignore[arg-type]
            if node.op_type in _SAME_VALUES and position == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                stack.append(node.outputs[0])
    return min(bounds, default=None)


def _first_axis(tensor: Tensor) -> int | None:
    return 0 if tensor.axes and tensor.axes[0] == "batch" else None


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
    tensor: Tensor, axis: int | None, found: Sequence[NDArray], sizes: Sequence[Mapping[str, int]]
) -> list[str | int | None]:
    """Inferred axes as far as the runs bear them out."""
    rank = found[0].ndim
    inferred = tensor.axes if len(tensor.axes) == rank else [None] * rank
    axes: list[str | int | None] = []
    for place, name in enumerate(inferred):
        runs = zip(found, sizes, strict=False)
        if place == axis:
            axes.append("batch")
        elif name != "batch" and all(
            array.shape[place] == (run[name] if isinstance(name, str) else name)
            for array, run in runs
        ):
            axes.append(name)
        else:
            axes.append(None)
    return axes
