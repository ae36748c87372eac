"""Opens a bundle and verifies every file in it.

A bundle is a directory that never changes after export: ``manifest.json``, ``graphs/`` with one
weight store, ``samples/``, and the tokenizer with its chat templates. Its digest is the SHA-256 of
the manifest, which has the SHA-256 of every other file. `open_bundle` refuses a directory that
differs from its manifest before an engine opens a file; `edgeexit.bundle.writer` writes bundles.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from edgeexit.bundle.documents import decode
from edgeexit.bundle.layout import MANIFEST, OWNED_FOLDERS, RECOPY, WEIGHTS
from edgeexit.bundle.manifest import FORMAT_MAJOR, KNOWN_FEATURES, SCORES, File, Manifest
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.bundle.paths import not_a_folder, shown
from edgeexit.bundle.validate import check_structure, graph_signatures
from edgeexit.errors import (
    BundleError,
    FormatError,
    IntegrityError,
    UsageError,
)

HASHED_AT_LOAD_BYTES = 4 << 20
MANIFEST_LIMIT_BYTES = 16 << 20
GRAPH_LIMIT_BYTES = 64 << 20
CHAT_TEMPLATE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened, checked bundle.

    Attributes:
        path: Its directory.
        manifest: Its manifest.
        digest: SHA-256 of ``manifest.json`` in hex; engines and policies are bound to it.
    """

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        """Path of a listed file. Raises `IntegrityError` if the manifest does not list it."""
        if name not in self.manifest.files:
            raise IntegrityError(f"{name}: not listed in the manifest of {self.path}", fix=RECOPY)
        return self.path / name

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """Reads a listed file and checks its digest again.

        Raises:
            IntegrityError: The file is not listed, larger than `limit_bytes`, or changed.
        """
        self.file(name)
        raw = read_regular(self.path, name, limit_bytes=limit_bytes)
        _require_digest(name, hashlib.sha256(raw).hexdigest(), self.manifest.files[name])
        return raw

    @property
    def weights_bytes(self) -> int:
        """Size of the weight store."""
        found = self.manifest.files.get(WEIGHTS)
        return found.bytes if found else 0

    @property
    def exits_untrained(self) -> bool:
        """Whether its exits are untrained: they serve to measure latency, not to answer."""
        return self.manifest.provenance.get("exits") == "untrained"

    @property
    def exits_unknown(self) -> bool:
        """Whether nothing says that its exits were trained: they share the model's own head, and
        the checkpoint did not list them."""
        return self.manifest.provenance.get("exits") == "unknown"


class Unchanged:
    """Detects changes of a bundle's files after it was opened.

    Graphs are compared with the manifest's digests, the weight store with its inode, size and
    modification time: hashing it would take too long.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._files = bundle.manifest.files
        self._root = bundle.path.absolute()
        self._weights = self._stat()

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Raises `IntegrityError` if one of these graphs, or the weight store, has changed."""
        fix = "Load the bundle again."
        for name in names:
            try:
                found = sha256_of(self._root / name)
            except OSError as error:
                raise IntegrityError(
                    f"{name}: missing since the bundle was loaded ({error.strerror})", fix=fix
                ) from error
            if found != self._files[name].sha256:
                raise IntegrityError(f"{name}: changed since the bundle was loaded", fix=fix)
        if self._stat() != self._weights:
            raise IntegrityError(f"{WEIGHTS}: changed since the bundle was loaded", fix=fix)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = (self._root / WEIGHTS).stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def open_bundle(
    path: str | os.PathLike[str], *, verify: Literal["quick", "full"] = "quick"
) -> Bundle:
    """Opens a bundle and checks it against its manifest.

    It always checks names, links, sizes, the graphs' inputs and external tensors, and hashes files
    up to 4 MiB. ``verify="full"`` hashes the weight store too (seconds per GiB).

    Raises:
        BundleError: The bundle is invalid; the message has the file and the cause.
    """
    if verify not in ("quick", "full"):
        raise UsageError(f"verify={verify!r} is not supported", fix='Use "quick" or "full".')
    root = Path(path)
    if reason := not_a_folder(root):
        raise BundleError(
            f"{shown(root)} {reason}", fix="Give the directory that `edgeexit export -o` made."
        )
    try:
        return _open(root, full=verify == "full")
    except OSError as error:
        where = shown(error.filename or root)
        raise BundleError(
            f"{where}: cannot be read ({error.strerror})", fix="Check its permissions."
        ) from error


