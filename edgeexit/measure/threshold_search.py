"""A greedy search for one threshold per exit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.rules import NEVER

ROUNDING = 1e-12
"""Tolerance for rounding: a risk of k/n must be within a limit of k/n."""

_LEVELS = 64
_REACH = np.array([0, 1, 3, 7, 15, 31, _LEVELS - 1])
"""Which of the looser levels are tried."""


def search(
    usable: NDArray[np.float64],
    loss: NDArray[np.float64],
    per_row_ms: NDArray[np.float64],
    max_risk: float,
    common: float,
) -> list[float]:
    """Lowers one exit's threshold at a time: the one that saves most time for its added risk.

    It starts once from "never" and once from the common threshold and takes the faster result,
    which is never slower than the common threshold on this data.

    Args:
        usable: ``[early exit, row]`` scores.
        loss: ``[exit, row]``.
        per_row_ms: ``[exit]``, time up to each exit.
        max_risk: Limit of the mean loss.
        common: A threshold for all exits that is within the limit.
    """
    descent = _Search(usable, loss, per_row_ms, max_risk)
    found = [descent.descend(start) for start in (NEVER, common)]
    _, thresholds = min(found, key=lambda one: one[0])
    return [float(value) for value in thresholds]


class _Search:
    """State of the greedy search."""

    def __init__(
        self,
        usable: NDArray[np.float64],
        loss: NDArray[np.float64],
        per_row_ms: NDArray[np.float64],
        max_risk: float,
    ) -> None:
        self.usable, self.loss, self.per_row_ms = usable, loss, per_row_ms
        self.max_risk = max_risk
        self.rows = np.arange(loss.shape[1])
        self.levels = [self._grid(values) for values in self.usable]

    @staticmethod
    def _grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """At most `_LEVELS` of an exit's scores, evenly spaced in rank, strict to loose."""
        finite = np.unique(values[np.isfinite(values)])
        places = np.linspace(0, len(finite) - 1, min(_LEVELS, len(finite))).round().astype(np.int64)
        return finite[np.unique(places)][::-1]

    def measure(self, thresholds: NDArray[np.float64]) -> tuple[float, float]:
        """Expected time per row and mean loss."""
        fires = self.usable >= thresholds[:, None]
        taken = np.vstack([fires, np.ones((1, len(self.rows)), np.bool_)]).argmax(axis=0)
        return float(self.per_row_ms[taken].mean()), float(self.loss[taken, self.rows].mean())

    def descend(self, start: float) -> tuple[float, NDArray[np.float64]]:
        """Lowers thresholds while the risk allows. Returns the expected time and the thresholds."""
        current = np.full(len(self.usable), start)
        time_ms, risk = self.measure(current)
        while True:
            trials = []
            for number, levels in enumerate(self.levels):
                looser = levels[levels < current[number]]
                # Further ones, too: the next one alone may be chance, or lose what a third regains.
                for ahead in _REACH[len(looser) > _REACH]:
                    trial = current.copy()
                    trial[number] = looser[ahead]
                    trial_ms, trial_risk = self.measure(trial)
                    if trial_risk <= self.max_risk + ROUNDING:
                        gain = (time_ms - trial_ms) / max(trial_risk - risk, 1e-9)
                        trials.append((gain, number, trial, trial_ms, trial_risk))
            if not trials:
                return time_ms, current
            _, _, current, time_ms, risk = max(trials, key=lambda one: one[0])


__all__ = ["ROUNDING", "search"]
