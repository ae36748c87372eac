"""Which decisions a quantised bundle takes otherwise than the model did in float32.

Quantising moves scores a little, and a score near its threshold falls on the other side. The bundle
holds inputs with the float32 answers to them (`edgeexit.export.passes.quantise` and
`quantise_decode`): data behind what set the ranges of activations, where there was more. Here the
device's own answers are held against those. What flips is told, not judged: a policy calibrated on
the quantised bundle knows nothing of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import Decision, decide
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError
from edgeexit.measure.data import read_npz
from edgeexit.runtime import Decoder, Model, Policy

FLOAT32 = "samples/float32.npz"
BATCH = 32
SCORE = "entropy"
"""The score whose decisions are compared where no policy names one."""


@dataclass(frozen=True)
class Flips:
    """What is otherwise at one exit.

    Attributes:
        exit: Its name.
        rows: How many were compared: rows, or tokens of a language model's texts.
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


def count_flips(model: Model, policy: Policy | None = None) -> list[Flips]:
    """Counts, exit by exit, for the inputs that the bundle holds.

    Args:
        model: Opened with all its scores.
        policy: Whose thresholds decide; None: the median of the float32 entropy scores at each
            exit, where most decisions are close.
    """
    bundle = model.bundle
    known = dict(read_npz(bundle.file(FLOAT32)))
    inputs = {tensor.name: f"input/{tensor.name}" for tensor in bundle.manifest.inputs}
    names = [f"{leave.name}/{name}" for leave in model.exits for name in ("logits", *leave.scores)]
    _require(known, [*names, *inputs.values()])
    rows = len(known[names[0]])
    size = min(BATCH, model.largest.get("batch", BATCH))
    batches: list[dict[str, NDArray[Any]]] = []
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        trace = model.trace({name: known[key][part] for name, key in inputs.items()})
        pairs = zip(model.exits, trace.outputs, trace.scores, strict=True)
        batches.append(
            {
                f"{e.name}/{k}": v
                for e, outputs, scores in pairs
                for k, v in (outputs | scores).items()
            }
        )
    made = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    for answers in (made, known):
        answers |= {
            f"{leave.name}/answer": answers[f"{leave.name}/logits"].argmax(-1)
            for leave in model.exits
        }
    return _compare(made, known, [leave.name for leave in model.exits], policy, bundle)


def count_decoder_flips(model: Decoder, policy: Policy | None = None) -> list[Flips]:
    """Counts, exit by exit, for the tokens of the texts that the bundle holds. Arguments as for
    `count_flips`."""
    bundle = model.bundle
    known = dict(read_npz(bundle.file(FLOAT32)))
    score = SCORE if policy is None else policy.score
    names = [leave.name for leave in model.exits]
    _require(known, ["input/tokens", *(f"{n}/{k}" for n in names for k in ("token", score))])
    texts = known["input/tokens"]
    made: dict[str, list[NDArray[Any]]] = {}
    for text in texts:
        session = model.session(1)
        head = session.head([score])
        session.embed(text[None])
        for number, name in enumerate(names):
            session.run(number, len(text))
            states = session.adapt(number, len(text))
            answers = head(states.reshape(-1, states.shape[-1]))
            made.setdefault(f"{name}/answer", []).append(answers["token"].copy())
            made.setdefault(f"{name}/{score}", []).append(answers[score].copy())
    ours = {name: np.concatenate(parts) for name, parts in made.items()}
    theirs = {f"{name}/answer": known[f"{name}/token"].reshape(-1) for name in names}
    theirs |= {f"{name}/{score}": known[f"{name}/{score}"].reshape(-1) for name in names}
    return _compare(ours, theirs, names, policy, bundle)


def _require(known: Mapping[str, NDArray[Any]], names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in known]:
        raise BundleError(f"{FLOAT32}: there is no {missing[0]}", fix="Export the bundle again.")


def _compare(
    made: Mapping[str, NDArray[Any]],
    known: Mapping[str, NDArray[Any]],
    names: Sequence[str],
    policy: Policy | None,
    bundle: Bundle,
) -> list[Flips]:
    """Holds ``EXIT/answer`` and ``EXIT/SCORE`` of both against each other."""
    score = SCORE if policy is None else policy.score
    decisions: Sequence[Decision] | None = None
    if policy is not None:
        decisions = decide(policy, bundle.exits(), digest=bundle.digest)
    found = []
    for number, name in enumerate(names):
        ours, theirs = (one[f"{name}/{score}"].astype(np.float64) for one in (made, known))
        threshold = float(np.median(theirs))
        asked = number < len(names) - 1
        if decisions is not None:
            threshold, asked = decisions[number].threshold, asked and decisions[number].consult
        flipped = int(((ours >= threshold) != (theirs >= threshold)).sum())
        others = int((made[f"{name}/answer"] != known[f"{name}/answer"]).sum())
        found.append(
            Flips(
                exit=name,
                rows=len(theirs),
                answers=others,
                decisions=flipped if asked else None,
                score=float(np.abs(ours - theirs).max()),
            )
        )
    return found


def describe(flips: list[Flips]) -> list[dict[str, Any]]:
    """The counts as plain data."""
    return [asdict(one) for one in flips]


__all__ = ["SCORE", "Flips", "count_decoder_flips", "count_flips", "describe", "has_float32"]
