"""Measures the gain of exits on handwriting: the digits example, over random splits.

    python benchmarks/digits.py              # the trained checkpoint of examples/digits
    python benchmarks/digits.py --quick      # three splits

The held-out digits (the example's validation and test images) are split at random twenty times.
Each time a threshold is calibrated on one part, and the model runs row by row over the other part,
in blocks that alternate with the same model unsplit. For comparison: truncated models, random exits
and an oracle. benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import HERE, ROOT, SCRATCH, save, say, verdict

from edgeexit import runtime
from edgeexit.bundle.policy import write_policy
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Lane, Side, alternate, best_setting, spread, warm
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.data import load_function, open_data
from edgeexit.measure.trace import Trace, record, replay
from edgeexit.runtime.engines.onnxruntime import available_cores

EXAMPLE = ROOT / "examples" / "digits"
AIMED_DROP = 0.0025
"""Target of the calibration on its part of the digits: half of the 0.5 points that the other part
may lose, because a threshold fits the rows best on which it was chosen."""

VALIDATION_ROWS = 400


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=EXAMPLE / "checkpoint")
    parser.add_argument("--truncated", type=Path, default=EXAMPLE / "truncated")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--score", default="max_prob")
    parser.add_argument("--risk", default="performance", choices=["performance", "consistency"])
    parser.add_argument("--per-exit", action="store_true", help="a separate threshold per exit")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    splits = 3 if given.quick else given.splits
    watch = environment.Watch()
    folder = SCRATCH / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    bundle = export(given.checkpoint, folder / "bundle")
    rows, labels = held_out()
    np.savez(folder / "rows.npz", **rows, label=labels)
    with runtime.load(bundle) as model:
        trace = record(model, open_data(folder / "rows.npz", bundle), 1)
    parts = [split(len(labels), seed) for seed in range(splits)]
    chosen = []
    for number, (validation, _) in enumerate(parts):
        policy, _, _ = calibrate(
            take(trace, validation),
            max_risk=AIMED_DROP,
            score=given.score,
            risk=given.risk,
            per_exit=given.per_exit,
        )
        path = folder / f"policy-{number}.json"
        write_policy(policy, path)
        chosen.append((policy, str(path)))
    inputs = folder / "inputs.npz"
    write_inputs(inputs, [{k: v[n : n + 1] for k, v in rows.items()} for n in range(len(labels))])
    measured = run(bundle, inputs, [path for _, path in chosen], parts, quick=given.quick)
    found = [
        figures(take(trace, test), policy, measured["costs"], measured["natural"][number])
        for number, ((policy, _), (_, test)) in enumerate(zip(chosen, parts, strict=True))
    ]
    result: dict[str, Any] = {
        "splits": found,
        "costs_to_unsplit": measured["costs"],
        "threads": measured["threads"],
        "calibration": {
            "max_risk": AIMED_DROP,
            "risk": given.risk,
            "score": given.score,
            "per_exit": given.per_exit,
        },
        "bundle_digest": bundle.digest,
        "summary": summary(found),
    }
    result["truncated"] = truncated(given.truncated, folder, bundle, rows, labels, parts, measured)
    result["verdicts"] = verdict(
        [
            *(
                (f"natural ÷ unsplit, {how}", result["summary"][key]["mean"], "<=", 0.4, 0.4)
                for how, key in (
                    ("of mean times", "mean_ratio_to_unsplit"),
                    ("of medians per exit", "ratio_to_unsplit"),
                )
            ),
            (
                "accuracy drop in points, mean",
                100 * result["summary"]["accuracy_drop"]["mean"],
                "<=",
                0.5,
                0.5,
            ),
        ]
    )
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")  # it would include our children
    save("digits", result, quick=given.quick)


def export(checkpoint: Path, bundle: Path) -> Bundle:
    """Exports a checkpoint in a child process, so that this process does not import torch."""
    code = (
        "import sys; from edgeexit.export import export; "
        "from edgeexit.export.pretrained import from_pretrained; "
        "model = from_pretrained(sys.argv[1]); "
        "export(model.split_model(), sys.argv[2], overwrite=True)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(bundle)], check=True, capture_output=True
    )
    return open_bundle(bundle)


def held_out() -> tuple[dict[str, NDArray], NDArray[np.int64]]:
    """The example's validation images, followed by its test images."""
    splits = (f"{EXAMPLE / 'data.py'}:{name}" for name in ("validation", "test"))
    halves = [load_function(split, "data")() for split in splits]
    rows = {name: np.concatenate([half[0][name] for half in halves]) for name in halves[0][0]}
    return rows, np.concatenate([half[1] for half in halves])


