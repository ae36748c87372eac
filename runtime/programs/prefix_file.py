"""Files of states, such as those of a system prompt: `write_prefix` and `read_prefix`.

A file is an ``.npz`` of numpy: ``about`` (JSON: format, bundle, engine), ``tokens`` and
``states/PART/GROUP``. It is bound to the bundle's digest and to the engine, whose kernels and forms
of states it holds.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit.bundle.files import write_atomic
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, StateError
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.prefix_cache import Prefix

FORMAT = 1
AGAIN = "Save it again: model.save_prefix(path, prompt)."


def write_prefix(
    path: str | os.PathLike[str], prefix: Prefix, bundle: Bundle, engine: Mapping[str, str]
) -> None:
    """Writes states of a text's first tokens, atomically.

    Args:
        engine: As `Model.describe_engine` tells.

    Raises:
        UsageError: The file cannot be written.
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
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = json.loads(bytes(file["about"]))
            tokens = np.asarray(file["tokens"], np.int64).reshape(-1)
            known = {
                "bundle": (about["bundle"], bundle.digest),
                "engine": (about["engine"], _bound(engine)),
            }
            for what, (theirs, here) in known.items():
                if about["format"] == FORMAT and theirs != here:
                    raise StateError(
                        f"{Path(path)}: the states are of another {what} ({_told(theirs)}; this is "
                        f"{_told(here)})",
                        fix=AGAIN,
                    )
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, this edgeexit reads {FORMAT}")
            states = _states(file, session, len(tokens))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{Path(path)}: cannot be read as saved states ({reason})", fix=AGAIN
        ) from error
    if len(tokens) >= session.capacity:
        raise StateError(
            f"{Path(path)}: {len(tokens)} tokens, and a text has {session.capacity} at most",
            fix="Load with a larger capacity.",
        )
    return Prefix(tokens, [len(tokens)] * len(session.stateful), states, stays=True)


def _states(file: Any, session: Session, count: int) -> list[list[Any]]:
    """Per part, its arrays, which must have the form of the session's."""
    found = []
    for number, part in enumerate(session.stateful):
        arrays = []
        for group, (dtype, shape) in enumerate(part.states.forms(count)):
            array = file[f"states/{number}/{group}"]
            if (array.dtype, array.shape) != (dtype, shape):
                raise ValueError(
                    f"states of {part.name} are {array.dtype} {list(array.shape)}, not {dtype} "
                    f"{list(shape)}"
                )
            arrays.append(array)
        found.append(arrays)
    return found


def _bound(engine: Mapping[str, str]) -> dict[str, str]:
    """What of an engine's description its states depend on."""
    return {name: engine[name] for name in ("engine", "states") if name in engine}


def _told(about: Any) -> str:
    if isinstance(about, Mapping):
        return " ".join(str(value) for value in about.values())
    return f"{about:.12}…"


__all__ = ["read_prefix", "write_prefix"]
