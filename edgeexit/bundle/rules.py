"""`Policy` and `Rule`: when rows stop, chain by chain. `edgeexit.bundle.policy` resolves them at
exits, `edgeexit.bundle.policy_file` reads and writes them."""

from __future__ import annotations

import math
from typing import Any

import msgspec

NEVER, ALWAYS = math.inf, -math.inf
OUT_OF_REACH = 3.4028234663852886e38
"""The largest float32: a threshold that no score reaches, for measurements of the comparison."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the threshold of a chain that writes text falls from token to token, as errors in early
    tokens harm most (CALM, arXiv:2207.07061, equation 5; MuE, CVPR 2023).

    Token t of a text (1 = the first) may stop early if its score is at least
    ``0.9 * threshold + 0.1 * exp(-temperature * t / length)``. MuE's schedule for texts of n tokens
    is ``Schedule(length=n + 1, temperature=1, warm_up=1 / 3)``.

    Attributes:
        length: Usual number of tokens of a text.
        temperature: How fast the threshold falls.
        warm_up: Share of `length` in which no token stops early.
    """

    length: int
    temperature: float = 4.0
    warm_up: float = 0.0

    def threshold(self, threshold: float, token: int) -> float:
        """The threshold for token number `token` of a text (1 = the first)."""
        if token - 1 < self.warm_up * self.length:
            return NEVER
        return 0.9 * threshold + 0.1 * math.exp(-self.temperature * token / self.length)


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When rows stop in one chain.

    Attributes:
        thresholds: Stop when score >= threshold: one number for all exits, one per exit in order
            (the last exit, which always answers, left out), or a mapping from exit names. ``inf``
            = never, ``-inf`` = always; exits missing from a mapping never stop a row. Only a
            mapping can have thresholds of exits that drop token groups.
        score: Name of the score to compare.
        patience: 0, or how many further exits must have predicted the same before a row stops.
        first: Name of the first exit where rows may stop; None = the first exit.
        last: Name of the last exit where rows may stop early; None = the last but one.
        schedule: How thresholds change from token to token; None = they do not.
    """

    thresholds: float | list[float] | dict[str, float] = NEVER
    score: str = "max_prob"
    patience: int = 0
    first: str | None = None
    last: str | None = None
    schedule: Schedule | None = None


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When rows stop, chain by chain.

    Attributes:
        rules: Chain -> its rule.
        bundle: Digest of the bundle that it was made for; None = any bundle that it fits.
        engine: Name and version of the engine used for calibration; informational.
        calibration: Data, risk and measured figures of the calibration.
    """

    rules: dict[str, Rule]
    bundle: str | None = None
    engine: dict[str, str] = {}
    calibration: dict[str, Any] = {}
