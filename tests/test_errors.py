"""The exception tree: what the command line and other processes rely on."""

from __future__ import annotations

import inspect
import pickle

import pytest

from edgeexit import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_error_survives_pickling_with_cause_and_remedy(kind: type[errors.EdgeExitError]) -> None:
    error = pickle.loads(pickle.dumps(kind("x is 3", fix="Use 2.")))
    assert type(error) is kind
    assert (error.what, error.fix) == ("x is 3", "Use 2.")


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_is_2_for_usage_3_for_checks_1_otherwise(
    kind: type[errors.EdgeExitError],
) -> None:
    expected = 2 if issubclass(kind, errors.UsageError) else 1
    assert kind.exit_code == (3 if issubclass(kind, errors.CheckError) else expected)


@pytest.mark.parametrize(
    "what, fix, expected",
    [
        ("a is wrong", "Mend it.", "a is wrong. Mend it."),
        ("a is wrong.", "", "a is wrong."),
        ("is a wrong?", "Look.", "is a wrong? Look."),
    ],
)
def test_message_reads_as_sentences(what: str, fix: str, expected: str) -> None:
    assert str(errors.EdgeExitError(what, fix=fix)) == expected


def test_tree_in_the_docstring_lists_every_error_once() -> None:
    for kind in KINDS:
        assert errors.__doc__.count(f" {kind.__name__} ") + errors.__doc__.count(
            f"\n    {kind.__name__} "
        ) >= 1, kind.__name__  # fmt: skip
    names = [name for name in errors.__all__ if name != "first_line"]
    assert sorted(names) == sorted(kind.__name__ for kind in KINDS)


def test_every_error_derives_from_the_base() -> None:
    assert all(issubclass(kind, errors.EdgeExitError) for kind in KINDS)
