"""Plots of the results of `calibrate` and `bench`, as PNG or SVG by the file's suffix.

`check_plot` checks the file name before a measurement; `plot_calibration` and `plot_bench` plot the
data of the printed tables. matplotlib (the extra ``plot``) is imported when a plot is drawn,
without pyplot, so that no window, display or global state is involved.

Colours are from the palette of Okabe and Ito for colour-blind readers; shapes differ too.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexit.bundle.files import check_output, write_atomic
from edgeexit.errors import MeasurementError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from edgeexit.measure.calibrate import Curve, ExitFigures

SUFFIXES = (".png", ".svg")
POINTS = 2000
"""Maximum number of plotted points of a curve: more than the width in pixels."""
RISKS = {
    "consistency": "whose prediction differs from the last exit's",
    "performance": "that the last exit predicts right and the policy wrong",
}
BLUE, ORANGE, GREY, DARK = "#0072B2", "#D55E00", "#B8B8B8", "#404040"
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # user names may contain $
    "font.family": "DejaVu Sans",  # shipped with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DARK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",  # keep text as text, to search and copy
    "svg.hashsalt": "edgeexit",  # equal figures give equal files
}


def check_plot(path: Path, *others: str | os.PathLike[str] | None, overwrite: bool = True) -> None:
    """Checks the file name of a plot before a measurement.

    Args:
        path: File of the plot.
        others: Other input and output files.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UsageError: The suffix is neither .png nor .svg, or the file cannot be written there.
        MeasurementError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--plot {path}: unsupported suffix {path.suffix or '(none)'}",
            fix="Give a file that ends in .png or .svg.",
        )
    try:
        check_output(path, *others, overwrite=overwrite)
    except UsageError as error:
        error.fix = error.fix.replace("-o", "--plot")
        raise
    for other in others:
        if other is not None and Path(other).resolve() == path.resolve():
            raise UsageError(
                f"--plot {path}: -o has the same file", fix="Give the plot another name."
            )
    if importlib.util.find_spec("matplotlib") is None:
        raise MeasurementError(
            "--plot needs matplotlib, which is not installed",
            fix='Install it: pip install "edgeexit[plot]".',
        )


def plot_calibration(
    path: Path,
    curve: Curve,
    chosen: int,
    exits: Sequence[ExitFigures],
    calibration: Mapping[str, Any],
    *,
    score: str,
    overwrite: bool = True,
) -> None:
    """Plots the trade-off of a calibration: risk against threshold and mean depth, each exit alone,
    and the share of rows that it answers.

    Args:
        path: Ends in .png or .svg.
        curve: Every result of a common threshold.
        chosen: Index of the chosen point.
        exits: Figures of every exit, in order.
        calibration: `Policy.calibration` of the chosen policy.
        score: The score that is compared with thresholds.
        overwrite: Whether an existing file may be replaced.
    """
    what = "tokens" if "texts" in calibration else "rows"
    with _figure(path, width=10.0, height=7.0, overwrite=overwrite) as figure:
        (left, right), (below, shares) = figure.subplots(2, 2)
        risk = RISKS[calibration["risk"]]
        data = calibration["data"].get("name", "")
        _title(figure, f"{data}, {calibration['n']} {what}; risk: share of {what} {risk}")
        _draw_risk(left, right, curve, chosen, calibration)
        left.set_xlabel(f"threshold for {score}, from strict to loose")
        right.set_xlabel(f"mean depth (segments per {what[:-1]})")
        _draw_exits(below, exits)
        below.set_ylabel(f"share of {what} (%)")
        below.set_title("Each exit alone")
        _bars(shares, list(calibration["exit_shares"].values()), [one.name for one in exits])
        shares.set_ylabel(f"share of {what} (%)")
        shares.set_title("Exits taken with the chosen policy")


def plot_bench(path: Path, result: Mapping[str, Any], *, overwrite: bool = True) -> None:
    """Plots a result of `edgeexit.measure.bench.bench.bench` against the unsplit model.

    Rows one at a time: the time of every exit's path; full batches: rows per second. Language
    models: tokens per second and the time to the first token, of every mode.

    Args:
        path: Ends in .png or .svg.
        result: The object that ``edgeexit bench --json`` prints.
        overwrite: Whether an existing file may be replaced.
    """
    machine, data = result["environment"], result["data"]["name"]
    height = max(3.2, 1.6 + 0.3 * _lines(result))
    with _figure(path, width=10.0, height=height, overwrite=overwrite) as figure:
        engine = machine["engine"]
        _title(
            figure,
            f"{machine['bundle']['name']} on {data}; {machine['processor']}, "
            f"{engine['library']} {engine['version']} ({engine['engine']})",
        )
        if "modes" in result:
            _draw_modes(figure, result)
        elif result["mode"] == "latency":
            _draw_latency(figure, result)
        else:
            _draw_throughput(figure, result)


