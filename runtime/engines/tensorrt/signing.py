"""Signatures of engines: made and verified with ssh-keygen.

A signature covers ``engines.json``, which holds the digest of every plan.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from edgeexit.errors import EngineError, IntegrityError, UsageError
from edgeexit.runtime.engines.tensorrt.engine_cache import (
    INDEX,
    SIGNATURE,
    check_plans,
    parse_index,
    read_raw_index,
    write_whole,
)

NAMESPACE = "edgeexit-engines"
"""What signatures are made for (``ssh-keygen -Y sign -n``). Signatures for anything else are
refused."""


def default_signers() -> Path:
    """The user's file of allowed signers."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(config) if config.startswith("/") else Path.home() / ".config"
    return root / "edgeexit" / "allowed_signers"


def sign(folder: Path, key: Path) -> None:
    """Signs a set of engines with an SSH key: writes ``engines.json.sig`` beside the index. If that
    fails, an older signature is kept.

    Raises:
        IntegrityError: A plan was changed since it was built.
        UsageError: The key cannot sign.
    """
    raw = read_raw_index(folder)
    check_plans(folder, parse_index(folder, raw))
    write_whole(folder / SIGNATURE, _sign(raw, key))


def try_key(key: Path) -> None:
    """Signs a test payload, to find out before a build whether the key can sign.

    Raises:
        UsageError: It cannot.
    """
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
                f"--sign {key}: ssh-keygen refused the key: {_last_line(done)}",
                fix="Give a private SSH key, or a public one whose private half the agent holds.",
            )
        return signature.read_bytes()


def verify_signature(folder: Path, raw: bytes, signers: Path) -> str:
    """Verifies the signature of the engines in a folder, whose index was read as `raw`.

    Returns:
        Who signed them, as the file of allowed signers names the key.

    Raises:
        IntegrityError: There is no signature, it does not match, or its key is not allowed to sign.
    """
    fix = (
        "Sign them where they were built (edgeexit build --sign KEY) with a key listed in the file "
        "of allowed signers (--allowed-signers FILE; each line is a name and the content of the "
        "key's .pub file: NAME ssh-ed25519 AAAA...), or add --trust to accept them unsigned."
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
            f"{folder / SIGNATURE}: the key that signed is not listed in {signers}", fix=fix
        )
    for name in dict.fromkeys(names):
        command = [*_KEYGEN, "verify", "-f", str(signers), "-I", name]
        done = _ssh_keygen([*command, "-n", NAMESPACE, "-s", signature], raw)
        if not done.returncode:
            return name
    raise IntegrityError(
        f"{folder / SIGNATURE}: the signature does not match the engines ({_last_line(done)})",
        fix="They were changed after signing, or the key is not allowed to sign engines: get them "
        "again from their builder.",
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
            f"ssh-keygen did not answer in {seconds:.0f} s",
            fix="Run it by hand to see why, then try again.",
        ) from error
    except FileNotFoundError as error:
        raise EngineError(
            "ssh-keygen is not installed; signatures need it",
            fix="Install OpenSSH (Debian: apt install openssh-client).",
        ) from error


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


__all__ = ["NAMESPACE", "default_signers", "sign", "try_key", "verify_signature"]
