"""The program of examples/cpp beside Python's runtime: the digits with exits, one row at a time.

    make headers
    python benchmarks/cpp.py            # results/cpp.json
    python benchmarks/cpp.py --quick

Both run the same bundle and policy in one thread, in processes of their own that take turns; the
first round of a turn over the rows does not count.
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

import numpy as np
from results import ROOT, SCRATCH, save, verdict

from edgeexit.measure import environment
from edgeexit.measure.bench.paired import spread

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples" / "digits"))
TURNS, ROUNDS = 15, 5


def prepare(folder: Path) -> None:
    """The program, a bundle, a policy and rows."""
    from data import inputs

    from tests.examples.test_cpp import build

    build(folder)
    bundle, trace = str(folder / "digits"), str(folder / "trace.npz")
    edgeexit = [sys.executable, "-m", "edgeexit"]
    checkpoint = str(ROOT / "examples" / "digits" / "checkpoint")
    data = f"{ROOT / 'examples' / 'digits' / 'data.py'}:validation"
    for command in (
        ["export", "-m", checkpoint, "-o", bundle, "--overwrite"],
        ["trace", bundle, "--data", data, "-o", trace, "--overwrite"],
        ["calibrate", trace, "--max-risk", "1%", "-o", str(folder / "policy.json"), "--overwrite"],
    ):
        subprocess.run([*edgeexit, *command], check=True, stdout=subprocess.DEVNULL)
    np.save(folder / "rows.npy", inputs("test")[0]["pixel_values"])


def in_python(folder: Path, rounds: int) -> None:
    """Prints what the program prints, by Python's runtime."""
    from edgeexit.runtime import load

    rows = np.load(folder / "rows.npy")
    with load(folder / "digits", policy=folder / "policy.json", threads=1) as model:
        for _ in range(rounds):
            for row in rows:
                given = {"pixel_values": row[None]}
                started = time.perf_counter()
                said = model(given)
                took = 1e3 * (time.perf_counter() - started)
                answer = int(said.outputs["logits"].argmax())
                print(answer, said.exit_names[0], float(said.scores[0]), took)


def turn(command: list[str], rows: int) -> tuple[list[list[str]], list[float]]:
    """What a process answered, and the milliseconds of each row but those of the first round."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [line[:2] for line in lines], [float(line[3]) for line in lines[rows:]]


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns: does the script run?")
    parser.add_argument("--python", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.python is not None:
        in_python(given.python, ROUNDS)
        return
    folder = SCRATCH / "cpp"
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    watch = environment.Watch()
    paths = [str(folder / name) for name in ("digits", "policy.json", "rows.npy")]
    commands = {
        "cpp": [str(folder / "build" / "exits"), *paths, "1", str(ROUNDS)],
        "python": [sys.executable, __file__, "--python", str(folder)],
    }
    rows = len(np.load(folder / "rows.npy"))
    times: dict[str, list[list[float]]] = {name: [] for name in commands}
    answers: dict[str, Any] = {}
    for number in range(2 if given.quick else TURNS):
        for name in sorted(commands, reverse=bool(number % 2)):
            answers[name], own = turn(commands[name], rows)
            times[name].append(own)
    assert answers["cpp"] == answers["python"]
    ratios = {
        kind: [of(ours) / of(theirs) for ours, theirs in zip(*times.values(), strict=True)]
        for kind, of in (("median", statistics.median), ("mean", statistics.fmean))
    }
    result: dict[str, Any] = {
        "rows": rows,
        "rounds_that_count": ROUNDS - 1,
        "turns": len(ratios["mean"]),
        "threads": 1,
        "row_ms": {
            name: round(statistics.median(map(statistics.median, own)), 4)
            for name, own in times.items()
        },
        "cpp_against_python": {
            kind: {"ratio": round(statistics.median(own), 4), "spread": round(spread(own), 4)}
            for kind, own in ratios.items()
        },
    }
    value = result["cpp_against_python"]["mean"]["ratio"]
    result["verdicts"] = verdict([("C++ ÷ Python, mean of rows", value, "<=", 1.05, 1.0)])
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    save("cpp", result, quick=given.quick)
    print(json.dumps(result["cpp_against_python"]))


if __name__ == "__main__":
    main()
