"""``edgeexit check``: is this bundle right on this device?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli.common import (
    bundle_argument,
    engine_option,
    json_option,
    print_json,
    print_table,
    threads_option,
    verbosity_options,
)
from edgeexit.errors import CheckError, IntegrityError

if TYPE_CHECKING:
    from edgeexit.measure.check import Comparison


@click.command("check")
@bundle_argument
@engine_option
@threads_option
@click.option(
    "--policy", type=click.Path(path_type=Path), help="Check the decisions of this policy too."
)
@click.option(
    "--atol", type=click.FloatRange(min=0), help="Absolute tolerance; default: by precision."
)
@click.option(
    "--rtol", type=click.FloatRange(min=0), help="Relative tolerance; default: by precision."
)
@json_option
@verbosity_options
def command(
    bundle: Path,
    engine: str,
    threads: int | str,
    policy: Path | None,
    atol: float | None,
    rtol: float | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Verify a bundle on this device against its reference samples.

    Hashes every file, then compares every exit's outputs and scores, the decisions of the chain,
    the unsplit graph and the preprocessing. Exit code 3 if something differs. For int8 bundles it
    also counts the decisions that are not those of float32.

    \b
    edgeexit check bundle
    edgeexit check bundle --policy policy.json --atol 1e-3
    """
    from edgeexit.bundle.reader import open_bundle
    from edgeexit.measure import quantisation_effect
    from edgeexit.measure.check import check, describe
    from edgeexit.measure.check_decode import check_decoder
    from edgeexit.runtime import load, load_decoder, read_policy

    try:
        opened = open_bundle(bundle, verify="full")
    except IntegrityError as error:
        raise CheckError(error.what, fix=error.fix) from error
    flipped: list[quantisation_effect.Flips] = []
    chosen = None if policy is None else read_policy(policy)
    if opened.manifest.program == "decode":
        with load_decoder(opened, engine, policy=chosen, threads=threads) as decoder:  # type: ignore[arg-type]
            report = check_decoder(decoder, atol=atol, rtol=rtol, threads=threads)  # type: ignore[arg-type]
            about = decoder.describe_engine()
            if quantisation_effect.has_float32(opened):
                flipped = quantisation_effect.count_decoder_flips(decoder, chosen)
    else:
        with load(opened, engine, threads=threads, all_scores=True) as model:  # type: ignore[arg-type]
            report = check(model, policy=chosen, atol=atol, rtol=rtol, threads=threads)  # type: ignore[arg-type]
            about = model.describe_engine()
            if quantisation_effect.has_float32(opened):
                flipped = quantisation_effect.count_flips(model, chosen)
    if as_json:
        head = {"bundle": str(bundle), "digest": opened.digest, "engine": about}
        tail = {"flips_against_float32": quantisation_effect.describe(flipped)} if flipped else {}
        print_json(head | describe(report) | tail)
    elif not quiet:
        shown = [c for c in report.comparisons if verbose or not c.passed] or _worst(
            report.comparisons
        )
        print_table(
            f"{bundle}: {len(opened.manifest.files)} files as exported; {report.rows} sample rows "
            f"on {about['library']} {about['version']} ({about['engine']})",
            ("where", "what", "largest difference", ""),
            [
                (c.where, c.what, f"{c.difference:.3g}", "ok" if c.passed else "DIFFERS")
                for c in shown
            ],
        )
        for note in report.notes:
            click.echo(note)
        if flipped:
            what = "tokens" if opened.manifest.program == "decode" else "rows"
            score = quantisation_effect.SCORE if chosen is None else chosen.score
            print_table(
                f"against float32, {flipped[0].rows} {what} of the calibration data, decisions "
                + ("of the policy" if chosen else f"where {score} is at its median"),
                ("exit", "other answers", "other decisions", f"largest difference of {score}"),
                [
                    (
                        f.exit,
                        _of(f.answers, f.rows),
                        "-" if f.decisions is None else _of(f.decisions, f.rows),
                        f"{f.score:.3g}",
                    )
                    for f in flipped
                ],
            )
        held = sum(c.passed for c in report.comparisons)
        click.echo(
            f"{held} of {len(report.comparisons)} comparisons hold "
            f"(atol {report.atol:g}, rtol {report.rtol:g})" + ("" if verbose else "; -v shows all")
        )
    report.require()


def _of(count: int, rows: int) -> str:
    """A count and its share.

    >>> _of(3, 200)
    '3 (1.5 %)'
    """
    return f"{count} ({100 * count / rows:.1f} %)"


def _worst(comparisons: list[Comparison]) -> list[Comparison]:
    """The largest difference of each place."""
    worst: dict[str, Comparison] = {}
    for one in comparisons:
        before = worst.get(one.where)
        if before is None or one.difference > before.difference:
            worst[one.where] = one
    return list(worst.values())
