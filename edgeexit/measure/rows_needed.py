"""How many rows a calibration needs to show a risk, and warnings about fewer.

With no loss among n rows, a risk of r is ruled out at a confidence of 1 - delta if
(1 - r)^n <= delta: then n >= ln(delta) / ln(1 - r).
"""

from __future__ import annotations

import math

CONFIDENCE = 0.95


def rows_needed(max_risk: float) -> int | None:
    """The fewest rows (texts or batches, see `doubts`) with which a risk can be seen: if none of
    them has a loss, the risk is within the limit with a confidence of 95 %. None: no number of rows
    can show a risk of 0.

    >>> rows_needed(0.005), rows_needed(0.01), rows_needed(1.0), rows_needed(0.0)
    (598, 299, 1, None)
    """
    if max_risk <= 0:
        return None
    if max_risk >= 1:
        return 1
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_risk))


def doubts(rows: int, what: str, max_risk: float) -> list[str]:
    """Warnings about a calibration on too little data to see the risk; empty if it is enough.

    Args:
        rows: Number of independent decisions: of rows, or of texts where rows are tokens, or of
            batches.
        what: ``rows``, ``texts``, or ``batches`` where exits apply to the whole batch: its rows
            stop together.
    """
    limit, needed = f"{100 * max_risk:.3g} %", rows_needed(max_risk)
    one = "batch" if what == "batches" else what.removesuffix("s")
    several, what = what, one if rows == 1 else what
    if needed is None:
        return [
            f"no number of {what} can show a risk of 0 %; the policy was fitted to {rows} {what}"
        ]
    if rows >= needed:
        return []
    unseen = 100 * -math.expm1(math.log(1 - CONFIDENCE) / rows)
    return [
        f"{rows} {what} cannot show a risk of {limit}: even without any loss among them, the risk "
        f"on other data may be up to {unseen:.2g} % (at {CONFIDENCE:.0%} confidence); calibrate on "
        f"at least {needed} {several}"
    ]


__all__ = ["CONFIDENCE", "doubts", "rows_needed"]
