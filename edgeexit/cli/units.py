"""Options whose values carry their unit: times (``2min``) and sizes (``512MiB``)."""

from __future__ import annotations

import re

import click

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_LONGEST_S, _LARGEST = 7 * 24 * 3600, 1 << 50


def seconds_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> float | None:
    """Reads the time of an option, in seconds."""
    return None if value is None else read_seconds(value)


def bytes_option(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """Reads the size of an option, in bytes."""
    return None if value is None else read_bytes(value)


def read_seconds(text: str) -> float:
    """A time in seconds.

    >>> read_seconds("200ms"), read_seconds("60s"), read_seconds("1.5min")
    (0.2, 60.0, 90.0)
    """
    seconds = _read(text, _SECONDS)
    if not 0 < seconds <= _LONGEST_S:
        raise click.BadParameter(f"{text[:40]!r} is not a time, as in 500ms, 60s or 2min.")
    return seconds


def read_bytes(text: str) -> int:
    """A size in bytes.

    >>> read_bytes("512KiB"), read_bytes("1.5GiB")
    (524288, 1610612736)
    """
    size = _read(text, _BYTES)
    if not 1 <= size <= _LARGEST:
        raise click.BadParameter(f"{text[:40]!r} is not a size, as in 512KiB, 16MiB or 2GiB.")
    return int(size)


def _read(text: str, units: dict[str, float] | dict[str, int]) -> float:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2] not in units:
        return 0.0
    return float(found[1]) * units[found[2]]


__all__ = ["bytes_option", "read_bytes", "read_seconds", "seconds_option"]
