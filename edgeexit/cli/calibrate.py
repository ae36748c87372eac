"""``edgeexit calibrate``: makes a policy from a trace."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import fraction, print_json, print_table, share, warn
from edgeexit.cli.options import output_options, overwrite_option
from edgeexit.errors import PolicyError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from edgeexit.bundle.policy import Policy
    from edgeexit.measure.calibrate import Curve, ExitFigures
    from edgeexit.measure.trace import Trace

POINTS_SHOWN, POINTS_PRINTED = 20, 1000

TEXTS_WITHOUT_LOSS = 0.9
"""With fewer texts without any loss, `calibrate` warns."""


@click.command("calibrate")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--max-risk",
    metavar="SHARE",
    help="Maximum mean loss against the last exit, as a share: 0.5% or 0.005.  [required]",
)
@click.option("--score", help="Score to compare with thresholds; default: max_prob.")
@click.option(
    "--risk",
    type=click.Choice(["consistency", "performance"]),
    default="consistency",
    show_default=True,
    help="Definition of a loss. consistency: the prediction differs from the last exit's; "
    "performance: it is wrong and the last exit is right (needs labels).",
)
@click.option("--per-exit", is_flag=True, help="One threshold per exit, found greedily.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Refuse a trace of another bundle.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The policy (.json)."
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also plot the trade-off to this file (.png or .svg; needs matplotlib).",
)
@overwrite_option
@output_options
def command(
    trace: Path,
    max_risk: str | None,
    score: str | None,
    risk: Any,
    per_exit: bool,
    bundle: Path | None,
    output: Path,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Choose thresholds from a trace for a maximum risk.

    Takes the loosest threshold whose measured risk, and that of every stricter threshold, is within
    --max-risk. Exit code 3 if there is none. The figures are measured on this data, not certified.
    A warning says if it has too few rows to show the risk.

    Examples:

    \b
    edgeexit calibrate trace.npz --max-risk 0.5% -o policy.json
    edgeexit calibrate trace.npz --max-risk 1% --risk performance --per-exit -o policy.json
    edgeexit calibrate trace.npz --max-risk 0.5% -o policy.json --plot trade-off.png
    """
    from edgeexit.bundle.files import check_output
    from edgeexit.measure.calibrate import calibrate, default_score, figures
    from edgeexit.measure.plots import check_plot, plot_calibration
    from edgeexit.measure.trace_file import read_trace

    limit = _limit(max_risk, quiet=quiet)
    check_output(output, trace, overwrite=overwrite)
    if plot is not None:
        check_plot(plot, trace, output, overwrite=overwrite)
    recorded = read_trace(trace)
    if bundle is not None:
        _require_bundle(recorded, trace, bundle)
    if len(recorded.exits) < 2:
        raise UsageError(
            f"{trace}: the chain {recorded.chain} has no early exit, so there is nothing to "
            "calibrate",
            fix="Export the model with exits in this chain (edgeexit export --exits).",
        )
    score = default_score(recorded, score)
    policy, curve, chosen = calibrate(
        recorded, max_risk=limit, score=score, risk=risk, per_exit=per_exit
    )
    _write(policy, output, overwrite=overwrite)
    for doubt in policy.calibration["warnings"] if not quiet else ():
        warn(doubt)
    exits = figures(recorded, score)
    if plot is not None:
        plot_calibration(
            plot, curve, chosen, exits, policy.calibration, score=score, overwrite=overwrite
        )
    if as_json:
        points = _points(curve, recorded.exits, _some(curve, chosen, POINTS_PRINTED), chosen)
        print_json({"policy": str(output)} | _facts(policy, recorded, exits, curve, points))
    elif not quiet:
        _print_exits(recorded, trace, exits, score)
        click.echo("")
        _print_curve(curve, recorded.exits, chosen, score, "common" if per_exit else "chosen")
        if per_exit:
            click.echo("")
            _print_thresholds(policy, recorded)
        elif note := _not_monotone(curve, chosen, score):
            click.echo(note)
        click.echo("")
        click.echo(f"{output}: {_summary(policy.calibration, recorded)}")
    if not quiet:
        _warn_of_texts(policy.calibration)


