"""``edgeexit check``: verifies a bundle on this device against its reference samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import print_json, print_table
from edgeexit.cli.options import bundle_argument, engine_options, output_options
from edgeexit.errors import CheckError, IntegrityError

if TYPE_CHECKING:
    from edgeexit.measure.judge import Comparison, Report
    from edgeexit.measure.quantisation_effect import Flips


def _finite(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


@click.command("check")
@bundle_argument
@engine_options
@click.option(
    "--policy", type=click.Path(path_type=Path), help="Also check the decisions of this policy."
)
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    callback=_finite,
    help="Tolerance relative to the spread of the logits over the rows (scores: absolute); "
    "default: by precision.",
)
@click.option(
    "--rtol",
    type=click.FloatRange(min=0),
    callback=_finite,
    help="Tolerance relative to the value; default: by precision.",
)
@output_options
def command(
    bundle: Path,
    engine: str,
    threads: Any,
    policy: Path | None,
    atol: float | None,
    rtol: float | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Verify a bundle on this device against its reference samples.

    Hashes every file, then compares outputs and scores of every exit, decisions or texts, the
    unsplit graphs and the preprocessing. Exit code 3 if something differs. For int8 bundles it also
    counts decisions that differ from float32.

    Examples:

    \b
    edgeexit check bundle
    edgeexit check bundle --policy policy.json --atol 1e-3
    """
    from edgeexit.bundle.reader import open_bundle
    from edgeexit.measure import judge, quantisation_effect
    from edgeexit.measure.check import check
    from edgeexit.runtime import load

    try:
        opened = open_bundle(bundle, verify="full")
    except IntegrityError as error:
        raise CheckError(error.what, fix=error.fix) from error
    flips: list[Flips] = []
    with load(opened, engine, policy=policy, threads=threads, all_scores=True) as model:
        chosen = None if policy is None else model.policy
        about = model.describe_engine()
        score = quantisation_effect.SCORE if chosen is None else model.decisions[-1].score
        if quantisation_effect.has_float32(opened):
            flips = quantisation_effect.count_flips(model, chosen)
        report = check(model, policy=chosen, atol=atol, rtol=rtol, threads=threads, closing=True)
    if as_json:
        head = {"bundle": str(bundle), "digest": opened.digest, "engine": about}
        tail = {"flips_against_float32": quantisation_effect.describe(flips)} if flips else {}
        print_json(head | judge.describe(report) | tail)
    elif not quiet:
        rows = "sample texts" if opened.manifest.decoding else "sample rows"
        title = (
            f"{bundle}: {len(opened.manifest.files)} files as exported; {report.rows} {rows} "
            f"on {about['library']} {about['version']} ({about['engine']})"
        )
        _print(report, title, verbose=bool(verbose))
        if flips:
            what = "tokens" if opened.manifest.decoding else "rows"
            _print_flips(flips, what, score, of_policy=chosen is not None)
        _print_sum(report, verbose=bool(verbose))
    report.require()


def _print(report: Report, title: str, *, verbose: bool) -> None:
    shown = [c for c in report.comparisons if verbose or not c.passed] or _worst(report.comparisons)
    print_table(
        title,
        ("where", "what", "largest difference", ""),
        [(c.where, c.what, f"{c.difference:.3g}", "ok" if c.passed else "DIFFERS") for c in shown],
    )
    for note in report.notes:
        click.echo(note)


def _print_flips(flips: list[Flips], what: str, score: str, *, of_policy: bool) -> None:
    print_table(
        f"against float32, {flips[0].rows} {what} of the calibration data, decisions "
        + ("of the policy" if of_policy else f"where {score} is at its median"),
        ("exit", "other answers", "other decisions", f"largest difference of {score}")
        + (("perplexity", "in float32") if flips[0].perplexity else ()),
        [
            (
                f.exit,
                _of(f.answers, f.rows),
                "-" if f.decisions is None else _of(f.decisions, f.rows),
                f"{f.score:.3g}",
                *(f"{one:.4g}" for one in reversed(f.perplexity or ())),
            )
            for f in flips
        ],
    )


def _print_sum(report: Report, *, verbose: bool) -> None:
    held = sum(c.passed for c in report.comparisons)
    click.echo(
        f"{held} of {len(report.comparisons)} comparisons passed "
        f"(atol {report.atol:g}, rtol {report.rtol:g})" + ("" if verbose else "; -v shows all")
    )


def _of(count: int, rows: int) -> str:
    """A count and its share.

    >>> _of(3, 200)
    '3 (1.5 %)'
    """
    return f"{count} ({100 * count / rows:.1f} %)"


def _worst(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparison with the largest difference for each place."""
    worst: dict[str, Comparison] = {}
    for one in comparisons:
        before = worst.get(one.where)
        if before is None or one.difference > before.difference:
            worst[one.where] = one
    return list(worst.values())
