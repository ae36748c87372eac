"""Times in texts (`edgeexit.bundle.manifest.Timestamps`): which tokens may follow, and how times
are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Timestamps


def forbid(logits: NDArray[np.float64], times: Timestamps, written: Sequence[int]) -> None:
    """Sets logits ``[vocabulary]`` of tokens that cannot follow to minus infinity, by the rules of
    transformers' ``WhisperTimeStampLogitsProcessor``.

    Args:
        written: The tokens behind the start tokens.
    """
    first = times.first
    logits[times.without] = -np.inf
    ends = len(written) > 0 and written[-1] >= first
    paired = len(written) < 2 or written[-2] >= first
    if ends and paired:
        logits[first:] = -np.inf
    elif ends:
        logits[: times.end] = -np.inf
    latest = next((token for token in reversed(written) if token >= first), None)
    if latest is not None:  # the end of a segment may be the start of the next one
        logits[first : latest + (0 if ends and not paired else 1)] = -np.inf
    if not written:
        logits[:first] = -np.inf
        if times.latest is not None:
            logits[first + times.latest + 1 :] = -np.inf
    top = logits.max()
    if np.isfinite(top):
        weights = np.exp(logits - top)
        if weights[first:].sum() > weights[:first].max(initial=0.0):
            logits[:first] = -np.inf


@dataclass
class WrittenTimes:
    """How a text says times.

    Attributes:
        times: The tokens.
        shown: Whether the text has them; else they are left out.
        offset_s: Where the window begins in the sound.
        muted: Whether times are left out although they are shown.
    """

    times: Timestamps
    shown: bool
    offset_s: float = 0.0
    muted: bool = False

    def text(self, token: int) -> str | None:
        """What the text says for a time, as transformers writes it (``<|1.20|>``); None: the token
        is no time."""
        if token < self.times.first:
            return None
        seconds = (token - self.times.first) * self.times.step_s + self.offset_s
        return f"<|{seconds:.2f}|>" if self.shown and not self.muted else ""


__all__ = ["WrittenTimes", "forbid"]
