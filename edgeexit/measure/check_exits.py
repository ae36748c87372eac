"""Compares the exits of a chain, and the exits that a rule takes, with the reference samples.

`edgeexit.measure.check` uses it for rows, `edgeexit.measure.check_texts` for texts. A sample is
named ``EXIT/NAME``. Answers of a later chain behind an early exit of an earlier chain are named
``EARLIER_EXIT/EXIT/NAME``; without the first part, earlier chains ran to their last exits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Exit
from edgeexit.bundle.policy import Policy, Rule, forced, rule_of
from edgeexit.measure.batches import row_count
from edgeexit.measure.judge import Judge
from edgeexit.runtime import Model

LOGITS_SIZE = 10
"""Magnitude of logits: two tokens are equally likely if their logits differ by less than the
rounding error of a number of this size."""


@dataclass(frozen=True)
class Checked:
    """A model, its samples, the comparisons so far, and notes on what was not compared."""

    model: Model
    samples: Mapping[str, NDArray]
    inputs: Mapping[str, NDArray]
    judge: Judge
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows, or texts, in the sample."""
        return row_count(self.model.bundle, self.inputs)

    def note(self, what: str) -> None:
        """Adds a note, once."""
        if what not in self.notes:
            self.notes.append(what)


def compare_exits(
    checked: Checked,
    chain: Chain,
    answers: Mapping[str, NDArray],
    how: str,
    behind: Sequence[str] = (),
) -> None:
    """Compares every exit's outputs and scores with the samples.

    Args:
        answers: ``EXIT/NAME`` -> value on this device.
        behind: As for `reference`.
    """
    samples, judge = checked.samples, checked.judge
    for exit_ in chain.stops:
        for name in [*exit_.outputs, *exit_.scores]:
            key = f"{exit_.name}/{name}"
            expected = reference(samples, key, behind)
            if expected is None:
                continue
            if name == "token":
                gap = reference(samples, f"{exit_.name}/gap", behind)
                clear = likelier(judge, math.inf if gap is None else gap)
                wrong = int((clear & (answers[key] != expected)).sum())
                judge.count(exit_.name, f"greedy token, {how}", wrong)
                continue
            if name in exit_.outputs:
                found = answers[key]
                if "token" in exit_.outputs and found.shape == expected.shape:
                    # Beyond a draft vocabulary both are -inf.
                    covered = ~(np.isneginf(found) & np.isneginf(expected)).all(0)
                    found, expected = found[:, covered], expected[:, covered]
                judge.compare(exit_.name, f"{name}, {how}", found, expected)
            else:
                judge.compare_score(exit_.name, f"score {name}, {how}", answers[key], expected)


def likelier(judge: Judge, gap: NDArray | float) -> NDArray[np.bool_]:
    """Marks tokens whose logit is so far above the next that rounding cannot change them."""
    return np.asarray(gap > judge.atol + judge.rtol * LOGITS_SIZE)


def reference(
    samples: Mapping[str, NDArray],
    key: str,
    behind: Sequence[str] = (),
    rows: Sequence[int] | None = None,
) -> NDArray | None:
    """A sample, or None if the bundle does not have it.

    Args:
        key: ``EXIT/NAME``.
        behind: Per row, the early exit at which an earlier chain stopped; empty: its last exit. No
            rows: the last exit for all.
        rows: The rows of the sample; None: all.
    """
    if not behind:
        return samples.get(key)
    parts = {name: samples.get(f"{name}/{key}" if name else key) for name in set(behind)}
    chosen = [parts[name] for name in behind]
    numbers = range(len(behind)) if rows is None else rows
    if any(part is None for part in chosen):
        return None
    return np.stack(
        [part[row] for part, row in zip(chosen, numbers, strict=True) if part is not None]
    )


def rules_of(checked: Checked, name: str, chain: Chain, given: Policy | None) -> dict[str, Rule]:
    """Title -> rule of a chain whose decisions the samples determine."""
    early = chain.stops[:-1]
    known = [
        {score for score in exit_.scores if f"{exit_.name}/{score}" in checked.samples}
        for exit_ in early
    ]
    scores = sorted(set.intersection(*known)) if known else []
    rules = {
        f"{score} at its median": Rule(
            thresholds=[_middle(checked.samples[f"{exit_.name}/{score}"]) for exit_ in early],
            score=score,
        )
        for score in scores
    }
    if given is not None:
        rule = rule_of(given, chain, name)
        if not early or rule.score in scores:
            rules = {"the given policy": rule} | rules
    return rules


def forced_rules(chain: Chain) -> dict[str, Rule]:
    """Title -> rule that stops every row at one early exit."""
    return {
        f"all at {exit_.name}": _with_score(forced(chain.stops, exit_.name), exit_)
        for exit_ in chain.stops[:-1]
        if exit_.scores
    }


def _with_score(rule: Rule, exit_: Exit) -> Rule:
    return Rule(
        thresholds=rule.thresholds,
        score=next(iter(exit_.scores)),
        first=rule.first,
        last=rule.last,
    )


def only(model: Model, name: str, rule: Rule) -> Policy:
    """A policy in which only one chain has a rule that may stop rows early."""
    return Policy(rules={chain: Rule() for chain in model.chains} | {name: rule})


def decided(
    judge: Judge,
    arrays: Mapping[str, NDArray],
    chain: Chain,
    rule: Rule,
    *,
    independent: bool = True,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The exits that rows take by their scores, and whether rounding may not change them.

    It does not use the runtime's code for rules, so that the reference is independent.

    Args:
        arrays: ``EXIT/SCORE`` -> ``[row]``; with patience also ``EXIT/logits``.
        independent: Whether rows may take different exits.
    """
    early = [exit_.name for exit_ in chain.stops[:-1]]
    count = len(arrays[f"{early[0]}/{rule.score}"]) if early else 0
    wanted = np.full(count, len(early))
    alive = np.ones(count, np.bool_)
    open_question = np.zeros(count, np.bool_)
    previous, streak = np.full(count, -1), np.zeros(count, np.int64)
    first = early.index(rule.first) if rule.first else 0
    last = early.index(rule.last) if rule.last else len(early) - 1
    for number in range(first, last + 1):
        scores = arrays[f"{early[number]}/{rule.score}"].astype(np.float64)
        threshold = _threshold(rule, early, number)
        open_question |= alive & judge.near(scores, threshold)
        fires = alive & (scores >= threshold)
        if rule.patience:
            predicted = arrays[f"{early[number]}/logits"].argmax(-1)
            streak = np.where(predicted == previous, streak + 1, 0)
            previous = predicted
            fires &= streak >= rule.patience
        if not independent:
            fires &= fires.all()
        wanted[fires] = number
        alive &= ~fires
    return wanted, ~open_question if independent else ~open_question & ~open_question.any()


def _threshold(rule: Rule, early: list[str], number: int) -> float:
    if isinstance(rule.thresholds, dict):
        return rule.thresholds.get(early[number], math.inf)
    if isinstance(rule.thresholds, list):
        return rule.thresholds[number]
    return rule.thresholds


def _middle(scores: NDArray) -> float:
    """A threshold between the two scores around the median, so that no score equals it."""
    ordered = np.sort(scores[np.isfinite(scores)].astype(np.float64))
    if not len(ordered):
        return math.inf
    half = len(ordered) // 2
    return float(ordered[max(half - 1, 0)] + ordered[half]) / 2


__all__ = [
    "Checked",
    "compare_exits",
    "decided",
    "forced_rules",
    "likelier",
    "only",
    "reference",
    "rules_of",
]
