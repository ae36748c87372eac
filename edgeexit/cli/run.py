"""``edgeexit run``: runs inputs and shows the answers and the exits that gave them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli.common import add_current_directory, print_json, print_table
from edgeexit.cli.input_kinds import OF_ROWS, OF_TEXT, advice
from edgeexit.cli.options import ENGINES, bundle_argument, engine_options, output_options
from edgeexit.cli.policies import (
    check_stopping,
    chosen_policy,
    encoders,
    of_last_chain,
    say_cautions,
    stopping_options,
)
from edgeexit.cli.speech import speech_options
from edgeexit.cli.writing import read_writing, write, writing_given, writing_options
from edgeexit.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgeexit.measure.batches import Batch

logger = logging.getLogger(__name__)


@click.command("run")
@bundle_argument
@click.option(
    "--data", metavar="DATA", help=".npz, .jsonl, a folder of images, or module:function."
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An image file; may be given several times. With --prompt: an image of the prompt.",
)
@click.option("--text", "texts", multiple=True, help="A text; may be given several times.")
@stopping_options
@click.option("--exit", "exit_name", metavar="NAME", help="Stop all rows at this exit.")
@click.option("--rows", type=click.IntRange(min=1), help="Use only this many rows of the data.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows per batch.",
)
@writing_options
@speech_options
@engine_options
@click.option(
    "--fallback",
    type=click.Choice(ENGINES),
    help="Engine to fall back to, with a warning, if --engine cannot be used; default: an error.",
)
@output_options
def command(bundle: Path, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Run inputs and show which exit answered.

    Examples:

    \b
    edgeexit run bundle --image digit.png --policy policy.json
    edgeexit run bundle --text "a fine film" --threshold 0.9 -v
    edgeexit run bundle --data test.npz --rows 10 --json
    edgeexit run bundle --prompt "def main(" --mode exact --stream
    edgeexit run bundle --prompt "Why is the sky blue?" --chat --stream
    edgeexit run bundle --image cat.jpg --prompt "What is it?" --chat --stream
    edgeexit run bundle --audio speech.wav --language en --timestamps --stream
    """
    kind = _only_kind(options, bundle)
    check_stopping(options)
    opened = _open_for(kind, bundle)
    if options["encoder_threshold"] is not None:
        encoders(opened)
    if kind in OF_TEXT:
        _check_no_rows(options)
        writing = read_writing(options, opened, as_json=as_json)
    elif given := writing_given(options):
        raise UsageError(
            f"--{given[0].replace('_', '-').replace('stops', 'stop')} is for models that write "
            f"text, and {bundle} does not",
            fix="Leave it out.",
        )
    add_current_directory()
    loading = {name: options[name] for name in ("engine", "fallback", "threads")}
    policy = loading["policy"] = chosen_policy(opened, options)
    if not quiet:
        say_cautions(opened, policy, options)
    if kind in OF_TEXT:
        write(opened, writing, loading, options["capacity"], as_json=as_json, quiet=quiet)
    else:
        _answer(opened, loading, options, as_json=as_json, verbose=bool(verbose), quiet=quiet)


def _only_kind(options: Mapping[str, Any], bundle: Path) -> str:
    """The input option that was given. Raises `UsageError` if it is not exactly one."""
    names = {"data": "data", "image": "images", "text": "texts", "prompt": "prompts"}
    names |= {"messages": "messages", "audio": "sounds"}
    given = [kind for kind, name in names.items() if options[name]]
    if len(given) == 1:
        return given[0]
    if given == ["image", "prompt"]:
        return "prompt"
    what = f"--{given[0]} and --{given[1]} exclude each other: " if given else ""
    answers, writes = (" or ".join(f"--{kind}" for kind in k) for k in (OF_ROWS, OF_TEXT))
    fix = f"Give {answers}; a language model: {writes}."
    if bundle.is_dir():
        fix = advice(open_bundle(bundle))
    raise UsageError(f"{what}run needs one kind of input", fix=fix)


def _check_no_rows(options: Mapping[str, Any]) -> None:
    """Refuses options that are only for models that answer rows."""
    if options["exit_name"] is not None:
        raise UsageError(
            "--exit is for models that answer rows",
            fix="To draft with one exit, use --mode exact --draft-exit NAME; to stop at one exit, "
            "a policy with a threshold for only that exit.",
        )
    if options["rows"] is not None:
        raise UsageError("--rows is for --data", fix="Leave it out.")


def _open_for(kind: str, bundle: Path) -> Bundle:
    """Opens the bundle; refuses an input that it does not take."""
    opened = open_bundle(bundle)
    writes = opened.manifest.decoding is not None
    if kind not in (OF_TEXT if writes else OF_ROWS):
        does = "writes text" if writes else "does not write text"
        raise UsageError(f"--{kind}: {bundle} {does}", fix=advice(opened))
    return opened


