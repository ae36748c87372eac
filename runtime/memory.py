"""Memory of this machine and of this process, as Linux reports it, and bounds of what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeexit.errors import UsageError


def available_bytes() -> int:
    """Bytes that a program can allocate now without swapping."""
    return _read(Path("/proc/meminfo"), "MemAvailable")


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes. ``ru_maxrss`` is not used: it includes the
    peak of the parent process."""
    return _read(Path("/proc/self/status"), "VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return _read(Path("/proc/self/status"), "VmRSS")


def check_limit_bytes(limit_bytes: int | None) -> int | None:
    """A bound in bytes; None: no bound. Raises `UsageError` for anything else."""
    if limit_bytes is None:
        return None
    whole = isinstance(limit_bytes, (int, np.integer)) and not isinstance(limit_bytes, bool)
    if not whole or limit_bytes < 0:
        raise UsageError(
            f"limit_bytes is {limit_bytes!r}",
            fix="Use a whole number from 0 up; None: no bound.",
        )
    return int(limit_bytes)


def _read(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no {name}: edgeexit needs Linux for this")


__all__ = ["available_bytes", "check_limit_bytes", "peak_bytes", "resident_bytes"]
