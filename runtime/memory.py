"""Memory of this machine and this process, as Linux tells it."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int:
    """What a program could get now without anything being swapped out."""
    return _read(Path("/proc/meminfo"), "MemAvailable")


def peak_bytes() -> int:
    """The most that this process held at once. ``ru_maxrss`` would also hold the peak of the
    process that started it."""
    return _read(Path("/proc/self/status"), "VmHWM")


def _read(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no {name}: edgeexit needs Linux for this")


__all__ = ["available_bytes", "peak_bytes"]
