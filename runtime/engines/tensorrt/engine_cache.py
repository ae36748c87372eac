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
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeexit.bundle.manifest import Sha256, Struct
from edgeexit.bundle.reader import Bundle, check_relative, read_regular, regular_size, sha256_of
from edgeexit.errors import (
    BundleError,
    EngineError,
    IntegrityError,
    OutputBusyError,
    UsageError,
)
from edgeexit.runtime.engines.tensorrt.precision import Types

logger = logging.getLogger(__name__)

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
    """A folder of the cache to build in: made if need be, and held against a second build. What
    an earlier one left half-written is removed.

    Raises:
        OutputBusyError: Another build writes there.
        EngineError: It cannot be written, or others can write there.
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
                f"{folder}: another build is writing there",
                fix="Wait for it to end; what it built is then used.",
            ) from error
        for left in folder.glob("*.partial"):
            left.unlink(missing_ok=True)
        yield folder
    finally:
        os.close(lock)


def _make_private(folder: Path) -> None:
    """Makes a folder in which only its owner writes, whatever the umask says."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)


def write_whole(path: Path, data: bytes | memoryview) -> None:
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
        + " another place: -o for engines that go elsewhere, else --engine-dir DIR or "
        "EDGEEXIT_ENGINE_DIR. Engines that were built already are kept.",
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
    return _read(folder, _read_raw(folder))


def _read_raw(folder: Path) -> bytes:
    with _advising():
        return read_regular(folder, INDEX, limit_bytes=INDEX_LIMIT_BYTES)


_BUILD_AGAIN = "Build again (edgeexit build mends what is damaged), or import them again."


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Gives errors of reading files, which speak of bundles elsewhere, the advice for engines."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(error.what, fix=_BUILD_AGAIN) from error


def _read(folder: Path, raw: bytes) -> EngineSet:
    fix = _BUILD_AGAIN
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
        with _advising():
            check_relative(plan.file, INDEX)
        if "/" in plan.file or plan.file in (INDEX, SIGNATURE, LOCK):
            raise IntegrityError(f"{folder / INDEX}: {plan.file!r} is not a plan's name", fix=fix)
        with _advising():
            size = regular_size(folder, plan.file)
        if size != plan.bytes:
            raise IntegrityError(
                f"{folder / plan.file}: {size} bytes, expected {plan.bytes}", fix=fix
            )
    return found


def check_plans(folder: Path, engines: EngineSet) -> None:
    """Hashes every plan; raises `IntegrityError` for one that is not as it was built."""
    for plan in engines.plans:
        if not is_whole(folder, plan):
            raise IntegrityError(
                f"{folder / plan.file}: not as it was built",
                fix=_BUILD_AGAIN,
            )


def is_whole(folder: Path, plan: PlanFile) -> bool:
    """Whether a plan is there and as it was built."""
    path = folder / plan.file
    if path.is_symlink() or not path.is_file() or path.stat().st_size != plan.bytes:
        return False
    return sha256_of(path) == plan.sha256


def whole_plans(folder: Path, bundle: str, key: str) -> dict[str, PlanFile]:
    """Of a folder's index the plans that are as they were built, by graph; none if the index cannot
    be read or is of other engines. A plan that is listed twice does not count."""
    try:
        raw = read_regular(folder, INDEX, limit_bytes=INDEX_LIMIT_BYTES)
        found = msgspec.json.decode(raw, type=EngineSet)
    except (BundleError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    if (found.format, found.bundle, found.key, key_of(found.made_from)) != (
        FORMAT,
        bundle,
        key,
        key,
    ):
        return {}
    names = [plan.file for plan in found.plans]
    return {
        plan.graph: plan
        for plan in found.plans
        if names.count(plan.file) == 1 and "/" not in plan.file and is_whole(folder, plan)
    }


def list_engines(root: Path, bundle: str) -> list[tuple[Path, EngineSet]]:
    """The finished engines of a bundle's digest, the one built or asked for last at the end. What
    is damaged is left out with a warning.

    Raises:
        EngineError: The folder, or one above it inside the cache, belongs to somebody else or lets
            others write: they could put code there; or it cannot be read.
    """
    top = root / bundle
    found = []
    try:
        for folder in sorted(top.iterdir(), key=lambda one: one.name) if top.is_dir() else ():
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
                logger.warning("%s: holds engines of another bundle or key; left out", folder)
                continue
            found.append((folder, engines))
        return sorted(found, key=lambda one: (one[0] / INDEX).stat().st_mtime_ns)
    except OSError as error:
        raise EngineError(
            f"{error.filename or top}: cannot be read ({error.strerror})",
            fix="Check its permissions, or choose another place: EDGEEXIT_ENGINE_DIR.",
        ) from error


def _require_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{folder}: others can write there, and engines are code that runs",
            fix=f"Make it yours alone (chmod -R go-w {folder}), or choose another place "
            "(EDGEEXIT_ENGINE_DIR).",
        )


