"""The bundle on disk: reading it so that nothing is trusted.

A bundle is a directory that never changes after export: ``manifest.json``, ``graphs/`` with one
weight store, ``samples/``, and the tokenizer with its chat templates. Its digest is the SHA-256 of
the manifest, which holds the SHA-256 of every other file. `open_bundle` refuses anything that is
not exactly what the manifest lists, before an engine sees it; `edgeexit.bundle.writer` makes
bundles.
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

from edgeexit.bundle.manifest import (
    FORMAT_MAJOR,
    ITEM_BYTES,
    KNOWN_FEATURES,
    SCORES,
    Decoding,
    Exit,
    File,
    Manifest,
    Segment,
    Tensor,
    TextPreprocessing,
)
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.errors import (
    BundleError,
    FormatError,
    IntegrityError,
    UsageError,
)

MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.bin"
OWNED_FOLDERS = ("graphs", "samples", "tokenizer")
"""Folders in which every file must be listed in the manifest."""

HASHED_AT_LOAD_BYTES = 4 << 20
MANIFEST_LIMIT_BYTES = 16 << 20
GRAPH_LIMIT_BYTES = 64 << 20
CHAT_TEMPLATE_LIMIT_BYTES = 1 << 20
_RECOPY = "The bundle was changed after export; copy it again or export it again."


@dataclass(frozen=True)
class Bundle:
    """An opened, checked bundle.

    Attributes:
        path: Its directory.
        manifest: What it says about itself.
        digest: SHA-256 of ``manifest.json`` in hex: the name that engines and policies are bound
            to.
    """

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        """Path of a listed file. Raises `IntegrityError` for one that is not listed."""
        if name not in self.manifest.files:
            raise IntegrityError(f"{name}: not listed in the manifest of {self.path}", fix=_RECOPY)
        return self.path / name

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """The content of a listed file, held against its digest once more.

        Raises:
            IntegrityError: It is not listed, larger than `limit_bytes`, or not as it was exported.
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

    def exits(self) -> list[Exit]:
        """Every exit of every chain, in the order in which they are reached."""
        chains = self.manifest.chains.values()
        return [leave for chain in chains for part in chain.segments for leave in part.exits]


