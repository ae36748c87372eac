"""Drift over a long run: a device that gets hot is slower than the first seconds say.

The chain runs alone, input after input, and its times are told in windows beside the device's
clocks, temperatures and throttling (`edgeexit.measure.device_state`).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from edgeexit.measure.bench.contest import Contest
from edgeexit.measure.bench.paired import percentiles
from edgeexit.measure.device_state import read_state, throttled

WINDOWS, SHORTEST_S = 20, 1.0
"""Number of windows, unless they would be shorter than that."""
MOST_DRIFT = 0.05
"""More gives a warning."""


def measure(contest: Contest, seconds: float) -> dict[str, Any]:
    """Runs the chain for a time: natural exits where there are data, else all its layers; texts in
    mode ``full``.

    Returns:
        Per window when it began, runs, median and p99 in milliseconds, and the state behind it;
        ``drift``: median of the last window relative to that of the first; what throttled.
    """
    side, inputs = contest.chain, contest.inputs
    case = "full" if inputs.lengths else ("natural" if inputs.real else "all")
    warm = side.warm_up(case, seconds=1.0)
    length = max(SHORTEST_S, seconds / WINDOWS)
    block = max(1, round(200.0 / max(warm["median_ms"], 1e-3)))
    order = np.random.default_rng(contest.options.seed).permutation(side.inputs)
    before, runs = read_state(), 0
    windows: list[dict[str, Any]] = []
    began = time.perf_counter()
    while (start := time.perf_counter() - began) < seconds:
        times: list[float] = []
        while time.perf_counter() - began < min(start + length, seconds):
            numbers = [int(order[(runs + number) % len(order)]) for number in range(block)]
            times += side.run(case, numbers, lead=False)["times_ms"]
            runs += block
        contest.tell("soak", round(start), round(seconds))
        windows.append(
            {
                "from_s": round(start, 2),
                "runs": len(times),
                "p50_ms": round(statistics.median(times), 4),
                "p99_ms": percentiles(times).get("p99"),
                "state": read_state(),
            }
        )
    return {
        "case": case,
        "seconds": round(time.perf_counter() - began, 2),
        "runs": runs,
        "windows": windows,
        "drift": round(windows[-1]["p50_ms"] / windows[0]["p50_ms"], 4),
        "throttled": throttled(before, windows[-1]["state"]),
    }


def doubts(found: dict[str, Any]) -> list[str]:
    """Warnings about a long run."""
    change = found["drift"] - 1
    if abs(change) <= MOST_DRIFT:
        return []
    way = "slower" if change > 0 else "faster"
    return [
        f"soak: the last window is {abs(change):.0%} {way} than the first, so short measurements "
        "of this device do not hold"
    ]


__all__ = ["doubts", "measure"]