def _lines(result: Mapping[str, Any]) -> int:
    """Number of lines that the plot needs space for."""
    if "modes" in result:
        return len(result["modes"]) + 1
    return len(result["exits"]) + (2 if result["mode"] == "latency" else 6)


@contextmanager
def _figure(path: Path, *, width: float, height: float, overwrite: bool) -> Iterator[Figure]:
    """A figure in this module's style, not the user's; written to the file at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        kind = path.suffix.lower().removeprefix(".")
        drawn = io.BytesIO()
        figure.savefig(
            drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {}
        )
    write_atomic(path, lambda file: file.write(drawn.getvalue()), overwrite=overwrite)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=12)


def _draw_risk(
    left: Axes, right: Axes, curve: Curve, chosen: int, calibration: Mapping[str, Any]
) -> None:
    """Plots the curve over thresholds and over depths, with the limit and the chosen point."""
    count = len(curve.thresholds)
    points = np.unique(np.r_[np.linspace(0, count - 1, min(count, POINTS)).round(), chosen])
    points = points.astype(np.int64)
    risks, limit = 100 * curve.risks, 100 * calibration["max_risk"]
    finite = points[np.isfinite(curve.thresholds[points])]
    left.step(curve.thresholds[finite], risks[finite], where="post", color=BLUE)
    left.invert_xaxis()
    right.plot(curve.depths[points], risks[points], color=BLUE)
    for axes, what, x in ((left, "threshold", curve.thresholds), (right, "depth", curve.depths)):
        axes.axhline(limit, color=DARK, linewidth=1, linestyle="--", label=f"allowed {limit:g} %")
        axes.plot(
            x[chosen],
            risks[chosen],
            "o",
            color=ORANGE,
            markersize=9,
            label=f"chosen: {what} {x[chosen]:.4g} (risk {risks[chosen]:.2f} %)",
        )
        axes.set_ylim(0, 1.35 * (max(limit, risks.max()) or 1))  # room for the legend
    if calibration["method"] != "sweep":
        depth, risk = calibration["mean_depth"], 100 * calibration["measured_risk"]
        name = f"threshold per exit: depth {depth:.4g} (risk {risk:.2f} %)"
        right.plot(depth, risk, "D", color=DARK, markersize=8, label=name)
    for axes in (left, right):
        axes.set_ylabel("risk (%)")
    left.legend(loc="upper left")
    right.legend(loc="upper right")
    left.set_title("Risk against threshold")
    right.set_title("Risk against depth")


def _draw_exits(axes: Axes, exits: Sequence[ExitFigures]) -> None:
    """Agreement with the last exit, and accuracy where there are labels."""
    places = np.arange(len(exits))
    agreement = [100 * one.agreement for one in exits]
    accuracy = [100 * one.accuracy for one in exits]
    axes.plot(places, agreement, "o-", color=BLUE, label="same prediction as the last exit")
    if np.isfinite(accuracy).any():
        axes.plot(places, accuracy, "s--", color=ORANGE, label="right prediction")
    _name(axes, [one.name for one in exits])
    limits = axes.get_ylim()
    _up_to_100(axes.yaxis)
    axes.set_ylim(*limits)
    axes.legend(loc="best")


def _bars(axes: Axes, shares: Sequence[float], names: Sequence[str]) -> None:
    """Shares as bars, in percent."""
    values = [100 * share for share in shares]
    drawn = axes.bar(np.arange(len(values)), values, color=BLUE)
    axes.bar_label(drawn, [_percent(value) for value in values], fontsize=9)
    _name(axes, names)
    axes.set_ylim(0, 1.08 * max(values))
    _up_to_100(axes.yaxis)


def _up_to_100(axis: Axis) -> None:
    """Leaves out ticks above 100 %: the room there is for labels."""
    axis.set_ticks([tick for tick in axis.get_ticklocs() if 0 <= tick <= 100])


def _percent(value: float) -> str:
    return f"{value:.0f}" if value == 0 or value >= 10 else f"{value:.1f}"


def _name(axes: Axes, names: Sequence[str]) -> None:
    """Writes names under an axis, rotated if they are too long."""
    turned: dict[str, Any] = {}
    if sum(map(len, names)) > 40:
        turned = {"rotation": 45, "ha": "right"} if len(names) <= 12 else {"rotation": 90}
    axes.set_xticks(np.arange(len(names)), _short(names), **turned)


def _short(names: Sequence[str]) -> list[str]:
    """Shortens long names."""
    return [name if len(name) <= 20 else f"{name[:19]}…" for name in names]


def _draw_latency(figure: Figure, result: Mapping[str, Any]) -> None:
    """Time per row of every path: the median, and a line to the 90th percentile."""
    natural, unsplit_ms = result["natural"], result["unsplit"]["p50_ms"]
    lanes = [("unsplit", result["unsplit"])]
    lanes += [(one["name"], one) for one in result["exits"]]
    if natural is None:
        axes = figure.subplots()
    else:
        lanes.append(("natural exits", natural))
        axes, beside = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_rates(beside, result)
    for place, (name, found) in enumerate(lanes):
        colour = {"unsplit": DARK, "natural exits": ORANGE}.get(name, BLUE)
        # Up to p90 only: longer times come from other load and would dominate the plot.
        median, end = found["p50_ms"], found.get("p90_ms", found["p50_ms"])
        axes.plot([median, end], [place, place], color=colour, linewidth=3)
        axes.plot(median, place, "o", color=colour)
        ratio = found.get("ratio_to_unsplit")
        said = f", {ratio:.2f} x unsplit" if ratio else ""
        if name == "natural exits":
            said += ", weighted by rate"
        _label(axes, f"{median:.3f} ms{said}", max(end, unsplit_ms), place)  # right of the line
    axes.axvline(unsplit_ms, color=DARK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(lanes)), _short([name for name, _ in lanes]))
    axes.invert_yaxis()
    axes.set_xlim(0, (1.7 if natural else 1.5) * axes.get_xlim()[1])
    axes.set_xlabel("time per row (ms); dot: median, line: to the 90th percentile")
    axes.set_title("Time up to each exit")


def _draw_throughput(figure: Figure, result: Mapping[str, Any]) -> None:
    """Rows per second of full batches."""
    natural = result["natural"]
    bars = [("unsplit", result["unsplit"]["rows_per_s"], 0.0, GREY)]
    labels = [f"{result['unsplit']['rows_per_s']:.0f}"]
    if natural is None:
        axes = figure.subplots()
    else:
        bars.append(("natural exits", natural["rows_per_s"], 0.0, BLUE))
        labels.append(
            f"{natural['rows_per_s']:.0f}, time {natural['ratio_to_unsplit']:.2f} x unsplit"
        )
        axes, below = figure.subplots(2, 1, height_ratios=[2, len(result["exits"])])
        _draw_rates(below, result)
    _lying_bars(axes, bars, labels)
    axes.set_xlabel(f"rows per second, batches of {result['data']['batch']} rows")
    axes.set_title("Throughput")


def _draw_rates(axes: Axes, result: Mapping[str, Any]) -> None:
    """Plots the share of rows per exit."""
    rows = [(one["name"], 100 * one["rate"], 0.0, BLUE) for one in result["exits"]]
    _lying_bars(axes, rows, [_percent(rate) for _, rate, _, _ in rows])
    _up_to_100(axes.xaxis)
    axes.set_xlabel("share of rows (%)")
    axes.set_title(f"Exits taken (score {result['policy']['score']})")


def _draw_modes(figure: Figure, result: Mapping[str, Any]) -> None:
    """Tokens per second and time to the first token of every mode."""
    speed, first = figure.subplots(1, 2, width_ratios=[3, 2])
    lanes: list[tuple[str, Mapping[str, Any]]] = [("unsplit", result["unsplit"])]
    lanes += list(result["modes"].items())
    bars, labels, prefills = [], [], []
    for name, found in lanes:
        ours = found.get("time_against_unsplit")
        half = 0.0 if ours is None else found["tokens_per_s"] * ours["decode_spread"] / 2
        colour = GREY if ours is None else BLUE
        bars.append((name, found["tokens_per_s"], half, colour))
        prefills.append((name, found["prefill_ms"], 0.0, colour))
        ratio = "" if ours is None else f", time {ours['decode']:.2f} x unsplit"
        labels.append(f"{found['tokens_per_s']:.0f}{ratio}")
    _lying_bars(speed, bars, labels)
    _lying_bars(first, prefills, [f"{found['prefill_ms']:.3g}" for _, found in lanes])
    speed.set_xlabel("tokens per second after the first; line: quartile distance over turns")
    speed.set_title(f"Decoding, {result['new_tokens']} tokens per prompt")
    speed.set_xlim(0, 1.2 * speed.get_xlim()[1])
    first.set_xlabel("time to the first token (ms)")
    first.set_title("Prefill")


def _lying_bars(
    axes: Axes, bars: Sequence[tuple[str, float, float, str]], labels: Sequence[str]
) -> None:
    """Horizontal bars, each ``(name, value, half of its spread, colour)``, with a label behind.

    The first bar is on top.
    """
    for place, ((_, value, half, colour), label) in enumerate(zip(bars, labels, strict=True)):
        axes.barh(place, value, color=colour, xerr=half or None, ecolor=DARK)
        _label(axes, label, value + half, place)
    axes.set_yticks(range(len(bars)), _short([name for name, *_ in bars]))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(value + half for _, value, half, _ in bars))


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    """Writes a label beside a point, on top of lines."""
    axes.annotate(
        text,
        (x, y),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        bbox={"color": "white", "pad": 0.5},
    )
