"""JSON documents of known form: manifests, policies, lists of engines."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode(raw: bytes | str, form: type[T]) -> T:
    """Reads a document.

    Raises:
        ValueError: It is not JSON, or not of that form, whatever msgspec raises over it.

    >>> decode(b"[1, 2]", list[int])
    [1, 2]
    >>> decode(b"[" * 100_000, list)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return msgspec.json.decode(raw, type=form)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def convert(value: object, form: type[T]) -> T:
    """The same of what was read already, and may be of another form."""
    try:
        return msgspec.convert(value, form)
    except (msgspec.MsgspecError, OverflowError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


__all__ = ["convert", "decode"]
