"""Inputs to run an ONNX file with: the user's, or random ones that fit the graph's use of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.cut.read_onnx import DTYPES

MOST_ROWS = 16
"""Rows used of the user's samples; a few are enough for a reference."""
_SAME_VALUES = frozenset(
    {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"}
)
_TABLES = {"EmbedLayerNormalization": {0: 2, 1: 4}}
"""Lookup operators of other domains: input of ids -> input of the table."""


def sample_inputs(
    graph: ir.Graph,
    rows: Mapping[str, int],
    samples: Mapping[str, NDArray] | None,
    names: Mapping[str, str],
) -> dict[str, NDArray]:
    """Returns inputs to run a graph with.

    Args:
        graph: A normalised graph.
        rows: Axes that may count rows -> number of rows to generate.
        samples: The user's inputs; None: inputs are generated.
        names: Name of an input in the user's file -> its name in the graph.
    """
    if samples is not None:
        return _given_inputs(graph, rows, samples, names)
    seed = np.random.default_rng(0)
    sizes = dict(rows)
    for value in graph.inputs:
        for size in value.shape or ():
            if isinstance(size, ir.SymbolicDim) and size.value and size.value not in sizes:
                # Strides shrink images, so their sides start large; all sizes differ.
                step = 32 if len(value.shape or ()) >= 4 else 1
                start = 64 if step == 32 else 6
                sizes[size.value] = start + step * len(sizes)
    inputs = {}
    for value in graph.inputs:
        shape = [d if isinstance(d, int) else sizes[d.value or ""] for d in value.shape or ()]
        inputs[value.name or ""] = _made_up(value, shape, seed)
    return inputs


def _given_inputs(
    graph: ir.Graph,
    rows: Mapping[str, int],
    samples: Mapping[str, NDArray],
    names: Mapping[str, str],
) -> dict[str, NDArray]:
    given = {names.get(name, name): np.asarray(array) for name, array in samples.items()}
    if "label" not in {value.name for value in graph.inputs}:
        given.pop("label", None)  # data sets have it; the model does not take it
    wanted = [value.name or "" for value in graph.inputs]
    for name in [*sorted(set(wanted) - given.keys()), *sorted(given.keys() - set(wanted))]:
        kind = "is missing" if name in wanted else "is not an input"
        raise UsageError(f"samples: {name} {kind}", fix=f"The model takes {', '.join(wanted)}.")
    sizes: dict[str, int] = {}
    inputs = {}
    for value in graph.inputs:
        name, array = value.name or "", given[value.name or ""]
        expected = DTYPES.get(value.dtype) if value.dtype is not None else None
        dims = [d if isinstance(d, int) else d.value for d in value.shape or ()]
        if dims and dims[0] == 1 and array.ndim == len(dims):  # it takes one row at a time
            array = array[:1]
        fits = array.dtype.name == expected and array.ndim == len(dims)
        for dim, size in zip(dims, array.shape, strict=False):
            fits = fits and size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
        if not fits:
            raise UsageError(
                f"samples: {name} is {array.dtype.name}{list(array.shape)}, the model takes "
                f"{expected}{dims}",
                fix="Axes of the same name have the same size in all inputs.",
            )
        for axis, dim in enumerate(dims):
            if dim in rows:
                array = np.take(array, range(min(MOST_ROWS, array.shape[axis])), axis)
        inputs[name] = array
    return inputs


def _made_up(value: ir.Value, shape: list[int], seed: np.random.Generator) -> NDArray:
    kind = DTYPES.get(value.dtype) if value.dtype is not None else None
    if kind is None or kind == "bfloat16":
        raise ExportError(
            f"input {value.name}: sample values cannot be generated for the type {value.dtype}",
            fix="Convert the input to numbers outside the model.",
        )
    dtype = np.dtype(kind)
    bound = _bound(value)
    if bound is not None and dtype.kind in "iu":
        return seed.integers(0, bound, shape).astype(dtype)
    is_mask = dtype.kind == "b" or "mask" in (value.name or "").lower()
    if dtype.kind in "iu" and not is_mask and len(shape) >= 2:
        # Probably codes: different ones, because the effect of a constant would not show.
        codes = seed.integers(0, 2, shape).astype(dtype)
        codes[..., 0] = 1
        return codes
    if dtype.kind in "biu" or is_mask:
        # Probably a mask: ones, with padding at the end of every row but the first.
        ones = np.ones(shape, dtype)
        if len(shape) >= 2 and shape[-1] > 2:
            for row in range(1, shape[0]):
                ones[row, ..., shape[-1] - 1 - row % (shape[-1] // 2) :] = 0
        return ones
    return seed.standard_normal(shape).astype(dtype)


def _bound(value: ir.Value) -> int | None:
    """Number of valid ids of an input: the size of the smallest table that it indexes, or of its
    one-hot code; None if neither is found."""
    bounds = []
    stack, seen = [value], {value}
    while stack:
        for node, position in stack.pop().uses():
            table = None
            if node.op_type == "Equal" or (node.op_type == "OneHot" and position == 0):
                bounds += _codes(node.inputs[1 - position], one_hot=node.op_type == "OneHot")
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


def _codes(value: ir.Value | None, *, one_hot: bool) -> list[int]:
    """The bound that a constant sets: a one-hot depth, or the largest id of a comparison."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _SAME_VALUES:
            break
        value = node.inputs[0]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    known = None if tensor is None else tensor.numpy()
    if known is None or known.dtype.kind not in "iu" or known.size == 0:
        return []
    if one_hot:
        return [int(known.max())] if known.max() > 0 else []
    return [int(known.max()) + 1] if known.size > 2 and known.min() >= 0 else []


__all__ = ["MOST_ROWS", "sample_inputs"]
