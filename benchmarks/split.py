"""Measures the cost and gain of splitting: the chain against other ways to run the same early-exit
model.

    python benchmarks/split.py                 # both shapes
    python benchmarks/split.py --shape small
    python benchmarks/split.py --quick         # tiny shapes: does the script run?

Every figure is a median of ratios of neighbouring blocks. Each side has its own process and thread
setting (edgeexit/measure/bench/paired.py). benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import graphs
import models
import numpy as np
from results import HERE, SCRATCH, save, say, verdict

from edgeexit import runtime
from edgeexit.bundle.policy import policy_for, write_policy
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.inputs import prepare_rows
from edgeexit.measure.bench.paired import Lane, Side, alternate, best_setting, spread, warm
from edgeexit.measure.bench.rows import share_of_ideal
from edgeexit.runtime.engines.onnxruntime import available_cores


@dataclass(frozen=True)
class Effort:
    """Durations of the measurements."""

    seconds: float
    launches: int
    pair_rounds: int
    search: bool = True


EFFORTS = {
    "large": Effort(seconds=12, launches=3, pair_rounds=5),
    "small": Effort(seconds=5, launches=7, pair_rounds=7),
    "quick": Effort(seconds=1, launches=1, pair_rounds=5, search=False),
}


def main() -> None:
    """Measures the requested shapes and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", choices=["large", "small"], action="append")
    parser.add_argument("--quick", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--keep", action="store_true", help="use the bundles of the last run")
    given = parser.parse_args()
    watch = environment.Watch()
    chosen = given.shape or ["small", "large"]
    result: dict[str, Any] = {"imports": import_time()}
    say(f"import edgeexit.runtime: {result['imports']}")
    for name in chosen:
        shape = (models.QUICK if given.quick else models.SHAPES)[name]
        effort = EFFORTS["quick" if given.quick else name]
        result[name] = measure(shape, effort, keep=given.keep)
    result["verdicts"] = verdicts(result)
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")  # it would include our children
    save("split" if len(chosen) == 2 else f"split-{chosen[0]}", result, quick=given.quick)


def import_time() -> dict[str, Any]:
    """Seconds of ``import edgeexit.runtime`` in a new interpreter, and heavy modules that it
    imports."""
    code = (
        "import time; t = time.perf_counter(); import edgeexit.runtime; "
        "t = time.perf_counter() - t; "
        "import sys; print(t, [m for m in ('torch', 'transformers', 'onnx', 'onnxruntime') "
        "if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(7)
    ]
    heavy = runs[0].stdout.strip().partition(" ")[2]
    times = [float(run.stdout.split()[0]) for run in runs]
    return {"seconds": round(statistics.median(times), 4), "heavy_modules": heavy}


def measure(shape: models.Shape, effort: Effort, *, keep: bool) -> dict[str, Any]:
    """Measures all figures of one shape."""
    folder = SCRATCH / shape.name
    found: dict[str, Any] = {"shape": asdict(shape)}
    say(f"{shape.name}: checkpoint, export, graphs")
    found["export"] = prepare(shape, folder, keep=keep)
    bundle = open_bundle(folder / "bundle")
    found["bundle_digest"] = bundle.digest
    inputs = folder / "inputs.npz"
    write_inputs(inputs, [tokens(shape, 1, seed) for seed in range(16)])
    arguments = {"bundle": str(bundle.path), "inputs": str(inputs)}
    built = arguments | {"folder": str(folder / "graphs")}
    search = _Search(effort)
    subjects = "edgeexit.measure.bench.cases"
    options = settings("cpu", available_cores()) if effort.search else ["blocking"]
    chain = search.best("chain", f"{subjects}:chain", arguments, "all", options)
    direct = search.best("direct", f"{subjects}:unsplit", arguments, "unsplit", options)
    search.chosen["merged"] = direct.threads  # found for one large graph, so good for another
    found |= split_tax(arguments, built, search.chosen, effort)
    say(f"  split tax {found['split_tax']} against {found['baseline']}")
    last = f"path:exit_{shape.layers}"
    forced = Opening("chain", "subjects:forced_exits", arguments, chain.threads)
    first = search.best("first", "subjects:first", built, "forced:exit_1", [direct.threads])
    found["against_truncated"] = pairs(forced, first, "forced", shape, effort)
    say(f"  against truncated: {[one['ratio'] for one in found['against_truncated']]}")
    near = [direct.threads, *(o for o in options[:2] if o != direct.threads)]
    torch = arguments | {"checkpoint": str(folder / "checkpoint")}
    for name, given, tried in (
        ("nested", built, near),
        ("naive", arguments, options),
        ("eager", torch, eager_settings(effort.search)),
    ):
        other = search.best(name, f"subjects:{name}", given, last, tried)
        found[f"against_{name}"] = pairs(chain, other, "path", shape, effort)
        say(f"  against {name}: {[one['ratio'] for one in found[f'against_{name}']]}")
    found["threads"] = {name: str(setting) for name, setting in search.chosen.items()}
    found["thread_search"] = search.searched
    say("  batches of 32")
    found["batch_32"] = batches(shape, bundle, folder, chain.threads, effort)
    return found


def prepare(shape: models.Shape, folder: Path, *, keep: bool) -> dict[str, Any]:
    """Creates the checkpoint, the bundle and the other graphs. Returns time and memory of the
    export."""
    import json

    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    facts = folder / "export.json"
    if keep and facts.is_file():
        return json.loads(facts.read_text())
    script = [sys.executable, str(HERE / "models.py")]
    subprocess.run(
        [*script, "checkpoint", str(checkpoint), "--shape", models.as_json(shape)],
        check=True,
        capture_output=True,
    )
    made = subprocess.run(
        [*script, "export", str(checkpoint), "--bundle", str(bundle)],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(made.stdout.splitlines()[-1])
    found["bundle_of_weights"] = round(found["bundle_bytes"] / found["weights_bytes"], 4)
    opened = open_bundle(bundle)
    graphs.build(opened, folder / "graphs")
    facts.write_text(json.dumps(found))
    return found


def tokens(shape: models.Shape, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Random token ids ``[rows, tokens]``, no padding."""
    size = (rows, shape.tokens)
    ids = np.random.default_rng(seed).integers(0, shape.vocabulary, size)
    return {
        "input_ids": ids,
        "attention_mask": np.ones(size, np.int64),
        "token_type_ids": np.zeros(size, np.int64),
    }


@dataclass(frozen=True)
class Opening:
    """How to open a side: its subject, the subject's arguments, and the thread setting."""

    name: str
    subject: str
    arguments: dict[str, Any]
    threads: Any

    def __call__(self) -> Side:
        given = self.arguments | {"threads": self.threads}
        return Side(self.subject, given, folder=str(HERE), name=self.name)


class _Search:
    """Finds the best thread setting of each side, and keeps the times of the others."""

    def __init__(self, effort: Effort) -> None:
        self._seconds = min(2.0, effort.seconds / 4)
        self.chosen: dict[str, Any] = {}
        self.searched: dict[str, dict[str, float]] = {}

    def best(
        self, name: str, subject: str, arguments: dict[str, Any], case: str, tried: list[Any]
    ) -> Opening:
        def make(setting: Any) -> Side:
            return Opening(name, subject, arguments, setting)()

        best, relative = tried[0], {str(tried[0]): 1.0}
        if len(tried) > 1:
            side, best, relative = best_setting(make, case, tried, seconds=self._seconds)
            side.close()
        self.chosen[name], self.searched[name] = best, relative
        say(f"  {name}: threads {best}, of {relative}")
        return Opening(name, subject, arguments, best)


def eager_settings(search: bool) -> list[list[Any]]:
    """Thread counts and attention implementations to try with PyTorch."""
    counts = sorted({1, available_cores()}, reverse=True)
    if not search:
        return [[counts[0], "sdpa"]]
    return [[count, attention] for count in counts for attention in ("sdpa", "eager")]


def split_tax(
    arguments: dict[str, Any], built: dict[str, Any], chosen: dict[str, Any], effort: Effort
) -> dict[str, Any]:
    """Split tax: all scores are evaluated and no row stops, against both unsplit graphs; the larger
    tax is used.

    Memory addresses differ between processes and change a ratio by some percent. So the three sides
    are started several times, and the figure is the median over these launches.
    """
    launches = []
    for _ in range(effort.launches):
        with contextlib.ExitStack() as stack:
            chain, direct, merged = (
                stack.enter_context(
                    Side(subject, given | {"threads": chosen[side]}, folder=str(HERE), name=side)
                )
                for side, subject, given in (
                    ("chain", "edgeexit.measure.bench.cases:chain", arguments),
                    ("direct", "edgeexit.measure.bench.cases:unsplit", arguments),
                    ("merged", "subjects:graph", built | {"name": "merged"}),
                )
            )
            found: dict[str, Any] = {}
            base, candidate = Lane("direct", direct, "unsplit"), Lane("merged", merged, "unsplit")
            warm([base, candidate], seconds=1.0)
            alternate(base, [candidate], seconds=effort.seconds)
            found["merged_to_direct"] = round(statistics.median(candidate.ratios), 4)
            for name, side in (("direct", direct), ("merged", merged)):
                lane, full = Lane(name, side, "unsplit"), Lane("all", chain, "all")
                warm([lane, full], seconds=1.0)
                alternate(lane, [full], seconds=effort.seconds)
                found[name] = {
                    "split_tax": round(statistics.median(full.ratios), 4),
                    "spread": round(spread(full.ratios), 4),
                    "blocks": len(full.ratios),
                    "chain_p50_ms": round(statistics.median(full.times_ms), 4),
                    "unsplit_p50_ms": round(statistics.median(lane.times_ms), 4),
                }
            launches.append(found)
            say(f"  launch: {[(name, found[name]['split_tax']) for name in ('direct', 'merged')]}")
    taxes = {
        name: round(statistics.median(one[name]["split_tax"] for one in launches), 4)
        for name in ("direct", "merged")
    }
    baseline = max(taxes, key=lambda name: taxes[name])
    return {
        "baseline": baseline,
        "merged_to_direct": statistics.median(one["merged_to_direct"] for one in launches),
        "split_tax": taxes[baseline],
        "split_tax_against": taxes,
        "split_tax_launches": launches,
    }


def pairs(
    chain: Opening, other: Opening, kind: str, shape: models.Shape, effort: Effort
) -> list[dict[str, Any]]:
    """Compares the chain with another side, exit by exit: the chain's time ÷ the other's.

    As for the split tax, both sides are started several times, and a figure is the median over
    these launches.
    """
    measured: dict[str, list[dict[str, float]]] = {}
    for launch in range(effort.launches):
        with chain() as ours, other() as theirs:
            for layer in range(1, shape.layers + 1):
                case = f"{kind}:exit_{layer}"
                if case in theirs.cases:
                    one = _pair(ours, theirs, case, effort, seed=launch * 100 + layer)
                    measured.setdefault(f"exit_{layer}", []).append(one)
    return [
        {"exit": name}
        | {key: round(statistics.median(one[key] for one in launches), 4) for key in launches[0]}
        | {"launches": [one["ratio"] for one in launches]}
        for name, launches in measured.items()
    ]


def _pair(ours: Side, theirs: Side, case: str, effort: Effort, seed: int) -> dict[str, float]:
    candidate, base = Lane("chain", ours, case), Lane("other", theirs, case)
    warm([candidate, base], seconds=0.2)
    block_ms = 40.0
    alternate(
        base,
        [candidate],
        seconds=effort.pair_rounds * (2 * block_ms + 15) / 1000,
        block_ms=block_ms,
        min_block_runs=2,
        min_runs=2 * effort.pair_rounds,
        seed=seed,
    )
    return {
        "ratio": round(statistics.median(candidate.ratios), 4),
        "spread": round(spread(candidate.ratios), 4),
        "chain_p50_ms": round(statistics.median(candidate.times_ms), 4),
        "other_p50_ms": round(statistics.median(base.times_ms), 4),
    }


def batches(
    shape: models.Shape, bundle: Bundle, folder: Path, threads: Any, effort: Effort
) -> dict[str, Any]:
    """Batches of 32 whose rows stop at all exits equally often: throughput against the ideal."""
    rows, size = 128, 32
    data = folder / "rows.npz"
    np.savez(data, **tokens(shape, rows, 7))
    thresholds = even_thresholds(bundle, tokens(shape, rows, 7))
    policy = folder / "policy.json"
    write_policy(policy_for(runtime.Rule(thresholds=thresholds), bundle), policy)
    inputs = prepare_rows(bundle, str(data), size, str(folder), 0)
    arguments = {"bundle": str(bundle.path), "inputs": inputs.path, "policy": str(policy)}
    with Side("edgeexit.measure.bench.cases:chain", arguments | {"threads": threads}) as chain:
        whole, natural = Lane("segments", chain, "segments"), Lane("natural", chain, "natural")
        for lane in (whole, natural):
            block = lane.side.run(lane.case, range(inputs.count), lead=False)
            lane.expected_ms = statistics.median(block["times_ms"])
        alternate(
            whole,
            [natural],
            seconds=effort.seconds / 2,
            block_ms=200.0,
            min_block_runs=1,
            min_runs=1,
            whole=natural,
        )
    whole.mean_ratios = [1.0]
    exits = np.concatenate([record["exits"] for record in natural.records])
    return {
        "of_ideal": round(share_of_ideal(natural, whole), 4),
        "ratio_to_all_segments": round(statistics.median(natural.ratios), 4),
        "rates": [round(float((exits == n).mean()), 4) for n in range(shape.layers)],
        "blocks": len(natural.ratios),
    }


def even_thresholds(bundle: Bundle, rows: dict[str, np.ndarray]) -> list[float]:
    """Thresholds with which about the same number of these rows stops at every exit."""
    with runtime.load(bundle) as model:
        count = len(next(iter(rows.values())))
        parts = [
            model.trace({name: value[start : start + 32] for name, value in rows.items()}).scores
            for start in range(0, count, 32)
        ]
    scores = [
        np.concatenate([part[number]["max_prob"] for part in parts])
        for number in range(len(parts[0]))
    ]
    left = np.ones(count, bool)
    thresholds = []
    for number, score in enumerate(scores[:-1]):
        share = 1 / (len(scores) - number)
        threshold = float(np.quantile(score[left], 1 - share))
        thresholds.append(threshold)
        left &= score < threshold
    return thresholds


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The project's goals, and the level that each figure reaches."""
    figures = [("import edgeexit.runtime, s", result["imports"]["seconds"], "<=", 0.3, 0.3)]
    for name, tax, eager in (("large", (1.03, 1.0), 1.3), ("small", (1.05, 1.02), 2.5)):
        if name not in result:
            continue
        found = result[name]

        def worst(key: str, found: dict[str, Any] = found) -> float:
            return max(one["ratio"] for one in found[key])

        figures += [
            (f"{name}: split tax", found["split_tax"], "<=", *tax),
            (
                f"{name}: forced exit ÷ truncated, worst",
                worst("against_truncated"),
                "<=",
                1.05,
                1.02,
            ),
            (f"{name}: ÷ nested If, worst exit", worst("against_nested"), "<=", 1.0, 1.0),
            (f"{name}: ÷ naive chain, worst exit", worst("against_naive"), "<=", 1.0, 1.0),
            (
                f"{name}: eager PyTorch ÷ chain, worst",
                1 / worst("against_eager"),
                ">=",
                eager,
                eager,
            ),
            (f"{name}: bundle ÷ weights", found["export"]["bundle_of_weights"], "<=", 1.05, 1.05),
            (f"{name}: batch 32 of ideal", found["batch_32"]["of_ideal"], ">=", 0.8, 0.95),
            (f"{name}: export, s", found["export"]["seconds"], "<=", 180.0, 180.0),
            (
                f"{name}: export memory ÷ weights",
                found["export"]["memory_above_imports_of_weights"],
                "<=",
                2.5,
                2.5,
            ),
        ]
    return verdict(figures)


if __name__ == "__main__":
    main()
