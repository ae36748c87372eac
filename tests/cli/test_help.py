"""``--help`` of every verb: an example that parses, and a word on every option."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from edgeexit.cli import VERBS, cli
from tests.command_lines import find_commands, parse


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(verb: str) -> None:
    shown = CliRunner().invoke(cli, [verb, "--help"]).output
    before, heading, after = shown.partition("\n  Examples:\n")
    assert heading
    examples = list(find_commands(after.partition("\nOptions:")[0]))
    assert examples
    assert not list(find_commands(before))
    for example in examples:
        assert parse(example).info_name == verb


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_something_of_every_option(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert options
    assert [one.name for one in options if not one.help] == []


def test_an_example_with_an_option_that_is_not_there_is_found() -> None:
    with pytest.raises(click.UsageError, match="--no-such"):
        parse("edgeexit check bundle --no-such")
    with pytest.raises(click.UsageError, match="Missing parameter: output"):
        parse("edgeexit trace bundle --data rows.npz  # where to?")
