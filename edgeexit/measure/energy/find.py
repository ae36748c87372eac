"""`find_source`: the sensor of this device, and why the others cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeexit.measure.energy.nvml import Nvml
from edgeexit.measure.energy.rails import Rails
from edgeexit.measure.energy.rapl import Rapl
from edgeexit.measure.energy.source import Source, Unusable
from edgeexit.measure.energy.tegrastats import Tegrastats


def find_source(
    root: Path = Path("/"), *, gpu: bool = False
) -> tuple[Source | None, dict[str, str]]:
    """The first sensor that can be read: a board's rails before its program; a GPU's own before the
    processor's if the GPU computes, else the processor's alone.

    Args:
        root: Folder that ``sys`` is in.
        gpu: Whether a GPU computes.

    Returns:
        The sensor, which the caller closes, or None; and the reason of every one that was tried and
        cannot be used.
    """
    ways: dict[str, Callable[[], Source]] = {
        "hwmon": lambda: Rails(root),
        "tegrastats": Tegrastats,
        **({"nvml": Nvml} if gpu else {}),
        "rapl": lambda: Rapl(root),
    }
    reasons: dict[str, str] = {}
    for name, make in ways.items():
        try:
            return make(), reasons
        except Unusable as error:
            reasons[name] = str(error)
    return None, reasons


__all__ = ["find_source"]
