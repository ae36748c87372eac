"""Power mode, clocks, temperatures and throttling of a device, which decide what a figure means.

Results hold it before and after a measurement (`edgeexit.measure.environment.Watch`). What a
machine does not tell is None, with the reason.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_CPU = "sys/devices/system/cpu"


def read_state(root: Path = Path("/")) -> dict[str, Any]:
    """The state now.

    Args:
        root: Folder that ``sys`` is in.

    Returns:
        ``power_mode`` of a Jetson; ``cpu_mhz`` and ``gpu_mhz``: clocks now and the largest allowed;
        ``temperatures_c``; ``throttle_events``: counters of thermal and over-current throttling
        since the machine began; and ``unknown``: what is None, and why.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        "power_mode": lambda _: _power_mode(),
        "cpu_mhz": _cpu_mhz,
        "gpu_mhz": _gpu_mhz,
        "temperatures_c": _temperatures,
        "throttle_events": _throttle_events,
    }
    state: dict[str, Any] = {}
    unknown = {}
    for name, reader in readers.items():
        try:
            state[name] = reader(root)
        except _Unknown as error:
            state[name], unknown[name] = None, str(error)
    return state | {"unknown": unknown}


def throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    """Counters of throttling that grew between two states, and by how much."""
    first, last = before["throttle_events"] or {}, after["throttle_events"] or {}
    return {name: last[name] - own for name, own in first.items() if last.get(name, own) > own}


class _Unknown(Exception):
    """Why something is not known."""


def _power_mode() -> str:
    program = shutil.which("nvpmodel")
    if program is None:
        raise _Unknown("the program nvpmodel is not there: this is no Jetson")
    asked = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=30, check=False)
    for line in asked.stdout.splitlines():
        name, _, mode = line.partition(":")
        if "Power Mode" in name and mode.strip():
            return mode.strip()
    raise _Unknown(f"nvpmodel -q said {(asked.stdout or asked.stderr).strip()[:80]!r}")


def _cpu_mhz(root: Path) -> dict[str, Any]:
    folders = sorted((root / _CPU).glob("cpu[0-9]*/cpufreq"))
    now = [*_numbers(folders, "scaling_cur_freq")]
    if not now:
        raise _Unknown(f"no cpufreq below /{_CPU} (virtual machines have none)")
    most = [*_numbers(folders, "scaling_max_freq")]
    return {"now": [value // 1000 for value in now], "most": max(most, default=0) // 1000 or None}


def _gpu_mhz(root: Path) -> dict[str, Any]:
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if any(part in folder.name for part in ("gpu", "gv11b", "gp10b", "ga10b")):
            now, most = (_numbers([folder], name) for name in ("cur_freq", "max_freq"))
            if (value := next(now, None)) is not None:
                top = next(most, None)
                return {"now": value // 10**6, "most": None if top is None else top // 10**6}
    raise _Unknown("no GPU below /sys/class/devfreq")


def _temperatures(root: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        for value in _numbers([zone], "temp"):
            kind = zone / "type"
            name = kind.read_text().strip() if kind.is_file() else zone.name
            found[name if name not in found else f"{name} ({zone.name})"] = value / 1000
    if not found:
        raise _Unknown("no thermal_zone below /sys/class/thermal can be read")
    return found


def _throttle_events(root: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("core", "package"):
        folders = (root / _CPU).glob("cpu[0-9]*/thermal_throttle")
        counts = [*_numbers(folders, f"{name}_throttle_count")]
        if counts:
            found[f"{name} thermal"] = sum(counts)
    for file in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
        for value in _numbers([file.parent], file.name):
            found[f"over-current {file.name.removesuffix('_event_cnt')}"] = value
    if not found:
        raise _Unknown("no thermal_throttle and no oc*_event_cnt below /sys")
    return found


def _numbers(folders: Any, name: str) -> Iterator[int]:
    """Numbers in files of that name; a file that is not there or cannot be read gives none, as
    sensors of parts that are switched off do."""
    for folder in folders:
        try:
            yield int((folder / name).read_text())
        except (OSError, ValueError):
            continue


__all__ = ["read_state", "throttled"]
