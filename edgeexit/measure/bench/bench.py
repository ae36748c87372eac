"""`bench`: a bundle against the same model unsplit, on this machine.

Both sides run in processes of their own, each in the thread setting in which it is fastest, in
alternating blocks (`edgeexit.measure.bench.paired`). Latency and throughput are separate modes: one
row at a time, or full batches. The result is one JSON object that also says what it was measured on
and why it should not be trusted, where that is so.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import MeasurementError, UsageError
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import (
    Lane,
    Side,
    alternate,
    best_setting,
    middle_mean,
    percentiles,
    spread,
    warm,
)
from edgeexit.measure.data import Batch, open_data, take_rows
from edgeexit.runtime.engines.onnxruntime import available_cores
from edgeexit.runtime.executor.launch_ahead import LaunchAhead

Mode = Literal["latency", "throughput"]
Progress = Callable[[str, int, int], None]

MAX_SPREAD = 0.10
MAX_OTHER_CORES = 0.10
MAX_STEAL = 0.01
"""Beyond these a result carries a warning."""


@dataclass(frozen=True)
class Inputs:
    """What both sides run: inputs (one row each, or full batches), and their labels."""

    path: str
    count: int
    batch: int
    labels: list[NDArray[np.int64]] | None
    name: str
    digest: str | None


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    mode: Mode = "latency",
    engine: str = "cpu",
    policy: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    batch: int = 32,
    seconds: float = 30.0,
    threads: Any = None,
    seed: int = 0,
    launch_ahead: LaunchAhead = "never",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a bundle.

    Args:
        bundle: The bundle.
        mode: ``latency``: one row at a time. ``throughput``: batches of `batch` rows.
        engine: As for `edgeexit.runtime.load`.
        policy: Path of a policy; None: the bundle's default.
        data: Real data for natural exits (see `edgeexit.measure.data`); None: the bundle's samples,
            and no natural exits.
        seconds: How long the timed part shall take; warm-up and the search for settings come on
            top.
        threads: A setting for both sides; None: search the best one for each.
        seed: Of the order of rows.
        launch_ahead: As for `edgeexit.runtime.load`.

    Returns:
        The object that ``edgeexit bench --json`` prints; docs and the README describe its fields.
    """
    if not 0 < seconds <= 86400:
        raise UsageError(
            f"--time {seconds:g}s is not a time to measure for", fix="Use 5s to an hour."
        )
    if batch < 1:
        raise UsageError(f"--batch {batch} is less than 1", fix="Use 1 or more.")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if opened.manifest.program != "forward":
        raise MeasurementError(
            f"{opened.path} is a language model",
            fix="Measure it with edgeexit.measure.bench.decode_bench.bench_decoder, "
            "as the command does.",
        )
    tell = progress or (lambda what, done, of: None)
    watch = environment.Watch()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeexit-bench-"))
        inputs = prepare_inputs(opened, data, 1 if mode == "latency" else batch, folder, seed)
        sides = _Sides(opened, inputs.path, engine, policy, threads, seconds, launch_ahead)
        tell("thread settings: unsplit", 0, 0)
        unsplit = stack.enter_context(_closing(sides.best("unsplit", "unsplit")))
        tell("thread settings: chain", 0, 0)
        chain = stack.enter_context(_closing(sides.best("chain", "all")))
        measure = _latency if mode == "latency" else _throughput
        result = measure(opened, inputs, unsplit, chain, data is not None, seconds, seed, tell)
        result["gpu"] = None
        if "gpu" in chain.cases:
            (result["gpu"],) = chain.run("gpu", [0])["records"]
        own_cpu_s = sides.cpu_s + unsplit.cpu_s + chain.cpu_s + sum(os.times()[:2])
        restless = [side.name for side in (unsplit, chain) if side.restless]
        facts = chain.facts
    machine = watch.stop(own_cpu_s)
    result["mode"] = mode
    result["unsplit"]["threads"] = sides.chosen["unsplit"]
    result["chain"] = {
        "threads": sides.chosen["chain"],
        "engine": {key: facts[key] for key in ("engine", "library", "version")},
    }
    result["policy"] = {"score": facts["score"], "thresholds": facts["thresholds"]}
    result["thread_search"] = sides.found
    result["data"] = {
        "name": inputs.name,
        "rows": inputs.count * inputs.batch,
        "batch": inputs.batch,
        "sha256": inputs.digest,
    }
    result["environment"] = {
        **environment.describe(),
        "bundle": {"name": opened.manifest.name, "digest": opened.digest},
        "engine": result["chain"]["engine"],
        "machine": machine,
    }
    result["warnings"] += doubts(machine, restless)
    return result


