"""Compares two results of `bench`: of two bundles, policies, versions or machines.

Times of two runs differ by what else the machines did, so every figure is also given relative to
the unsplit model of its own run. A difference within the spread of a figure is told as such.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeexit.errors import InputError

SCHEMA = 1
"""Version of the results' form."""

Verdict = Literal["faster", "slower", "within the spread", "spread not known"]

_WRITE = "Give files that edgeexit bench -o wrote."


@dataclass(frozen=True)
class Figure:
    """One time in both results.

    Attributes:
        name: Path or mode; for texts with ``first token`` or ``per token``.
        ms: Milliseconds, first and second result.
        against_unsplit: The same relative to the unsplit model of the same run; None: it is the
            unsplit model.
        spread: The larger spread of the two ratios: distance of the quartiles of single ratios,
            relative to their median. None: a result does not have it.
    """

    name: str
    ms: tuple[float, float]
    against_unsplit: tuple[float, float] | None
    spread: float | None

    @property
    def ratio(self) -> float:
        """Second time relative to the first; below 1 is faster."""
        return self.ms[1] / self.ms[0]

    @property
    def ratio_against_unsplit(self) -> float | None:
        """The same of the times relative to unsplit; None: it is the unsplit model."""
        return None if self.against_unsplit is None else _quotient(self.against_unsplit)

    @property
    def verdict(self) -> Verdict | None:
        """Whether the second is faster relative to unsplit; None: it is the unsplit model."""
        ratio = self.ratio_against_unsplit
        if ratio is None:
            return None
        if self.spread is None:
            return "spread not known"
        if abs(ratio - 1) <= self.spread:
            return "within the spread"
        return "faster" if ratio < 1 else "slower"


@dataclass(frozen=True)
class Comparison:
    """Two results beside each other.

    Attributes:
        figures: What both have.
        missing: Names of paths or modes that only one has.
        differences: What else differs: machine, versions, bundle, data, settings.
    """

    figures: list[Figure]
    missing: list[str]
    differences: list[str]


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a result.

    Raises:
        InputError: The file is no result of `bench`, or of a newer version.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", fix=_WRITE) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})", fix=_WRITE) from error
    known = ("mode", "unsplit", "split_tax", "environment", "data")
    lacking = [name for name in known if not isinstance(found, dict) or name not in found]
    if lacking or not isinstance(found["environment"], dict):
        raise InputError(
            f"{path}: not a result of bench (it has no {(lacking or ['environment'])[0]!r})",
            fix=_WRITE,
        )
    if (schema := found.get("schema", 1)) != SCHEMA:
        raise InputError(
            f"{path}: its form has the version {schema!r}; this edgeexit reads {SCHEMA}",
            fix="Use the edgeexit that wrote it, or measure again.",
        )
    return found


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Compares two results of the same kind.

    Args:
        first, second: From `read_result`.

    Raises:
        InputError: They measured different things.
    """
    modes = first["mode"], second["mode"]
    if modes[0] != modes[1]:
        raise InputError(
            f"the results are of different kinds: {modes[0]} and {modes[1]}",
            fix="Compare two of rows in the same --mode, or two of texts.",
        )
    ours, theirs = dict(_times(first)), dict(_times(second))
    figures = []
    for name in ours:
        if name in theirs:
            (ms, relative, spread), (ms_2, relative_2, spread_2) = ours[name], theirs[name]
            spreads = _both(spread, spread_2)
            widest = None if spreads is None else max(spreads)
            figures.append(Figure(name, (ms, ms_2), _both(relative, relative_2), widest))
    missing = [name for name in [*ours, *theirs] if (name in ours) != (name in theirs)]
    return Comparison(figures, missing, [*_differences(first, second)])


def comparison_to_json(found: Comparison) -> dict[str, Any]:
    """What ``edgeexit bench --compare --json`` prints."""
    return {
        "schema": SCHEMA,
        "figures": [
            {
                "name": one.name,
                "ms": list(one.ms),
                "ratio": round(one.ratio, 4),
                "against_unsplit": None if one.verdict is None else list(one.against_unsplit or ()),
                "ratio_against_unsplit": None
                if one.ratio_against_unsplit is None
                else round(one.ratio_against_unsplit, 4),
                "spread": one.spread,
                "verdict": one.verdict,
            }
            for one in found.figures
        ],
        "only_in_one": found.missing,
        "differences": found.differences,
    }


Time = tuple[float, "float | None", "float | None"]
"""Milliseconds, the same relative to unsplit, and the spread of that ratio."""


def _times(result: Mapping[str, Any]) -> Iterator[tuple[str, Time]]:
    """Every time of a result by its name."""
    unsplit = result["unsplit"]
    if "modes" in result:
        yield "unsplit, first token", (unsplit["prefill_ms"], None, None)
        yield "unsplit, per token", (1e3 / unsplit["tokens_per_s"], None, None)
        for name, own in result["modes"].items():
            ratio = own["time_against_unsplit"]
            first = own["prefill_ms"], ratio["prefill"], ratio.get("prefill_spread")
            yield f"{name}, first token", first
            each = 1e3 / own["tokens_per_s"]
            yield f"{name}, per token", (each, ratio["decode"], ratio.get("decode_spread"))
        return
    yield "unsplit", (_row_ms(unsplit), None, None)
    chain = result["chain"]
    tax = result["split_tax"], result.get("split_tax_spread")
    yield "all layers, every exit asked", (_row_ms(chain), *tax)
    natural = result["natural"]
    for own in [*result["exits"], *([{"name": "natural"} | natural] if natural else [])]:
        if "ratio_to_unsplit" in own:
            yield own["name"], (_row_ms(own), own["ratio_to_unsplit"], own.get("ratio_spread"))


def _row_ms(own: Mapping[str, Any]) -> float:
    """Time of a row: the median; in batches the mean."""
    per_s = own.get("rows_per_s")
    return 1e3 / float(per_s) if per_s else float(own["p50_ms"])


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """What the results do not share."""
    about = [_facts(first), _facts(second)]
    for name in dict.fromkeys([*about[0], *about[1]]):
        one, other = (facts.get(name, "not told") for facts in about)
        if one != other:
            yield f"{name}: {one} and {other}"


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    environment = result["environment"]
    engine, bundle = environment.get("engine", {}), environment.get("bundle", {})
    chosen = result.get("threads") or {
        side: result[side].get("threads") for side in ("unsplit", "chain")
    }
    return {
        "processor": str(environment.get("processor")),
        "cores": str(environment.get("cores")),
        "engine": " ".join(str(engine.get(key)) for key in ("engine", "library", "version")),
        "edgeexit": str(environment.get("packages", {}).get("edgeexit")),
        "bundle": f"{bundle.get('name')} {str(bundle.get('digest'))[:12]}",
        "data": str(result["data"].get("sha256") or result["data"].get("name")),
        "policy": str(result.get("policy")),
        "new tokens": str(result.get("new_tokens")),
        "threads": ", ".join(f"{side} {own}" for side, own in chosen.items()),
    }


def _both(one: float | None, other: float | None) -> tuple[float, float] | None:
    return None if one is None or other is None else (one, other)


def _quotient(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0]


__all__ = [
    "SCHEMA",
    "Comparison",
    "Figure",
    "compare_results",
    "comparison_to_json",
    "read_result",
]
