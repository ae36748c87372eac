"""Writes bundles atomically.

`BundleWriter` fills a temporary directory beside the output, writes the manifest last, checks the
result with `edgeexit.bundle.reader`, and renames it. After an error, Ctrl-C or a full disk, no
files remain. A killed export leaves its directory, which the next export to the same output
removes; a lock on the directory, which ends with its process, tells it from a running export's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from edgeexit.bundle.layout import MANIFEST, OWNED_FOLDERS
from edgeexit.bundle.manifest import FORMAT_MAJOR, FORMAT_MINOR, File, Manifest
from edgeexit.bundle.reader import Bundle, open_bundle, sha256_of
from edgeexit.errors import (
    BundleError,
    EdgeExitError,
    OutputBusyError,
    OutputExistsError,
    UsageError,
)


class BundleWriter:
    """Writes a bundle atomically.

    Files are written to a temporary directory beside `output`; `commit` writes the manifest and
    renames the directory. Leaving the ``with`` block without `commit` removes it.

    Args:
        output: Directory of the bundle. Must not exist unless `overwrite`.
        overwrite: Replace an existing bundle; it stays until the new bundle is complete.
    """

    def __init__(self, output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.output = Path(output)
        self.overwrite = overwrite
        self._folder: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> BundleWriter:
        parent = self.output.absolute().parent
        with reporting_full_disk(self.output):
            self._clear_leftovers()
            check_output(self.output, overwrite=self.overwrite)
            parent.mkdir(parents=True, exist_ok=True)
            self._folder, self._lock = _new_folder(parent, self.output.name)
            (self._folder / "graphs").mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, OSError) and not isinstance(error, EdgeExitError):
                with reporting_full_disk(self.output, self._folder):
                    raise error
        finally:
            if self._folder is not None and self._folder.exists():
                shutil.rmtree(self._folder, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)

    @property
    def folder(self) -> Path:
        """The temporary directory to fill."""
        if self._folder is None:
            raise UsageError("BundleWriter is used outside its with block")
        return self._folder

    def commit(self, manifest: Manifest) -> Bundle:
        """Hashes every file, writes the manifest, and moves the bundle to `output`.

        Returns the bundle, opened and checked by `open_bundle`.
        """
        with reporting_full_disk(self.output, self.folder):
            files = {}
            for directory, _, names in os.walk(self.folder):
                for name in names:
                    path = Path(directory) / name
                    relative = path.relative_to(self.folder).as_posix()
                    files[relative] = File(sha256=sha256_of(path), bytes=path.stat().st_size)
            manifest = msgspec.structs.replace(
                manifest,
                format=f"{FORMAT_MAJOR}.{FORMAT_MINOR}",
                files=dict(sorted(files.items())),
            )
            raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
            (self.folder / MANIFEST).write_bytes(raw + b"\n")
            open_bundle(self.folder)
            for path in self.folder.rglob("*"):
                if path.is_file():
                    path.chmod(0o444)
            self._replace()
        return open_bundle(self.output)

    def _replace(self) -> None:
        aside = None
        if self.overwrite:
            with contextlib.suppress(
                FileNotFoundError
            ):  # another export may have moved it meanwhile
                aside = self.folder.with_suffix(".old")
                os.rename(self.output, aside)
        try:
            os.rename(self.folder, self.output)
        except BaseException as error:  # Ctrl-C too: the old bundle must not go without a new one
            if aside is not None and aside.exists() and not self.output.exists():
                os.rename(aside, self.output)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputBusyError(
                    f"{self.output}: another export has written this bundle meanwhile",
                    fix="Keep that bundle, or export again with --overwrite.",
                ) from error
            raise
        finally:
            if aside is not None and self.output.exists():
                shutil.rmtree(aside, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Removes leftovers of a killed export to the same output.

        An old bundle that was moved aside and not yet replaced is moved back.
        """
        parent = self.output.absolute().parent
        name = re.escape(self.output.name)
        pattern = re.compile(rf"\.{name}\.[0-9a-f]{{16}}\.(partial|old)")
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():  # .old before .partial
            found = pattern.fullmatch(path.name)
            if not found:
                continue
            with _left(path.with_suffix(".partial")) as left:
                if left and found[1] == "old" and not self.output.exists():
                    os.rename(path, self.output)
                elif left:
                    shutil.rmtree(path, ignore_errors=True)


def _new_folder(parent: Path, name: str) -> tuple[Path, int | None]:
    """Makes and locks a temporary directory. Another export may take it for a leftover before it
    is locked; then the next is made."""
    while True:
        folder = parent / f".{name}.{secrets.token_hex(8)}.partial"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = _lock(folder)
            if folder.exists():
                return folder, descriptor
            if descriptor is not None:
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Locks a directory until the returned descriptor is closed or the process ends; the lock
    survives renaming. None: the file system has no locks. Raises `BlockingIOError` if another
    descriptor has the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _left(folder: Path) -> Iterator[bool]:
    """Whether no export writes to a directory any more, which stays so inside. False where the file
    system has no locks to tell."""
    try:
        descriptor = _lock(folder)
    except FileNotFoundError:
        yield True
    except OSError:
        yield False
    else:
        yield descriptor is not None
        if descriptor is not None:
            os.close(descriptor)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuses an output that exists; with `overwrite`, one that is not a bundle."""
    if not (output.exists() or output.is_symlink()):
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists", fix="Choose another -o, or add --overwrite.")
    if output.is_symlink() or not output.is_dir():
        raise OutputExistsError(f"{output} is not a directory", fix="Choose another -o.")
    if any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise OutputExistsError(
            f"{output} is not a bundle (no {MANIFEST}), so --overwrite does not replace it",
            fix="Choose another -o, or remove the directory.",
        )
    for path in output.iterdir():
        if path.name not in (MANIFEST, *OWNED_FOLDERS):
            raise OutputExistsError(
                f"{output} has {path.name}, which is not part of the bundle and would be lost",
                fix="Move it out of the bundle; store other files beside it.",
            )


class reporting_full_disk:
    """Context manager: turns an OSError of a write into a `BundleError` with a fix. `folder` is the
    temporary directory."""

    def __init__(self, output: Path, folder: Path | None = None) -> None:
        self.output, self.folder = output, folder

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BundleError(
                f"{self.output}: the disk is full; no partial files remain",
                fix="Free some space or choose another -o, then run the same command again.",
            ) from error
        if error.errno == errno.ENOENT and self.folder is not None and not self.folder.exists():
            raise BundleError(
                f"{self.output}: {self.folder.name} was removed while this export was writing to "
                "it",
                fix="Run the same command again.",
            ) from error
        raise BundleError(
            f"{self.output}: cannot be written ({error.strerror or error})",
            fix="Choose a writable directory.",
        ) from error


__all__ = ["BundleWriter", "check_output", "reporting_full_disk"]
