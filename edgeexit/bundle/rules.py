"""`Policy` and `Rule`: when rows stop, chain by chain. `edgeexit.bundle.policy` resolves them at
exits, `edgeexit.bundle.policy_file` reads and writes them."""

from __future__ import annotations

import math
from typing import Any

import msgspec

NEVER, ALWAYS = math.inf, -math.inf
OUT_OF_REACH = 3.4028234663852886e38
"""The largest float32: a threshold that no score reaches, for measurements of the comparison."""


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
    """

    thresholds: float | list[float] | dict[str, float] = NEVER
    score: str = "max_prob"
    patience: int = 0
    first: str | None = None
    last: str | None = None


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
