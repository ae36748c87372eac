"""Is this bundle right on this device? Digests, then every answer against the reference samples.

The samples hold what torch computed for a few rows. They are run here whole, each row alone, and
under policies that make rows leave at different exits, so that splitting, binding and compacting
are all compared, not only the graphs. The unsplit graph and the declared preprocessing are compared
too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Exit, ImagePreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError, CheckError, EngineError
from edgeexit.measure.data import read_npz, take_rows
from edgeexit.measure.preprocess import (
    TextSource,
    encode_texts,
    image_from_array,
    preprocess_images,
)
from edgeexit.runtime import Model, Policy, Result
from edgeexit.runtime.load import load_unsplit

REFERENCE = "samples/reference.npz"
PREPROCESSING = "samples/preprocessing.npz"
TOLERANCES = {
    "float32": (1e-4, 1e-3),
    "float16": (2e-2, 2e-2),
    "bfloat16": (1e-1, 1e-1),
    "int8": (5e-1, 1e-1),
}
"""Precision -> absolute and relative tolerance, where the user gives none."""

GREY_LEVELS = 2.0
"""Image libraries round resized pixels differently, by one grey level or, at borders, two."""

Threads = int | Literal["blocking", "spinning", "process"]


@dataclass(frozen=True)
class Comparison:
    """One thing compared.

    Attributes:
        where: The exit, ``unsplit`` or ``preprocessing``.
        what: The output or score, and how it was run.
        difference: Largest absolute difference; infinite for NaN against a number or another shape.
        passed: Whether every element lies within atol + rtol * abs(reference).
    """

    where: str
    what: str
    difference: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """All comparisons, with the tolerances they were judged by.

    `notes` says what could not be compared here, and why.
    """

    comparisons: list[Comparison]
    rows: int
    atol: float
    rtol: float
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether all of them held."""
        return all(one.passed for one in self.comparisons)

    def require(self) -> None:
        """Raises `CheckError` naming the worst comparison if one did not hold."""
        failed = [one for one in self.comparisons if not one.passed]
        if failed:
            worst = max(failed, key=lambda one: one.difference)
            raise CheckError(
                f"{worst.where}: {worst.what} differs from the reference by {worst.difference:.3g} "
                f"(allowed: {self.atol:g} + {self.rtol:g} x value); {len(failed)} of "
                f"{len(self.comparisons)} comparisons failed",
                fix="If the device computes in lower precision on purpose, allow more with --atol "
                "and --rtol; otherwise export again, or try another version of the engine.",
            )


def tolerances(bundle: Bundle) -> tuple[float, float]:
    """Default tolerances for the lowest precision in a bundle."""
    found = {variant.precision for variant in bundle.manifest.unsplit}
    for chain in bundle.manifest.chains.values():
        found |= {variant.precision for part in chain.segments for variant in part.variants}
    return max(TOLERANCES[precision] for precision in found)


def check(
    model: Model,
    *,
    policy: Policy | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    threads: Threads = "blocking",
) -> Report:
    """Compares a loaded bundle with its samples.

    Args:
        model: The bundle, opened with ``verify="full"`` if weights shall be hashed. Its policy is
            restored afterwards.
        policy: A policy to check beside those made here.
        atol: Absolute tolerance; None = by precision.
        rtol: Relative tolerance; None = by precision.
        threads: Threads of the unsplit graph.

    Raises:
        BundleError: There are no samples, or they do not fit the manifest.
        PolicyError: `policy` does not fit the bundle.
    """
    bundle, before = model.bundle, model.policy
    default_atol, default_rtol = tolerances(bundle)
    judge = Judge(default_atol if atol is None else atol, default_rtol if rtol is None else rtol)
    samples = _samples(bundle)
    inputs = {t.name: samples[f"input/{t.name}"] for t in bundle.manifest.inputs}
    rows = _row_count(bundle, inputs)
    try:
        _check_exits(model, samples, inputs, rows, judge)
        _check_decisions(model, samples, inputs, rows, judge, policy)
    finally:
        model.policy = before
    engine = model.describe_engine()["engine"]
    with load_unsplit(bundle, engine, threads=threads) as unsplit:
        made = unsplit(inputs).outputs
    for name in made:
        judge.compare("unsplit", f"{name}, batch of {rows}", made[name], samples[f"unsplit/{name}"])
    notes = []
    if PREPROCESSING in bundle.manifest.samples:
        try:
            _check_preprocessing(bundle, judge)
        except EngineError as error:  # a device that feeds tensors needs no image or text library
            notes.append(f"preprocessing was not compared: {error}")
    return Report(judge.comparisons, rows, judge.atol, judge.rtol, notes)


