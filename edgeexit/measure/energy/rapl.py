"""Energy counters of x86 processors (RAPL), from the kernel's powercap files.

Only whole packages are added: their cores and graphics are parts of them. Memory and the rest of
the computer are not in the figure.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgeexit.measure.energy.source import Source, Unusable, read_number

INTERVAL_S = 0.01
_PACKAGE = re.compile(r"package-\d+")


class Rapl(Source):
    """The sum of all packages' counters.

    Raises:
        Unusable: There are none, or they may not be read.
    """

    name, kind, interval_s = "rapl", "joules", INTERVAL_S

    def __init__(self, root: Path = Path("/")) -> None:
        zones = sorted((root / "sys/class/powercap").glob("*rapl:*"))
        packages = [
            zone
            for zone in zones
            if (zone / "name").is_file() and _PACKAGE.fullmatch((zone / "name").read_text().strip())
        ]
        if not packages:
            raise Unusable("no package below /sys/class/powercap (virtual machines have none)")
        self.parts = tuple((zone / "name").read_text().strip() for zone in packages)
        self._counters = [_Counter(zone) for zone in packages]
        self.read()

    def read(self) -> float:
        return sum(counter.read() for counter in self._counters)


class _Counter:
    """A counter that starts again from 0 when it is full."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = read_number(zone / "max_energy_range_uj")
        self._last, self._full = 0, 0

    def read(self) -> float:
        now = read_number(self._file)
        if now < self._last:
            self._full += self._range
        self._last = now
        return (self._full + now) * 1e-6


__all__ = ["Rapl"]