def _open(root: Path, *, full: bool) -> Bundle:
    """Opens a directory. Raises `BundleError`, or OSError if a file cannot be read."""
    if not (root / MANIFEST).exists() and (root / "config.json").exists():
        raise BundleError(
            f"{root} is a checkpoint, not a bundle",
            fix=f"Make a bundle of it: edgeexit export -m {root} -o BUNDLE.",
        )
    if not (root / MANIFEST).exists() and not (root / "graphs").exists():
        raise BundleError(
            f"{root} is not a bundle: it has no {MANIFEST}",
            fix="Give the directory that `edgeexit export -o` made.",
        )
    raw = read_regular(root, MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
    manifest = decode_manifest(raw)
    bundle = Bundle(path=root, manifest=manifest, digest=hashlib.sha256(raw).hexdigest())
    check_structure(manifest)
    _check_files(bundle, full=full)
    _check_graphs(bundle)
    return bundle


def decode_manifest(raw: bytes) -> Manifest:
    """Decodes ``manifest.json``. Raises `FormatError` for another format, else `BundleError`."""

    class Head(msgspec.Struct):
        format: str
        requires: list[str] = []

    fix = "Give a bundle made by `edgeexit export`."
    try:
        head = decode(raw, Head)
    except ValueError as error:
        raise BundleError(f"{MANIFEST}: not a manifest ({error})", fix=fix) from error
    if not re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,6}", head.format, flags=re.ASCII):
        raise FormatError(f'{MANIFEST}: format {head.format!r} is not "major.minor"', fix=fix)
    if int(head.format.split(".")[0]) != FORMAT_MAJOR:
        raise FormatError(
            f"{MANIFEST}: the format is {head.format}, this edgeexit reads {FORMAT_MAJOR}.x",
            fix="Install the edgeexit that wrote it, or export again with this one.",
        )
    if unknown := sorted(set(head.requires) - KNOWN_FEATURES):
        raise FormatError(
            f"{MANIFEST}: the bundle requires {', '.join(unknown)}, unknown to this edgeexit",
            fix="Install a newer edgeexit.",
        )
    try:
        return decode(raw, Manifest)
    except ValueError as error:
        raise BundleError(f"{MANIFEST}: {error}", fix=RECOPY) from error


def _check_files(bundle: Bundle, *, full: bool) -> None:
    for name, expected in bundle.manifest.files.items():
        path = bundle.path / name
        size = regular_size(bundle.path, name)
        if size != expected.bytes:
            raise IntegrityError(
                f"{name}: {size} bytes, the manifest says {expected.bytes}", fix=RECOPY
            )
        if full or size <= HASHED_AT_LOAD_BYTES:
            _require_digest(name, sha256_of(path), expected)
    for name in _owned_files(bundle.path):
        if name not in bundle.manifest.files:
            raise IntegrityError(
                f"{name}: in the bundle but not in its manifest",
                fix="Remove it; store results and policies beside a bundle, not in it.",
            )


def _require_digest(name: str, found: str, expected: File) -> None:
    if found != expected.sha256:
        raise IntegrityError(
            f"{name}: sha256 differs from the manifest (expected {expected.sha256[:12]}…, found "
            f"{found[:12]}…)",
            fix=RECOPY,
        )


def _check_graphs(bundle: Bundle) -> None:
    for name, inputs, outputs in graph_signatures(bundle.manifest):
        _check_graph(bundle, name, inputs, outputs)


def _check_graph(bundle: Bundle, name: str, inputs: set[str], outputs: set[str]) -> None:
    raw = read_regular(bundle.path, name, limit_bytes=GRAPH_LIMIT_BYTES)
    try:
        graph = read_graph_file(raw)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name}: not an ONNX graph: {error}", fix=RECOPY) from error
    for what, found, expected in (
        ("inputs", set(graph.inputs), inputs),
        ("outputs", set(graph.outputs), outputs),
    ):
        if found != expected:
            raise IntegrityError(
                f"{name}: its {what} are {sorted(found)}, the manifest says {sorted(expected)}",
                fix=RECOPY,
            )
    store = PurePosixPath(WEIGHTS).name
    for tensor in graph.externals:
        inside = (
            tensor.location == store
            and str(PurePosixPath(name).parent) == str(PurePosixPath(WEIGHTS).parent)
            and tensor.length is not None
            and tensor.offset + tensor.length <= bundle.weights_bytes
        )
        if not inside:
            raise IntegrityError(
                f"{name}: tensor {tensor.tensor!r} is outside the weight store "
                f"({tensor.location!r}, {tensor.length} bytes at {tensor.offset})",
                fix=RECOPY,
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _owned_files(root: Path) -> Iterator[str]:
    for folder in OWNED_FOLDERS:
        for directory, folders, files in os.walk(root / folder, followlinks=False):
            for name in [*files, *(f for f in folders if (Path(directory) / f).is_symlink())]:
                yield (Path(directory) / name).relative_to(root).as_posix()


def regular_size(root: Path, name: str) -> int:
    """Size of a regular file below `root`. Raises `IntegrityError` if it is missing, a link, or
    not a regular file."""
    path = root
    try:
        for part in name.split("/"):
            path = path / part
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise IntegrityError(
                    f"{name}: {path} is a link", fix="Replace the link with the file itself."
                )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IntegrityError(f"{name}: missing from {root}", fix=RECOPY) from error
    except OSError as error:
        raise IntegrityError(f"{name}: cannot be read ({error.strerror})", fix=RECOPY) from error
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{name}: not a regular file", fix=RECOPY)
    return status.st_size


def read_regular(root: Path, name: str, *, limit_bytes: int) -> bytes:
    """Content of a regular file. Raises `IntegrityError` if it is larger than `limit_bytes`."""
    size = regular_size(root, name)
    if size > limit_bytes:
        raise IntegrityError(
            f"{name}: {size} bytes, more than the {limit_bytes} allowed", fix=RECOPY
        )
    try:
        return (root / name).read_bytes()
    except OSError as error:
        raise IntegrityError(f"{name}: cannot be read ({error.strerror})", fix=RECOPY) from error


__all__ = [
    "MANIFEST",
    "SCORES",
    "WEIGHTS",
    "Bundle",
    "Unchanged",
    "decode_manifest",
    "open_bundle",
    "sha256_of",
]
