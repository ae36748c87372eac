"""Which decisions a quantised bundle takes otherwise than the model did in float32.

Quantising moves scores a little, and a score near its threshold falls on the other side. The bundle
holds inputs with the float32 answers to them (`edgeexit.export.quantise`); here the device's own
answers are held against those. What flips is told, not judged: a policy calibrated on the quantised
bundle knows nothing of float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle import Bundle
from edgeexit.errors import BundleError
from edgeexit.measure.data import read_npz
from edgeexit.runtime import Model, Policy
from edgeexit.runtime.policy import decide

FLOAT32 = "samples/float32.npz"
BATCH = 32


@dataclass(frozen=True)
class Flips:
    """What is otherwise at one exit.

    Attributes:
        exit: Its name.
        rows: How many were compared.
        answers: Rows that get another class.
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


def count_flips(model: Model, policy: Policy | None = None) -> list[Flips]:
    """Counts, exit by exit, for the inputs that the bundle holds.

    Args:
        model: Opened with all its scores.
        policy: Whose thresholds decide; None: the median of the float32 scores at each exit, where
            most decisions are close.
    """
    bundle = model.bundle
    known = read_npz(bundle.file(FLOAT32))
    inputs = {tensor.name: known.get(f"input/{tensor.name}") for tensor in bundle.manifest.inputs}
    names = [f"{leave.name}/{name}" for leave in model.exits for name in ("logits", *leave.scores)]
    if missing := [name for name in names if name not in known]:
        raise BundleError(f"{FLOAT32}: there is no {missing[0]}", fix="Export the bundle again.")
    if missing := [name for name, value in inputs.items() if value is None]:
        raise BundleError(f"{FLOAT32}: there is no input {missing[0]}", fix="Export again.")
    rows = len(known[names[0]])
    batches: list[dict[str, NDArray[Any]]] = []
    for start in range(0, rows, BATCH):
        part = slice(start, min(start + BATCH, rows))
        trace = model.trace({name: value[part] for name, value in inputs.items()})  # type: ignore[index]
        pairs = zip(model.exits, trace.outputs, trace.scores, strict=True)
        batches.append(
            {
                f"{e.name}/{k}": v
                for e, outputs, scores in pairs
                for k, v in (outputs | scores).items()
            }
        )
    made = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    score = "entropy" if policy is None else policy.score
    decisions = None if policy is None else decide(policy, model.exits, digest=bundle.digest)
    found = []
    for number, leave in enumerate(model.exits):
        ours, theirs = (one[f"{leave.name}/{score}"].astype(np.float64) for one in (made, known))
        threshold = float(np.median(theirs))
        asked = number < len(model.exits) - 1
        if decisions is not None:
            threshold, asked = decisions[number].threshold, asked and decisions[number].consult
        flipped = int(((ours >= threshold) != (theirs >= threshold)).sum())
        answers = [one[f"{leave.name}/logits"].argmax(-1) for one in (made, known)]
        found.append(
            Flips(
                exit=leave.name,
                rows=rows,
                answers=int((answers[0] != answers[1]).sum()),
                decisions=flipped if asked else None,
                score=float(np.abs(ours - theirs).max()),
            )
        )
    return found


def describe(flips: list[Flips]) -> list[dict[str, Any]]:
    """The counts as plain data."""
    return [asdict(one) for one in flips]


__all__ = ["Flips", "count_flips", "describe", "has_float32"]