class Judge:
    """Collects comparisons under one pair of tolerances."""

    def __init__(self, atol: float, rtol: float) -> None:
        self.atol = atol
        self.rtol = rtol
        self.comparisons: list[Comparison] = []

    def compare(
        self, where: str, what: str, found: NDArray, expected: NDArray, *, atol: float | None = None
    ) -> None:
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

    def near(self, scores: NDArray, threshold: float) -> NDArray[np.bool_]:
        """Scores so close to a threshold that either decision is right."""
        with np.errstate(invalid="ignore"):
            near = np.abs(scores - threshold) <= self.atol + self.rtol * np.abs(scores)
        return np.asarray(near & np.isfinite(scores), np.bool_)


def _samples(bundle: Bundle) -> Mapping[str, NDArray]:
    if REFERENCE not in bundle.manifest.samples:
        raise BundleError(
            f"{REFERENCE}: the bundle holds no reference samples", fix="Export it again."
        )
    samples = read_npz(bundle.file(REFERENCE))
    expected = [f"input/{tensor.name}" for tensor in bundle.manifest.inputs]
    for leave in bundle.exits():
        expected += [f"{leave.name}/{name}" for name in [*leave.outputs, *leave.scores]]
    expected += [f"unsplit/{tensor.name}" for tensor in bundle.manifest.outputs]
    for name in expected:
        if name not in samples:
            raise BundleError(f"{REFERENCE}: there is no {name}", fix="Export the bundle again.")
    return samples


def _row_count(bundle: Bundle, inputs: Mapping[str, NDArray]) -> int:
    tensor = next(t for t in bundle.manifest.inputs if t.row_axis is not None)
    assert tensor.row_axis is not None
    return int(inputs[tensor.name].shape[tensor.row_axis])


def _check_exits(
    model: Model,
    samples: Mapping[str, NDArray],
    inputs: Mapping[str, NDArray],
    rows: int,
    judge: Judge,
) -> None:
    whole = model.trace(inputs)
    alone = [model.trace(_rows(model, inputs, np.array([row]))) for row in range(rows)]
    for number, leave in enumerate(model.exits):
        for kind in ("outputs", "scores"):
            for name, made in getattr(whole, kind)[number].items():
                expected = samples[f"{leave.name}/{name}"]
                label = name if kind == "outputs" else f"score {name}"
                judge.compare(leave.name, f"{label}, batch of {rows}", made, expected)
                single = np.concatenate([getattr(one, kind)[number][name] for one in alone])
                judge.compare(leave.name, f"{label}, rows alone", single, expected)


def _check_decisions(
    model: Model,
    samples: Mapping[str, NDArray],
    inputs: Mapping[str, NDArray],
    rows: int,
    judge: Judge,
    policy: Policy | None,
) -> None:
    """Runs policies and compares the exit taken, and what it answered, with the reference."""
    exits = model.exits
    (chain,) = model.bundle.manifest.chains.values()
    independent = chain.rows == "independent"
    policies = {} if policy is None else {"the given policy": policy}
    every = np.arange(rows)
    subsets = [every, every[::-1].copy()] + ([every[1:]] if rows > 2 else [])
    if len(exits) > 1:
        for score in sorted(set.intersection(*(set(leave.scores) for leave in exits[:-1]))):
            policies[f"{score} at its median"] = Policy(
                thresholds=[_middle(samples[f"{leave.name}/{score}"]) for leave in exits[:-1]],
                score=score,
            )
    for title, one in policies.items():
        model.policy = one
        for subset in subsets:
            result = model(_rows(model, inputs, subset))
            _compare_decisions(exits, samples, subset, result, one, title, judge, independent)


