"""``edgeexit trace``: records every exit's scores and predictions for a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli.common import add_current_directory, print_json, progress_bar, warn
from edgeexit.cli.options import bundle_argument, engine_options, output_options, overwrite_option
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.measure.trace import Trace
    from edgeexit.runtime import Model


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
@click.option("--chain", metavar="NAME", help="The chain to trace; default: the one that answers.")
@click.option(
    "--gates",
    is_flag=True,
    help="Vision-language models: trace the gates that drop image tokens instead of exits.",
)
@click.option(
    "--policy",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What other chains and exits do meanwhile; default: none stops early. `calibrate` adds to "
    "this policy.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of an answer, where answers are written.",
)
@engine_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows, or texts, per batch; times are in ms per batch of this size.",
)
@overwrite_option
@output_options
def command(
    bundle: Path,
    data: str,
    output: Path,
    chain: str | None,
    gates: bool,
    policy: Path | None,
    max_new_tokens: int | None,
    engine: str,
    threads: int | str,
    batch_size: int,
    overwrite: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Record every exit's scores and predictions for a data set.

    For a language model, rows are the tokens of the given texts. Exits that are chosen once per
    prompt (--gates, or --chain vision) change the answer: there the answer to every prompt is
    written once per exit, and a row is a prompt.

    Examples:

    \b
    edgeexit trace bundle --data validation.npz -o trace.npz
    edgeexit trace writer --data texts.jsonl -o trace.npz
    edgeexit trace vlm --data questions.jsonl --gates -o gates.npz
    """
    from edgeexit.bundle.files import check_output
    from edgeexit.measure.data import open_data
    from edgeexit.measure.texts import read_texts
    from edgeexit.measure.trace import record
    from edgeexit.measure.trace_answers import record_answers
    from edgeexit.measure.trace_file import write_trace
    from edgeexit.runtime import load

    check_output(output, data, overwrite=overwrite)
    add_current_directory()
    with load(bundle, engine, policy=policy, threads=threads, all_scores=True) as model:  # type: ignore[arg-type]
        answers = gates or (model.writes and chain not in (None, model.chain_name))
        _check(model, gates, answers, chain, max_new_tokens, batch_size)
        with progress_bar(quiet) as progress:
            if answers:
                decoding = model.bundle.manifest.decoding
                # Where an encoder reads the prompt, a target would be part of what is continued.
                targets = decoding is not None and not decoding.start_tokens
                trace = record_answers(
                    model,
                    read_texts(data, model.bundle, targets=targets),
                    name=Path(data).name,
                    chain=None if gates else chain,
                    max_new_tokens=max_new_tokens,
                    progress=progress,
                )
            else:
                opened = open_data(data, model.bundle)
                trace = record(model, opened, batch_size, chain=chain, progress=progress)
    if len(trace.exits) < 2 and not quiet:
        warn(f"the chain {trace.chain} has no early exit, so calibrate refuses this trace")
    write_trace(trace, output, overwrite=overwrite)
    if as_json:
        print_json({"trace": str(output)} | _facts(trace))
    elif not quiet:
        click.echo(f"{output}: {_summary(trace)}")


def _check(
    model: Model, gates: bool, answers: bool, chain: str | None, most: int | None, batch_size: int
) -> None:
    """Refuses options that do not go together."""
    if gates and chain not in (None, model.chain_name):
        raise UsageError(
            "--gates and --chain exclude each other",
            fix=f"Gates are those of {model.chain_name}; trace {chain} in a second run.",
        )
    if answers and batch_size > 1:
        raise UsageError(
            f"--batch-size {batch_size}: answers are written one prompt at a time",
            fix="Leave it out.",
        )
    if not answers and most is not None:
        raise UsageError(
            f"--max-new-tokens {most}: nothing is written for this trace",
            fix="Leave it out; it is for --gates, and for a --chain before the text.",
        )


def _facts(trace: Trace) -> dict[str, object]:
    return {
        "bundle": trace.bundle,
        "engine": trace.engine,
        "data": trace.data,
        "chain": trace.chain,
        "rows": trace.rows,
        "texts": trace.texts,
        "labelled": trace.labels is not None,
        "exits": trace.exits,
        "scores": list(trace.scores),
        "batch_size": trace.batch_size,
        "segment_ms": dict(zip(trace.exits, trace.segment_ms().tolist(), strict=True)),
    }


def _summary(trace: Trace) -> str:
    if trace.of_answers:
        what, each = f"{trace.rows} prompts, answered at every exit", "first token"
    elif trace.texts is None:
        what = f"{trace.rows} rows {'with' if trace.labels is not None else 'without'} labels"
        each = f"batch of {trace.batch_size}"
    else:
        what, each = f"{trace.rows} tokens of {trace.texts} texts", "token"
        each += f" of {trace.rows_per_run} texts" if trace.rows_per_run > 1 else ""
    time_ms = trace.segment_ms().sum()
    return f"{what}, {len(trace.exits)} exits, {time_ms:.3f} ms per {each} at full depth"
