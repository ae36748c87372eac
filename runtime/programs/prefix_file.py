"""Files of states, such as those of a system prompt: `write_prefix` and `read_prefix`.

A file is an ``.npz`` of numpy: ``about`` (JSON: format, bundle, engine), ``tokens`` and
``states/PART/GROUP``. It is bound to the bundle's digest and to the engine, whose kernels and forms
of states it holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeexit.bundle.files import read_npz, write_atomic
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, StateError, first_line
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.prefix_cache import Prefix

FORMAT = 1
SAVED = "saved states"
AGAIN = "Save it again: model.save_prefix(path, prompt)."


class _About(msgspec.Struct):
    """``about`` of a file."""

    format: int
    bundle: str
    engine: dict[str, str]


def write_prefix(
    path: str | os.PathLike[str], prefix: Prefix, bundle: Bundle, engine: Mapping[str, str]
) -> None:
    """Writes states of a text's first tokens, atomically.

    Args:
        engine: As `Model.describe_engine` tells.

    Raises:
        MeasurementError, UsageError: The file cannot be written.
    """
    about = {"format": FORMAT, "bundle": bundle.digest, "engine": _bound(engine)}
    arrays: dict[str, Any] = {
        f"states/{part}/{group}": array
        for part, own in enumerate(prefix.states)
        for group, array in enumerate(own)
    }
    raw = np.frombuffer(json.dumps(about).encode(), np.uint8)
    write_atomic(path, lambda file: np.savez(file, about=raw, tokens=prefix.tokens, **arrays))


def read_prefix(
    path: str | os.PathLike[str], bundle: Bundle, engine: Mapping[str, str], session: Session
) -> Prefix:
    """Reads a file of `write_prefix`, for the parts of a session.

    Raises:
        DataError: The file is missing or damaged.
        StateError: It is of another bundle or engine, or longer than the capacity.
    """
    arrays = read_npz(Path(path), AGAIN, SAVED)
    try:
        about = msgspec.json.decode(bytes(arrays["about"]), type=_About)
        if about.format != FORMAT:
            raise ValueError(f"format {about.format}, this edgeexit reads {FORMAT}")
        _check_bound(path, "bundle", about.bundle, bundle.digest)
        _check_bound(path, "engine", about.engine, _bound(engine))
        tokens = arrays["tokens"]
        if tokens.dtype != np.int64 or tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}")
        states = _states(arrays, session, len(tokens))
    except KeyError as error:
        raise DataError(f"{Path(path)}: it has no array {error}", fix=AGAIN) from error
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{Path(path)}: cannot be read as {SAVED} ({first_line(error)})", fix=AGAIN
        ) from error
    if len(tokens) >= session.capacity:
        raise StateError(
            f"{Path(path)}: {len(tokens)} tokens, and a text has {session.capacity} at most",
            fix="Load with a larger capacity.",
        )
    return Prefix(tokens, [len(tokens)] * len(session.stateful), states, stays=True)


def _states(arrays: Mapping[str, Any], session: Session, count: int) -> list[list[Any]]:
    """Per part, its arrays, which must have the form of the session's."""
    found = []
    for number, part in enumerate(session.stateful):
        own = []
        for group, (dtype, shape) in enumerate(part.states.forms(count)):
            array = arrays[f"states/{number}/{group}"]
            if (array.dtype, array.shape) != (dtype, shape):
                raise ValueError(
                    f"states of {part.name} are {array.dtype} {list(array.shape)}, not {dtype} "
                    f"{list(shape)}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"states of {part.name} are not numbers")
            own.append(array)
        found.append(own)
    return found


def _check_bound(path: object, what: str, theirs: object, here: object) -> None:
    if theirs != here:
        raise StateError(
            f"{path}: the states are of another {what} ({_told(theirs)}; this is {_told(here)})",
            fix=AGAIN,
        )


def _bound(engine: Mapping[str, str]) -> dict[str, str]:
    """What of an engine's description its states depend on."""
    return {name: engine[name] for name in ("engine", "states") if name in engine}


def _told(about: Any) -> str:
    if isinstance(about, Mapping):
        return " ".join(str(value) for value in about.values())
    return f"{about:.12}…"


__all__ = ["read_prefix", "write_prefix"]
