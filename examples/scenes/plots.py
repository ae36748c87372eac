"""Draws what was measured on the scenes example: ``exits.png`` (where tokens leave, by kind and
steps; quality against time), ``depth.png`` (right answers by the layer of an exit, for several
ways to train adapters) and ``attention.png`` (which attentions it can do without).

    python examples/scenes/plots.py

Reads scenes-seed-0.json and scenes.json in benchmarks/results (benchmarks/scenes.py), and
depth.json (depth.py) and attention.json (attention.py). Needs ``edgeexit[plot]``.
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
RESULTS = HERE.parents[1] / "benchmarks/results"
KINDS = ("read", "walk", "follow", "go")
OURS = {
    "free": ("FREE", (4, 5)),
    "exact": ("FREE, exact", (-52, 5)),
    "gates": ("DyVTE", (7, -10)),
    "all": ("all of it", (-12, -13)),
}
"""Case with exits -> its name, and where it is written from its place, in points."""
OTHERS = {
    "unsplit": ("unsplit", (4, 4)),
    "lookup": ("prompt lookup", (-44, 5)),
    "layers-8": ("8 layers, plain", (6, -8)),
    "layers-12": ("cut behind layer 12", (-88, 5)),
    "patience": ("PABEE", (5, -3)),
    "random": ("random exits", (5, -3)),
    "tower_2": ("tower left behind layer 2", (-30, 6)),
}
WAYS = {
    "search": "attentions of the search",
    "last": "the last attentions",
    "random": "drawn attentions",
    "without": "the last, without adapters",
    "whole": "whole layers (ShortGPT)",
}
"""Way to choose what is removed (examples/scenes/attention.py) -> its name."""


def draw_depths(axes: Axes, cases: dict[str, Any]) -> None:
    """Mean layer of a token's exit by kind and steps."""
    own = cases["free"]["mean_layer"]

    def order(row: str) -> tuple[int, int]:
        kind, steps = row.split()
        return KINDS.index(kind), int(steps)

    rows = sorted((row for row in own if " " in row), key=order)
    axes.bar(
        range(len(rows)), [own[row] for row in rows], color=[f"C{order(row)[0]}" for row in rows]
    )
    labels = [row if order(row)[0] > 1 else row.split()[0] for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90)
    axes.set(ylabel="mean layer of a token's exit", title="FREE: kinds of questions, and steps")


def draw_quality(axes: Axes, cases: dict[str, Any]) -> None:
    """Right answers against the time of whole answers."""

    def place(name: str) -> tuple[float, float]:
        return cases[name]["all"]["whole"], 100 * cases[name]["right"]

    static = sorted((name for name in cases if name.startswith("static_")), key=layer_of)
    axes.plot(*zip(*map(place, static), strict=True), "o-", color="0.7")
    for name in static:
        axes.annotate(f"drop {layer_of(name)}", place(name), (5, -3), textcoords="offset points")
    for named, form, colour in ((OURS, "s", "C3"), (OTHERS, "o", "0.4")):
        for name, (label, offset) in named.items():
            axes.plot(*place(name), form, color=colour)
            axes.annotate(label, place(name), offset, textcoords="offset points")
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


def draw_attentions(axes: Axes, values: dict[str, float], label: str, chosen: list[int]) -> None:
    """A value for the attention of each layer; those that are removed stand out."""
    colours = ["C3" if int(layer) in chosen else "0.6" for layer in values]
    axes.bar([int(layer) for layer in values], list(values.values()), color=colours)
    axes.set(xlabel="layer of the attention", ylabel=label)
    axes.set_xticks([int(layer) for layer in values])


def draw_removed(axes: Axes, attention: dict[str, Any]) -> None:
    """Right answers by the number of attentions that are removed, for several ways to choose."""
    ways: dict[str, list[tuple[int, float]]] = {}
    whole = attention["base"]["right"]["whole"]["all"]
    for name, one in attention.items():
        if one["remove"]:
            way = name.rpartition("-")[0]
            right = one["right"]["adapted"]["all"]
            ways.setdefault(way, []).append((one["remove"], 100 * right))
    axes.axhline(100 * whole, color="0.7")
    for way, points in ways.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=WAYS.get(way, way))
    axes.set(xlabel="removed", ylabel="right answers in %")
    axes.legend(fontsize=7)


def main() -> None:
    plt.rcParams["font.size"] = 8
    one, means = (
        json.loads((RESULTS / f"{name}.json").read_text())["cases"]
        for name in ("scenes-seed-0", "scenes")
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_depths(left, one)
    draw_quality(right, means)
    figure.savefig(HERE / "exits.png", dpi=110)
    if not (HERE / "depth.json").exists():
        return print("depth.json is missing, so depth.png is not drawn: run depth.py")
    depth = json.loads((HERE / "depth.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    draw_settings(left, depth, ("read", "walk", "follow"), "described scenes and walks")
    draw_settings(right, depth, ("go",), "steps at once")
    figure.savefig(HERE / "depth.png", dpi=110)
    if not (HERE / "attention.json").exists():
        return print("attention.json is missing, so attention.png is not drawn: run attention.py")
    attention = json.loads((HERE / "attention.json").read_text())
    found = next(one["search"] for one in attention.values() if "search" in one)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    draw_attentions(axes[0], found["loss_without_one"], "loss without it", found["chosen"])
    axes[0].set_yscale("log")
    draw_attentions(axes[1], found["scores"], "score of the search", found["chosen"])
    draw_removed(axes[2], attention)
    figure.savefig(HERE / "attention.png", dpi=110)


if __name__ == "__main__":
    main()
