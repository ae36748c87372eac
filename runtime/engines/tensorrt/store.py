"""The engine cache: built plans beside a bundle, never in it, under a key of all that made them.

``<root>/<bundle digest>/<key>/`` holds plans and, written last, ``engines.json``: what they were
made from, and their digests. A folder without it is a build that has not ended, and is taken up
again. A plan is executable code: one that was not built here comes in only with a signature by
somebody who is allowed to sign, or by explicit trust (`import_engines`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeexit.bundle import Bundle, check_relative, read_regular, regular_size, sha256_of
from edgeexit.errors import EngineError, IntegrityError, OutputBusyError, UsageError
from edgeexit.manifest import Sha256, Struct
from edgeexit.runtime.engines.tensorrt.precision import Types

INDEX, SIGNATURE, LOCK = "engines.json", "engines.json.sig", ".lock"
NAMESPACE = "edgeexit-engines"
"""What signatures are made for (``ssh-keygen -Y sign -n``): those made for anything else do not
count."""
INDEX_LIMIT_BYTES = 16 << 20
FORMAT = 1


class PlanFile(Struct, frozen=True, kw_only=True):
    """One engine: which graph of the bundle it was made from, and how.

    Attributes:
        graph: The graph's name in the bundle.
        file: The plan, beside the index.
        outputs: Outputs that it gives.
        profiles: Per profile, input -> its smallest, usual and largest shape. Inputs of one shape
            are left out.
        largest: Named axis -> its largest size.
        precision: Kind of layer -> type that it computes in, by the network -> how many there are.
        inspected: Type -> how many of the engine's layers multiply in it, by the library's
            inspector; None where it could not be loaded, as where it was built ahead of time.
        seconds, peak_memory_bytes: What the build took.
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
    """What engines run on: a compute capability (86 for 8.6), or one kind of device."""

    ahead_of_time: bool
    compute_capability: Annotated[int, Meta(ge=1)]
    gpu: str | None = None
    multiprocessors: int | None = None
    cuda: int | None = None
    l4t: str | None = None


class MadeFrom(Struct, frozen=True, kw_only=True):
    """What every reader of a key's ingredients counts on; there is more in them."""

    library: str
    version: str
    target: Target


class EngineSet(Struct, frozen=True, kw_only=True):
    """``engines.json``: the engines of a bundle for one device, library and set of sizes.

    `made_from` is everything that the key is made of; see `key_of`.
    """

    format: Annotated[int, Meta(ge=1)]
    bundle: Sha256
    key: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
    made_from: dict[str, Any]
    plans: Annotated[list[PlanFile], Meta(min_length=1)]


