"""Signs engines and verifies their signatures, with ssh-keygen.

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
"""Namespace of the signatures (``ssh-keygen -Y sign -n``). Signatures with another namespace are
rejected."""


def default_signers() -> Path:
    """The user's file of allowed signers."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(config) if config.startswith("/") else Path.home() / ".config"
    return root / "edgeexit" / "allowed_signers"


def sign(folder: Path, key: Path) -> None:
    """Signs a set of engines with an SSH key: writes ``engines.json.sig`` next to the index. If
    that fails, the old signature is kept.

    Raises:
        IntegrityError: A plan was changed after the build.
        UsageError: The key cannot sign.
    """
    raw = read_raw_index(folder)
    check_plans(folder, parse_index(folder, raw))
    write_whole(folder / SIGNATURE, _sign(raw, key))


def try_key(key: Path) -> None:
    """Signs a test payload, to check before a build that the key can sign.

    Raises:
        UsageError: The key cannot sign.
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
                fix="Give a private SSH key, or a public key whose private key is in the agent.",
            )
        return signature.read_bytes()


def verify_signature(folder: Path, raw: bytes, signers: Path) -> str:
    """Verifies the signature of the engines in a folder; `raw` is their index.

    Returns:
        The signer's name in the file of allowed signers.

    Raises:
        IntegrityError: There is no signature, it does not match, or its key is not allowed to sign.
    """
    fix = (
        "Sign them on the machine that built them (edgeexit build --sign KEY) with a key in the "
        "file of allowed signers (--allowed-signers FILE; each line is a name and the content of "
        "the key's .pub file: NAME ssh-ed25519 AAAA...), or add --trust to accept them unsigned."
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
        fix="The engines were changed after signing, or the key is not allowed to sign engines. "
        "Get them again from the machine that built them.",
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
            fix="Run ssh-keygen on the command line to see why, then try again.",
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
