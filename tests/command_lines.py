"""Command lines as documents show them, parsed by the command line's own click objects."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from edgeexit.cli import cli


def find_commands(text: str) -> Iterator[str]:
    """Commands of edgeexit in a block of shell: those that begin a line, with the lines that a
    backslash continues."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("edgeexit "):
            yield line.strip()


def parse(line: str) -> click.Context:
    """Parses a command without running it.

    Raises:
        click.UsageError: The verb, an option or a value does not exist, or one is missing.
    """
    line = re.sub(r"\$'([^']*)'", r"'\1'", line)  # bash's quotes, which shlex does not know
    words = shlex.split(line, comments=True)
    assert words[0] == "edgeexit"
    group = click.Context(cli)
    command = cli.get_command(group, words[1])
    if command is None:
        raise click.UsageError(f"no verb {words[1]}")
    return command.make_context(words[1], words[2:], parent=group)
