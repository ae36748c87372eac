"""What libraries raise over a file becomes an error that names the file and what helps.

transformers, safetensors, peft and torch let through whatever the libraries below them raise, of
any kind; so does a tokenizer or an image processor that a damaged file was read into. Every call
into them that depends on a user's file stands in `translated`.
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


@contextlib.contextmanager
def translated(
    where: str | Path,
    does: str,
    fix: str,
    *,
    folder: Path | None = None,
    required: str = "config.json",
) -> Iterator[None]:
    """Turns whatever a library raises into an `ExportError`.

    Args:
        where: The file or folder that is read, as the user knows it.
        does: What could not be done, as in ``transformers cannot read it``.
        fix: What the user can do about it.
        folder: A checkpoint's, whose files are looked at: one that is damaged is named instead.
        required: The file that says what the others in it are.
    """
    try:
        yield
    except EdgeExitError:
        raise
    except Exception as error:
        if folder is not None and (found := damaged_file(folder, required)):
            raise ExportError(
                f"{where}: {found}", fix="Fetch that file again; git lfs pull gets the real ones."
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ExportError(
                f"{where}: its weights are a pickle that is damaged, or holds more than tensors; "
                "code in it is not run",
                fix="Where you trust it, load it with torch and save the model as safetensors "
                "(save_pretrained).",
            ) from error
        raise ExportError(
            f"{where}: {does} ({type(error).__name__}: {first_line(error)})", fix=fix
        ) from error


def damaged_file(folder: Path, required: str = "config.json") -> str | None:
    """Which file of a checkpoint cannot be what its name says, and why; None if none is seen.

    Args:
        required: The file that says what the others are.
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
            return f"{file.name} is not whole ({first_line(error)})"
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


__all__ = ["damaged_file", "translated"]
