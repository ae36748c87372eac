"""Which decisions a quantised bundle takes that the model in float32 would not.

Quantising moves scores a little, and a score near its threshold moves to the other side. The bundle
holds inputs with the float32 answers to them (`edgeexit.export.passes.quantise`): data behind what
set the ranges of activations, where there was more. Here the device's own answers are compared with
those. The counts are informational: a policy calibrated on the quantised bundle does not depend on
float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgeexit.bundle.policy import Policy, Rule, decisions_of, policy_for
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError
from edgeexit.measure.batches import read_npz
from edgeexit.measure.probe import ask_in_batches, predictions
from edgeexit.runtime import Model

FLOAT32 = "samples/float32.npz"
BATCH = 32
SCORE = "entropy"
"""The score whose decisions are compared where no policy names one."""


@dataclass(frozen=True)
class Flips:
    """What differs at one exit.

    Attributes:
        exit: Its name.
        rows: How many were compared: rows, or tokens of texts.
        answers: Rows that get another class or token.
        decisions: Rows that leave here in one precision and not in the other; None at the last
            exit, and where the policy never leaves.
        score: Largest difference of the score that decides.
    """

    exit: str
    rows: int
    answers: int
    decisions: int | None
    score: float


def has_float32(bundle: Bundle) -> bool:
    """Whether the bundle says what the model answered in float32."""
    return FLOAT32 in bundle.manifest.samples


def count_flips(model: Model, policy: Policy | Rule | None = None) -> list[Flips]:
    """Counts, exit by exit, for the inputs that the bundle holds.

    Args:
        model: Best opened with all its scores.
        policy: Whose thresholds decide; None: the median of the float32 entropy scores at each
            exit, where most decisions are close.
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
            )
        )
    return found


def describe(flips: list[Flips]) -> list[dict[str, Any]]:
    """The counts as plain data."""
    return [asdict(one) for one in flips]


__all__ = ["SCORE", "Flips", "count_flips", "describe", "has_float32"]