def _limit(max_risk: str | None, *, quiet: bool) -> float:
    """Reads ``--max-risk``, and says how a number without ``%`` was understood."""
    if max_risk is None:
        raise UsageError(
            "--max-risk is missing: the share of rows that may lose by stopping early",
            fix="Give a share, as in --max-risk 0.5%.",
        )
    limit = fraction(max_risk, "--max-risk")
    if not max_risk.strip().endswith("%") and limit and not quiet:
        click.echo(f"--max-risk {max_risk} is a risk of {100 * limit:.3g} %", err=True)
    return limit


def _write(policy: Policy, output: Path, *, overwrite: bool) -> None:
    """Writes the policy; of several processes that write one file, one succeeds."""
    from edgeexit.bundle.files import write_atomic
    from edgeexit.bundle.policy import write_policy

    with tempfile.TemporaryDirectory(prefix="edgeexit-") as folder:
        own = Path(folder) / "policy.json"
        write_policy(policy, own)
        content = own.read_bytes()
    write_atomic(output, lambda file: file.write(content), overwrite=overwrite)


def _require_bundle(recorded: Trace, trace: Path, bundle: Path) -> None:
    from edgeexit.bundle.reader import open_bundle

    digest = open_bundle(bundle).digest
    if digest != recorded.bundle:
        raise PolicyError(
            f"{trace}: trace of the bundle {recorded.bundle[:12]}…, {bundle} is {digest[:12]}…",
            fix="Trace this bundle.",
        )


def _facts(
    policy: Policy,
    trace: Trace,
    exits: list[ExitFigures],
    curve: Curve,
    points: list[dict[str, Any]],
) -> dict[str, Any]:
    from dataclasses import asdict

    rule = policy.rules[trace.chain]
    return {
        "chain": trace.chain,
        "thresholds": rule.thresholds,
        "score": rule.score,
        "bundle": policy.bundle,
        "engine": policy.engine,
        "calibration": policy.calibration,
        "exits": [asdict(one) for one in exits],
        "curve": points,
        "curve_points": len(curve.thresholds),
    }


def _print_exits(trace: Trace, path: Path, exits: list[ExitFigures], score: str) -> None:
    rows = "rows" if trace.texts is None else f"tokens of {trace.texts} texts"
    texts = trace.next_log_probs is not None
    print_table(
        f"{trace.data.get('name', path)}: {trace.rows} {rows}; each exit alone",
        ("exit", "accuracy", "agrees with last", f"AUROC {score}", "ms up to it")
        + (("perplexity",) if texts else ()),
        [
            (
                one.name,
                share(one.accuracy),
                share(one.agreement),
                "-" if one.auroc != one.auroc else f"{one.auroc:.3f}",
                f"{one.cumulative_ms:.3f}",
                *([f"{one.perplexity:.4g}"] if texts else []),
            )
            for one in exits
        ],
        notes=[
            f"AUROC: how well {score} ranks {'rows' if trace.texts is None else 'tokens'} on which "
            "the exit agrees with the last above the others (0.5: not at all, 1: perfectly)"
        ],
    )


def _print_curve(curve: Curve, exits: list[str], chosen: int, score: str, mark: str) -> None:
    points = _points(curve, exits, _some(curve, chosen, POINTS_SHOWN), chosen)
    print_table(
        f"one threshold for {score}, strict to loose ({len(curve.thresholds)} distinct results)",
        ("threshold", "risk", "mean segments", "ms", *exits, ""),
        [
            (
                threshold,
                share(p["risk"]),
                f"{p['mean_depth']:.2f}",
                f"{p['expected_ms']:.3f}",
                *(f"{100 * value:.0f} %" for value in p["exit_shares"].values()),
                f"<- {mark}" if p["chosen"] else "",
            )
            for threshold, p in zip(
                _distinct([p["threshold"] for p in points]), points, strict=True
            )
        ],
    )


