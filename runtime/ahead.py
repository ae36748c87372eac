"""Launching a segment before the exit in front of it has been asked, where that pays.

While a score travels to the host and the host decides, a GPU stands still: the gap. If the next
segment is already on the stream, there is none; but when the row leaves after all, the segment was
run for nothing, and the next call waits behind it. So it pays at an exit that few rows take:

    share that leaves x time of the next segment < share that stays x gap

All three are measured here, while the model runs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

LaunchAhead = Literal["never", "measured", "always"]
SAMPLES = 16
"""Times taken of each gap before it is believed."""
REMEMBERED = 4096
"""Rows after which older ones count half, so that shares follow the data."""


@dataclass
class Boundary:
    """What is known of one exit and the segment behind it.

    Attributes:
        asked, left: How many rows came to the exit, and took it.
        gaps_ms: Times that the GPU stood still between the two segments, when nothing was launched
            ahead.
        segments_ms: Times of the segment behind it.
    """

    asked: int = 0
    left: int = 0
    gaps_ms: list[float] = field(default_factory=list)
    segments_ms: list[float] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether there are times enough."""
        return len(self.gaps_ms) >= SAMPLES

    def count(self, left: bool) -> None:
        """Counts a row that was asked."""
        if self.asked >= REMEMBERED:
            self.asked, self.left = self.asked // 2, self.left // 2
        self.asked += 1
        self.left += left

    def time(self, gap_ms: float, segment_ms: float) -> None:
        """Takes down what one row's gap and segment took."""
        self.gaps_ms.append(gap_ms)
        self.segments_ms.append(segment_ms)

    def pays(self) -> bool:
        """Whether to launch the next segment ahead. One row more is taken to leave and one more to
        stay than was seen, so that few rows prove nothing.

        >>> often = Boundary(100, 50, [0.03] * 16, [1.0] * 16)
        >>> seldom = Boundary(1000, 2, [0.03] * 16, [1.0] * 16)
        >>> often.pays(), seldom.pays()
        (False, True)
        """
        if not self.measured:
            return False
        leaving = (self.left + 1) / (self.asked + 2)
        gap, segment = statistics.median(self.gaps_ms), statistics.median(self.segments_ms)
        return leaving * segment < (1 - leaving) * gap


class Ahead:
    """Decides, per exit of a chain, whether the segment behind it is launched ahead.

    Args:
        exits: How many exits there are.
        when: ``always``, or ``measured``: where it pays.
    """

    def __init__(self, exits: int, when: LaunchAhead) -> None:
        self.when = when
        self.boundaries = [Boundary() for _ in range(exits)]

    def launches(self, number: int) -> bool:
        """Whether to launch ahead what comes behind an exit."""
        return self.when == "always" or self.boundaries[number].pays()

    def facts(self) -> list[dict[str, float | int | bool]]:
        """What was measured, per exit but the last."""
        found: list[dict[str, float | int | bool]] = []
        for number, one in enumerate(self.boundaries[:-1]):
            about: dict[str, float | int | bool] = {
                "asked": one.asked,
                "left": one.left,
                "launched_ahead": self.launches(number),
            }
            if one.gaps_ms:
                about["gap_ms"] = statistics.median(one.gaps_ms)
                about["segment_ms"] = statistics.median(one.segments_ms)
            found.append(about)
        return found


__all__ = ["Ahead", "Boundary", "LaunchAhead"]
