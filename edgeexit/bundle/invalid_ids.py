"""Finds the input with an id outside of the model's table in the message of an engine.

Engines name the node and the id, but not the input that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_ONNXRUNTIME = re.compile(r"idx=(-?\d+) must be within the inclusive range \[-?\d+,(\d+)\]")
_NUMPY = re.compile(r"index (-?\d+) is out of bounds for axis \d+ with size (\d+)")


def invalid_id(message: str, inputs: Mapping[str, NDArray]) -> str | None:
    """Says which input has the id that an engine refuses, in which row; None for other messages.

    >>> ids = np.array([[3, 4], [5, 99]])
    >>> invalid_id("idx=99 must be within the inclusive range [-57,56]", {"input_ids": ids})
    "input_ids: the id 99 (row 1 of the batch, position 1) is not in the model's table (0 to 56)"
    """
    if found := _ONNXRUNTIME.search(message):
        number, last = int(found[1]), int(found[2])
    elif found := _NUMPY.search(message):
        number, last = int(found[1]), int(found[2]) - 1
    else:
        return None
    for name, value in inputs.items():
        array = np.asarray(value)
        if array.ndim and array.dtype.kind in "iu" and (array == number).any():
            row, *rest = np.argwhere(array == number)[0].tolist()
            at = f", position {', '.join(map(str, rest))}" if rest else ""
            at = f"row {row} of the batch{at}" if len(array) > 1 else at.removeprefix(", ")
            return f"{name}: the id {number} ({at}) is not in the model's table (0 to {last})"
    return None


__all__ = ["invalid_id"]
