"""Compares thread settings of `load`: its default, ``blocking``, and the command line's default.

    python benchmarks/threads.py --digits BUNDLE --writer BUNDLE     # five minutes

Each launch is a new process; launches of all settings take turns. A classifier runs rows at full
depth with every exit evaluated; a language model writes in mode ``full``. Figures are medians of
launches. Ratios are relative to ``process``, the command line's default, in the same turn.
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
from results import save, say

from edgeexit.bundle.policy import OUT_OF_REACH, Rule
from edgeexit.measure import environment
from edgeexit.runtime import load

SETTINGS = ("process", "brief", "blocking")
ROWS, TEXTS, NEW_TOKENS, PROMPT_TOKENS = 1500, 4, 64, 32


def measure(bundle: str, threads: Any) -> float:
    """Milliseconds per row, or per token, in this process."""
    policy = Rule(thresholds=OUT_OF_REACH)
    with load(bundle, threads=threads, policy=policy) as model:
        if model.writes:
            prompt = list(range(1, PROMPT_TOKENS + 1))
            model.generate([prompt], max_new_tokens=NEW_TOKENS, text=False, reuse=False).finish()
            rates = []
            for _ in range(TEXTS):
                made = model.generate(
                    [prompt], max_new_tokens=NEW_TOKENS, text=False, reuse=False
                ).finish()
                rates.append(made.tokens_per_s)
            return 1e3 / statistics.median(rates)
        samples = np.load(model.bundle.file("samples/reference.npz"))
        row = {t.name: samples[f"input/{t.name}"][:1] for t in model.bundle.manifest.inputs}
        times = []
        for _ in range(ROWS):
            started = time.perf_counter()
            model(row)
            times.append(time.perf_counter() - started)
        return 1e3 * statistics.median(times[ROWS // 5 :])


def main() -> None:
    """Measures every setting and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--digits", type=Path, help="a bundle of examples/digits")
    parser.add_argument("--writer", type=Path, help="a bundle of examples/codelm")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--launch", nargs=2, metavar=("BUNDLE", "SETTING"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.launch:
        print(json.dumps(measure(*given.launch)))
        return
    if given.digits is None or given.writer is None:
        parser.error("give both bundles: --digits, --writer")
    watch = environment.Watch()
    found: dict[str, Any] = {}
    for name, bundle in (("digits", given.digits), ("codelm", given.writer)):
        times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for turn in range(given.turns):
            for place in np.random.default_rng(turn).permutation(len(SETTINGS)):
                setting = SETTINGS[place]
                command = [sys.executable, __file__, "--launch", str(bundle), setting]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                times[setting].append(json.loads(done.stdout))
        ratios = {
            setting: [a / b for a, b in zip(own, times["process"], strict=True)]
            for setting, own in times.items()
        }
        found[name] = {
            setting: {
                "ms": round(statistics.median(own), 4),
                "to_process": round(statistics.median(ratios[setting]), 4),
                "turns": [round(ratio, 3) for ratio in ratios[setting]],
            }
            for setting, own in times.items()
        }
        say(f"{name}: " + ", ".join(f"{s} {found[name][s]['to_process']}" for s in SETTINGS))
    result = {"bundles": found, "turns": given.turns}
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    save("threads", result, quick=False)


if __name__ == "__main__":
    main()
