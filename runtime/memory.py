"""Memory of this machine and of this process, as Linux reports it."""

from __future__ import annotations

from pathlib import Path


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


def _read(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no {name}: edgeexit needs Linux for this")


__all__ = ["available_bytes", "peak_bytes", "resident_bytes"]
