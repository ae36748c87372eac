"""The errors that edgeexit raises deliberately, with their exit codes on the command line.

    EdgeExitError            base class: what, where, why, and how to fix it
    ├── UsageError           called with invalid arguments
    │   ├── OutputExistsError    the output exists and overwriting was not allowed
    │   └── OutputBusyError      another process is writing the same output
    ├── ExportError          the model or graph cannot be split as asked
    ├── BundleError          the bundle is incomplete, invalid, or changed after export
    │   ├── FormatError          this edgeexit does not support the format or a feature
    │   └── IntegrityError       a file is missing, unlisted, linked, resized or altered
    ├── PolicyError          a policy does not fit the bundle it is used with
    ├── InputError           the inputs of a model do not fit its signature
    ├── DataError            a data set cannot be read or does not fit the bundle
    ├── EngineError          the engine library is missing, refuses a graph, or fails
    ├── StateError           a model was used after close, from two threads, or after a fork
    ├── MeasurementError     a measurement could not be made
    └── CheckError           the command ran and a check failed (exit code 3)

>>> error = UsageError("--exits: 'a' is not a layer number", fix="Give numbers, as in 3,6.")
>>> print(error)
--exits: 'a' is not a layer number. Give numbers, as in 3,6.
>>> error.exit_code
2
"""

from __future__ import annotations


class EdgeExitError(Exception):
    """Base of every error that edgeexit raises deliberately.

    Args:
        what: One sentence: where, what, and why. It starts with the name of the file, flag,
            tensor or exit it is about.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        what = self.what if self.what.endswith((".", "?", "!")) else f"{self.what}."
        return f"{what} {self.fix}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.fix))


def _rebuild(kind: type[EdgeExitError], what: str, fix: str) -> EdgeExitError:
    return kind(what, fix=fix)


class UsageError(EdgeExitError):
    """A command or function was called with invalid arguments."""

    exit_code = 2


class OutputExistsError(UsageError):
    """The output exists and overwriting was not allowed."""


class OutputBusyError(UsageError):
    """Another process is writing the same output."""


class ExportError(EdgeExitError):
    """The model or graph cannot be split as asked."""


class BundleError(EdgeExitError):
    """The bundle is incomplete, invalid, or changed after export."""


class FormatError(BundleError):
    """This edgeexit does not support the bundle's format or a feature that it requires."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, unlisted, linked, resized or altered."""


class PolicyError(EdgeExitError):
    """A policy does not fit the bundle it is used with."""


class InputError(EdgeExitError):
    """The inputs of a model do not fit its signature."""


class DataError(EdgeExitError):
    """A data set cannot be read or does not fit the bundle."""


class EngineError(EdgeExitError):
    """The engine library is missing, refuses a graph, or fails."""


class StateError(EdgeExitError):
    """A model was used after close, from two threads, or after a fork."""


class MeasurementError(EdgeExitError):
    """A measurement could not be made."""


class CheckError(EdgeExitError):
    """The command ran and a check failed."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The message of a library's exception in one line; its class name if it has no message.

    >>> first_line(MemoryError()), first_line(ValueError("a\\nb"))
    ('MemoryError', 'a')
    >>> first_line(RuntimeError("Errors in loading weights:\\n\\tsize mismatch for w"))
    'Errors in loading weights: size mismatch for w'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


__all__ = [
    "BundleError",
    "CheckError",
    "DataError",
    "EdgeExitError",
    "EngineError",
    "ExportError",
    "FormatError",
    "InputError",
    "IntegrityError",
    "MeasurementError",
    "OutputBusyError",
    "OutputExistsError",
    "PolicyError",
    "StateError",
    "UsageError",
    "first_line",
]
