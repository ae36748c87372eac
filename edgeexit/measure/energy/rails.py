"""Power rails of Jetson boards, from the kernel's hwmon files, and which of them are the total.

An INA3221 has the voltage and the current of up to three rails, an INA238 the power of one. Rails
are known by their labels. Some feed others, so only those of `TOTALS` are added.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edgeexit.measure.energy.source import Source, Unusable, read_number

TOTALS: dict[str, tuple[str, ...]] = {
    "Jetson AGX Thor": ("VIN",),
    "Jetson Orin Nano, Orin NX, Xavier NX": ("VDD_IN",),
    "Jetson AGX Orin": ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    "Jetson AGX Xavier": ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    "Jetson Nano": ("POM_5V_IN",),
}
"""Boards and the rails whose sum is what the module takes. Others on the board are behind one of
these (``VDDQ_VDD2_1V8AO`` behind ``VIN_SYS_5V0``, ``VDD_CPU_GPU_CV`` behind ``VDD_IN``)."""

INTERVAL_S = 0.01
_UNNAMED = {"ina238": "VIN"}
"""Chips with one rail whose label older kernels do not give, and that rail."""


@dataclass(frozen=True)
class Rail:
    """Files of a rail: power in microwatts, or voltage in millivolts and current in
    milliamperes."""

    label: str
    power: Path | None = None
    voltage: Path | None = None
    current: Path | None = None

    def watts(self) -> float:
        """Power now. Raises `Unusable` if a file cannot be read."""
        if self.power is not None:
            return read_number(self.power) * 1e-6
        assert self.voltage is not None and self.current is not None
        return read_number(self.voltage) * read_number(self.current) * 1e-6


def find_rails(root: Path) -> list[Rail]:
    """All rails below ``root/sys/class/hwmon``."""
    found = []
    for device in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = _text(device / "name")
        if name.startswith("ina3221"):
            for number in (1, 2, 3):
                label = _text(device / f"in{number}_label")
                current = device / f"curr{number}_input"
                if label and label != "NC" and current.exists():
                    found.append(Rail(label, voltage=device / f"in{number}_input", current=current))
        elif (power := device / "power1_input").exists() and name.startswith("ina2"):
            label = _text(device / "in1_label") or _text(device / "label")
            found.append(Rail(label or _UNNAMED.get(name, name), power=power))
    return found


def board_of(labels: Collection[str]) -> str | None:
    """The first board of `TOTALS` that has all its rails among `labels`."""
    return next((board for board, own in TOTALS.items() if {*own} <= {*labels}), None)


class Rails(Source):
    """The sum of the rails that are a board's total.

    Raises:
        Unusable: There are no rails, none are known to be the total, or they cannot be read.
    """

    name, kind, interval_s = "hwmon", "watts", INTERVAL_S

    def __init__(self, root: Path = Path("/")) -> None:
        rails = find_rails(root)
        if not rails:
            raise Unusable("no INA3221 or INA238 below /sys/class/hwmon: this is no Jetson")
        labels = [rail.label for rail in rails]
        self.board = board_of(labels)
        if self.board is None:
            raise Unusable(f"the rails {', '.join(labels)} are not known to be a board's total")
        self._rails = [rail for rail in rails if rail.label in TOTALS[self.board]]
        self.parts = tuple(rail.label for rail in self._rails)
        self.read()

    def read(self) -> float:
        return sum(rail.watts() for rail in self._rails)


def _text(path: Path) -> str:
    """A file's text; empty: there is none."""
    return path.read_text().strip() if path.is_file() else ""


__all__ = ["TOTALS", "Rail", "Rails", "board_of", "find_rails"]
