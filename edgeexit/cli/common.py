"""Output helpers of all commands: progress on stderr, one JSON object on stdout, tables."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edgeexit.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, of)``; `of` is 0 if the total is unknown."""


@contextlib.contextmanager
def progress_bar(quiet: bool, *, lines: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr if it is a terminal. Otherwise a function that does nothing, or with
    `lines` prints a line at the beginning of every stage."""
    if quiet or not sys.stderr.isatty():
        told: set[str] = set()

        def tell(what: str, done: int, of: int) -> None:
            if lines and not quiet and what not in told:
                told.add(what)
                click.echo(f"{what} ...", err=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, of: bar.update(
            task, description=what, completed=done, total=of or None
        )


def print_json(value: Any) -> None:
    """Prints one JSON object. Infinity and NaN become null, as JSON has neither."""
    click.echo(json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Prints a table on stdout: text columns left, numbers right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [
        max(len(head), *(len(row[i]) for row in cells)) if cells else len(head)
        for i, head in enumerate(columns)
    ]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    if title:
        click.echo(title)
    click.echo(line(columns))
    click.echo("  ".join("-" * width for width in widths))
    for row in cells:
        click.echo(line(row))
    for note in notes:
        click.echo(note)


def _numeric(cell: str) -> bool:
    return cell in ("", "-", "never") or cell[0] in "+-0123456789."


def fraction(value: str, option: str) -> float:
    """Reads ``0.5%`` or ``0.005``.

    >>> fraction("0.5%", "--max-risk")
    0.005
    """
    text = value.strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    number = number / 100 if text.endswith("%") else number
    if not 0 <= number < 1:
        raise UsageError(
            f"{option} {value}: not a share from 0 up to 1 (100 %)",
            fix=f"Give a percentage or a fraction, as in {option} 0.5% or {option} 0.005.",
        )
    return number


def share(value: float) -> str:
    """A share as a percentage."""
    return "-" if math.isnan(value) else f"{100 * value:.2f} %"


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    click.echo(f"warning: {text}", err=True)


def in_exit_order(shares: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Exits and their values, with numbers in names compared as numbers.

    >>> in_exit_order({"exit_10": 1, "exit_2": 3})
    [('exit_2', 3), ('exit_10', 1)]
    """
    return sorted(
        shares.items(),
        key=lambda item: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part)
            for part in re.split(r"([0-9]+)", item[0])
        ],
    )


def size(count: float) -> str:
    """Bytes in the largest fitting unit.

    >>> size(512), size(1536), size(3 << 20)
    ('512 B', '1.5 KiB', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def add_current_directory() -> None:
    """Makes modules of the current directory importable, as ``python -m`` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
