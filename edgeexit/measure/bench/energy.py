"""Joules of a row, or of a token, for the unsplit model, for every exit and for natural exits.

Each case runs in a loop of its own, for at least `LEAST_S` and `LEAST_SAMPLES` readings of the
sensor; energy is integrated over that loop. Before, both sides are stopped and the idle power is
read. Exits of one row are far too short for the sensors, so each exit is forced in a loop; of
natural runs there is only the mean.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from edgeexit.errors import MeasurementError
from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.paired import Side
from edgeexit.measure.energy.find import find_source
from edgeexit.measure.energy.sampler import Sampler
from edgeexit.measure.energy.source import Source

LEAST_S, LEAST_SAMPLES, IDLE_S = 10.0, 100, 5.0
BLOCK_S = 1.0
"""A loop asks the side for about that much work at a time."""
LONGEST_S = 120.0
"""A sensor that gives too few readings until then is refused."""


def open_source(engine: str) -> Source:
    """The device's sensor.

    Raises:
        MeasurementError: None can be read, with the reason of each.
    """
    source, reasons = find_source(gpu=engine != "cpu")
    if source is None:
        tried = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise MeasurementError(
            f"--energy: no sensor can be read ({tried})",
            fix="Measure without --energy, or on a device with a sensor.",
        )
    return source


def measure(contest: Contest, source: Source) -> dict[str, Any]:
    """Energy of every case, in joules of a run; of texts also of a token, their prompts included.

    Args:
        contest: The two sides.
        source: From `open_source`.
    """
    texts = bool(contest.inputs.lengths)
    cases = [("unsplit", contest.unsplit, "unsplit")]
    if texts:
        modes = ["full", *(["exact"] if contest.inputs.real else [])]
        cases += [(mode, contest.chain, mode) for mode in modes if mode in contest.chain.cases]
    else:
        names = [exit_.name for exit_ in contest.bundle.manifest.last_chain.stops]
        cases += [(name, contest.chain, f"forced:{name}") for name in names]
        if contest.inputs.real:
            cases.append(("natural", contest.chain, "natural"))
    with Sampler(source) as sampler:
        started = time.perf_counter()
        time.sleep(IDLE_S)
        ended = time.perf_counter()
        idle_w = sampler.joules(started, ended) / (ended - started)
        found = {}
        for place, (name, side, case) in enumerate(cases):
            contest.tell("energy", place, len(cases))
            found[name] = _of_case(side, case, sampler, idle_w, contest.options.seed)
    return {
        "sensor": source.name,
        "parts": list(source.parts),
        "idle_watts": round(idle_w, 4),
        "per": "text" if texts else f"{contest.inputs.batch} rows",
        "cases": found,
    }


def _of_case(side: Side, case: str, sampler: Sampler, idle_w: float, seed: int) -> dict[str, Any]:
    """Runs a case in a loop, over all inputs in a random order."""
    warm = side.warm_up(case, seconds=1.0)
    block = max(1, round(1e3 * BLOCK_S / max(warm["median_ms"], 1e-3)))
    order = np.random.default_rng(seed).permutation(side.inputs)
    runs, tokens = 0, 0
    started = ended = time.perf_counter()
    while ended - started < LEAST_S or sampler.samples(started, ended) < LEAST_SAMPLES:
        if ended - started > LONGEST_S:
            raise MeasurementError(
                f"--energy: {sampler.samples(started, ended)} readings in {LONGEST_S:g} s are too "
                "few",
                fix="Measure without --energy: this sensor is too slow.",
            )
        numbers = [int(order[(runs + number) % len(order)]) for number in range(block)]
        records = side.run(case, numbers, lead=False)["records"]
        tokens += sum(len(own["tokens"]) for own in records if _is_text(own))
        runs, ended = runs + block, time.perf_counter()
    joules, seconds = sampler.joules(started, ended), ended - started
    own = joules - idle_w * seconds
    return {
        "joules": round(joules / runs, 6),
        "joules_above_idle": round(own / runs, 6),
        **({"joules_per_token": round(joules / tokens, 6)} if tokens else {}),
        "watts": round(joules / seconds, 4),
        "runs": runs,
        "seconds": round(seconds, 2),
        "samples": sampler.samples(started, ended),
    }


def _is_text(record: Any) -> bool:
    return isinstance(record, dict) and "tokens" in record


__all__ = ["measure", "open_source"]