def _print_thresholds(policy: Policy, trace: Trace) -> None:
    """The thresholds that were chosen for single exits."""
    thresholds = policy.rules[trace.chain].thresholds
    assert isinstance(thresholds, dict)
    shares = policy.calibration["exit_shares"]
    print_table(
        "chosen: a threshold per exit",
        ("exit", "threshold", "exits there"),
        [
            (name, shown, share(shares[name]))
            for name, shown in zip(
                thresholds, _distinct(list(map(_threshold, thresholds.values()))), strict=True
            )
        ],
    )


def _not_monotone(curve: Curve, chosen: int, score: str) -> str:
    """A note if a looser threshold looks better than the chosen one; otherwise empty."""
    from edgeexit.measure.calibrate import looser_and_better

    looser = looser_and_better(curve, chosen)
    if looser is None:
        return ""
    worst = float(curve.risks[chosen:looser].max())
    one = float(curve.thresholds[looser])
    return (
        f"note: {one:.4g} keeps the risk, too ({share(float(curve.risks[looser]))}, "
        f"{curve.expected_ms[looser]:.3f} ms), but stricter thresholds do not (up to "
        f"{share(worst)}): {score} hardly tells right from wrong here; try another --score, or "
        "--per-exit"
    )


def _warn_of_texts(about: dict[str, Any]) -> None:
    """Warns if a risk per token leaves few texts without a loss."""
    texts = about.get("risk_of_texts")
    if texts is not None and texts["share_without_loss"] < TEXTS_WITHOUT_LOSS:
        warn(
            f"only {share(texts['share_without_loss'])} of {about['texts']} texts have no loss; "
            f"the largest has {share(texts['largest'])}. --max-risk is a share of tokens: where "
            "whole answers must stay the same, use a much lower one"
        )


def _distinct(thresholds: Sequence[float | str]) -> list[str]:
    """Thresholds with four decimals, or with as many as show that they differ.

    >>> _distinct(["never", 0.99991, 0.99992]), _distinct([0.5, 0.5])
    (['never', '0.99991', '0.99992'], ['0.5000', '0.5000'])
    """
    different = len(set(thresholds))
    for decimals in range(4, 17):
        found = [one if isinstance(one, str) else f"{one:.{decimals}f}" for one in thresholds]
        if len(set(found)) == different:
            break
    return found


def _summary(about: dict[str, Any], trace: Trace) -> str:
    rows = "rows" if trace.texts is None else "tokens"
    text = (
        f"{about['risk']} risk {share(about['measured_risk'])} on {about['n']} {rows} (allowed "
        f"{share(about['max_risk'])}), {about['expected_ms']:.3f} ms expected against "
        f"{about['full_ms']:.3f} ms at full depth. "
    )
    if "perplexity" in about:
        text += (
            f"Perplexity {about['perplexity']:.4g}, at full depth {about['perplexity_full']:.4g}. "
        )
    texts = about.get("risk_of_texts")
    if texts is not None and texts["share_without_loss"] >= TEXTS_WITHOUT_LOSS:
        text += (
            f"Of {about['texts']} texts, {share(texts['share_without_loss'])} have no loss; the "
            f"largest has {share(texts['largest'])}. "
        )
    return text + "Measured, not certified."


def _some(curve: Curve, chosen: int, count: int) -> list[int]:
    """At most `count` evenly spaced points of the curve, with the first, the chosen and the last
    point."""
    total = len(curve.thresholds)
    if total <= count:
        return list(range(total))
    spread = {round(i * (total - 1) / (count - 1)) for i in range(count)}
    return sorted(spread | {chosen})


def _points(curve: Curve, exits: list[str], points: list[int], chosen: int) -> list[dict[str, Any]]:
    return [
        {
            "threshold": _threshold(curve.thresholds[point]),
            "risk": float(curve.risks[point]),
            "mean_depth": float(curve.depths[point]),
            "expected_ms": float(curve.expected_ms[point]),
            "exit_shares": dict(zip(exits, curve.shares[point].tolist(), strict=True)),
            "chosen": point == chosen,
        }
        for point in points
    ]


def _threshold(value: np.float64 | float) -> float | str:
    return "never" if value == float("inf") else float(value)