def _compare_decisions(
    exits: list[Exit],
    samples: Mapping[str, NDArray],
    subset: NDArray[np.intp],
    result: Result,
    policy: Policy,
    title: str,
    judge: Judge,
    independent: bool,
) -> None:
    # The rule is written out here a second time, on purpose: the reference decides by itself.
    wanted = np.full(len(subset), len(exits) - 1)
    alive = np.ones(len(subset), np.bool_)
    open_question = np.zeros(len(subset), np.bool_)
    previous, streak = np.full(len(subset), -1), np.zeros(len(subset), np.int64)
    early = [leave.name for leave in exits[:-1]]
    first = early.index(policy.first) if policy.first else 0
    last = early.index(policy.last) if policy.last else len(early) - 1
    for number in range(first, last + 1):
        scores = samples[f"{early[number]}/{policy.score}"][subset].astype(np.float64)
        threshold = _threshold(policy, early, number)
        open_question |= alive & judge.near(scores, threshold)
        fires = alive & (scores >= threshold)
        if policy.patience:
            predicted = samples[f"{early[number]}/logits"][subset].argmax(-1)
            streak = np.where(predicted == previous, streak + 1, 0)
            previous = predicted
            fires &= streak >= policy.patience
        if not independent:
            fires &= fires.all()
        wanted[fires] = number
        alive &= ~fires
    sure = ~open_question if independent else ~open_question & ~open_question.any()
    wrong = sure & (result.exits != wanted)
    where = exits[int(wanted[wrong][0])].name if wrong.any() else "decisions"
    label = f"{title}, {len(subset)} rows"
    judge.comparisons.append(
        Comparison(where, f"exit taken ({label})", float(wrong.sum()), not wrong.any())
    )
    for name, made in result.outputs.items():
        expected = np.stack(
            [
                samples[f"{exits[k].name}/{name}"][row]
                for k, row in zip(result.exits, subset, strict=True)
            ]
        )
        judge.compare("decisions", f"{name} ({label})", made, expected)


def _threshold(policy: Policy, early: list[str], number: int) -> float:
    if isinstance(policy.thresholds, dict):
        return policy.thresholds.get(early[number], math.inf)
    if isinstance(policy.thresholds, list):
        return policy.thresholds[number]
    return policy.thresholds


def _middle(scores: NDArray) -> float:
    """Between the two scores around the median, so that no score lies on the threshold."""
    ordered = np.sort(scores[np.isfinite(scores)].astype(np.float64))
    if not len(ordered):
        return math.inf
    half = len(ordered) // 2
    return float(ordered[max(half - 1, 0)] + ordered[half]) / 2


def _rows(
    model: Model, inputs: Mapping[str, NDArray], rows: NDArray[np.intp]
) -> dict[str, NDArray]:
    axes = {tensor.name: tensor.row_axis for tensor in model.bundle.manifest.inputs}
    return {name: take_rows(value, rows, axes[name]) for name, value in inputs.items()}


def _check_preprocessing(bundle: Bundle, judge: Judge) -> None:
    arrays = read_npz(bundle.file(PREPROCESSING))
    preprocessing = bundle.manifest.preprocessing
    prefix = "expected/"
    expected = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if isinstance(preprocessing, ImagePreprocessing):
        if "image" not in arrays or preprocessing.input not in expected:
            raise BundleError(f"{PREPROCESSING}: no image or no answer", fix="Export again.")
        made = {
            preprocessing.input: preprocess_images(
                preprocessing, [image_from_array(arrays["image"])]
            )
        }
        levels = GREY_LEVELS * preprocessing.scale / min(abs(value) for value in preprocessing.std)
        atol = max(judge.atol, levels)
    else:
        if "text" not in arrays:
            raise BundleError(f"{PREPROCESSING}: no text in it", fix="Export again.")
        made = encode_texts(
            bundle, [TextSource(str(text)) for text in np.atleast_1d(arrays["text"])]
        )
        atol = 0.0
    for name, value in expected.items():
        found = made.get(name, np.empty(0))
        if value.ndim == found.ndim - 1:
            value = value[None]
        judge.compare("preprocessing", name, found, value, atol=atol)


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


__all__ = ["Comparison", "Judge", "Report", "check", "describe", "tolerances"]