def split(rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of the validation and test parts. Seed 0 is the example's split."""
    order = np.arange(rows) if seed == 0 else np.random.default_rng(seed).permutation(rows)
    return order[:VALIDATION_ROWS], order[VALIDATION_ROWS:]


def take(trace: Trace, rows: NDArray[np.int64]) -> Trace:
    """Selected rows of a trace that was recorded row by row."""
    assert trace.batch_size == 1 and trace.labels is not None
    return dataclasses.replace(
        trace,
        scores={name: score[:, rows] for name, score in trace.scores.items()},
        predictions=trace.predictions[:, rows],
        labels=trace.labels[rows],
        batch_rows=trace.batch_rows[rows],
        times_ms=trace.times_ms[rows],
    )


def run(
    bundle: Bundle,
    inputs: Path,
    policies: list[str],
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    *,
    quick: bool,
) -> dict[str, Any]:
    """Measures natural exits over every split's test rows, and the time of every exit's path."""
    arguments = {"bundle": str(bundle.path), "inputs": str(inputs)}
    tried = ["blocking"] if quick else settings("cpu", available_cores())
    with contextlib.ExitStack() as stack:

        def best(subject: str, more: dict[str, Any], case: str) -> tuple[Side, Any]:
            def make(setting: Any) -> Side:
                given = arguments | more | {"threads": setting}
                return Side(subject, given, folder=str(HERE), name=subject)

            side, setting, _ = best_setting(make, case, tried, seconds=1.0)
            return stack.enter_context(side), setting

        unsplit, unsplit_threads = best("edgeexit.measure.bench.cases:unsplit", {}, "unsplit")
        chain, chain_threads = best("subjects:policies", {"policies": policies}, "all")
        baseline = Lane("unsplit", unsplit, "unsplit")
        names = [exit_.name for exit_ in bundle.manifest.last_chain.stops]
        paths = [Lane(name, chain, f"path:{name}") for name in names]
        warm([baseline, *paths], seconds=1.0)
        alternate(baseline, paths, seconds=2 if quick else 20)
        natural = [natural_blocks(chain, baseline, n, test) for n, (_, test) in enumerate(parts)]
    return {
        "costs": [round(statistics.median(lane.ratios), 4) for lane in paths],
        "cost_spreads": [round(spread(lane.ratios), 4) for lane in paths],
        "natural": natural,
        "threads": {"unsplit": str(unsplit_threads), "chain": str(chain_threads)},
    }


def natural_blocks(
    chain: Side, baseline: Lane, number: int, test: NDArray[np.int64], block: int = 40
) -> dict[str, Any]:
    """Runs every test row once, in random order, in blocks that alternate with unsplit on the same
    rows."""
    order = np.random.default_rng(number).permutation(test).tolist()
    ours: dict[int, float] = {}
    relative: dict[int, float] = {}
    theirs: list[float] = []
    exits: dict[int, int] = {}
    for count, start in enumerate(range(0, len(order), block)):
        rows = order[start : start + block]
        if count % 2:
            made = chain.run(f"policy:{number}", rows)
            reference = baseline.side.run(baseline.case, rows)
        else:
            reference = baseline.side.run(baseline.case, rows)
            made = chain.run(f"policy:{number}", rows)
        middle = statistics.median(reference["times_ms"])
        theirs += reference["times_ms"]
        for row, time_ms, answer in zip(rows, made["times_ms"], made["records"], strict=True):
            ours[row], relative[row], exits[row] = time_ms, time_ms / middle, answer["exits"][0]
    taken: dict[int, list[float]] = {}
    for row, value in relative.items():
        taken.setdefault(exits[row], []).append(value)
    ratio = sum(len(times) * statistics.median(times) for times in taken.values()) / len(order)
    return {
        "ratio_to_unsplit": ratio,
        "mean_ratio_to_unsplit": statistics.fmean(ours.values()) / statistics.fmean(theirs),
        "exits": [exits[int(row)] for row in test],
    }


def figures(
    test: Trace, policy: runtime.Policy, costs: list[float], natural: dict[str, Any]
) -> dict[str, Any]:
    """Figures of one split: measured for natural exits, computed for random exits and the
    oracle."""
    taken = np.asarray(natural["exits"])
    expected = replay(test, policy)
    right = test.predictions == test.labels
    rates = np.bincount(taken, minlength=len(costs)) / len(taken)
    rows = np.arange(len(taken))
    earliest = np.where(right.any(0), right.argmax(0), len(costs) - 1)
    last = float(right[-1].mean())
    return {
        "threshold": policy.rules[test.chain].thresholds,
        "ratio_to_unsplit": round(natural["ratio_to_unsplit"], 4),
        "mean_ratio_to_unsplit": round(natural["mean_ratio_to_unsplit"], 4),
        "expected_ratio": round(float(rates @ np.asarray(costs)), 4),
        "accuracy": round(float(right[taken, rows].mean()), 5),
        "last_exit_accuracy": round(last, 5),
        "accuracy_drop": round(last - float(right[taken, rows].mean()), 5),
        "mean_depth": round(float(taken.mean()) + 1, 4),
        "rates": [round(float(rate), 5) for rate in rates],
        "as_replayed": bool((taken == expected).all()),
        "random_exits_accuracy": round(float(rates @ right.mean(1)), 5),
        "oracle": {
            "accuracy": round(float(right[earliest, rows].mean()), 5),
            "ratio_to_unsplit": round(float(np.asarray(costs)[earliest].mean()), 4),
            "mean_depth": round(float(earliest.mean()) + 1, 4),
        },
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and range of each figure over the splits."""

    def over(values: list[float]) -> dict[str, float]:
        return {
            "mean": round(statistics.fmean(values), 5),
            "deviation": round(statistics.stdev(values), 5),
            "min": min(values),
            "max": max(values),
        }

    keys = ["ratio_to_unsplit", "mean_ratio_to_unsplit", "expected_ratio", "accuracy"]
    keys += ["last_exit_accuracy", "accuracy_drop", "mean_depth", "random_exits_accuracy"]
    made: dict[str, Any] = {key: over([one[key] for one in found]) for key in keys}
    for key in ("accuracy", "ratio_to_unsplit"):
        made[f"oracle_{key}"] = over([one["oracle"][key] for one in found])
    return made


def truncated(
    folder: Path,
    scratch: Path,
    bundle: Bundle,
    rows: dict[str, NDArray],
    labels: NDArray[np.int64],
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    measured: dict[str, Any],
) -> list[dict[str, Any]]:
    """Truncated models that were trained the same way: accuracy over the splits, and time."""
    found = []
    if not folder.is_dir():
        say(f"no {folder.name}/ next to the checkpoint: nothing to compare with")
        return found
    depths = [path for path in folder.iterdir() if path.name.isdigit()]
    for checkpoint in sorted(depths, key=lambda path: int(path.name)):
        small = export(checkpoint, scratch / f"truncated-{checkpoint.name}")
        with runtime.load(small, unsplit=True) as model:
            right = model(rows).outputs["logits"].argmax(-1) == labels
        shares = [float(right[test].mean()) for _, test in parts]
        threads = measured["threads"]["unsplit"]
        threads = int(threads) if threads.isdigit() else threads
        common = {"inputs": str(scratch / "inputs.npz"), "threads": threads}
        subject = "edgeexit.measure.bench.cases:unsplit"
        with (
            Side(subject, common | {"bundle": str(bundle.path)}) as whole,
            Side(subject, common | {"bundle": str(small.path)}) as cut,
        ):
            lanes = Lane("unsplit", whole, "unsplit"), Lane("cut", cut, "unsplit")
            warm(lanes, seconds=1.0)
            alternate(lanes[0], [lanes[1]], seconds=2)
        found.append(
            {
                "layers": int(checkpoint.name),
                "accuracy_mean": round(statistics.fmean(shares), 5),
                "accuracy_deviation": round(statistics.stdev(shares), 5),
                "ratio_to_unsplit": round(statistics.median(lanes[1].ratios), 4),
            }
        )
        say(f"  truncated {found[-1]}")
    return found


if __name__ == "__main__":
    main()
