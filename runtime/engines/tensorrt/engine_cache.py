"""The engine cache: built plans, stored outside the bundle.

``<root>/<bundle digest>/<key>/`` holds plans and ``engines.json``, which is written last and lists
what the plans were built from and their digests. The key is a digest of everything that determines
the plans. A folder without ``engines.json`` is an unfinished build, which the next build continues.
Plans are executable code, so folders that other users can write are refused, and plans from other
machines must be imported (`edgeexit.runtime.engines.tensorrt.importing`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeexit.bundle.documents import convert, decode
from edgeexit.bundle.manifest import Sha256, Struct
from edgeexit.bundle.reader import read_regular, regular_size, sha256_of
from edgeexit.bundle.validate import check_relative
from edgeexit.errors import (
    BundleError,
    EngineError,
    IntegrityError,
    OutputBusyError,
)
from edgeexit.runtime.engines.tensorrt.precision import Types

logger = logging.getLogger(__name__)

INDEX, SIGNATURE, LOCK = "engines.json", "engines.json.sig", ".lock"
INDEX_LIMIT_BYTES = 16 << 20
FORMAT = 1


class PlanFile(Struct, frozen=True, kw_only=True):
    """One engine: the graph that it was built from, and how.

    Attributes:
        graph: The graph's name in the bundle.
        file: The plan's file name, next to the index.
        outputs: Names of its outputs.
        profiles: Per profile, input -> its smallest, usual and largest shape. Inputs with a fixed
            shape are left out.
        largest: Named axis -> its largest size.
        precision: Kind of layer -> type in the network -> number of layers.
        inspected: Type -> number of layers that multiply in it, from the library's inspector; None
            if the engine could not be loaded, as after a build for another machine.
        seconds, peak_memory_bytes: Time and memory of the build.
    """

    graph: str
    file: str
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=1)]
    outputs: list[str]
    profiles: list[dict[str, list[list[int]]]]
    largest: dict[str, int]
    precision: Types
    seconds: float
    peak_memory_bytes: int
    inspected: dict[str, int] | None = None


class Target(Struct, frozen=True, kw_only=True):
    """The target of engines: a compute capability (86 for 8.6), or one kind of device."""

    ahead_of_time: bool
    compute_capability: Annotated[int, Meta(ge=1)]
    gpu: str | None = None
    multiprocessors: int | None = None
    cuda: int | None = None
    l4t: str | None = None


class MadeFrom(Struct, frozen=True, kw_only=True):
    """The fields of `EngineSet.made_from` that readers require; it has more."""

    library: str
    version: str
    target: Target


class EngineSet(Struct, frozen=True, kw_only=True):
    """``engines.json``: the engines of a bundle for one device, library and set of sizes.

    `made_from` holds everything that determines the engines; `key` is its digest (`key_of`).
    """

    format: Annotated[int, Meta(ge=1)]
    bundle: Sha256
    key: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
    made_from: dict[str, Any]
    plans: Annotated[list[PlanFile], Meta(min_length=1)]


def key_of(made_from: Mapping[str, Any]) -> str:
    """The key of a set of engines: a digest of everything that determines them.

    >>> key_of({"library": "a", "version": "1"}) == key_of({"version": "1", "library": "a"})
    True
    """
    text = json.dumps(made_from, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def default_root() -> Path:
    """Folder of the engine cache: ``$EDGEEXIT_ENGINE_DIR``, else ``$XDG_CACHE_HOME/edgeexit``, else
    ``~/.cache/edgeexit``."""
    if chosen := os.environ.get("EDGEEXIT_ENGINE_DIR"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache.startswith("/") else Path.home() / ".cache") / "edgeexit"


def folder_of(root: Path, bundle: str, key: str) -> Path:
    """The folder of the engines with a key, for a bundle's digest."""
    return root / bundle / key


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Creates and locks a folder of the cache for a build. Removes partial files of an earlier
    build.

    Raises:
        OutputBusyError: Another build is writing to the folder.
        EngineError: The folder cannot be written, or other users can write to it.
    """
    root, top = folder.parents[1], folder.parent
    try:
        for place in (root, top, folder):
            _make_private(place)
            _require_private(place)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputBusyError(
                f"{folder}: another build is writing to this folder",
                fix="Wait until it ends, then run this again: it uses those engines.",
            ) from error
        for partial in folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
        yield folder
    finally:
        os.close(lock)


def _make_private(folder: Path) -> None:
    """Creates a folder that only its owner can write, for any umask."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file completely or not at all.

    Raises:
        EngineError: The disk is full, or the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> EngineError:
    """The error for a cache that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return EngineError(
        f"{path}: " + ("the disk is full" if full else f"cannot be written ({error.strerror})"),
        fix=("Free some space, or choose" if full else "Choose")
        + " another folder: -o for engines of other machines, else --engine-dir DIR or "
        "EDGEEXIT_ENGINE_DIR. Finished engines are kept.",
    )


def write_index(folder: Path, engines: EngineSet) -> None:
    """Writes ``engines.json``, which completes the folder."""
    raw = msgspec.json.format(msgspec.json.encode(engines), indent=1)
    write_whole(folder / INDEX, raw + b"\n")


def read_index(folder: Path) -> EngineSet:
    """Reads ``engines.json``. Raises `IntegrityError` as `parse_index` does."""
    return parse_index(folder, read_raw_index(folder))


def read_raw_index(folder: Path) -> bytes:
    """The bytes of ``engines.json``. Signatures cover these bytes."""
    with _advising():
        return read_regular(folder, INDEX, limit_bytes=INDEX_LIMIT_BYTES)


_BUILD_AGAIN = "Build again (edgeexit build replaces damaged engines), or import them again."


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Replaces the fix in errors about files: the original is meant for bundles."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(error.what, fix=_BUILD_AGAIN) from error


def parse_index(folder: Path, raw: bytes) -> EngineSet:
    """Parses ``engines.json`` and checks its consistency and the sizes of the plans.

    Raises:
        IntegrityError: It cannot be parsed, its key is not the digest of `made_from`, or a plan is
            missing, a link, or has another size.
    """
    fix = _BUILD_AGAIN
    try:
        engines = decode(raw, EngineSet)
    except ValueError as error:
        raise IntegrityError(f"{folder / INDEX}: {error}", fix=fix) from error
    if engines.format != FORMAT:
        raise IntegrityError(
            f"{folder / INDEX}: format {engines.format}, this edgeexit reads format {FORMAT}",
            fix=fix,
        )
    if key_of(engines.made_from) != engines.key:
        raise IntegrityError(
            f"{folder / INDEX}: the key {engines.key} does not match made_from",
            fix=fix,
        )
    try:
        convert(engines.made_from, MadeFrom)
    except ValueError as error:
        raise IntegrityError(f"{folder / INDEX}: made_from: {error}", fix=fix) from error
    for plan in engines.plans:
        with _advising():
            check_relative(plan.file, INDEX)
        if "/" in plan.file or plan.file in (INDEX, SIGNATURE, LOCK):
            raise IntegrityError(
                f"{folder / INDEX}: {plan.file!r} is not the name of a plan", fix=fix
            )
        with _advising():
            size = regular_size(folder, plan.file)
        if size != plan.bytes:
            raise IntegrityError(
                f"{folder / plan.file}: {size} bytes, expected {plan.bytes}", fix=fix
            )
    return engines


def check_plans(folder: Path, engines: EngineSet) -> None:
    """Hashes every plan. Raises `IntegrityError` if a plan was changed after the build."""
    for plan in engines.plans:
        if not is_whole(folder, plan):
            raise IntegrityError(
                f"{folder / plan.file}: was changed after the build", fix=_BUILD_AGAIN
            )


def is_whole(folder: Path, plan: PlanFile) -> bool:
    """Whether a plan exists and was not changed after the build."""
    path = folder / plan.file
    if path.is_symlink() or not path.is_file() or path.stat().st_size != plan.bytes:
        return False
    return sha256_of(path) == plan.sha256


def whole_plans(folder: Path, bundle: str, key: str) -> dict[str, PlanFile]:
    """Graph -> undamaged plan, for the plans in a folder. Empty if its index cannot be read or is
    for other engines. Plans that are listed twice are left out."""
    try:
        raw = read_regular(folder, INDEX, limit_bytes=INDEX_LIMIT_BYTES)
        engines = decode(raw, EngineSet)
    except (BundleError, ValueError):
        return {}
    if (engines.format, engines.bundle, engines.key, key_of(engines.made_from)) != (
        FORMAT,
        bundle,
        key,
        key,
    ):
        return {}
    names = [plan.file for plan in engines.plans]
    return {
        plan.graph: plan
        for plan in engines.plans
        if names.count(plan.file) == 1 and "/" not in plan.file and is_whole(folder, plan)
    }


def list_engines(root: Path, bundle: str) -> list[tuple[Path, EngineSet]]:
    """Finished engines for a bundle's digest; the most recently built or requested set comes last.
    Damaged sets are left out with a warning.

    Raises:
        EngineError: The folder, or a folder above it in the cache, cannot be read, or other users
            can write to it and could put code there.
    """
    top = root / bundle
    sets = []
    try:
        for folder in sorted(top.iterdir(), key=lambda path: path.name) if top.is_dir() else ():
            if not (folder / INDEX).is_file():
                continue
            for place in (root, top, folder):
                _require_private(place)
            try:
                engines = read_index(folder)
            except IntegrityError as error:
                logger.warning("%s", error)
                continue
            if (engines.bundle, engines.key) != (bundle, folder.name):
                logger.warning("%s: ignored, it holds engines of another bundle or key", folder)
                continue
            sets.append((folder, engines))
        return sorted(sets, key=lambda entry: (entry[0] / INDEX).stat().st_mtime_ns)
    except OSError as error:
        raise EngineError(
            f"{error.filename or top}: cannot be read ({error.strerror})",
            fix="Check its permissions, or choose another folder: EDGEEXIT_ENGINE_DIR.",
        ) from error


def _require_private(folder: Path) -> None:
    """Raises `EngineError` if other users can write to a folder."""
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{folder}: other users can write to this folder, and engines are executable code",
            fix=f"Make it writable only for you (chmod -R go-w {folder}), or choose another "
            "folder: EDGEEXIT_ENGINE_DIR.",
        )


__all__ = [
    "EngineSet", "PlanFile", "building", "check_plans", "default_root", "folder_of", "is_whole",
    "key_of", "list_engines", "parse_index", "read_index", "read_raw_index", "whole_plans",
    "write_index", "write_whole",
]  # fmt: skip
