"""Measures the effect of four choices of the runtime on a small model, by undoing one at a time.

    python benchmarks/choices.py         # after split.py, whose small bundle it uses; two minutes

The ratio is the time of the chain without the choice ÷ with it. Every exit is evaluated and no row
stops. Both run in their own process with the same thread setting. benchmarks/README.md explains the
choices.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import models
from results import HERE, SCRATCH, save, say
from split import tokens

from edgeexit.errors import UsageError
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import write_inputs
from edgeexit.measure.bench.paired import Lane, Side, alternate, spread, warm

CHOICES = ("one score", "fusions left out", "shared arena", "compiled session")


def main() -> None:
    """Measures every choice and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--threads", nargs="+", default=["process", "1"])
    parser.add_argument("--seconds", type=float, default=12)
    given = parser.parse_args()
    folder = SCRATCH / "small"
    if not (folder / "bundle").is_dir():
        raise UsageError(f"{folder} has no bundle", fix="Run benchmarks/split.py first.")
    inputs = folder / "choices.npz"
    write_inputs(inputs, [tokens(models.SHAPES["small"], 1, seed) for seed in range(16)])
    arguments: dict[str, Any] = {"bundle": str(folder / "bundle"), "inputs": str(inputs)}
    watch = environment.Watch()
    found: dict[str, Any] = {}
    for text in given.threads:
        threads = int(text) if text.isdigit() else text
        arguments["threads"] = threads
        found[text] = {}
        with Side("edgeexit.measure.bench.cases:chain", arguments, name="chain") as chain:
            for choice in CHOICES:
                changed = arguments | {"choice": choice}
                with Side("subjects:without", changed, folder=str(HERE), name=choice) as other:
                    with_it, without = Lane("with", chain, "all"), Lane("without", other, "all")
                    warm([with_it, without], seconds=1.0)
                    alternate(with_it, [without], seconds=given.seconds)
                found[text][choice] = {
                    "ratio_without": round(statistics.median(without.ratios), 4),
                    "spread": round(spread(without.ratios), 4),
                    "chain_p50_ms": round(statistics.median(with_it.times_ms), 4),
                }
                say(f"  threads {text}, without {choice}: {found[text][choice]['ratio_without']}")
    result = {"threads": found}
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    save("choices", result, quick=False)


if __name__ == "__main__":
    main()
