"""Figures of models that take rows: latency of every exit's path, or throughput of full batches.

Blocks of the unsplit model and of each lane alternate (`edgeexit.measure.bench.paired`). Figures
are computed from pairs of blocks.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.inputs import Inputs
from edgeexit.measure.bench.paired import (
    Lane,
    alternate,
    middle_mean,
    percentiles,
    spread,
    warm,
)

MAX_SPREAD = 0.10
"""A larger spread of ratios between blocks gives a warning."""

FEW_ROWS = 30
"""With fewer rows, exit rates, accuracy and agreement say nothing about other data."""

THROUGHPUT_BLOCKS: dict[str, Any] = {"block_ms": 200.0, "min_block_runs": 1, "min_runs": 1}


def measure(contest: Contest) -> dict[str, Any]:
    """Measures rows one at a time, or in full batches."""
    inputs, mode = contest.inputs, contest.options.mode
    names = [exit_.name for exit_ in contest.bundle.manifest.last_chain.stops]
    baseline = Lane("unsplit", contest.unsplit, "unsplit")
    cases = ["segments"] if mode == "throughput" else [f"path:{name}" for name in names]
    full, natural = (Lane(case, contest.chain, case) for case in ("all", "natural"))
    others = [Lane(case, contest.chain, case) for case in cases]
    lanes = [full, *others, *([natural] if inputs.real else [])]
    warnings = _run(contest, baseline, lanes, natural)
    if inputs.real:
        warnings += _cover(natural, inputs, contest.options.seconds)
        warnings += _few_rows(natural)
    rates = _exit_rates(natural, len(names)) if inputs.real else None
    facts = contest.chain.facts
    figures = _throughput if mode == "throughput" else _latency
    return {
        "unsplit": _times(baseline, inputs, mode)
        | {
            "accuracy": _accuracy(baseline, inputs),
            "threads": contest.chosen["unsplit"],
        },
        "split_tax": round(statistics.median(full.ratios), 4),
        "split_tax_spread": round(spread(full.ratios), 4),
        "exits": [
            {"name": name}
            | (_path(others[number], inputs, mode) if mode == "latency" else {})
            | {
                "rate": None if rates is None else round(rates[number], 6),
                "accuracy": _accuracy(natural, inputs, at=number) if inputs.real else None,
            }
            for number, name in enumerate(names)
        ],
        "natural": None
        if rates is None
        else _times(natural, inputs, mode)
        | figures(natural, others, rates)
        | {
            "accuracy": _accuracy(natural, inputs),
            "agreement": _agreement(natural, baseline),
            "rows": sum(len(exits) for exits, _ in _answers(natural).values()),
        },
        "warnings": warnings,
        "gpu": contest.chain.run("gpu", [0])["records"][0]
        if "gpu" in contest.chain.cases
        else None,
        "mode": mode,
        "chain": _path(full, inputs, mode)
        | {"threads": contest.chosen["chain"], "engine": contest.engine},
        "policy": {"score": facts["score"], "thresholds": facts["thresholds"]},
        "same_threads": contest.same_threads,
        "thread_search": contest.searched,
        "data": {
            "name": inputs.name,
            "rows": inputs.count * inputs.batch,
            "batch": inputs.batch,
            "sha256": inputs.digest,
        },
    }


def _run(contest: Contest, baseline: Lane, lanes: Sequence[Lane], natural: Lane) -> list[str]:
    """Warms up and runs the blocks. Returns warnings about the figures."""
    options = contest.options
    contest.tell("warm-up", 0, 0)
    warm([baseline, *lanes], seconds=min(5.0, options.seconds / 6))
    rounds = alternate(
        baseline,
        lanes,
        seconds=options.seconds,
        seed=options.seed,
        whole=natural,
        tick=lambda done: contest.tell("blocks", round(100 * done), 100),
        **(THROUGHPUT_BLOCKS if options.mode == "throughput" else {}),
    )
    return _unsettled([baseline, *lanes], rounds)


def _latency(natural: Lane, paths: Sequence[Lane], rates: Sequence[float]) -> dict[str, Any]:
    """Measured figures of natural exits, and those that the exits' own paths let expect: the sum
    of rate x median over exits."""
    medians = [percentiles(lane.times_ms)["p50"] for lane in paths]
    ratios = [statistics.median(lane.ratios) for lane in paths]
    return {
        "ratio_to_unsplit": round(natural_ratio(natural, rates), 4),
        "mean_ratio_to_unsplit": round(middle_mean(natural.mean_ratios), 4),
        "expected_ms": round(sum(map(_product, zip(rates, medians, strict=True))), 4),
        "expected_ratio": round(sum(map(_product, zip(rates, ratios, strict=True))), 4),
    }


def _throughput(natural: Lane, timed: Sequence[Lane], rates: Sequence[float]) -> dict[str, Any]:
    return {
        "ratio_to_unsplit": round(middle_mean(natural.mean_ratios), 4),
        "of_ideal": round(share_of_ideal(natural, timed[0]), 4),
    }


def natural_ratio(natural: Lane, rates: Sequence[float]) -> float:
    """Measured time of a row relative to unsplit: the median of the natural runs that stopped at an
    exit, weighted by the exit's rate.

    A median over all rows would give only the time of the most frequent exit, and a mean would
    include disturbances of the machine. Exits at which no timed row stopped are left out (`_cover`
    runs rows untimed).
    """
    taken: dict[int, list[float]] = {}
    for record, relative in zip(natural.records, natural.relative, strict=False):
        taken.setdefault(record["exits"][0], []).append(relative)
    weight = sum(rates[number] for number in taken)
    whole = sum(rates[number] * statistics.median(times) for number, times in taken.items())
    return whole / weight


def share_of_ideal(natural: Lane, timed: Lane) -> float:
    """Throughput with natural exits ÷ the ideal, in which each row takes time only in the segments
    that it passes.

    A segment's time per row is its time for a full batch ÷ the batch size. The times of both lanes
    are relative to their paired baseline blocks.
    """
    segments = np.asarray(timed.records)
    whole = segments.sum(1)
    shares = (segments / whole[:, None]).mean(0)  # of a full pass, per segment
    depth = np.concatenate([record["exits"] for record in natural.records])
    reached = np.asarray([(depth >= number).mean() for number in range(len(shares))])
    ideal = float((shares * reached).sum()) * middle_mean(timed.mean_ratios)
    return ideal / middle_mean(natural.mean_ratios)


def _unsettled(lanes: Sequence[Lane], rounds: int) -> list[str]:
    warnings = [
        f"{lane.name}: the median had not settled at the end of warm-up"
        for lane in lanes
        if not lane.settled
    ]
    wide = [lane for lane in lanes if spread(lane.ratios) > MAX_SPREAD]
    if wide:
        worst = max(wide, key=lambda lane: spread(lane.ratios))
        warnings.append(
            f"{len(wide)} of {len(lanes)} figures vary by more than {MAX_SPREAD:.0%} between "
            f"{rounds} blocks (worst: {worst.name}, {spread(worst.ratios):.0%})"
        )
    return warnings


def _cover(natural: Lane, inputs: Inputs, seconds: float) -> list[str]:
    """Runs the remaining inputs untimed, so that exit rates cover all data. Returns warnings."""
    left = sorted(set(range(inputs.count)) - set(natural.numbers))
    affordable = int(seconds * 1000 / max(natural.expected_ms, 1e-3))
    for start in range(0, min(len(left), affordable), 256):
        part = left[start : start + 256]
        natural.records += natural.side.run(natural.case, part)["records"]
        natural.numbers += part
    if len(left) <= affordable:
        return []
    return [
        f"natural exits were run on {inputs.count - len(left) + affordable} of {inputs.count} "
        "inputs; a longer --time covers more"
    ]


def _few_rows(natural: Lane) -> list[str]:
    """A warning if the rates and accuracies come from too few rows."""
    rows = sum(len(exits) for exits, _ in _answers(natural).values())
    if rows >= FEW_ROWS:
        return []
    return [
        f"rate, accuracy and agreement are of {rows} row{'s' * (rows != 1)} only, and say nothing "
        f"about others: give at least {FEW_ROWS}"
    ]


def _times(lane: Lane, inputs: Inputs, mode: str) -> dict[str, Any]:
    times = {f"{name}_ms": value for name, value in percentiles(lane.times_ms).items()} | {
        "mean_ms": round(statistics.fmean(lane.times_ms), 4),
        "runs": len(lane.times_ms),
    }
    if mode == "latency":
        return times
    per_row = statistics.fmean(lane.times_ms) / inputs.batch
    return times | {"rows_per_s": round(1000 / per_row, 2)}


def _path(lane: Lane, inputs: Inputs, mode: str) -> dict[str, Any]:
    ratio, varies = statistics.median(lane.ratios), spread(lane.ratios)
    figures = {"ratio_to_unsplit": round(ratio, 4), "ratio_spread": round(varies, 4)}
    return _times(lane, inputs, mode) | figures


def _answers(lane: Lane) -> dict[int, tuple[list[int], list[int] | None]]:
    """Input number -> exits and labels of its rows."""
    pairs = zip(lane.numbers, lane.records, strict=True)
    return {number: (record["exits"], record["labels"]) for number, record in pairs}


def _exit_rates(natural: Lane, exits: int) -> list[float]:
    """Share of rows that each exit answers."""
    taken = Counter(number for own, _ in _answers(natural).values() for number in own)
    return [taken[number] / sum(taken.values()) for number in range(exits)]


def _accuracy(lane: Lane, inputs: Inputs, at: int | None = None) -> float | None:
    """Share of correct answers among the rows (only those that stopped at exit `at`, if given);
    None: no labels."""
    if inputs.labels is None:
        return None
    right = []
    for number, (exits, labels) in _answers(lane).items():
        if labels is None:
            return None
        truth = inputs.labels[number]
        chosen = [True] * len(exits) if at is None else [own == at for own in exits]
        right += [int(a == b) for a, b, c in zip(labels, truth, chosen, strict=True) if c]
    return round(statistics.fmean(right), 6) if right else None


def _agreement(lane: Lane, baseline: Lane) -> float | None:
    """Share of rows with the same prediction as the unsplit model."""
    reference = _answers(baseline)
    same = []
    for number, (_, labels) in _answers(lane).items():
        if number in reference:
            theirs = reference[number][1]
            if labels is None or theirs is None:
                return None
            same += [int(a == b) for a, b in zip(labels, theirs, strict=True)]
    return round(statistics.fmean(same), 6) if same else None


def _product(pair: tuple[float, float]) -> float:
    return pair[0] * pair[1]
