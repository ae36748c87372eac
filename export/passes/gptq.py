"""GPTQ (arXiv:2210.17323): a weight's inputs are rounded one after the other, and what each
rounding changes in the outputs is made up for by the inputs that are still to be rounded.

How inputs vary together is measured on data, in float32 (`second_moments`). Unlike the paper's,
layers in front are not quantised while those behind are measured, so the order does not matter.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.export.evaluate import open_graph

DAMPING = 0.01
"""Added to every input's moment, as a share of their mean (the paper's)."""

Grid = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Scales and zero points ``[rows]`` of a block."""


def second_moments(
    model: ir.Model, tensors: Sequence[ir.Value], feeds: Sequence[Mapping[str, Any]]
) -> dict[str, NDArray[np.float64]]:
    """Sums of ``x xᵀ`` over the rows x of tensors ``[..., width]``: name -> ``[width, width]``.

    Args:
        model: A graph; it is not changed.
        tensors: Of the graph.
        feeds: Its inputs, batch by batch.
    """
    found: dict[str, NDArray[np.float64]] = {}
    names = list(dict.fromkeys(str(tensor.name) for tensor in tensors))
    with tempfile.TemporaryDirectory(prefix="edgeexit-") as scratch:
        path = Path(scratch, "float32.onnx")
        with _as_outputs(model.graph, tensors):
            ir.save(model, path, external_data="float32.data")
        run = open_graph(path)
        for feed in feeds:
            known = {**feed, **run(feed)}
            for name in names:
                rows = np.asarray(known[name], np.float32)
                rows = rows.reshape(-1, rows.shape[-1])
                found[name] = found.get(name, 0.0) + (rows.T @ rows).astype(np.float64)
    return found


@contextlib.contextmanager
def _as_outputs(graph: ir.Graph, tensors: Sequence[ir.Value]) -> Iterator[None]:
    count = len(graph.outputs)
    for tensor in dict.fromkeys(tensors):
        if not (tensor.is_graph_output() or tensor.is_graph_input()):
            tensor.dtype = tensor.dtype or ir.DataType.FLOAT
            graph.outputs.append(tensor)
    try:
        yield
    finally:
        del graph.outputs[count:]


def round_in_turn(
    weight: NDArray[np.float32],
    moments: NDArray[np.float64],
    bits: int,
    block: int,
    grid: Callable[[NDArray[np.float32]], Grid],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Rounds a weight.

    Args:
        weight: ``[rows, width]``.
        moments: Second moments of its inputs ``[width, width]``.
        bits: Of a number.
        block: Neighbouring inputs that share a scale.
        grid: Chooses scales and zero points for a block ``[rows, block]``, as it stands when its
            turn comes.

    Returns:
        Numbers ``[rows, blocks, block]``, scales and zero points ``[rows, blocks]``.
    """
    rows, width = weight.shape
    most = (1 << bits) - 1
    left = np.array(weight.T, np.float32, order="C")  # [width, rows]: an input is contiguous
    inverse = _inverse_factor(moments, left)
    numbers = np.zeros((width, rows), np.uint8)
    scales, zeros = (np.zeros((rows, width // block), np.float32) for _ in range(2))
    for start in range(0, width, block):
        stop, place = start + block, start // block
        part, errors = left[start:stop], np.zeros((block, rows), np.float32)
        scale, zero = grid(np.ascontiguousarray(part.T))
        scales[:, place], zeros[:, place] = scale, zero
        for own, column in enumerate(range(start, stop)):
            with np.errstate(divide="ignore", invalid="ignore"):
                number = np.nan_to_num(np.rint(part[own] / scale), posinf=most, neginf=0) + zero
            np.clip(number, 0, most, out=number)
            numbers[column] = number
            errors[own] = (part[own] - (number - zero) * scale) / inverse[column, column]
            part[own:] -= np.outer(inverse[column, column:stop], errors[own])
        left[stop:] -= inverse[start:stop, stop:].T @ errors
    return numbers.T.reshape(rows, -1, block), scales, zeros.astype(np.uint8)


def _inverse_factor(
    moments: NDArray[np.float64], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The upper Cholesky factor of the inverse of the damped moments. Weights ``[width, rows]`` of
    inputs that are always 0 become 0."""
    damped = moments.copy()
    diagonal = np.arange(len(damped))
    dead = damped[diagonal, diagonal] == 0
    damped[dead, dead] = 1.0
    weight[dead] = 0.0
    damped[diagonal, diagonal] += DAMPING * damped[diagonal, diagonal].mean()
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    return np.ascontiguousarray(lower.T.astype(np.float32))


__all__ = ["Grid", "round_in_turn", "second_moments"]