def key_of(made_from: Mapping[str, Any]) -> str:
    """The key of engines: a digest of everything that could make them others.

    >>> key_of({"library": "a", "version": "1"}) == key_of({"version": "1", "library": "a"})
    True
    """
    text = json.dumps(made_from, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def default_root() -> Path:
    """Where engines are kept: ``$EDGEEXIT_ENGINE_DIR``, else ``$XDG_CACHE_HOME/edgeexit``, else
    ``~/.cache/edgeexit``."""
    if chosen := os.environ.get("EDGEEXIT_ENGINE_DIR"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache.startswith("/") else Path.home() / ".cache") / "edgeexit"


def folder_of(root: Path, bundle: str, key: str) -> Path:
    """Where the engines of a bundle's digest with that key belong."""
    return root / bundle / key


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder of the cache to build in: made if need be, and held against a second build.

    Raises:
        OutputBusyError: Another build writes there.
        EngineError: It cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputBusyError(
                f"{folder}: another build is writing there",
                fix="Wait for it to end; what it built is then used.",
            ) from error
        yield folder
    finally:
        os.close(lock)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is whole or not there.

    Raises:
        EngineError: The disk is full, or cannot be written.
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
    """What to raise when the cache cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return EngineError(
        f"{path}: " + ("the disk is full" if full else f"cannot be written ({error.strerror})"),
        fix=("Free some space, or choose" if full else "Choose")
        + " another place: --engine-dir DIR. Engines that were built already are kept.",
    )


def write_index(folder: Path, engines: EngineSet) -> None:
    """Writes ``engines.json``, which makes the folder whole."""
    raw = msgspec.json.format(msgspec.json.encode(engines), indent=1)
    write_whole(folder / INDEX, raw + b"\n")


def read_index(folder: Path) -> EngineSet:
    """Reads ``engines.json`` and holds it against itself and the files' sizes.

    Raises:
        IntegrityError: It cannot be read, its key is not the key of what it was made from, or a
            plan is missing, linked, or of another size.
    """
    return _read(folder, read_regular(folder, INDEX, limit_bytes=INDEX_LIMIT_BYTES))


def _read(folder: Path, raw: bytes) -> EngineSet:
    fix = "Remove the folder and build again: edgeexit build."
    try:
        found = msgspec.json.decode(raw, type=EngineSet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{folder / INDEX}: {error}", fix=fix) from error
    if found.format != FORMAT:
        raise IntegrityError(
            f"{folder / INDEX}: its format is {found.format}, this edgeexit reads {FORMAT}", fix=fix
        )
    if key_of(found.made_from) != found.key:
        raise IntegrityError(
            f"{folder / INDEX}: its key {found.key} is not the key of what it was made from",
            fix=fix,
        )
    try:
        msgspec.convert(found.made_from, type=MadeFrom)
    except msgspec.ValidationError as error:
        raise IntegrityError(f"{folder / INDEX}: made_from: {error}", fix=fix) from error
    for plan in found.plans:
        check_relative(plan.file, INDEX)
        if "/" in plan.file or plan.file in (INDEX, SIGNATURE, LOCK):
            raise IntegrityError(f"{folder / INDEX}: {plan.file!r} is not a plan's name", fix=fix)
        size = regular_size(folder, plan.file)
        if size != plan.bytes:
            raise IntegrityError(
                f"{folder / plan.file}: {size} bytes, expected {plan.bytes}", fix=fix
            )
    return found


def check_plans(folder: Path, engines: EngineSet) -> None:
    """Hashes every plan; raises `IntegrityError` for one that is not as it was built."""
    for plan in engines.plans:
        if sha256_of(folder / plan.file) != plan.sha256:
            raise IntegrityError(
                f"{folder / plan.file}: not as it was built",
                fix="Copy it again, or build again: edgeexit build.",
            )


def list_engines(root: Path, bundle: str) -> list[tuple[Path, EngineSet]]:
    """The finished engines of a bundle's digest, oldest first.

    Raises:
        EngineError: The folder, or one above it inside the cache, belongs to somebody else or lets
            others write: they could put code there.
    """
    top = root / bundle
    found = []
    for folder in sorted(top.iterdir(), key=lambda one: one.name) if top.is_dir() else ():
        if (folder / INDEX).is_file():
            for place in (root, top, folder):
                _require_private(place)
            found.append((folder, read_index(folder)))
    return sorted(found, key=lambda one: (one[0] / INDEX).stat().st_mtime_ns)


def _require_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{folder}: others can write there, and engines are code that runs",
            fix=f"Make it yours alone: chmod -R go-w {folder}; or use --engine-dir DIR.",
        )


Trust = Literal["signature", "anything"]


def import_engines(
    source: Path,
    root: Path,
    bundle: Bundle,
    *,
    trust: Trust = "signature",
    signers: Path | None = None,
) -> list[Path]:
    """Takes engines that were built elsewhere into the cache.

    Args:
        source: A folder with ``engines.json``, or one that holds such folders
            (``DIGEST/KEY`` as `edgeexit build -o` writes them).
        root: The cache.
        bundle: Whose engines they must be.
        trust: ``signature``: only those with a valid signature by an allowed signer. ``anything``:
            the user answers for them.
        signers: Allowed signers, as ssh-keygen reads them; None: ``allowed_signers`` in the
            configuration folder.

    Returns:
        Where each set stands now.

    Raises:
        UsageError: There is nothing to import.
        IntegrityError: Engines of another bundle, changed ones, without signature or with a wrong
            one. Nothing is imported then.
    """
    folders = _with_index(source)
    if not folders:
        raise UsageError(
            f"{source}: there are no engines (no {INDEX})",
            fix="Give the folder that `edgeexit build -o` made.",
        )
    # Read once: what the signature was held against is what is copied.
    raws = [read_regular(folder, INDEX, limit_bytes=INDEX_LIMIT_BYTES) for folder in folders]
    sets = [(folder, raw, _read(folder, raw)) for folder, raw in zip(folders, raws, strict=True)]
    mine = [one for one in sets if one[2].bundle == bundle.digest]
    if not mine:
        raise IntegrityError(
            f"{source}: these engines were built from the bundle {sets[0][2].bundle[:12]}, "
            f"{bundle.path} is {bundle.digest[:12]}",
            fix="Build engines of this bundle, or give the bundle that they were made from.",
        )
    for folder, raw, one in mine:
        if trust == "signature":
            verify_signature(folder, raw, default_signers() if signers is None else signers)
        check_plans(folder, one)
    return [_copy(folder, one, root) for folder, _, one in mine]


def _with_index(source: Path) -> list[Path]:
    if not source.is_dir():
        return []
    places = [source, *source.glob("*"), *source.glob("*/*")]
    return sorted(one for one in places if (one / INDEX).is_file())


def _copy(folder: Path, engines: EngineSet, root: Path) -> Path:
    """Copies a set; the index last. What is hashed again is the copy: it cannot change any more."""
    target = folder_of(root, engines.bundle, engines.key)
    with building(target):
        try:
            for plan in engines.plans:
                partial = target / f"{plan.file}.partial"
                shutil.copyfile(folder / plan.file, partial)
                os.replace(partial, target / plan.file)
        except OSError as error:
            raise cannot_write(target, error) from error
        check_plans(target, engines)
        write_index(target, engines)
    return target


def default_signers() -> Path:
    """The user's file of allowed signers."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(config) if config.startswith("/") else Path.home() / ".config"
    return root / "edgeexit" / "allowed_signers"


def sign(folder: Path, key: Path) -> None:
    """Signs a set of engines with an SSH key: ``engines.json.sig`` beside the index, which holds
    the digest of every plan."""
    (folder / SIGNATURE).unlink(missing_ok=True)
    command = [*_KEYGEN, "sign", "-q", "-n", NAMESPACE, "-f", str(key)]
    done = _ssh_keygen([*command, str(folder / INDEX)])
    if done.returncode:
        raise UsageError(
            f"--sign {key}: ssh-keygen refused it: {_last_line(done)}",
            fix="Give a private SSH key, or a public one whose private half the agent holds.",
        )


def verify_signature(folder: Path, raw: bytes, signers: Path) -> str:
    """Returns who signed the engines in a folder, whose index was read as `raw`.

    Raises:
        IntegrityError: There is no signature, it does not fit, or its key is nobody's who may sign.
    """
    fix = (
        "Sign them where they were built (edgeexit build --sign KEY) with a key listed in the file "
        "of allowed signers (--allowed-signers FILE; a line is a name before what stands in the "
        "key's .pub: NAME ssh-ed25519 AAAA...), or add --trust if you answer for them."
    )
    if not (folder / SIGNATURE).is_file():
        raise IntegrityError(f"{folder}: the engines have no signature ({SIGNATURE})", fix=fix)
    if not signers.is_file():
        raise IntegrityError(f"{signers}: there is no file of allowed signers", fix=fix)
    signature = str(folder / SIGNATURE)
    whose = _ssh_keygen([*_KEYGEN, "find-principals", "-f", str(signers), "-s", signature])
    names = whose.stdout.decode(errors="replace").splitlines()
    if whose.returncode or not names:
        raise IntegrityError(
            f"{folder / SIGNATURE}: nobody in {signers} has the key that signed", fix=fix
        )
    command = [*_KEYGEN, "verify", "-f", str(signers), "-I", names[0]]
    done = _ssh_keygen([*command, "-n", NAMESPACE, "-s", signature], raw)
    if done.returncode:
        raise IntegrityError(
            f"{folder / SIGNATURE}: the signature does not fit the engines ({_last_line(done)})",
            fix=fix,
        )
    return names[0]


_KEYGEN = ["ssh-keygen", "-Y"]


def _ssh_keygen(command: list[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise EngineError(
            "ssh-keygen is not installed, and signatures are its work",
            fix="Install OpenSSH (Debian: apt install openssh-client).",
        ) from error


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


__all__ = [
    "EngineSet", "PlanFile", "building", "default_root", "default_signers", "folder_of",
    "import_engines", "key_of", "list_engines", "read_index", "sign", "verify_signature",
    "write_index", "write_whole",
]  # fmt: skip
