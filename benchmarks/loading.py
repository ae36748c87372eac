"""Loading time and peak memory: the chain against the unsplit graph, in new processes.

    python benchmarks/loading.py          # after split.py, whose bundles it uses; six minutes

Processes take turns, and import the runtime and its engine before the clock starts. Memory is the
process's peak (VmHWM) after loading and four runs, above its memory before loading. The chain
evaluates every exit, and no row stops early.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import HERE, SCRATCH, save, say, verdict

from edgeexit.runtime.memory import peak_bytes

THREADS = "process"


def main() -> None:
    """Measures both shapes and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(load_one(*given.one)))
        return
    from edgeexit.measure import environment

    watch = environment.Watch()
    result: dict[str, Any] = {}
    for shape in ("small", "large"):
        folder = SCRATCH / shape
        found: dict[str, list[dict[str, float]]] = {"chain": [], "unsplit": []}
        for done in range(given.rounds):
            for what in ("chain", "unsplit") if done % 2 else ("unsplit", "chain"):
                found[what].append(in_a_process(what, folder))
        result[shape] = {
            "rounds": given.rounds,
            "loading": ratio(found, "load_s"),
            "peak_memory": ratio(found, "peak_bytes"),
        }
        say(f"  {shape}: {result[shape]}")
    result["threads"] = THREADS
    result["verdicts"] = verdict(
        [
            (f"{shape}: {title} ÷ unsplit", result[shape][key]["ratio"], "<=", must, aim)
            for shape in ("small", "large")
            for title, key, must, aim in (
                ("loading", "loading", 1.5, 1.1),
                ("peak memory", "peak_memory", 1.2, 1.05),
            )
        ]
    )
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    save("loading", result, quick=False)


def in_a_process(what: str, folder: Path) -> dict[str, float]:
    """Loads in a process with a small parent, because a child inherits the parent's peak."""
    command = [sys.executable, str(HERE / "loading.py"), "--one", what]
    made = subprocess.run(
        [*command, str(folder / "bundle"), str(folder / "inputs.npz")],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(made.stdout.splitlines()[-1])


def load_one(what: str, bundle: str, inputs: str) -> dict[str, float]:
    """Loads and runs. Returns seconds of loading, and peak bytes above those before."""
    import onnxruntime  # noqa: F401, its import is not part of loading

    from edgeexit import runtime
    from edgeexit.bundle.policy import OUT_OF_REACH
    from edgeexit.measure.bench.cases import read_inputs

    rows = read_inputs(inputs)[:4]
    before = peak_bytes()
    started = time.perf_counter()
    if what == "chain":
        model = runtime.load(bundle, policy=runtime.Rule(thresholds=OUT_OF_REACH), threads=THREADS)
    else:
        model = runtime.load(bundle, unsplit=True, threads=THREADS)
    took = time.perf_counter() - started
    for row in rows:
        model(row)
    return {"load_s": took, "peak_bytes": peak_bytes() - before}


def ratio(found: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """Chain ÷ unsplit: the median over pairs of processes; also both medians."""
    pairs = zip(found["chain"], found["unsplit"], strict=True)
    median = {what: statistics.median(one[key] for one in ones) for what, ones in found.items()}
    return {
        "ratio": round(statistics.median(a[key] / b[key] for a, b in pairs), 4),
        "chain": round(median["chain"], 4),
        "unsplit": round(median["unsplit"], 4),
    }


if __name__ == "__main__":
    main()
