"""Comparisons with reference samples, and their tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import CheckError

TOLERANCES = {
    "float32": (1e-4, 1e-3),
    "float16": (2e-2, 2e-2),
    "bfloat16": (1e-1, 1e-1),
    "int8": (5e-1, 1e-1),
    # ONNX Runtime multiplies 4-bit weights in float32 or in int8, as the operators around allow:
    # up to 1.4 % of the largest logit apart.
    "int4": (1e-1, 5e-2),
}
"""Precision -> default absolute and relative tolerance."""


@dataclass(frozen=True)
class Comparison:
    """The result of one comparison.

    Attributes:
        where: The exit, ``unsplit`` or ``preprocessing``.
        what: The output or score, and how the rows ran.
        difference: Largest absolute difference; infinite for NaN against a number or another shape.
        passed: Whether every element is within atol + rtol * abs(reference).
    """

    where: str
    what: str
    difference: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """All comparisons, with their tolerances.

    `notes` lists what was not compared, and why.
    """

    comparisons: list[Comparison]
    rows: int
    atol: float
    rtol: float
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether all comparisons passed."""
        return all(one.passed for one in self.comparisons)

    def require(self) -> None:
        """Raises `CheckError` with the worst comparison if a comparison failed."""
        failed = [one for one in self.comparisons if not one.passed]
        if failed:
            worst = max(failed, key=lambda one: one.difference)
            raise CheckError(
                f"{worst.where}: {worst.what} differs from the reference by {worst.difference:.3g} "
                f"(allowed: {self.atol:g} + {self.rtol:g} x value); {len(failed)} of "
                f"{len(self.comparisons)} comparisons failed",
                fix="If the device is meant to compute in lower precision, increase --atol and "
                "--rtol; otherwise export again, or try another version of the engine.",
            )


def tolerances(bundle: Bundle) -> tuple[float, float]:
    """Default tolerances for the lowest precision in a bundle."""
    components = bundle.manifest.components.values()
    found = {variant.precision for component in components for variant in component.variants}
    return max(TOLERANCES[precision] for precision in found)


class Judge:
    """Collects comparisons under one pair of tolerances."""

    def __init__(self, atol: float, rtol: float) -> None:
        self.atol = atol
        self.rtol = rtol
        self.comparisons: list[Comparison] = []

    def compare(
        self, where: str, what: str, found: NDArray, expected: NDArray, *, atol: float | None = None
    ) -> None:
        """Compares two arrays."""
        atol = self.atol if atol is None else atol
        if found.shape != expected.shape:
            self.comparisons.append(Comparison(where, f"shape of {what}", math.inf, False))
            return
        a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(a - b))
            apart = np.where(np.isnan(apart), np.inf, apart)
            passed = bool((apart <= atol + self.rtol * np.abs(np.where(same, 0.0, b))).all())
        self.comparisons.append(Comparison(where, what, float(apart.max(initial=0.0)), passed))

    def count(self, where: str, what: str, wrong: int) -> None:
        """Adds a comparison that must be exact; `wrong` answers differ."""
        self.comparisons.append(Comparison(where, what, float(wrong), not wrong))

    def near(self, scores: NDArray, threshold: float) -> NDArray[np.bool_]:
        """Marks scores so close to a threshold that both decisions are acceptable."""
        with np.errstate(invalid="ignore"):
            near = np.abs(scores - threshold) <= self.atol + self.rtol * np.abs(scores)
        return np.asarray(near & np.isfinite(scores), np.bool_)


def describe(report: Report) -> dict[str, object]:
    """The report as plain data."""
    return {
        "passed": report.passed,
        "rows": report.rows,
        "atol": report.atol,
        "rtol": report.rtol,
        "comparisons": [
            {"where": c.where, "what": c.what, "max_difference": c.difference, "passed": c.passed}
            for c in report.comparisons
        ],
        "notes": report.notes,
    }
