"""Measures a chain on a GPU against unsplit on the same engine: split tax by number of exits, time
of each exit's path, bytes copied to the host, idle time of the GPU between segments, and gain and
waste of launching ahead.

    python benchmarks/gpu.py --engine cuda                  # ONNX Runtime's CUDA provider
    python benchmarks/gpu.py --engine tensorrt              # builds engines for this GPU first
    python benchmarks/gpu.py --engine cpu --quick           # does the script run?

The model has the shape of BERT-base in float16, with 128 tokens. Both sides run in one process and
take turns, block by block. Every figure is a median of ratios of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import numpy as np
from results import SCRATCH, save, say, verdict
from split import tokens

from edgeexit.bundle.policy import OUT_OF_REACH
from edgeexit.bundle.reader import Bundle
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import gpu_facts
from edgeexit.runtime import Rule, load

Inputs = Mapping[str, np.ndarray]
ROWS = (1, 32)
ROUNDS, BLOCK_S = 15, 0.2


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--engine", choices=["cuda", "tensorrt", "cpu"], required=True)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    given = parser.parse_args()
    watch = environment.Watch()
    shape = models.QUICK["large"] if given.quick else models.SHAPES["large"]
    dtype = "float32" if given.engine == "cpu" else "float16"
    folder = SCRATCH / f"gpu-{shape.name}"
    if not (folder / "checkpoint").is_dir():
        models.make_checkpoint(shape, folder / "checkpoint")
    os.environ["EDGEEXIT_ENGINE_DIR"] = str(folder / "engines")
    result: dict[str, Any] = {
        "engine": given.engine,
        "dtype": dtype,
        "shape": dataclasses.asdict(shape),
    }
    curve = []
    for exits in exit_sets(shape.layers):
        say(f"{len(exits)} exits: export")
        bundle = export(folder / "checkpoint", folder / f"{dtype}-{len(exits)}", exits, dtype)
        if given.engine == "tensorrt":
            build(bundle)
        curve.append(measure(bundle, given.engine, shape, quick=given.quick))
        say(f"  {curve[-1]}")
    result["by_exits"] = curve
    three = next((one for one in curve if one["exits"] == 3), curve[0])
    tax = {rows: three["split_tax"][rows]["ratio"] for rows in ROWS}
    result["verdicts"] = verdict(
        [
            ("split tax with 3 exits, batch 1", tax[1], "<=", 1.05, 1.02),
            ("split tax with 3 exits, batch 32", tax[32], "<=", 1.02, 1.01),
        ]
    )
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    save(f"gpu-{given.engine}", result, quick=given.quick)


def exit_sets(layers: int) -> list[list[int]]:
    """Layers with an early exit: 1, 3, half of them, all except the last; evenly spaced."""
    counts = sorted({1, min(3, layers - 1), layers // 2, layers - 1})
    spread = [np.linspace(0, layers, count + 2)[1:-1] for count in counts]
    return [sorted({round(place) for place in one}) for one in spread]


def export(checkpoint: Path, path: Path, exits: list[int], dtype: str) -> Bundle:
    """The bundle with these exits."""
    from edgeexit.export import export as write_bundle
    from edgeexit.export.pretrained import from_pretrained

    model = from_pretrained(checkpoint, exits=exits).split_model()
    return write_bundle(model, path, dtype=dtype, overwrite=True)


def build(bundle: Bundle) -> None:
    """Engines for this GPU."""
    from edgeexit.runtime.build.build import build_engines
    from edgeexit.runtime.build.profiles import Asked
    from edgeexit.runtime.build.work_list import sample_sizes, work_of
    from edgeexit.runtime.engines.cuda.driver import describe_device
    from edgeexit.runtime.engines.tensorrt import engine_cache
    from edgeexit.runtime.engines.tensorrt.library import find_library

    library, asked = find_library(), Asked({}, {}, {"batch": max(ROWS)})
    sizes = sample_sizes(bundle)
    works = work_of(bundle.manifest, library.features, asked, sizes, tunes=library.tunes)
    build_engines(bundle, works, library, describe_device(), engine_cache.default_root())


def measure(bundle: Bundle, engine: str, shape: models.Shape, *, quick: bool) -> dict[str, Any]:
    """Measures one set of exits."""
    rounds = 3 if quick else ROUNDS
    policy = Rule(score="max_prob", thresholds=OUT_OF_REACH)
    whole = load(bundle, engine, unsplit=True)
    with load(bundle, engine, policy=policy) as chain, whole as unsplit:
        taxes, crossing = {}, {}
        for rows in ROWS:
            inputs = tokens(shape, rows, 0)
            taxes[rows] = ratio(lambda: chain(inputs), lambda: unsplit(inputs), rounds)  # noqa: B023
            if chain.device_counts is not None:
                chain(inputs)
                crossing[rows] = gpu_facts(chain, inputs)["a_call"]
        inputs = tokens(shape, 1, 0)
        paths = {}
        for exit_ in chain.exits[:-1]:
            chain.policy = Rule(score="max_prob", thresholds={exit_.name: -np.inf})
            paths[exit_.name] = ratio(lambda: chain(inputs), lambda: unsplit(inputs), rounds)
    return {
        "exits": len(chain.exits) - 1,
        "split_tax": taxes,
        "path_of_unsplit": paths,
        "a_call": crossing,
        **({} if engine == "cpu" else ahead(bundle, engine, inputs, rounds)),
    }


def ahead(bundle: Bundle, engine: str, inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Compares launching ahead with waiting, for one row: if no row stops (only gain), and if every
    row stops at the first exit (only waste, because calls follow each other immediately). Also
    measures the gaps with the GPU's clock."""
    stays = Rule(score="max_prob", thresholds=OUT_OF_REACH)
    measured = load(bundle, engine, policy=stays, launch_ahead="measured")
    always = load(bundle, engine, policy=stays, launch_ahead="always")
    with load(bundle, engine, policy=stays) as never, always, measured:
        for _ in range(40):
            measured(inputs)
        gaps = measured.boundaries
        gain = ratio(lambda: always(inputs), lambda: never(inputs), rounds)
        first = never.exits[0].name
        always.policy = never.policy = Rule(score="max_prob", thresholds={first: -np.inf})
        waste = ratio(lambda: always(inputs), lambda: never(inputs), rounds)
    return {"boundaries": gaps, "launched_ahead": {"none_leaves": gain, "all_leave_first": waste}}


def ratio(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> dict[str, float]:
    """Median of ratios of neighbouring blocks, its quartiles, and milliseconds of both sides."""
    for _ in range(3):
        ours()
        theirs()
    times = []
    for number in range(rounds):
        sides = [ours, theirs] if number % 2 else [theirs, ours]
        took = {side: block(side) for side in sides}
        times.append((took[ours], took[theirs]))
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "ms": round(1e3 * statistics.median(a for a, _ in times), 4),
        "other_ms": round(1e3 * statistics.median(b for _, b in times), 4),
    }


def block(side: Callable[[], object]) -> float:
    """Seconds of one call: the median over `BLOCK_S` seconds."""
    times: list[float] = []
    until = time.perf_counter() + BLOCK_S
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        side()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
