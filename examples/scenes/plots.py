"""Draws what was measured on the scenes example: ``exits.png`` (where tokens leave, by kind and
steps; quality against time) and ``depth.png`` (right answers by the layer of an exit, for several
ways to train adapters).

    python examples/scenes/plots.py

Reads benchmarks/results/scenes-seed-0.json (benchmarks/scenes.py) and depth.json (depth.py). Needs
``edgeexit[plot]``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from edgeexit.measure.bench.vision_cases import layer_of

HERE = Path(__file__).resolve().parent
RESULT = HERE.parents[1] / "benchmarks/results/scenes-seed-0.json"
KINDS = ("read", "walk", "follow", "go")
NAMES = {
    "free": "FREE",
    "exact": "FREE, exact",
    "gates": "DyVTE",
    "tower": "tower exits",
    "tower_gates": "DyVTE + tower exits",
    "all": "all of it",
}


def draw_depths(axes: Axes, cases: dict[str, Any]) -> None:
    """Mean layer of a token's exit by kind and steps."""
    own = cases["free"]["mean_layer"]
    rows = [row for kind in KINDS for row in own if row.split()[0] == kind]
    colours = {kind: f"C{number}" for number, kind in enumerate(KINDS)}
    axes.bar(
        range(len(rows)), [own[row] for row in rows], color=[colours[r.split()[0]] for r in rows]
    )
    labels = [row.removesuffix(" 0") if row.startswith("read") else row for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90)
    axes.set(ylabel="mean layer of a token's exit", title="FREE: kinds of questions, and steps")


def draw_quality(axes: Axes, cases: dict[str, Any]) -> None:
    """Right answers against the time of whole answers."""

    def place(name: str) -> tuple[float, float]:
        return cases[name]["all"]["whole"], 100 * cases[name]["right"]

    static = sorted((name for name in cases if name.startswith("static_")), key=place)
    axes.plot(*zip(*map(place, static), strict=True), "o-", color="0.7", label="static cuts")
    for name in cases:
        if name in static:
            continue
        x, y = place(name)
        axes.plot(x, y, "s" if name in NAMES else "o", color="C3" if name in NAMES else "0.4")
        axes.annotate(
            NAMES.get(name, name), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7
        )
    axes.set(
        xlabel="time of whole answers ÷ unsplit", ylabel="right answers in %", title="all questions"
    )


def draw_settings(axes: Axes, depth: dict[str, Any], kinds: tuple[str, ...], title: str) -> None:
    """Right answers of each exit alone, by layer."""
    for setting, shares in depth["right"].items():
        layers = sorted(layer_of(name) for name in shares)
        means = []
        for layer in layers:
            own = shares[f"exit_{layer}"]
            chosen = [own[kind] for kind in own if kind.split()[0] in kinds]
            means.append(100 * sum(chosen) / len(chosen))
        axes.plot(layers, means, "o-", label=setting)
    axes.set(xlabel="layer of the exit", ylabel="right answers in %", title=title)
    axes.legend(fontsize=7)


def main() -> None:
    cases = json.loads(RESULT.read_text())["cases"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_depths(left, cases)
    draw_quality(right, cases)
    figure.savefig(HERE / "exits.png", dpi=110)
    depth = json.loads((HERE / "depth.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    draw_settings(left, depth, ("read", "walk", "follow"), "described scenes and walks")
    draw_settings(right, depth, ("go",), "steps at once")
    figure.savefig(HERE / "depth.png", dpi=110)


if __name__ == "__main__":
    main()
