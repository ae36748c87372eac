"""Options that several commands share, single and in groups."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from edgeexit.errors import UsageError, first_line

F = TypeVar("F", bound=Callable[..., Any])

ENGINES = ["cpu", "cuda", "tensorrt-provider", "tensorrt"]  # of edgeexit.runtime.load

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)
engine_option = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="cpu",
    show_default=True,
    help="Engine to run on.",
)


def read_threads(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | str | None:
    """Reads ``--threads``."""
    from edgeexit.runtime.engines.base import POOLS

    if value is None or value in POOLS:
        return value
    if value.isascii() and value.isdigit() and int(value) >= 1:
        return int(value)
    raise click.BadParameter(
        f"{value!r} is not a number from 1 up, {', '.join(POOLS[:-1])} or {POOLS[-1]}."
    )


threads_option = click.option(
    "--threads",
    default="process",
    show_default=True,
    callback=read_threads,
    metavar="N|brief|blocking|spinning|process",
    help="Threads of the engine: a number; or a pool per graph that, when idle, spins briefly "
    "(brief), sleeps (blocking) or spins (spinning); or one pool for the process. With a GPU: how "
    "the host waits.",
)


def engine_options(function: F) -> F:
    """Adds --engine and --threads."""
    return engine_option(threads_option(function))


class _Lines(logging.Formatter):
    """Log lines as the commands' own messages: ``warning: ...``."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _verbosity(context: click.Context, parameter: click.Parameter, value: int) -> int:
    """Sets up logging to stderr; logs of libraries are shown only with -v."""
    quiet = bool(context.params.get("quiet"))
    level = (
        logging.ERROR if quiet else {0: logging.WARNING, 1: logging.INFO}.get(value, logging.DEBUG)
    )
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines() if not value else logging.Formatter("%(name)s: %(message)s"))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("edgeexit").setLevel(level)
    if not value:
        warnings.simplefilter("ignore")
    return value


def verbosity_options(function: F) -> F:
    """Adds -v and -q. The function gets `verbose` (a count) and `quiet`."""
    function = click.option(
        "-v",
        "--verbose",
        count=True,
        callback=_verbosity,
        help="Log more on stderr and show more in tables; -vv: log everything.",
    )(function)
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        is_eager=True,
        help="Show only errors on stderr, no progress.",
    )(function)


def draft_vocabularies(given: Sequence[str]) -> dict[int, list[int]] | None:
    """Exit layer -> token ids, of values of --draft-vocabulary; None: there are none."""
    found: dict[int, list[int]] = {}
    for text in given:
        name, _, file = text.partition("=")
        layer = name.strip().removeprefix("exit_")
        if not file or not (layer.isascii() and layer.isdigit()):
            raise UsageError(
                f"--draft-vocabulary {text}: it is not EXIT=FILE",
                fix="Give an exit and a file, as in exit_2=ids.json.",
            )
        try:
            ids = msgspec.json.decode(Path(file).read_bytes(), type=list[int])
        except (OSError, msgspec.MsgspecError) as error:
            raise UsageError(
                f"--draft-vocabulary {text}: {file} cannot be read ({first_line(error)})",
                fix="Give a JSON file with a list of token ids, as in [0, 5, 17].",
            ) from error
        if int(layer) in found:
            raise UsageError(
                f"--draft-vocabulary {text}: {name} is given twice", fix="Give each exit once."
            )
        found[int(layer)] = ids
    return found or None


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def output_options(function: F) -> F:
    """Adds --json, -v and -q."""
    return json_option(verbosity_options(function))
