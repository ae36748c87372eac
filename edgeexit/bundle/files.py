"""Writes files atomically, checks output paths, and reads archives of arrays."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.paths import shown
from edgeexit.bundle.reader import MANIFEST
from edgeexit.errors import (
    DataError,
    MeasurementError,
    OutputExistsError,
    UsageError,
    first_line,
)


def write_atomic(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, overwrite: bool = True
) -> None:
    """Calls ``write(file)`` on a temporary file beside `path`, then renames it to `path`.

    Raises:
        OutputExistsError: `path` exists, and `overwrite` is not set. Of several processes that
            write one file, one succeeds.
        UsageError: `path` is a directory, or is inside a bundle.
        MeasurementError: The file cannot be written; no partial file remains.
    """
    path = Path(path)
    _check_output(path, (), overwrite=True)
    path = path.resolve()  # keep links: replace their target
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            write(file)
        if overwrite:
            os.replace(partial, path)
        else:
            _rename_to_new(partial, path)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise MeasurementError(
            f"{path}: cannot be written ({error.strerror or error}); no partial file remains",
            fix="Free some space, or choose another -o.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_npz(
    path: Path,
    fix: str = "Write it with numpy.savez(path, **arrays), one array per input.",
    what: str = ".npz",
) -> dict[str, NDArray]:
    """Reads every array of a ``.npz`` file. Raises `DataError`, also for pickled objects.

    Args:
        what: What the file should be, in messages.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an archive")
            with archive:
                return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise many types for a damaged file
        reason = "it has pickled objects" if "pickle" in str(error) else first_line(error)
        raise DataError(f"{path.name}: cannot be read as {what} ({reason})", fix=fix) from error


def _rename_to_new(partial: Path, path: Path) -> None:
    """Renames a file. Raises FileExistsError if the new name exists, which `os.rename` replaces."""
    try:
        os.link(partial, path)  # `write_atomic` removes the old name
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("xb").close()
        os.replace(partial, path)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path} exists", fix="Choose another -o, or add --overwrite.")


def check_output(
    path: Path, *inputs: str | os.PathLike[str] | None, overwrite: bool = True
) -> None:
    """Refuses an output, before long work, that is also an input, is not a regular file, is inside
    a bundle, exists without `overwrite`, or cannot be written."""
    try:
        _check_output(path, inputs, overwrite=overwrite)
        _check_writable(path)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{shown(path)}: cannot be written ({reason})", fix="Choose another file."
        ) from error


def _check_writable(path: Path) -> None:
    """Raises OSError if a file cannot be made beside the output, or in the nearest folder above it
    that exists. Permissions do not tell: a file system may be read-only."""
    path = path.resolve()
    folder = next(parent for parent in path.parents if parent.exists())
    with tempfile.TemporaryFile(dir=folder):
        pass
    longest = os.pathconf(folder, "PC_NAME_MAX")
    for name in (f".{path.name}.{'0' * 8}.partial", *path.relative_to(folder).parts[:-1]):
        if len(os.fsencode(name)) > longest:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _check_output(
    path: Path, inputs: Sequence[str | os.PathLike[str] | None], *, overwrite: bool
) -> None:
    for given in inputs:
        there = given is not None and os.path.exists(given) and path.exists()
        if given is not None and there and os.path.samefile(given, path):
            raise UsageError(f"{path} is both input and output", fix="Give another name with -o.")
    if path.is_dir():
        raise UsageError(f"{path} is a directory", fix="Give the name of a file (-o).")
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{path} is a device or a pipe, not a regular file",
            fix="Give the name of a file with -o; --json writes to stdout.",
        )
    if path.exists() and not overwrite:
        raise _exists(path)
    for parent in path.absolute().parents:
        if (parent / MANIFEST).is_file() and (parent / "graphs").is_dir():
            raise UsageError(
                f"{path} is inside the bundle {parent.name}",
                fix="Store results and policies beside the bundle: choose another -o.",
            )
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"{parent} is a file, not a directory", fix="Choose another -o.")
