"""Launching the next component before the score of the current exit is known, where that pays.

While a score is copied to the host and the host decides, the GPU is idle: the gap. Launching the
next component first removes the gap. But if the row stops at the exit, that component ran for
nothing and delays the next call. So launching ahead pays at exits where few rows stop:

    share of rows that stop x time of the next component < share that continue x gap

All of these are measured while the model runs: times per boundary, shares per boundary and policy.
Only the last `SAMPLES` times are used. One row in `MEASURED_AGAIN` is not launched ahead, so that
new gaps are measured.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgeexit.bundle.policy import Decision

LaunchAhead = Literal["never", "measured", "always"]
SAMPLES = 16
"""Times that are measured at each boundary before they are used, and that are kept."""
MEASURED_AGAIN = 64
"""One row in this number waits for its score."""
REMEMBERED = 4096
"""Rows after which the counts are halved, so that shares follow the data."""
POLICIES_KEPT = 64
"""Policies for which shares are remembered."""


@dataclass
class Times:
    """Times at one boundary: how long the GPU was idle when nothing was launched ahead, and the
    times of the component behind it."""

    gaps_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    segments_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    _medians_ms: tuple[float, float] | None = None

    @property
    def enough(self) -> bool:
        """Whether there are enough times to decide."""
        return len(self.gaps_ms) >= SAMPLES

    @property
    def medians_ms(self) -> tuple[float, float]:
        """Medians of the gaps and of the component times. Cached, because they are read while the
        GPU waits."""
        if self._medians_ms is None:
            self._medians_ms = statistics.median(self.gaps_ms), statistics.median(self.segments_ms)
        return self._medians_ms

    def add(self, gap_ms: float, segment_ms: float) -> None:
        """Adds the times of one row."""
        self.gaps_ms.append(gap_ms)
        self.segments_ms.append(segment_ms)
        self._medians_ms = None


@dataclass
class Share:
    """Rows that reached an exit under a policy (`asked`), and rows that stopped there (`left`)."""

    asked: int = 0
    left: int = 0

    def count(self, left: bool) -> None:
        """Adds a row."""
        if self.asked >= REMEMBERED:
            self.asked, self.left = self.asked // 2, self.left // 2
        self.asked += 1
        self.left += left


def pays(share: Share, times: Times) -> bool:
    """Whether to launch ahead. One stopped and one continued row are added to the counts, so that a
    few rows do not decide.

    >>> times = Times(deque([0.03] * SAMPLES), deque([1.0] * SAMPLES))
    >>> pays(Share(asked=100, left=50), times), pays(Share(asked=1000, left=2), times)
    (False, True)
    """
    if not times.enough:
        return False
    leaving = (share.left + 1) / (share.asked + 2)
    gap_ms, segment_ms = times.medians_ms
    return leaving * segment_ms < (1 - leaving) * gap_ms


class Ahead:
    """Decides, per exit of a chain, whether the component behind it is launched ahead.

    Args:
        exits: Number of exits.
        when: ``always``, or ``measured``: where it pays.
    """

    def __init__(self, exits: int, when: LaunchAhead) -> None:
        self.when = when
        self.times = [Times() for _ in range(exits)]
        self._shares: dict[tuple[object, ...], list[Share]] = {}

    def shares(self, decisions: Sequence[Decision]) -> list[Share]:
        """The counts of a policy, per exit."""
        key = tuple(decisions)
        known = self._shares.get(key)
        if known is None:
            known = self._shares[key] = [Share() for _ in self.times]
            while len(self._shares) > POLICIES_KEPT:
                self._shares.pop(next(iter(self._shares)))
        return known

    def launches(self, number: int, shares: Sequence[Share]) -> bool:
        """Whether to launch the component behind an exit ahead, for the current row."""
        if self.when == "always":
            return True
        waits = shares[number].asked % MEASURED_AGAIN == MEASURED_AGAIN - 1
        return not waits and pays(shares[number], self.times[number])

    def facts(self, shares: Sequence[Share]) -> list[dict[str, float | int | bool]]:
        """Measurements per exit except the last; see `Model.boundaries`."""
        boundaries: list[dict[str, float | int | bool]] = []
        for number, times in enumerate(self.times[:-1]):
            about: dict[str, float | int | bool] = {
                "asked": shares[number].asked,
                "left": shares[number].left,
                "launched_ahead": self.when == "always" or pays(shares[number], times),
            }
            if times.gaps_ms:
                about["gap_ms"], about["segment_ms"] = times.medians_ms
            boundaries.append(about)
        return boundaries


__all__ = ["Ahead", "LaunchAhead", "Share", "Times", "pays"]
