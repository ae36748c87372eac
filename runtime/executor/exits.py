"""Which rows stop at an exit: by the score's threshold, and by patience (`Streak`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import Decision


def leaving(scores: NDArray[Any], decision: Decision, rows: list[int], token: int) -> list[int]:
    """The rows whose score ``[batch]`` reaches the threshold for token number `token` of a text
    (1 = the first). NaN never does."""
    values, threshold = scores.tolist(), decision.threshold_at(token)
    return [row for row in rows if values[row] >= threshold]


class Streak:
    """Counts, per row, how many consecutive exits predicted the same class (PABEE,
    arXiv:2006.04152)."""

    def __init__(self, rows: int, patience: int) -> None:
        self.patience = patience
        self.previous = np.full(rows, -1, np.int64)
        self.count = np.zeros(rows, np.int64)

    def long_enough(
        self, alive: NDArray[np.intp] | None, logits: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Updates the counts with an exit's logits ``[alive, classes]``. Returns which rows have
        reached the patience."""
        rows = np.arange(len(self.previous)) if alive is None else alive
        predicted = logits.argmax(-1)
        same = predicted == self.previous[rows]
        self.count[rows] = np.where(same, self.count[rows] + 1, 0)
        self.previous[rows] = predicted
        return self.count[rows] >= self.patience


__all__ = ["Streak", "leaving"]
