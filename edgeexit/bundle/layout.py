"""The files of a bundle: their names, and the check of file names."""

from __future__ import annotations

from pathlib import PurePosixPath

from edgeexit.errors import IntegrityError

MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.bin"
OWNED_FOLDERS = ("graphs", "samples", "tokenizer")
"""Folders in which every file must be listed in the manifest."""

RECOPY = "The bundle was changed after export; copy it again or export it again."
EXPORT_AGAIN = "Export again."


def check_relative(name: str, where: str = MANIFEST) -> None:
    """Refuses a file name that could leave its folder: absolute, ``..``, empty or odd parts."""
    parts = name.split("/")
    bad = (
        PurePosixPath(name).is_absolute()
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(character) < 32 or character in '\\:"' for character in name)
        or len(name) > 255
    )
    if bad:
        raise IntegrityError(
            f"{where}: the file name {name!r} may point outside its folder",
            fix="Names are relative, with '/' between parts and without '..'. Export again.",
        )


__all__ = ["EXPORT_AGAIN", "MANIFEST", "OWNED_FOLDERS", "RECOPY", "WEIGHTS", "check_relative"]
