"""Chooses thresholds from a trace.

A sweep lowers one threshold for all exits from "never" over every score in the trace. The risk is
the mean loss of rows against the last exit: ``consistency``, 1 if the prediction differs (needs no
labels), or ``performance``, max(0, loss(exit) - loss(last)) with 0/1 loss. The result is the
loosest threshold whose measured risk **and that of all stricter thresholds** is within the limit:
below a threshold that exceeds it, a low risk is chance. The figures are measured on this data, not
certified.

For a model that writes text, a row is a token: the risk is a share of tokens. The loss of single
texts is reported too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import NEVER, Policy, Rule
from edgeexit.errors import CheckError, UsageError
from edgeexit.measure.given_text import of_exits
from edgeexit.measure.rows_needed import doubts, rows_needed
from edgeexit.measure.threshold_search import ROUNDING, search
from edgeexit.measure.trace import NO_LABEL, Trace, replay

Risk = Literal["consistency", "performance"]


@dataclass(frozen=True)
class Curve:
    """Every distinct result of a common threshold, strict to loose; entry 0 is "never".

    Attributes:
        thresholds: ``[point]``; a row stops if score >= threshold.
        risks: ``[point]``, mean loss against the last exit.
        depths: ``[point]``, mean number of segments run.
        shares: ``[point, exit]``, share of rows that each exit answers.
        expected_ms: ``[point]``, time per row by the trace's segment times.
    """

    thresholds: NDArray[np.float64]
    risks: NDArray[np.float64]
    depths: NDArray[np.float64]
    shares: NDArray[np.float64]
    expected_ms: NDArray[np.float64]


@dataclass(frozen=True)
class ExitFigures:
    """Figures of one exit if it answers every row of a trace.

    Attributes:
        accuracy: Share of correct predictions; NaN without labels.
        agreement: Share of rows with the same prediction as the last exit.
        auroc: How well the score ranks rows that agree above rows that do not; NaN if all rows
            agree, or none.
        cumulative_ms: Time per row up to this exit.
        perplexity: Of the texts, if rows are tokens and it predicts all of them; otherwise NaN.
    """

    name: str
    accuracy: float
    agreement: float
    auroc: float
    cumulative_ms: float
    perplexity: float = math.nan


def losses(trace: Trace, risk: Risk) -> NDArray[np.float64]:
    """Loss ``[exit, row]`` against the last exit; zero in the last row.

    Raises:
        DataError: ``performance`` needs labels and the trace has none.
    """
    predictions = trace.predictions
    if risk == "consistency":
        return (predictions != predictions[-1]).astype(np.float64)
    wrong = (predictions != trace.labelled().labels).astype(np.float64)
    return np.maximum(0.0, wrong - wrong[-1])


def sweep(trace: Trace, score: str, risk: Risk = "consistency") -> Curve:
    """Computes the curve of a common threshold.

    A row stops at exit k if the threshold is above every earlier score and not above the score at
    k. A row therefore changes its exit only at the running maxima of its scores. Sorting these
    maxima gives the curve in n log n steps, n = rows x exits.
    """
    usable = _usable_scores(trace, score)
    loss = losses(trace, risk)
    exits, rows = len(trace.exits), trace.rows
    reached = np.maximum.accumulate(usable, axis=0)
    before = np.vstack([np.full((1, rows), -np.inf), reached[:-1]])
    exit_of, row_of = np.nonzero(np.isfinite(reached) & (reached > before))
    thresholds = reached[exit_of, row_of]
    # At a looser threshold, a row moves from the exit of its next larger running maximum, or from
    # the last exit.
    later = np.full((exits - 1, rows), exits - 1)
    following = np.full(rows, exits - 1)
    for number in range(exits - 2, -1, -1):
        later[number] = following
        rises = np.isfinite(reached[number]) & (reached[number] > before[number])
        following = np.where(rises, number, following)
    from_exit = later[exit_of, row_of]
    order = np.argsort(-thresholds, kind="stable")
    thresholds, exit_of, row_of, from_exit = (
        array[order] for array in (thresholds, exit_of, row_of, from_exit)
    )
    last_of_equals = np.append(thresholds[1:] != thresholds[:-1], True)[: len(thresholds)]
    counts = np.zeros((len(thresholds) + 1, exits))
    counts[0, -1] = rows
    steps = np.arange(1, len(thresholds) + 1)
    counts[steps, exit_of] += 1
    counts[steps, from_exit] -= 1
    added = loss[exit_of, row_of] - loss[from_exit, row_of]
    kept = np.concatenate([[0], np.flatnonzero(last_of_equals) + 1])
    shares = np.cumsum(counts, axis=0)[kept] / rows
    risks = np.concatenate([[0.0], np.cumsum(added)])[kept] / rows
    per_row_ms = cumulative_ms(trace)
    return Curve(
        thresholds=np.concatenate([[NEVER], thresholds[kept[1:] - 1]]),
        risks=risks,
        depths=shares @ np.arange(1, exits + 1),
        shares=shares,
        expected_ms=shares @ per_row_ms,
    )


def choose(curve: Curve, max_risk: float) -> int:
    """Index of the loosest point whose risk, and that of all stricter points, is within the limit.

    Raises:
        CheckError: Only "never" is within the limit.
    """
    over = np.flatnonzero(curve.risks > max_risk + ROUNDING)
    chosen = int(over[0]) - 1 if len(over) else len(curve.risks) - 1
    if chosen == 0:
        first = f"{100 * curve.risks[1]:.3g} %" if len(curve.risks) > 1 else "none"
        raise CheckError(
            f"no threshold keeps the risk within {100 * max_risk:.3g} % "
            f"(the strictest has {first})",
            fix="Allow more risk, use more data, train the exits further, or run the full model.",
        )
    return chosen


def looser_and_better(curve: Curve, chosen: int) -> int | None:
    """Index of the fastest looser point that has less risk and takes less time than the chosen one;
    None: there is none. It is not chosen because a stricter one between them exceeds the limit,
    which happens where the score hardly tells right from wrong."""
    better = (curve.risks < curve.risks[chosen] - ROUNDING) & (
        curve.expected_ms < curve.expected_ms[chosen]
    )
    later = np.flatnonzero(better[chosen + 1 :]) + chosen + 1
    return int(later[curve.expected_ms[later].argmin()]) if len(later) else None


def calibrate(
    trace: Trace, *, max_risk: float, score: str, risk: Risk = "consistency", per_exit: bool = False
) -> tuple[Policy, Curve, int]:
    """Chooses a policy for a maximum risk. Returns policy, curve and index of the chosen point.

    Args:
        trace: The recorded exits.
        max_risk: Maximum mean loss against the last exit, as a fraction.
        score: Name of the score to compare.
        risk: Definition of the loss.
        per_exit: Starting from the common threshold, lower the thresholds of single exits greedily
            while the risk allows.

    Raises:
        CheckError: No threshold is within the limit.
    """
    if risk == "performance":
        trace = trace.labelled()
    curve = sweep(trace, score, risk)
    chosen = choose(curve, max_risk)
    thresholds: float | dict[str, float] = float(curve.thresholds[chosen])
    if per_exit:
        found = search(
            _usable_scores(trace, score),
            losses(trace, risk),
            cumulative_ms(trace),
            max_risk,
            float(curve.thresholds[chosen]),
        )
        thresholds = dict(zip(trace.exits[:-1], found, strict=True))
    taken = replay(trace, Rule(thresholds=thresholds, score=score))
    never = {name: Rule(score=one) for name, one in trace.other_chains.items()}
    stopping = {name: rule for name, rule in trace.policy.items() if rule != Rule()}
    rules = {**trace.policy, **never, **stopping}
    rules[trace.chain] = _rule(trace, thresholds, score)
    calibration = {
        "method": "sweep, per exit" if per_exit else "sweep",
        "uncertified": True,
        "risk": risk,
        "max_risk": max_risk,
        "rows_needed": rows_needed(max_risk),
    } | _measured(trace, risk, taken)
    calibration["warnings"] = doubts(*_decisions(trace), max_risk) + _no_numbers(trace, score)
    policy = Policy(rules=rules, bundle=trace.bundle, engine=trace.engine, calibration=calibration)
    return policy, curve, chosen


def _rule(trace: Trace, thresholds: float | dict[str, float], score: str) -> Rule:
    """The rule for the traced chain. Thresholds of its exits that were not traced stay: those of
    gates beside exits that stop, and the other way round."""
    before = trace.policy.get(trace.chain, Rule())
    known = before.thresholds if isinstance(before.thresholds, dict) else {}
    others = {name: value for name, value in known.items() if name not in trace.exits}
    if not others and not trace.gates:
        return Rule(thresholds=thresholds, score=score)
    own = thresholds
    if not isinstance(own, dict):
        own = dict.fromkeys(trace.exits[:-1], own)
    rule = before if trace.gates else msgspec.structs.replace(before, score=score)
    return msgspec.structs.replace(rule, thresholds={**others, **own})


def _no_numbers(trace: Trace, score: str) -> list[str]:
    """A warning if rows have a score that is NaN."""
    count = int(np.isnan(trace.scores[score]).any(axis=0).sum())
    if not count:
        return []
    rows = "rows" if trace.texts is None else "tokens"
    return [
        f"{score} is NaN for {count} of {trace.rows} {rows}: their answers mean nothing, so trace "
        "again without such data"
    ]


def _decisions(trace: Trace) -> tuple[int, str]:
    """Number of independent decisions in a trace, and what they are about: the tokens of a text
    depend on each other, and rows of a batch stop together where exits apply to all of it."""
    if trace.texts is not None:
        return trace.texts, "texts"
    return (trace.rows, "rows") if trace.independent else (len(trace.batch_rows), "batches")


def _measured(trace: Trace, risk: Risk, taken: NDArray[np.int64]) -> dict[str, Any]:
    """Figures of a policy on its trace; `taken` are the exits of the rows."""
    loss = losses(trace, risk)[taken, np.arange(trace.rows)]
    per_row_ms = cumulative_ms(trace)
    measured = {
        "measured_risk": float(loss.mean()),
        "n": trace.rows,
        "data": trace.data,
        "mean_depth": float(taken.mean() + 1),
        "exit_shares": dict(
            zip(trace.exits, _shares(taken, len(trace.exits)).tolist(), strict=True)
        ),
        "batch_size": trace.batch_size,
        "expected_ms": float(per_row_ms[taken].mean()),
        "full_ms": float(per_row_ms[-1]),
    }
    if trace.next_log_probs is not None and (given := of_exits(trace, taken)) is not None:
        measured |= {"perplexity": given.perplexity, "perplexity_full": given.perplexity_full}
    if trace.groups is not None:
        _, text = np.unique(trace.groups, return_inverse=True)
        of_texts = np.bincount(text, weights=loss) / np.bincount(text)
        measured |= {
            "texts": len(of_texts),
            "risk_of_texts": {
                "mean": float(of_texts.mean()),
                "largest": float(of_texts.max()),
                "share_without_loss": float((of_texts == 0).mean()),
            },
        }
    return measured


def figures(trace: Trace, score: str) -> list[ExitFigures]:
    """Accuracy, agreement and ranking of each exit alone."""
    agrees = trace.predictions == trace.predictions[-1]
    per_row_ms = cumulative_ms(trace)
    return [
        ExitFigures(
            name=name,
            accuracy=_accuracy(trace, number),
            agreement=float(agrees[number].mean()),
            auroc=auroc(trace.scores[score][number], agrees[number]),
            cumulative_ms=float(per_row_ms[number]),
            perplexity=_perplexity(trace, number),
        )
        for number, name in enumerate(trace.exits)
    ]


def _perplexity(trace: Trace, number: int) -> float:
    found = None
    if trace.next_log_probs is not None:
        found = of_exits(trace, np.full(trace.rows, number))
    return math.nan if found is None else found.perplexity


def _accuracy(trace: Trace, number: int) -> float:
    known = None if trace.labels is None else trace.labels != NO_LABEL
    if known is None or not known.any():
        return math.nan
    return float((trace.predictions[number] == trace.labels)[known].mean())


def auroc(scores: NDArray, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive row scores above a negative one, ties counting half.

    The Mann-Whitney statistic over mid-ranks. NaN scores rank lowest; NaN if one class is empty.

    >>> auroc(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
    0.875
    """
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return math.nan
    values = np.where(np.isnan(scores), -np.inf, scores)
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def cumulative_ms(trace: Trace) -> NDArray[np.float64]:
    """Time per row ``[exit]`` up to each exit, from medians over full-size runs."""
    return np.cumsum(trace.segment_ms()) / trace.rows_per_run


def default_score(trace: Trace, score: str | None) -> str:
    """`score` if given, else ``max_prob`` or the first score. Raises `UsageError`."""
    if score is None:
        return "max_prob" if "max_prob" in trace.scores else next(iter(trace.scores))
    if score not in trace.scores:
        raise UsageError(
            f"--score {score}: the trace has {', '.join(trace.scores)}", fix="Choose one of those."
        )
    return score


def _usable_scores(trace: Trace, score: str) -> NDArray[np.float64]:
    """Scores ``[early exit, row]`` to compare with thresholds.

    NaN becomes the lowest score. If exits apply to the whole batch, all rows of a batch get the
    lowest score in it.
    """
    values = trace.scores[score][:-1].astype(np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    if not trace.independent and len(values):
        starts = np.cumsum(trace.batch_rows) - trace.batch_rows
        lowest = np.minimum.reduceat(values, starts, axis=1)
        values = np.repeat(lowest, trace.batch_rows, axis=1)
    return values


def _shares(taken: NDArray[np.int64], exits: int) -> NDArray[np.float64]:
    return np.bincount(taken, minlength=exits) / len(taken)
