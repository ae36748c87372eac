"""Counts decisions of a quantised bundle that differ from the float32 model.

Quantisation changes scores slightly, and a score near its threshold may cross it. The bundle has
inputs with their float32 answers (`edgeexit.export.passes.quantise`), from the calibration data
that was not used for activation ranges, if there was any. This module compares the device's answers
with them. The counts are informational: a policy calibrated on the quantised bundle does not depend
on float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.files import read_npz
from edgeexit.bundle.next_tokens import NEXT_LOG_PROB, perplexity
from edgeexit.bundle.policy import Policy, Rule, decisions_of, policy_for
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError
from edgeexit.measure.probe import ask_in_batches, full_depth, predictions
from edgeexit.runtime import Model

FLOAT32 = "samples/float32.npz"
BATCH = 32
SCORE = "entropy"
"""The score to compare if there is no policy."""


@dataclass(frozen=True)
class Flips:
    """Differences at one exit.

    Attributes:
        exit: Its name.
        rows: Number of compared rows, or tokens of texts.
        answers: Number of rows with another class or token.
        decisions: Number of rows that stop here in only one precision; None at the last exit, and
            at exits where the policy never stops.
        score: Largest difference of the compared score.
        perplexity: Of the texts, in float32 and as it is here; None: rows are not tokens, or the
            bundle is of a version that did not store it.
    """

    exit: str
    rows: int
    answers: int
    decisions: int | None
    score: float
    perplexity: tuple[float, float] | None = None


def has_float32(bundle: Bundle) -> bool:
    """Whether the bundle has float32 answers."""
    return FLOAT32 in bundle.manifest.samples


def count_flips(model: Model, policy: Policy | Rule | None = None) -> list[Flips]:
    """Counts differences per exit for the inputs in the bundle.

    Args:
        model: The bundle, preferably loaded with all scores.
        policy: Gives the thresholds; None: the median of the float32 entropy scores at each exit,
            where most decisions are close.
    """
    bundle = model.bundle
    decisions = None
    if policy is not None:
        decisions = decisions_of(policy_for(policy, bundle), model.chain, model.chain_name)
    score = SCORE if decisions is None else decisions[-1].score
    known = read_npz(bundle.file(FLOAT32))
    inputs = {tensor.name: f"input/{tensor.name}" for tensor in bundle.manifest.inputs}
    answer = "token" if model.writes else "logits"
    names = [f"{exit_.name}/{name}" for exit_ in model.exits for name in (answer, score)]
    if missing := [name for name in [*inputs.values(), *names] if name not in known]:
        raise BundleError(f"{FLOAT32}: there is no {missing[0]}", fix="Export the bundle again.")
    size = 1 if model.writes else min(BATCH, model.largest.get("batch", BATCH))
    with full_depth(model):  # as in float32
        made = ask_in_batches(model, {name: known[key] for name, key in inputs.items()}, size)
    found = []
    for number, exit_ in enumerate(model.exits):
        key = f"{exit_.name}/{score}"
        ours, theirs = (one[key].astype(np.float64) for one in (made, known))
        threshold, asked = float(np.median(theirs)), number < len(model.exits) - 1
        if decisions is not None:
            threshold, asked = decisions[number].threshold, asked and decisions[number].consult
        flipped = int(((ours >= threshold) != (theirs >= threshold)).sum())
        others = predictions(made, exit_.name) != predictions(known, exit_.name)
        found.append(
            Flips(
                exit=exit_.name,
                rows=theirs.size,
                answers=int(others.sum()),
                decisions=flipped if asked else None,
                score=float(np.abs(ours - theirs).max()),
                perplexity=_perplexities(known, made, exit_.name),
            )
        )
    return found


def _perplexities(
    known: Mapping[str, NDArray], made: Mapping[str, NDArray], exit_: str
) -> tuple[float, float] | None:
    name = f"{exit_}/{NEXT_LOG_PROB}"
    if name not in known or np.isnan(known[name]).all():  # texts of one token
        return None
    return perplexity(known[name]), perplexity(made[name])


def describe(flips: list[Flips]) -> list[dict[str, Any]]:
    """The counts as plain data."""
    return [asdict(one) for one in flips]


__all__ = ["SCORE", "Flips", "count_flips", "describe", "has_float32"]
