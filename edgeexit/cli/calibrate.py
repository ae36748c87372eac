"""``edgeexit calibrate``: from a trace to a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import (
    fraction,
    json_option,
    print_json,
    print_table,
    share,
    verbosity_options,
)
from edgeexit.errors import PolicyError

if TYPE_CHECKING:
    import numpy as np

    from edgeexit.measure.calibrate import Curve

POINTS_SHOWN, POINTS_PRINTED = 20, 1000


@click.command("calibrate")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--max-risk",
    required=True,
    metavar="SHARE",
    help="Largest mean loss against the last exit, as in 0.5% or 0.005.",
)
@click.option("--score", help="Which score; default: max_prob.")
@click.option(
    "--risk",
    type=click.Choice(["consistency", "performance"]),
    default="consistency",
    show_default=True,
    help="Loss: another prediction than the last exit's, or a mistake that it does not make.",
)
@click.option("--per-exit", is_flag=True, help="A threshold for each exit, found greedily.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Refuse a trace of another bundle.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The policy (.json)."
)
@json_option
@verbosity_options
def command(
    trace: Path,
    max_risk: str,
    score: str | None,
    risk: str,
    per_exit: bool,
    bundle: Path | None,
    output: Path,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Choose thresholds from a trace for a risk that is acceptable.

    Takes the loosest threshold whose measured risk, and that of every stricter one, stays within
    --max-risk. Exit code 3 if none does. The figures are measured on this data, not certified.

    \b
    edgeexit calibrate trace.npz --max-risk 0.5% -o policy.json
    """
    from edgeexit.measure.calibrate import calibrate, default_score, figures
    from edgeexit.measure.files import check_output
    from edgeexit.measure.trace import read_trace
    from edgeexit.runtime import write_policy

    limit = fraction(max_risk, "--max-risk")
    check_output(output)
    recorded = read_trace(trace)
    if bundle is not None:
        from edgeexit.bundle.reader import open_bundle

        digest = open_bundle(bundle).digest
        if digest != recorded.bundle:
            raise PolicyError(
                f"{trace}: made with the bundle {recorded.bundle[:12]}…, "
                f"{bundle} is {digest[:12]}…",
                fix="Trace this bundle.",
            )
    chosen_score = default_score(recorded, score)
    made, curve, chosen = calibrate(
        recorded,
        max_risk=limit,
        score=chosen_score,
        risk=risk,  # type: ignore[arg-type]
        per_exit=per_exit,
    )
    write_policy(made, output)
    exits = figures(recorded, chosen_score)
    about = made.calibration
    if as_json:
        print_json(
            {
                "policy": str(output),
                "thresholds": made.thresholds,
                "score": made.score,
                "bundle": made.bundle,
                "engine": made.engine,
                "calibration": about,
                "exits": [
                    {
                        "name": one.name,
                        "accuracy": one.accuracy,
                        "agreement": one.agreement,
                        "auroc": one.auroc,
                        "cumulative_ms": one.cumulative_ms,
                    }
                    for one in exits
                ],
                "curve": _points(
                    curve, recorded.exits, _some(curve, chosen, POINTS_PRINTED), chosen
                ),
                "curve_points": len(curve.thresholds),
            }
        )
        return
    if quiet:
        return
    print_table(
        f"{recorded.data.get('name', trace)}: {recorded.rows} rows; every exit on its own",
        ("exit", "accuracy", "agrees with last", f"AUROC {chosen_score}", "ms up to it"),
        [
            (
                one.name,
                share(one.accuracy),
                share(one.agreement),
                "-" if one.auroc != one.auroc else f"{one.auroc:.3f}",
                f"{one.cumulative_ms:.3f}",
            )
            for one in exits
        ],
    )
    click.echo("")
    print_table(
        f"one threshold for {chosen_score}, strict to loose "
        f"({len(curve.thresholds)} distinct outcomes)",
        ("threshold", "risk", "mean depth", "ms", *recorded.exits, ""),
        [
            (
                "never" if p["threshold"] == "never" else f"{p['threshold']:.4f}",
                share(p["risk"]),
                f"{p['mean_depth']:.2f}",
                f"{p['expected_ms']:.3f}",
                *(f"{100 * value:.0f} %" for value in p["exit_shares"].values()),
                "<- chosen" if p["chosen"] else "",
            )
            for p in _points(curve, recorded.exits, _some(curve, chosen, POINTS_SHOWN), chosen)
        ],
    )
    click.echo("")
    click.echo(
        f"{output}: {risk} risk {share(about['measured_risk'])} on {about['n']} rows (allowed "
        f"{share(limit)}), {about['expected_ms']:.3f} ms expected against "
        f"{about['full_ms']:.3f} ms at full depth. Measured, not certified."
    )


def _some(curve: Curve, chosen: int, count: int) -> list[int]:
    """At most `count` points, evenly over the curve, with the first, the chosen and the last."""
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


def _threshold(value: np.float64) -> float | str:
    return "never" if value == float("inf") else float(value)
