"""Which exits a model should have: what evaluating each costs, measured, and which set of them is
expected to be fastest on a trace."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import runtime
from edgeexit.bundle.policy import NEVER, decide
from edgeexit.measure.bench.vision_cases import layer_of
from edgeexit.measure.threshold_search import search
from edgeexit.measure.trace import Trace
from edgeexit.runtime.programs.modes.choose import by_component
from edgeexit.runtime.programs.modes.early import Fast

TOKEN_RISKS = (0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
"""Shares of tokens that may differ, from loose to strict."""
CATCHING_UP = 0.1
"""What a layer costs for a token that has left, relative to one that has not: such tokens run
through it later, several at a time."""


def asking_costs(
    model: runtime.Model, prompts: Sequence[Sequence[int]], tokens: int
) -> dict[str, float]:
    """Cost of evaluating each early exit without stopping, its adapter included, relative to a
    token through all layers.

    Each exit is measured alone, with a threshold that is never reached, in turns with no exit.
    """
    exits = model.exits
    early = [exit_.name for exit_ in exits[:-1]]
    ways: list[dict[str, float]] = [{}, *({name: 2.0} for name in early)]
    times: list[list[float]] = [[] for _ in ways]
    for prompt in prompts:
        for way, thresholds in enumerate(ways):
            session = model.session(1)
            names = ["" if exit_ is None else exit_.name for exit_ in session.exits]
            rule = runtime.Rule(thresholds=thresholds, score="margin")
            mode = Fast(session, names, by_component(names, decide(rule, exits)))
            mode.prefill([np.array(prompt)])
            for _ in range(tokens):
                started = time.perf_counter()
                mode.step([True])
                times[way].append(time.perf_counter() - started)
    none, *asked = (float(np.median(one)) for one in times)
    return {
        name: round(max(0.0, one / none - 1), 4) for name, one in zip(early, asked, strict=True)
    }


def placements(
    trace: Trace,
    asking: Mapping[str, float],
    *,
    score: str,
    changed: float,
    most: int = 2,
) -> list[dict[str, Any]]:
    """Sets of exits with thresholds of their own, the one with the lowest expected cost first.

    Args:
        trace: Of answers; every exit of the bundle.
        asking: From `asking_costs`.
        changed: Share of texts that may have another token.
        most: Largest number of early exits.
    """
    found = []
    for chosen in _subsets(len(trace.exits) - 1, most):
        best = _best(trace, [*chosen, len(trace.exits) - 1], asking, score, changed)
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda one: float(one["cost"]))


def _subsets(early: int, most: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, most + 1):
        yield from itertools.combinations(range(early), size)


def _best(
    trace: Trace, chosen: list[int], asking: Mapping[str, float], score: str, changed: float
) -> dict[str, Any] | None:
    names = [trace.exits[number] for number in chosen]
    costs = costs_of(names, asking)
    usable = trace.scores[score][chosen[:-1]].astype(np.float64)
    predictions = trace.predictions[chosen]
    loss = (predictions != predictions[-1]).astype(np.float64)
    assert trace.groups is not None
    for risk in TOKEN_RISKS:
        thresholds = np.array(search(usable, loss, costs, risk, NEVER))
        fires = np.vstack([usable >= thresholds[:, None], np.ones((1, trace.rows), bool)])
        taken = fires.argmax(axis=0)
        wrong = loss[taken, np.arange(trace.rows)] > 0
        share = len(np.unique(trace.groups[wrong])) / len(np.unique(trace.groups))
        if share <= changed:
            return {
                "exits": names[:-1],
                "thresholds": dict(zip(names, thresholds.round(6).tolist(), strict=False)),
                "cost": round(float(costs[taken].mean()), 4),
                "shares": (np.bincount(taken, minlength=len(names)) / trace.rows).round(4).tolist(),
                "changed": round(share, 4),
            }
    return None


def costs_of(names: Sequence[str], asking: Mapping[str, float]) -> NDArray[np.float64]:
    """Cost of a token by the exit that it leaves at, relative to one through all layers.

    Args:
        names: Of the exits, the last one included.
    """
    layers = np.array([layer_of(name) for name in names], np.float64)
    asked = np.cumsum([asking.get(name, 0.0) for name in names])
    shares = layers / layers[-1]
    return np.asarray(shares + CATCHING_UP * (1 - shares) + asked)


def oracle(trace: Trace) -> dict[str, Any]:
    """What leaving at the earliest exit that says what the last one says would give: the mean layer
    of a token, and its expected cost if evaluating exits cost nothing; beside it, how often each
    exit says that. No rule can do better on these tokens without changing them."""
    same = trace.predictions == trace.predictions[-1]
    taken = same.argmax(axis=0)
    layers = np.array([layer_of(name) for name in trace.exits], np.float64)
    return {
        "mean_layer": round(float(layers[taken].mean()), 3),
        "cost": round(float(costs_of(trace.exits, {})[taken].mean()), 4),
        "shares": (np.bincount(taken, minlength=len(layers)) / trace.rows).round(4).tolist(),
        "agreement": dict(zip(trace.exits, same.mean(1).round(4).tolist(), strict=True)),
    }


__all__ = ["TOKEN_RISKS", "asking_costs", "costs_of", "oracle", "placements"]
