"""Times of single tokens, as in decoding, for the traces of a model that writes text.

A run reads a text token by token, and its time per segment is the median over tokens. Runs are
repeated over the given texts until their median settles: one run that another process interrupts
must not decide what calibration expects.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain
from edgeexit.bundle.policy import Rule
from edgeexit.measure.probe import times_to_exits
from edgeexit.runtime import Model

logger = logging.getLogger(__name__)

TIMED_TOKENS, TIMED_TEXTS = 32, 4
"""Tokens of a run, and number of batches of texts to take turns with."""
MIN_RUNS, MAX_RUNS, LONGEST_S = 5, 50, 1.0
SETTLED, WIDE = 0.02, 0.2
"""Change of the median that ends the runs, and interquartile range, both relative to the median,
above which a warning is logged."""


def measure_token_times(
    model: Model, batches: Sequence[Mapping[str, NDArray]], tokens: str
) -> tuple[list[list[float]], NDArray[np.int64]]:
    """Measures single tokens: milliseconds per run and segment, and rows of each run.

    Gates do not act meanwhile: they read prompts, which must then pass in one run.

    Args:
        batches: Inputs to take turns with, all of the same number of rows.
        tokens: The input with token ids ``[batch, seq]``.
    """
    chain = model.chains[model.bundle.manifest.decoding.chain]  # type: ignore[union-attr]
    whole = bool(model.bundle.manifest.decoding.groups)  # type: ignore[union-attr]
    prepared = [
        dict(batch) if whole else {**batch, tokens: batch[tokens][:, :TIMED_TOKENS]}
        for batch in batches
    ]

    def run(number: int) -> list[float]:
        steps = model.trace(prepared[number % len(prepared)], step=1).step_times_ms
        return times_to_exits(chain, median_of_tokens(steps))

    with _gates_at_rest(model, chain):
        for batch in prepared:
            model.trace(batch, step=1)
        runs = run_until_settled(run, at_least=max(MIN_RUNS, 2 * len(prepared)))
    return runs, np.full(len(runs), len(prepared[0][tokens]))


@contextmanager
def _gates_at_rest(model: Model, chain: Chain) -> Iterator[None]:
    """The model's policy without thresholds of gates."""
    before, name = model.policy, model.chain_name
    rule = before.rules.get(name, Rule())
    gates = {exit_.name for exit_ in chain.exits if exit_.action == "drop" and exit_.path}
    if not isinstance(rule.thresholds, dict) or gates.isdisjoint(rule.thresholds):
        yield
        return
    others = {exit_: value for exit_, value in rule.thresholds.items() if exit_ not in gates}
    rule = msgspec.structs.replace(rule, thresholds=others)
    model.policy = msgspec.structs.replace(before, rules=before.rules | {name: rule})
    try:
        yield
    finally:
        model.policy = before


def median_of_tokens(steps: Sequence[Sequence[float]]) -> list[float]:
    """Median time of each component over tokens, whose times are ``[token][component]``."""
    return [float(value) for value in np.median(steps, axis=0)]


def run_until_settled(
    run: Callable[[int], list[float]], *, at_least: int = MIN_RUNS
) -> list[list[float]]:
    """Repeats a run until the median of its total time settles, or for `LONGEST_S`. Logs a warning
    if the runs differ widely.

    Args:
        run: Gets the number of the run and returns milliseconds per segment.
        at_least: Number of runs before they can end as settled.
    """
    runs: list[list[float]] = []
    medians: list[float] = []
    started = time.perf_counter()
    while len(runs) < MAX_RUNS:
        runs.append(run(len(runs)))
        medians.append(float(np.median(np.sum(runs, axis=1))))
        recent = medians[-MIN_RUNS:]
        if len(runs) >= at_least and max(recent) - min(recent) <= SETTLED * medians[-1]:
            break
        if len(runs) >= MIN_RUNS and time.perf_counter() - started > LONGEST_S:
            break
    if (spread := spread_of(np.sum(runs, axis=1))) > WIDE:
        logger.warning(
            "the times of %d runs differ by %.0f %% (interquartile range, relative to the median): "
            "expected times are uncertain; close other processes and trace again",
            len(runs),
            100 * spread,
        )
    return runs


def spread_of(times: NDArray[np.float64]) -> float:
    """The interquartile range of times, relative to their median.

    >>> round(spread_of(np.array([1.0, 1.0, 1.1, 1.2, 9.0])), 3)
    0.182
    """
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / middle) if middle > 0 else 0.0


__all__ = [
    "MIN_RUNS",
    "TIMED_TEXTS",
    "measure_token_times",
    "median_of_tokens",
    "run_until_settled",
    "spread_of",
]
