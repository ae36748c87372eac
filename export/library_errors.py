"""Turns exceptions of libraries for a user's file into errors with the file and the fix.

For a damaged file, transformers, safetensors, peft and torch, tokenizers and image processors raise
exceptions of any type. Every call of these libraries that depends on a user's file is inside
`translated`.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import safetensors

from edgeexit.errors import EdgeExitError, ExportError, first_line

LFS_POINTER = b"version https://git-lfs"


def root_cause(error: BaseException) -> BaseException:
    """The exception that an exception was raised for, and so on: libraries wrap the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def translated(
    where: str | Path,
    does: str,
    fix: str,
    *,
    folder: Path | None = None,
    required: str = "config.json",
) -> Iterator[None]:
    """Context manager: turns any exception of a library into an `ExportError`.

    Args:
        where: The file or folder, as the user gave it.
        does: What failed, as in ``transformers cannot read it``.
        fix: What the user can do about it.
        folder: A checkpoint's folder; a damaged file in it is named instead of `does`.
        required: The configuration file of the folder.
    """
    try:
        yield
    except EdgeExitError:
        raise
    except Exception as error:
        if folder is not None and (found := damaged_file(folder, required)):
            raise ExportError(
                f"{where}: {found}",
                fix="Download the file again; git lfs pull replaces LFS pointers.",
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ExportError(
                f"{where}: its weights are a pickle that is damaged, or holds more than tensors; "
                "code in it is not run",
                fix="Where you trust it, load it with torch and save the model as safetensors "
                "(save_pretrained).",
            ) from error
        cause = root_cause(error)
        raise ExportError(
            f"{where}: {does} ({type(cause).__name__}: {first_line(cause)})", fix=fix
        ) from error


def damaged_file(folder: Path, required: str = "config.json") -> str | None:
    """The first damaged file of a checkpoint, and the cause; None if all look valid.

    Args:
        required: The configuration file of the folder.
    """
    if not (folder / required).is_file():
        kind = "is not a file" if (folder / required).exists() else "is not there"
        return f"{required} {kind}"
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin"):
            continue
        if not file.is_file():
            if file.is_symlink():
                return f"{file.name} is a link to a file that is not there"
            continue
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file.name} is a Git LFS pointer, not the file itself"
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="np"):
                    pass
        except (ValueError, OSError, RecursionError, safetensors.SafetensorError) as error:
            return f"{file.name} is incomplete ({first_line(error)})"
    return _missing_shard(folder)


def _missing_shard(folder: Path) -> str | None:
    for index in sorted(folder.glob("*.index.json")):
        about = json.loads(index.read_text(encoding="utf-8"))
        places = about.get("weight_map") if isinstance(about, dict) else None
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            return f"{index.name} does not say which file has which weight"
        for name in sorted(set(places.values())):
            if not (folder / name).is_file():
                return f"{name} is not there, and {index.name} names it"
    return None


__all__ = ["damaged_file", "root_cause", "translated"]
