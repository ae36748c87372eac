"""Comparisons with reference samples, and the report on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.compare import Difference, difference, spread
from edgeexit.bundle.compare import tolerances as tolerances_of
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import CheckError


@dataclass(frozen=True)
class Comparison:
    """The result of one comparison.

    Attributes:
        where: The exit, ``unsplit`` or ``preprocessing``.
        what: The output or score, and how the rows ran.
        difference: Largest absolute difference; infinite for NaN against a number or another shape.
        passed: Whether every element is within its tolerance (`edgeexit.bundle.compare`).
        allowed: The tolerance of the element that is furthest out; 0 where answers are counted.
        reason: Why it failed, if not by a difference.
    """

    where: str
    what: str
    difference: float
    passed: bool
    allowed: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """All comparisons, with their tolerances.

    `notes` lists what was not compared, and why, and infinite values of the reference.
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
        if not failed:
            return
        count = f"{len(failed)} of {len(self.comparisons)} comparisons failed"
        if reasons := [one for one in failed if one.reason]:
            one = reasons[0]
            raise CheckError(
                f"{one.where}: {one.what}: {one.reason}; {count}",
                fix="The exported model gives NaN for its own samples: check its weights, then "
                "export again with suitable samples.",
            )
        worst = max(failed, key=lambda one: one.difference)
        raise CheckError(
            f"{worst.where}: {worst.what} differs from the reference by {worst.difference:.3g} "
            f"(allowed: {worst.allowed:.3g}); {count}",
            fix="If the device is meant to compute in lower precision, increase --atol and "
            "--rtol; otherwise export again, or try another version of the engine.",
        )


def tolerances(bundle: Bundle) -> tuple[float, float]:
    """Default tolerances for the lowest precision in a bundle."""
    return tolerances_of(bundle.manifest)


class Judge:
    """Collects comparisons under one pair of tolerances.

    Attributes:
        atol: Allowed difference relative to the spread of an exit's outputs; of scores, absolute.
        rtol: Allowed difference relative to the value.
        outliers: Share of elements that may be further apart.
        notes: What is odd about the reference, and does not fail the check.
    """

    def __init__(self, atol: float, rtol: float, outliers: float = 0.0) -> None:
        self.atol = atol
        self.rtol = rtol
        self.outliers = outliers
        self.comparisons: list[Comparison] = []
        self.notes: list[str] = []

    def compare(
        self, where: str, what: str, found: NDArray, expected: NDArray, *, atol: float | None = None
    ) -> None:
        """Compares outputs of an exit.

        Args:
            atol: Absolute tolerance; None: the judge's, times the spread of the reference.
        """
        atol = self.atol * spread(expected) if atol is None else atol
        result = difference(found, expected, atol, self.rtol, self.outliers)
        if result.infinite:
            self._note(
                f"{where}: {_short(what)}: the reference itself is infinite for some classes"
            )
        reason = ""
        if result.nan:
            reason = f"the reference itself is NaN ({result.nan} of {expected.size} values)"
        self._add(where, what, result, reason)

    def compare_score(self, where: str, what: str, found: NDArray, expected: NDArray) -> None:
        """Compares scores of an exit. NaN in the reference is noted only: rows with such a score
        never exit, and outputs that are NaN fail the check."""
        result = difference(found, expected, self.atol, self.rtol, self.outliers)
        if result.nan:
            self._note(f"{where}: {_short(what)}: the reference itself is NaN; use another score")
        self._add(where, what, result)

    def count(self, where: str, what: str, wrong: int) -> None:
        """Adds a comparison that must be exact; `wrong` answers differ."""
        self.comparisons.append(Comparison(where, what, float(wrong), not wrong))

    def near(self, scores: NDArray, threshold: float) -> NDArray[np.bool_]:
        """Marks scores so close to a threshold that both decisions are acceptable."""
        with np.errstate(invalid="ignore"):
            near = np.abs(scores - threshold) <= self.atol + self.rtol * np.abs(scores)
        return np.asarray(near & np.isfinite(scores), np.bool_)

    def _add(self, where: str, what: str, result: Difference, reason: str = "") -> None:
        what = what if result.same_shape else f"shape of {what}"
        passed = result.passed and not reason
        largest = math.inf if reason else result.largest
        self.comparisons.append(Comparison(where, what, largest, passed, result.allowed, reason))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _short(what: str) -> str:
    """What was compared, without how the rows ran."""
    return what.split(",")[0]


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