def _answer(
    bundle: Bundle,
    loading: dict[str, Any],
    options: Mapping[str, Any],
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Runs rows and shows the answers."""
    from edgeexit.bundle.policy import forced
    from edgeexit.measure.batches import naming_rows
    from edgeexit.runtime import load

    rows, exit_name = options["rows"], options["exit_name"]
    with load(bundle, **loading) as model:
        if exit_name is not None:
            names = [exit_.name for exit_ in model.exits]
            if exit_name not in names:
                raise UsageError(
                    f"--exit {exit_name}: no such exit", fix=f"It has {', '.join(names)}."
                )
            model.policy = of_last_chain(bundle, forced(model.exits, exit_name))
        found: list[dict[str, Any]] = []
        for batch in _batches(bundle, options):
            with naming_rows(len(found), batch.rows):
                if not found and (verbose or as_json):
                    model(batch.inputs)  # warm-up: the first call also binds buffers
                result = model(batch.inputs, timed=True)
            found += _answers(bundle, batch, result, first=len(found))
            if rows is not None and len(found) >= rows:
                break
        about, score = model.describe_engine(), model.decisions[-1].score
    found = found[:rows]
    _warn_of_no_numbers(found)
    if as_json:
        path = str(bundle.path)
        print_json({"bundle": path, "engine": about, "score": score, "rows": found})
        return
    columns = ["row", "answer", "exit", score]
    if verbose:
        columns.append("ms per segment")
    if any("label" in row for row in found):
        columns.append("label")
    print_table("", columns, [_cells(row, columns, bundle.manifest.labels) for row in found])
    labelled = [row for row in found if "label" in row and "class" in row]
    if labelled and not quiet:
        right = sum(row["label"] == row["class"] for row in labelled)
        click.echo(f"{right} of {len(labelled)} correct")


def _warn_of_no_numbers(found: list[dict[str, Any]]) -> None:
    rows = [row["row"] for row in found if row.pop("no_number")]
    if rows:
        logger.warning(
            "row %d%s: the outputs have NaN or infinity; check the input",
            rows[0],
            f" and {len(rows) - 1} more" if len(rows) > 1 else "",
        )


def _batches(bundle: Bundle, options: Mapping[str, Any]) -> Iterator[Batch]:
    from edgeexit.measure.batches import Batch
    from edgeexit.measure.data import open_data
    from edgeexit.preprocessing.images import open_image, preprocess_images
    from edgeexit.runtime.text.tokenizer import encode_batch

    size, images, texts = options["batch_size"], options["images"], options["texts"]
    if options["data"] is not None:
        yield from open_data(options["data"], bundle).batches(size)
        return
    for start in range(0, len(images), size):
        preprocessing = bundle.manifest.image_preprocessing
        if preprocessing is None:
            raise DataError(
                "--image: the bundle has no image preprocessing", fix="Use --data with .npz."
            )
        opened = [open_image(path, str(path)) for path in images[start : start + size]]
        pixels = preprocess_images(preprocessing, opened)
        yield Batch({preprocessing.input: pixels}, None, len(opened))
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        yield Batch(encode_batch(bundle, part, tell=True), None, len(part))


def _answers(bundle: Bundle, batch: Batch, result: Any, *, first: int) -> list[dict[str, Any]]:
    import numpy as np

    labels = bundle.manifest.labels
    found = []
    for row in range(batch.rows):
        answer: dict[str, Any] = {
            "row": first + row,
            "exit": result.exit_names[row],
            "score": float(result.scores[row]),
        }
        if result.earlier:
            answer["earlier"] = {chain: exits[row] for chain, exits in result.earlier.items()}
        if "logits" in result.outputs:
            predicted = int(result.outputs["logits"][row].argmax())
            answer["class"] = predicted
            answer["answer"] = labels[predicted] if predicted < len(labels) else str(predicted)
        else:
            answer["outputs"] = {name: value[row] for name, value in result.outputs.items()}
        if batch.labels is not None:
            answer["label"] = int(batch.labels[row])
        answer["no_number"] = not all(
            np.isfinite(value[row]).all()
            for value in result.outputs.values()
            if value.dtype.kind == "f"
        )
        answer["batch_times_ms"] = result.times_ms
        found.append(answer)
    return found


def _cells(row: dict[str, Any], columns: list[str], labels: Sequence[str]) -> list[str]:
    answer = _class(row.get("class"), labels)
    cells = [str(row["row"]), answer, row["exit"], f"{row['score']:.4f}"]
    if "ms per segment" in columns:
        cells.append(" ".join(f"{time_ms:.3f}" for time_ms in row["batch_times_ms"]))
    if "label" in columns:
        cells.append(_class(row.get("label"), labels))
    return cells


def _class(number: int | None, labels: Sequence[str]) -> str:
    """A class as its name and number; as its number if it has no name.

    >>> _class(1, ["bad", "good"]), _class(1, ["0", "1"]), _class(3, []), _class(None, [])
    ('good (1)', '1', '3', '-')
    """
    if number is None:
        return "-"
    name = labels[number] if number < len(labels) else str(number)
    return name if name == str(number) else f"{name} ({number})"
