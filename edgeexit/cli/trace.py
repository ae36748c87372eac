"""``edgeexit trace``: what every exit says about a data set."""

from __future__ import annotations

from pathlib import Path

import click

from edgeexit.cli.common import (
    add_current_directory,
    bundle_argument,
    engine_option,
    json_option,
    print_json,
    progress_bar,
    threads_option,
    verbosity_options,
)
from edgeexit.errors import UsageError


@click.command("trace")
@bundle_argument
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help=".npz, .jsonl, a folder of images, or module:function.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The trace (.npz)."
)
@engine_option
@threads_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows that run together; times are per batch of this size.",
)
@json_option
@verbosity_options
def command(
    bundle: Path,
    data: str,
    output: Path,
    engine: str,
    threads: int | str,
    batch_size: int,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Record every exit's scores and predictions for a data set.

    \b
    edgeexit trace bundle --data validation.npz -o trace.npz
    """
    from edgeexit.bundle.reader import open_bundle
    from edgeexit.measure.data import open_data
    from edgeexit.measure.files import check_output
    from edgeexit.measure.trace import record, write_trace
    from edgeexit.runtime import load

    check_output(output)
    add_current_directory()
    opened_bundle = open_bundle(bundle)
    if opened_bundle.manifest.program == "decode":
        raise UsageError(
            f"{bundle} writes text, and trace takes no language models yet",
            fix="Try thresholds of its exits out: run --mode fast --threshold 0.6 --audit.",
        )
    with load(opened_bundle, engine, threads=threads, all_scores=True) as model:  # type: ignore[arg-type]
        opened = open_data(data, model.bundle)
        with progress_bar(quiet) as progress:
            trace = record(model, opened, batch_size, progress=progress)
    write_trace(trace, output)
    segment_ms = dict(zip(trace.exits, trace.segment_ms().tolist(), strict=True))
    if as_json:
        print_json(
            {
                "trace": str(output),
                "bundle": trace.bundle,
                "engine": trace.engine,
                "data": trace.data,
                "rows": trace.rows,
                "labelled": trace.labels is not None,
                "exits": trace.exits,
                "scores": list(trace.scores),
                "batch_size": batch_size,
                "segment_ms": segment_ms,
            }
        )
    elif not quiet:
        labels = "with labels" if trace.labels is not None else "without labels"
        click.echo(
            f"{output}: {trace.rows} rows {labels}, {len(trace.exits)} exits, "
            f"{sum(segment_ms.values()):.3f} ms per batch of {batch_size} at full depth"
        )
