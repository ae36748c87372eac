"""The environment of a measurement: hardware, versions, and other load on the machine.

`Watch` reads the kernel's counters before and after a measurement; `describe` returns processor,
versions and command. Every result has both, without names of people, hosts or folders.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from edgeexit.measure.device_state import read_state

PACKAGES = ("edgeexit", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def describe(*, command: list[str] | None = None) -> dict[str, Any]:
    """Processor, cores, memory, versions, and the command line with absolute paths cut to names."""
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": _versions(),
        "command": " ".join(without_folders(sys.argv if command is None else command)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def without_folders(command: list[str]) -> list[str]:
    """A command line whose absolute paths are cut to their last part.

    >>> without_folders(["/some/bin/edgeexit", "bench", "--data=/some/folder/rows.npz", "out/b"])
    ['edgeexit', 'bench', '--data=rows.npz', 'out/b']
    """
    return [re.sub(r"(^|=)/(?:[^/]*/)*", r"\1", word) for word in command]


class Watch:
    """Counts the machine's busy and stolen time from its creation to `stop`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = _jiffies()
        self._load_before = os.getloadavg()[0]
        self._state_before = read_state()

    def stop(self, own_cpu_s: float) -> dict[str, Any]:
        """Figures since the start. `own_cpu_s` is the CPU time of the measurement itself.

        Returns:
            Load averages, `steal_share` (share of time taken by other guests of the host) and
            `other_load_cores` (cores busy with other processes); null if the kernel has no
            counters; `state`: clocks, temperatures and throttling, before and after
            (`edgeexit.measure.device_state`).
        """
        elapsed = time.perf_counter() - self._started
        found: dict[str, Any] = {
            "elapsed_s": round(elapsed, 2),
            "load_before": round(self._load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "steal_share": None,
            "other_load_cores": None,
            "state": {"before": self._state_before, "after": read_state()},
        }
        after = _jiffies()
        if self._before is None or after is None or elapsed <= 0:
            return found
        spent = {name: after[name] - self._before[name] for name in after}
        whole = sum(spent.values())
        if whole > 0:
            busy_s = (whole - spent["idle"] - spent["iowait"] - spent["steal"]) / _TICKS
            found["steal_share"] = round(spent["steal"] / whole, 4)
            found["other_load_cores"] = round(max(0.0, busy_s - own_cpu_s) / elapsed, 3)
        return found


_TICKS = os.sysconf("SC_CLK_TCK")
_FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


def _jiffies() -> dict[str, int] | None:
    first = read_text("/proc/stat").partition("\n")[0].split()
    if len(first) <= len(_FIELDS):
        return None
    return {name: int(value) for name, value in zip(_FIELDS, first[1:], strict=False)}


def processor() -> str:
    """Name of the processor."""
    text = read_text("/proc/cpuinfo")
    for key in ("model name", "Hardware", "Model"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    board = read_text("/proc/device-tree/model").strip("\0\n ")
    return board or platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_text(path: str) -> str:
    """Content of a system file; empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