Trust = Literal["signature", "anything"]


def import_engines(
    source: Path,
    root: Path,
    bundle: Bundle,
    *,
    trust: Trust = "signature",
    signers: Path | None = None,
) -> dict[Path, str | None]:
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
        Where each set stands now, and who signed it; None: nobody was asked for.

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
    raws = [_read_raw(folder) for folder in folders]
    sets = [(folder, raw, _read(folder, raw)) for folder, raw in zip(folders, raws, strict=True)]
    mine = [one for one in sets if one[2].bundle == bundle.digest]
    if not mine:
        raise IntegrityError(
            f"{source}: these engines were built from the bundle {sets[0][2].bundle[:12]}, "
            f"{bundle.path} is {bundle.digest[:12]}",
            fix="Build engines of this bundle, or give the bundle that they were made from.",
        )
    names: list[str | None] = []
    for folder, raw, one in mine:
        allowed = default_signers() if signers is None else signers
        names.append(verify_signature(folder, raw, allowed) if trust == "signature" else None)
        check_plans(folder, one)
    places = [_copy(folder, one, root) for folder, _, one in mine]
    return dict(zip(places, names, strict=True))


def _with_index(source: Path) -> list[Path]:
    if not source.is_dir():
        return []
    places = [source, *source.glob("*"), *source.glob("*/*")]
    return sorted(one for one in places if (one / INDEX).is_file())


def _copy(folder: Path, engines: EngineSet, root: Path) -> Path:
    """Copies a set. Every copy is hashed before any of them takes its place, and while they do
    there is no index, so what is there is as it was signed or is not used."""
    target = folder_of(root, engines.bundle, engines.key)
    with building(target):
        partials = {plan.file: target / f"{plan.file}.partial" for plan in engines.plans}
        try:
            for plan in engines.plans:
                shutil.copyfile(folder / plan.file, partials[plan.file])
                if sha256_of(partials[plan.file]) != plan.sha256:
                    raise IntegrityError(
                        f"{folder / plan.file}: changed while it was imported",
                        fix="Import it again.",
                    )
            (target / INDEX).unlink(missing_ok=True)
            for name, partial in partials.items():
                os.replace(partial, target / name)
        except OSError as error:
            raise cannot_write(target, error) from error
        finally:
            for partial in partials.values():
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
        write_index(target, engines)
    return target


def default_signers() -> Path:
    """The user's file of allowed signers."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(config) if config.startswith("/") else Path.home() / ".config"
    return root / "edgeexit" / "allowed_signers"


def sign(folder: Path, key: Path) -> None:
    """Signs a set of engines with an SSH key: ``engines.json.sig`` beside the index, which holds
    the digest of every plan. An older signature stays until there is a new one."""
    engines = read_index(folder)
    check_plans(folder, engines)
    signature = _sign(_read_raw(folder), key)
    write_whole(folder / SIGNATURE, signature)


def try_key(key: Path) -> None:
    """Signs something of no account, so that a key that cannot sign is known before anything is
    built; raises `UsageError`."""
    _sign(b"", key)


def _sign(data: bytes, key: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="edgeexit-sign-") as folder:
        path = Path(folder) / INDEX
        path.write_bytes(data)
        command = [*_KEYGEN, "sign", "-q", "-n", NAMESPACE, "-f", str(key), str(path)]
        done = _ssh_keygen(command, seconds=None)  # it may ask for a passphrase
        signature = path.with_name(f"{path.name}.sig")
        if done.returncode or not signature.is_file():
            raise UsageError(
                f"--sign {key}: ssh-keygen refused it: {_last_line(done)}",
                fix="Give a private SSH key, or a public one whose private half the agent holds.",
            )
        return signature.read_bytes()


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
    for name in dict.fromkeys(names):
        command = [*_KEYGEN, "verify", "-f", str(signers), "-I", name]
        done = _ssh_keygen([*command, "-n", NAMESPACE, "-s", signature], raw)
        if not done.returncode:
            return name
    raise IntegrityError(
        f"{folder / SIGNATURE}: the signature does not fit the engines ({_last_line(done)})",
        fix="They were changed behind it, or the key may not sign engines: get them again from "
        "whoever built them.",
    )


_KEYGEN = ["ssh-keygen", "-Y"]


def _ssh_keygen(
    command: list[str], given: bytes = b"", *, seconds: float | None = 60
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, input=given, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"ssh-keygen did not answer in {seconds:.0f} s", fix="Try it by hand, then again."
        ) from error
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
    "import_engines", "is_whole", "key_of", "list_engines", "read_index", "sign", "try_key",
    "verify_signature", "whole_plans", "write_index", "write_whole",
]  # fmt: skip