def prepare_inputs(
    bundle: Bundle, data: str | os.PathLike[str] | None, batch: int, folder: str, seed: int
) -> Inputs:
    """Reads the data, in batches of `batch` rows drawn at random, into a file for the workers.

    Rows of different shapes (texts) are batched in the order of the data. Rows that do not fill a
    batch are left out.
    """
    digest, labels = None, None
    if data is None:
        whole = _samples(bundle)
        rows = next(whole[t.name].shape[t.row_axis or 0] for t in _row_inputs(bundle))
        order = np.arange(rows) if batch == 1 else np.resize(np.arange(rows), batch)
        made = [_take(bundle, whole, part) for part in np.split(order, len(order) // batch)]
        name = "samples"
    else:
        opened = open_data(data, bundle)
        batches = list(opened.batches(batch))
        name, digest = opened.name, opened.digest
        if batch > 1:
            batches = _shuffled(bundle, batches, batch, seed)
        if not batches:
            raise MeasurementError(
                f"{name}: fewer rows than one batch of {batch}", fix="Use a smaller --batch."
            )
        made = [one.inputs for one in batches]
        labels = [one.labels for one in batches if one.labels is not None] or None
    path = Path(folder) / "inputs.npz"
    write_inputs(path, made)
    return Inputs(str(path), len(made), batch, labels, name, digest)


def _samples(bundle: Bundle) -> dict[str, NDArray]:
    if not bundle.manifest.samples:
        raise MeasurementError(
            f"{bundle.path}: the bundle has no samples to run", fix="Give real inputs with --data."
        )
    with np.load(bundle.file(bundle.manifest.samples[0]), allow_pickle=False) as file:
        return {t.name: file[f"input/{t.name}"] for t in bundle.manifest.inputs}


def _row_inputs(bundle: Bundle) -> list[Tensor]:
    return [tensor for tensor in bundle.manifest.inputs if tensor.row_axis is not None]


def _take(
    bundle: Bundle, inputs: Mapping[str, NDArray], rows: NDArray[np.int64]
) -> dict[str, NDArray]:
    axes = {tensor.name: tensor.row_axis for tensor in bundle.manifest.inputs}
    return {name: take_rows(value, rows, axes[name]) for name, value in inputs.items()}


def _shuffled(bundle: Bundle, batches: list[Batch], size: int, seed: int) -> list[Batch]:
    """The same rows in random batches; those of unlike shapes stay in the batches they are in."""
    shapes = {
        (t.name, *np.delete(one.inputs[t.name].shape, t.row_axis or 0))
        for one in batches
        for t in _row_inputs(bundle)
    }
    if len(shapes) > len(_row_inputs(bundle)):
        return [one for one in batches if one.rows == size]
    whole = dict(batches[0].inputs)
    for tensor in _row_inputs(bundle):
        parts = [one.inputs[tensor.name] for one in batches]
        whole[tensor.name] = np.concatenate(parts, axis=tensor.row_axis or 0)
    rows = sum(one.rows for one in batches)
    labels = None
    if batches[0].labels is not None:
        labels = np.concatenate([one.labels for one in batches if one.labels is not None])
    order = np.random.default_rng(seed).permutation(rows)
    made = []
    for start in range(0, rows - size + 1, size):
        part = order[start : start + size]
        chosen = None if labels is None else labels[part]
        made.append(Batch(_take(bundle, whole, part), chosen, size))
    return made


class _Sides:
    """Opens the two sides, each in the best thread setting for it."""

    def __init__(
        self,
        bundle: Bundle,
        inputs: str,
        engine: str,
        policy: str | os.PathLike[str] | None,
        threads: Any,
        seconds: float,
        launch_ahead: LaunchAhead,
    ) -> None:
        self._launch_ahead = launch_ahead
        self._arguments = {"bundle": str(bundle.path), "inputs": inputs, "engine": engine}
        self._policy = None if policy is None else os.fspath(policy)
        self._settings = settings(engine, available_cores()) if threads is None else [threads]
        self._seconds = min(5.0, seconds / 6)
        self.chosen: dict[str, str] = {}
        self.found: dict[str, dict[str, float]] = {}
        self.cpu_s = 0.0

    def best(self, kind: str, case: str) -> Side:
        arguments = dict(self._arguments)
        if kind == "chain":
            arguments["launch_ahead"] = self._launch_ahead
            if self._policy is not None:
                arguments["policy"] = self._policy
        opened: list[Side] = []

        def make(setting: Any) -> Side:
            subject = f"edgeexit.measure.bench.cases:{kind}"
            side = Side(subject, arguments | {"threads": setting}, name=kind)
            opened.append(side)
            return side

        side, best, relative = best_setting(make, case, self._settings, seconds=self._seconds)
        self.chosen[kind], self.found[kind] = str(best), relative
        self.cpu_s += sum(one.cpu_s for one in opened if one is not side)
        return side


def _latency(
    bundle: Bundle,
    inputs: Inputs,
    unsplit: Side,
    chain: Side,
    real: bool,
    seconds: float,
    seed: int,
    tell: Progress,
) -> dict[str, Any]:
    names = [leave.name for leave in bundle.exits()]
    baseline = Lane("unsplit", unsplit, "unsplit")
    full = Lane("all", chain, "all")
    paths = [Lane(f"path:{name}", chain, f"path:{name}") for name in names]
    natural = Lane("natural", chain, "natural")
    lanes = [full, *paths, *([natural] if real else [])]
    tell("warm-up", 0, 0)
    warm([baseline, *lanes], seconds=min(5.0, seconds / 6))
    rounds = alternate(
        baseline,
        lanes,
        seconds=seconds,
        seed=seed,
        whole=natural,
        tick=lambda done: tell("blocks", round(100 * done), 100),
    )
    warnings = _unsettled([baseline, *lanes], rounds)
    result: dict[str, Any] = {
        "unsplit": _times(baseline) | {"accuracy": _accuracy(baseline, inputs)},
        "split_tax": round(statistics.median(full.ratios), 4),
        "split_tax_spread": round(spread(full.ratios), 4),
        "exits": [],
        "natural": None,
        "warnings": warnings,
    }
    if real:
        warnings += _cover(natural, inputs, seconds)
    answers = _answers(natural) if real else {}
    counts = Counter(exits[0] for exits, _ in answers.values())
    for number, lane in enumerate(paths):
        result["exits"].append(
            {"name": names[number]}
            | _times(lane)
            | {
                "ratio_to_unsplit": round(statistics.median(lane.ratios), 4),
                "rate": round(counts[number] / len(answers), 6) if real else None,
                "accuracy": _accuracy(natural, inputs, at=number) if real else None,
            }
        )
    if real:
        rates = [counts[number] / len(answers) for number in range(len(paths))]
        means = [statistics.fmean(lane.times_ms) for lane in paths]
        ratios = [statistics.median(lane.ratios) for lane in paths]
        result["natural"] = _times(natural) | {
            "ratio_to_unsplit": round(natural_ratio(natural, rates), 4),
            "mean_ratio_to_unsplit": round(middle_mean(natural.mean_ratios), 4),
            "accuracy": _accuracy(natural, inputs),
            "agreement": _agreement(natural, baseline),
            "rows": len(answers),
            "expected_mean_ms": round(sum(map(_product, zip(rates, means, strict=True))), 4),
            "expected_ratio": round(sum(map(_product, zip(rates, ratios, strict=True))), 4),
        }
    return result


def _throughput(
    bundle: Bundle,
    inputs: Inputs,
    unsplit: Side,
    chain: Side,
    real: bool,
    seconds: float,
    seed: int,
    tell: Progress,
) -> dict[str, Any]:
    names = [leave.name for leave in bundle.exits()]
    baseline = Lane("unsplit", unsplit, "unsplit")
    full, timed = Lane("all", chain, "all"), Lane("segments", chain, "segments")
    natural = Lane("natural", chain, "natural")
    lanes = [full, timed, *([natural] if real else [])]
    tell("warm-up", 0, 0)
    warm([baseline, *lanes], seconds=min(5.0, seconds / 6))
    rounds = alternate(
        baseline,
        lanes,
        seconds=seconds,
        block_ms=200.0,
        min_block_runs=1,
        min_runs=1,
        seed=seed,
        whole=natural,
        tick=lambda done: tell("blocks", round(100 * done), 100),
    )
    warnings = _unsettled([baseline, *lanes], rounds)
    result: dict[str, Any] = {
        "unsplit": _rates(baseline, inputs.batch) | {"accuracy": _accuracy(baseline, inputs)},
        "split_tax": round(statistics.median(full.ratios), 4),
        "split_tax_spread": round(spread(full.ratios), 4),
        "exits": [],
        "natural": None,
        "warnings": warnings,
    }
    counts: Counter[int] = Counter()
    if real:
        warnings += _cover(natural, inputs, seconds)
        answers = _answers(natural)
        counts.update(number for exits, _ in answers.values() for number in exits)
        result["natural"] = _rates(natural, inputs.batch) | {
            "ratio_to_unsplit": round(middle_mean(natural.mean_ratios), 4),
            "accuracy": _accuracy(natural, inputs),
            "agreement": _agreement(natural, baseline),
            "rows": sum(counts.values()),
            "of_ideal": round(share_of_ideal(natural, timed), 4),
        }
    rows = sum(counts.values())
    for number, name in enumerate(names):
        result["exits"].append(
            {
                "name": name,
                "rate": round(counts[number] / rows, 6) if real else None,
                "accuracy": _accuracy(natural, inputs, at=number) if real else None,
            }
        )
    return result


def natural_ratio(natural: Lane, rates: Sequence[float]) -> float:
    """Expected time of a row relative to unsplit: per exit the median, weighted by the exit's rate.

    A median over all rows would tell the time of the commonest exit only, and a mean would tell
    what else the machine did. Exits that no timed row took (`_cover` ran those) are left out.
    """
    taken: dict[int, list[float]] = {}
    for record, relative in zip(natural.records, natural.relative, strict=False):
        taken.setdefault(record["exits"][0], []).append(relative)
    weight = sum(rates[number] for number in taken)
    whole = sum(rates[number] * statistics.median(times) for number, times in taken.items())
    return whole / weight


def share_of_ideal(natural: Lane, timed: Lane) -> float:
    """Throughput with natural exits ÷ the ideal: each row charged only for its segments.

    A segment's charge per row is its time for a whole batch ÷ the batch; both lanes' times are
    taken relative to the baseline blocks they are paired with.
    """
    segments = np.asarray(timed.records)
    whole = segments.sum(1)
    shares = (segments / whole[:, None]).mean(0)  # of a full pass, per segment
    depth = np.concatenate([record["exits"] for record in natural.records])
    reached = np.asarray([(depth >= number).mean() for number in range(len(shares))])
    ideal = float((shares * reached).sum()) * middle_mean(timed.mean_ratios)
    return ideal / middle_mean(natural.mean_ratios)


def doubts(machine: dict[str, Any], restless: Sequence[str]) -> list[str]:
    """Warnings that follow from what else the machine did."""
    found = []
    other, steal = machine["other_load_cores"], machine["steal_share"]
    if other is not None and other > MAX_OTHER_CORES:
        found.append(
            f"other processes kept {other:.2f} cores busy; close them and measure "
            "again for absolute times"
        )
    if steal is not None and steal > MAX_STEAL:
        found.append(f"the host gave {steal:.1%} of this machine's time to other guests")
    found += [f"{name}: its threads went on spinning between blocks" for name in restless]
    return found


def _unsettled(lanes: Sequence[Lane], rounds: int) -> list[str]:
    found = [
        f"{lane.name}: its median had not settled when warm-up ended"
        for lane in lanes
        if not lane.settled
    ]
    wide = [lane for lane in lanes if spread(lane.ratios) > MAX_SPREAD]
    if wide:
        worst = max(wide, key=lambda lane: spread(lane.ratios))
        found.append(
            f"{len(wide)} of {len(lanes)} figures vary by more than {MAX_SPREAD:.0%} between "
            f"{rounds} blocks (worst: {worst.name}, {spread(worst.ratios):.0%})"
        )
    return found


def _cover(natural: Lane, inputs: Inputs, seconds: float) -> list[str]:
    """Runs the inputs that no block has reached yet, untimed, so that rates are those of the
    data."""
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


def _times(lane: Lane) -> dict[str, Any]:
    found = percentiles(lane.times_ms)
    return {f"{name}_ms": value for name, value in found.items()} | {
        "mean_ms": round(statistics.fmean(lane.times_ms), 4),
        "runs": len(lane.times_ms),
    }


def _rates(lane: Lane, batch: int) -> dict[str, Any]:
    per_row = statistics.fmean(lane.times_ms) / batch
    return _times(lane) | {"rows_per_s": round(1000 / per_row, 2)}


def _answers(lane: Lane) -> dict[int, tuple[list[int], list[int] | None]]:
    """Input number -> exits and labels of its rows."""
    pairs = zip(lane.numbers, lane.records, strict=True)
    return {number: (record["exits"], record["labels"]) for number, record in pairs}


def _accuracy(lane: Lane, inputs: Inputs, at: int | None = None) -> float | None:
    """Share of right answers among the rows run (those that left at exit `at`); None: no labels."""
    if inputs.labels is None:
        return None
    right = []
    for number, (exits, labels) in _answers(lane).items():
        if labels is None:
            return None
        truth = inputs.labels[number]
        chosen = [True] * len(exits) if at is None else [one == at for one in exits]
        right += [int(a == b) for a, b, c in zip(labels, truth, chosen, strict=True) if c]
    return round(statistics.fmean(right), 6) if right else None


def _agreement(lane: Lane, baseline: Lane) -> float | None:
    """Share of rows with the unsplit model's prediction."""
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


@contextlib.contextmanager
def _closing(side: Side) -> Iterator[Side]:
    with side:
        yield side


__all__ = ["bench", "doubts", "prepare_inputs", "share_of_ideal"]
