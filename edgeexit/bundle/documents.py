"""Decodes JSON documents into structs: manifests, policies, lists of engines."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode(raw: bytes | str, form: type[T]) -> T:
    """Decodes a JSON document.

    Raises:
        ValueError: The document is not JSON, or does not match `form`.

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
    """Converts a decoded value into `form`. Raises ValueError if it does not match."""
    try:
        return msgspec.convert(value, form)
    except (msgspec.MsgspecError, OverflowError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


__all__ = ["convert", "decode"]