class Unchanged:
    """Knows how a bundle's files were when it was opened, for those who read them again later.

    Graphs are held against the manifest's digests, the weight store against its inode, size and
    time: hashing it would take too long.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._files = bundle.manifest.files
        self._root = bundle.path.absolute()
        self._weights = self._stat()

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Raises `IntegrityError` if one of these graphs, or the weights, changed meanwhile."""
        fix = "Load the bundle again."
        for name in names:
            try:
                found = sha256_of(self._root / name)
            except OSError as error:
                raise IntegrityError(
                    f"{name}: gone since the bundle was loaded ({error.strerror})", fix=fix
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
    """Opens a bundle and refuses it unless it is exactly what its manifest says.

    Every opening checks names, links, sizes, the graphs' inputs and external tensors, and hashes
    files up to 4 MiB. ``verify="full"`` hashes the weight store too (seconds per GiB).

    Raises:
        BundleError: One of its kinds, naming the file and the reason.
    """
    if verify not in ("quick", "full"):
        raise UsageError(f"verify={verify!r} is not a way to verify", fix='Use "quick" or "full".')
    root = Path(path)
    if not root.is_dir():
        kind = "is a file, not a bundle directory" if root.exists() else "does not exist"
        raise BundleError(
            f"{root} {kind}", fix="Give the directory that `edgeexit export -o` made."
        )
    if not (root / MANIFEST).exists() and (root / "config.json").exists():
        raise BundleError(
            f"{root} is a checkpoint, not a bundle",
            fix=f"Make a bundle of it: edgeexit export -m {root} -o BUNDLE.",
        )
    raw = read_regular(root, MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
    manifest = decode_manifest(raw)
    bundle = Bundle(path=root, manifest=manifest, digest=hashlib.sha256(raw).hexdigest())
    _check_structure(manifest)
    _check_files(bundle, full=verify == "full")
    _check_graphs(bundle)
    return bundle


def decode_manifest(raw: bytes) -> Manifest:
    """Decodes ``manifest.json``. Raises `FormatError` for another format, else `BundleError`."""

    class Head(msgspec.Struct):
        format: str
        requires: list[str] = []

    fix = "Give a bundle made by `edgeexit export`."
    try:
        head = msgspec.json.decode(raw, type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
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
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{MANIFEST}: {error}", fix=_RECOPY) from error


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
            fix="Names are relative, with '/' between parts and without '..'. Make it again.",
        )


def _check_structure(manifest: Manifest) -> None:
    """Checks the references inside a manifest: names that exist, once, in the right order."""
    for name in manifest.files:
        check_relative(name)
    wanted = [variant.graph for variant in manifest.unsplit]
    segments = [part for chain in manifest.chains.values() for part in chain.segments]
    segments += list(manifest.heads.values())
    wanted += [variant.graph for part in segments for variant in part.variants]
    wanted += [part.projection.graph for part in segments if part.projection is not None]
    wanted += manifest.samples
    wanted += [manifest.tokenizer] if manifest.tokenizer else []
    wanted += manifest.chat.templates.values() if manifest.chat else []
    for name in wanted:
        if name not in manifest.files:
            raise IntegrityError(f"{MANIFEST}: {name} is used but not listed in files", fix=_RECOPY)
    if isinstance(manifest.preprocessing, TextPreprocessing) and not manifest.tokenizer:
        raise BundleError(f"{MANIFEST}: text preprocessing needs a tokenizer", fix="Export again.")
    if manifest.chat is not None and not manifest.tokenizer:
        raise BundleError(f"{MANIFEST}: chat templates need a tokenizer", fix="Export again.")
    if not manifest.chains:
        raise BundleError(f"{MANIFEST}: it has no chain", fix="Export again.")
    for tensor in [*manifest.inputs, *manifest.outputs]:
        _check_rows(f"{MANIFEST}: {tensor.name}", tensor)
    if not any("batch" in tensor.axes for tensor in manifest.inputs):
        raise BundleError(f"{MANIFEST}: no input has an axis named batch", fix="Export again.")
    if (manifest.decoding is None) != (manifest.program == "forward"):
        raise BundleError(
            f"{MANIFEST}: the program {manifest.program} and the decoding section do not fit",
            fix="Export again.",
        )
    if manifest.decoding is not None:
        _check_decoding(manifest, manifest.decoding)
    for chain_name, chain in manifest.chains.items():
        _check_chain(manifest, chain_name, chain.segments)
    exits = [leave.name for part in segments for leave in part.exits]
    if repeated := sorted({name for name in exits if exits.count(name) > 1}):
        raise BundleError(f"{MANIFEST}: exit {repeated[0]} is there twice", fix="Export again.")


def _check_decoding(manifest: Manifest, decoding: Decoding) -> None:
    """Checks the table of embeddings against the store, and what the section names."""
    embedding = decoding.embedding
    width, store = embedding.output.axes[-1:], manifest.files.get(WEIGHTS)
    if not width or not isinstance(width[0], int) or store is None:
        raise BundleError(
            f"{MANIFEST}: the embedding's output {embedding.output.axes} has no width, or there is "
            "no weight store",
            fix="Export again.",
        )
    end = embedding.offset + embedding.vocabulary * width[0] * ITEM_BYTES[embedding.output.dtype]
    if end > store.bytes:
        raise IntegrityError(
            f"{MANIFEST}: the embedding lies outside the weight store (it would end at byte {end} "
            f"of {store.bytes})",
            fix=_RECOPY,
        )
    if embedding.tokens not in [tensor.name for tensor in manifest.inputs]:
        raise BundleError(f"{MANIFEST}: there is no input {embedding.tokens}", fix="Export again.")
    bad = [token for token in decoding.stop_tokens if not 0 <= token < embedding.vocabulary]
    if bad:
        raise BundleError(
            f"{MANIFEST}: the stop token {bad[0]} is outside the vocabulary", fix="Export again."
        )
    if decoding.head not in manifest.heads:
        raise BundleError(f"{MANIFEST}: there is no head {decoding.head}", fix="Export again.")


def _check_chain(manifest: Manifest, chain: str, segments: list[Segment]) -> None:
    known: dict[str, Tensor] = {tensor.name: tensor for tensor in manifest.inputs}
    if manifest.decoding is not None:
        fed = (manifest.decoding.embedding.output, manifest.decoding.positions)
        known |= {tensor.name: tensor for tensor in fed}
    for part in segments:
        where = f"{MANIFEST}: chain {chain}, segment {part.name}"
        for tensor in part.inputs:
            before = known.get(tensor.name)
            if before is None:
                raise BundleError(
                    f"{where}: nothing before it makes {tensor.name}", fix="Export again."
                )
            if (before.dtype, before.axes, before.row_axis) != (
                tensor.dtype,
                tensor.axes,
                tensor.row_axis,
            ):
                raise BundleError(
                    f"{where}: {tensor.name} is {before.dtype}{before.axes} where it is made and "
                    f"{tensor.dtype}{tensor.axes} here",
                    fix="Export again.",
                )
        own = {tensor.name: tensor for tensor in part.outputs}
        for tensor in part.outputs:
            if tensor.name in known:
                raise BundleError(f"{where}: {tensor.name} is made twice", fix="Export again.")
            _check_rows(f"{where}: {tensor.name}", tensor)
        known |= own
        for leave in part.exits:
            _check_exit(manifest, where, leave, own)
            if leave.adapter is not None and part is segments[-1]:
                raise BundleError(
                    f"{where}: exit {leave.name} has an adapter, but it answers as the model",
                    fix="Export again.",
                )
            if leave.adapter is not None:
                _check_adapter(manifest, where, leave, own)
    last = segments[-1]
    if manifest.program == "forward" and not last.exits:
        raise BundleError(f"{MANIFEST}: chain {chain} ends without an exit", fix="Export again.")


def _check_rows(where: str, tensor: Tensor) -> None:
    """Rows lie along the axis named batch, and along no other."""
    found = [place for place, axis in enumerate(tensor.axes) if axis == "batch"]
    if found != ([] if tensor.row_axis is None else [tensor.row_axis]):
        raise BundleError(
            f"{where} has the axes {tensor.axes}, so its row_axis cannot be {tensor.row_axis}",
            fix="Rows lie along the axis named batch. Export again.",
        )


def _check_exit(manifest: Manifest, where: str, leave: Exit, own: dict[str, Tensor]) -> None:
    if leave.head is not None:
        if leave.head not in manifest.heads:
            raise BundleError(
                f"{where}: exit {leave.name} uses the head {leave.head}, which is not there",
                fix="Export again.",
            )
        if leave.state not in own:
            raise BundleError(
                f"{where}: exit {leave.name} looks at {leave.state}, not an output", fix=_RECOPY
            )
        own = {tensor.name: tensor for tensor in manifest.heads[leave.head].outputs}
    promised = [output.name for output in manifest.outputs]
    if leave.action == "stop" and sorted(leave.outputs) != sorted(promised):
        raise BundleError(
            f"{where}: exit {leave.name} gives {sorted(leave.outputs)}, the model promises "
            f"{sorted(promised)}",
            fix="Export again.",
        )
    for tensor in [*leave.outputs.values(), *leave.scores.values()]:
        if tensor not in own:
            raise BundleError(
                f"{where}: exit {leave.name} names {tensor}, not an output", fix=_RECOPY
            )
    for output in manifest.outputs if leave.action == "stop" else ():
        given = own[leave.outputs[output.name]]
        if not _same_form(given, output):
            raise BundleError(
                f"{where}: {given.name} of exit {leave.name} is {given.dtype}{given.axes}, "
                f"the model promises {output.name} as {output.dtype}{output.axes}",
                fix="Export again.",
            )
    for score, tensor in leave.scores.items():
        if own[tensor].dtype != "float32" or own[tensor].axes != ["batch"]:
            raise BundleError(
                f"{where}: score {score} of exit {leave.name} is not float32 [batch]",
                fix="Export again.",
            )


def _check_adapter(manifest: Manifest, where: str, leave: Exit, own: dict[str, Tensor]) -> None:
    """An adapter maps an exit's state and the positions to a state of the same form."""
    adapter = manifest.heads.get(leave.adapter or "")
    if adapter is None:
        raise BundleError(
            f"{where}: exit {leave.name} uses the adapter {leave.adapter}, which is not there",
            fix="Export again.",
        )
    if leave.head is None or manifest.decoding is None:
        raise BundleError(
            f"{where}: exit {leave.name} has an adapter, but no head behind it", fix="Export again."
        )
    state = own[leave.state or ""]
    takes, gives = adapter.inputs, adapter.outputs
    if takes != [state, manifest.decoding.positions] or [
        (tensor.dtype, tensor.axes, tensor.row_axis) for tensor in gives
    ] != [(state.dtype, state.axes, state.row_axis)]:
        raise BundleError(
            f"{where}: the adapter {leave.adapter} does not map {state.name} and the positions to "
            "one state of the same form",
            fix="Export again.",
        )


def _same_form(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of these forms can stand in one array: only open axes may differ."""
    return (one.dtype, one.row_axis, len(one.axes)) == (
        other.dtype,
        other.row_axis,
        len(other.axes),
    ) and not any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(one.axes, other.axes, strict=True)
    )


def _check_files(bundle: Bundle, *, full: bool) -> None:
    for name, expected in bundle.manifest.files.items():
        path = bundle.path / name
        size = regular_size(bundle.path, name)
        if size != expected.bytes:
            raise IntegrityError(
                f"{name}: {size} bytes, the manifest says {expected.bytes}", fix=_RECOPY
            )
        if full or size <= HASHED_AT_LOAD_BYTES:
            _require_digest(name, sha256_of(path), expected)
    for name in _owned_files(bundle.path):
        if name not in bundle.manifest.files:
            raise IntegrityError(
                f"{name}: in the bundle but not in its manifest",
                fix="Remove it; results and policies belong beside a bundle, never in it.",
            )


def _require_digest(name: str, found: str, expected: File) -> None:
    if found != expected.sha256:
        raise IntegrityError(
            f"{name}: sha256 differs from the manifest (expected {expected.sha256[:12]}…, found "
            f"{found[:12]}…)",
            fix=_RECOPY,
        )


def _check_graphs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    program_inputs = {tensor.name for tensor in manifest.inputs}
    program_outputs = {tensor.name for tensor in manifest.outputs}
    if manifest.decoding is not None:
        fed = (manifest.decoding.embedding.output, manifest.decoding.positions)
        caches = [c for chain in manifest.chains.values() for p in chain.segments for c in p.caches]
        program_inputs = {t.name for t in fed} | {cache.past for cache in caches}
        program_outputs |= {cache.present for cache in caches}
    for variant in manifest.unsplit:
        lengths = {f"lengths/{kind}" for kind in variant.lengths}
        _check_graph(bundle, variant.graph, program_inputs | lengths, program_outputs)
    parts = [part for chain in manifest.chains.values() for part in chain.segments]
    for part in [*parts, *manifest.heads.values()]:
        inputs = {tensor.name for tensor in part.inputs}
        outputs = {tensor.name for tensor in part.outputs}
        inputs |= {cache.past for cache in part.caches}
        outputs |= {cache.present for cache in part.caches}
        for variant in part.variants:
            lengths = {f"lengths/{kind}" for kind in variant.lengths}
            _check_graph(bundle, variant.graph, inputs | lengths, outputs)
        if part.projection is not None:
            given = {tensor.name for tensor in part.inputs}
            made = {cache.present for cache in part.caches}
            _check_graph(bundle, part.projection.graph, given, made)


def _check_graph(bundle: Bundle, name: str, inputs: set[str], outputs: set[str]) -> None:
    raw = read_regular(bundle.path, name, limit_bytes=GRAPH_LIMIT_BYTES)
    try:
        graph = read_graph_file(raw)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name}: not an ONNX graph: {error}", fix=_RECOPY) from error
    for what, found, expected in (
        ("inputs", set(graph.inputs), inputs),
        ("outputs", set(graph.outputs), outputs),
    ):
        if found != expected:
            raise IntegrityError(
                f"{name}: its {what} are {sorted(found)}, the manifest says {sorted(expected)}",
                fix=_RECOPY,
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
                f"{name}: tensor {tensor.tensor!r} lies outside the weight store "
                f"({tensor.location!r}, {tensor.length} bytes at {tensor.offset})",
                fix=_RECOPY,
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
    """Size of a regular file below `root`; raises `IntegrityError` for links, and where it is
    missing or something else."""
    path = root
    try:
        for part in name.split("/"):
            path = path / part
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise IntegrityError(
                    f"{name}: {path} is a link", fix="Links are not followed: put the file there."
                )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IntegrityError(f"{name}: missing from {root}", fix=_RECOPY) from error
    except OSError as error:
        raise IntegrityError(f"{name}: cannot be read ({error.strerror})", fix=_RECOPY) from error
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{name}: not a regular file", fix=_RECOPY)
    return status.st_size


def read_regular(root: Path, name: str, *, limit_bytes: int) -> bytes:
    """Content of such a file; raises `IntegrityError` if it is larger than allowed."""
    size = regular_size(root, name)
    if size > limit_bytes:
        raise IntegrityError(
            f"{name}: {size} bytes, more than the {limit_bytes} allowed", fix=_RECOPY
        )
    try:
        return (root / name).read_bytes()
    except OSError as error:
        raise IntegrityError(f"{name}: cannot be read ({error.strerror})", fix=_RECOPY) from error


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
