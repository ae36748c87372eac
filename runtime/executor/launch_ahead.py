"""Launching a segment before the exit in front of it has been asked, where that pays.

While a score travels to the host and the host decides, a GPU stands still: the gap. If the next
segment is already on the stream, there is none; but when the row leaves after all, the segment was
run for nothing, and the next call waits behind it. So it pays at an exit that few rows take:

    share that leaves x time of the next segment < share that stays x gap

All three are measured here, while the model runs: times per boundary, shares per policy as well.
The last `SAMPLES` times count, and one row in `MEASURED_AGAIN` is not launched ahead, to take more.
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
"""Times taken at each boundary before they are believed; older ones are forgotten."""
MEASURED_AGAIN = 64
"""One row in so many waits for its score."""
REMEMBERED = 4096
"""Rows after which older ones count half, so that shares follow the data."""
POLICIES_KEPT = 64
"""Policies for which shares are remembered."""


@dataclass
class Times:
    """What one boundary costs: times that the GPU stood still there when nothing was launched
    ahead, and times of the segment behind it."""

    gaps_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    segments_ms: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    _medians_ms: tuple[float, float] | None = None

    @property
    def enough(self) -> bool:
        """Whether they are believed."""
        return len(self.gaps_ms) >= SAMPLES

    @property
    def medians_ms(self) -> tuple[float, float]:
        """Of the gaps and of the segments; worked out when there are new ones, for it is asked for
        while the GPU waits."""
        if self._medians_ms is None:
            self._medians_ms = statistics.median(self.gaps_ms), statistics.median(self.segments_ms)
        return self._medians_ms

    def add(self, gap_ms: float, segment_ms: float) -> None:
        """Takes down one row's."""
        self.gaps_ms.append(gap_ms)
        self.segments_ms.append(segment_ms)
        self._medians_ms = None


@dataclass
class Share:
    """How many rows came to an exit under a policy, and how many of them took it."""

    asked: int = 0
    left: int = 0

    def count(self, left: bool) -> None:
        """Counts a row."""
        if self.asked >= REMEMBERED:
            self.asked, self.left = self.asked // 2, self.left // 2
        self.asked += 1
        self.left += left


def pays(share: Share, times: Times) -> bool:
    """Whether to launch ahead. One row more is taken to leave and one more to stay than was seen,
    so that few rows prove nothing.

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
    """Decides, per exit of a chain, whether the segment behind it is launched ahead.

    Args:
        exits: How many exits there are.
        when: ``always``, or ``measured``: where it pays.
    """

    def __init__(self, exits: int, when: LaunchAhead) -> None:
        self.when = when
        self.times = [Times() for _ in range(exits)]
        self._shares: dict[tuple[object, ...], list[Share]] = {}

    def shares(self, decisions: Sequence[Decision]) -> list[Share]:
        """What is known of a policy's exits."""
        key = tuple(decisions)
        known = self._shares.get(key)
        if known is None:
            known = self._shares[key] = [Share() for _ in self.times]
            while len(self._shares) > POLICIES_KEPT:
                self._shares.pop(next(iter(self._shares)))
        return known

    def launches(self, number: int, shares: Sequence[Share]) -> bool:
        """Whether to launch ahead what comes behind an exit, for the next row that comes there."""
        if self.when == "always":
            return True
        waits = shares[number].asked % MEASURED_AGAIN == MEASURED_AGAIN - 1
        return not waits and pays(shares[number], self.times[number])

    def facts(self, shares: Sequence[Share]) -> list[dict[str, float | int | bool]]:
        """What was measured, per exit but the last."""
        found: list[dict[str, float | int | bool]] = []
        for number, times in enumerate(self.times[:-1]):
            about: dict[str, float | int | bool] = {
                "asked": shares[number].asked,
                "left": shares[number].left,
                "launched_ahead": self.when == "always" or pays(shares[number], times),
            }
            if times.gaps_ms:
                about["gap_ms"], about["segment_ms"] = times.medians_ms
            found.append(about)
        return found


__all__ = ["Ahead", "LaunchAhead", "Share", "Times", "pays"]
