"""Which tokens of texts leave at an exit, and how long rows were told the same (patience)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import Decision


def leaving(scores: NDArray[Any], decision: Decision, rows: list[int]) -> list[int]:
    """Those of the rows whose score ``[batch]`` reaches the threshold. NaN reaches none."""
    found = scores.tolist()
    return [row for row in rows if found[row] >= decision.threshold]


class Streak:
    """Counts, per row, how many exits in a row predicted the same class (PABEE,
    arXiv:2006.04152)."""

    def __init__(self, rows: int, patience: int) -> None:
        self.patience = patience
        self.previous = np.full(rows, -1, np.int64)
        self.count = np.zeros(rows, np.int64)

    def long_enough(
        self, alive: NDArray[np.intp] | None, logits: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Takes an exit's logits ``[alive, classes]``. Says which rows have been told the same
        class often enough."""
        rows = np.arange(len(self.previous)) if alive is None else alive
        predicted = logits.argmax(-1)
        same = predicted == self.previous[rows]
        self.count[rows] = np.where(same, self.count[rows] + 1, 0)
        self.previous[rows] = predicted
        return self.count[rows] >= self.patience


__all__ = ["Streak", "leaving"]
