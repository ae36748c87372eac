"""Power of a Jetson by its program ``tegrastats``, where the kernel's files may not be read.

A line has ``VDD_IN 4970mW/4970mW`` for every rail: now, and the mean since the program began.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading

from edgeexit.measure.energy.rails import TOTALS, board_of
from edgeexit.measure.energy.source import Source, Unusable

INTERVAL_MS = 100
FIRST_LINE_S = 5.0
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?!\S)")


def read_line(line: str) -> dict[str, float]:
    """Watts of every rail in a line.

    >>> read_line("RAM 2448/7620MB GR3D_FREQ 0% VDD_IN 4970mW/4970mW VDD_SOC 1460mW/1455mW")
    {'VDD_IN': 4.97, 'VDD_SOC': 1.46}
    """
    return {name: int(now) / 1000 for name, now, _ in _RAIL.findall(line)}


class Tegrastats(Source):
    """The newest line's sum of the rails that are a board's total.

    Args:
        program: Its name or path.

    Raises:
        Unusable: The program is not there, writes no line, or none with the rails of a known board.
    """

    name, kind, interval_s = "tegrastats", "watts", INTERVAL_MS / 1000

    def __init__(self, program: str = "tegrastats") -> None:
        path = shutil.which(program)
        if path is None:
            raise Unusable(f"the program {program} is not there: this is no Jetson")
        self._watts: float | None = None
        self._why = f"{program} wrote no line"
        self._first = threading.Event()
        self.parts: tuple[str, ...] = ()
        self._process = subprocess.Popen(
            [path, "--interval", str(INTERVAL_MS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        self._first.wait(FIRST_LINE_S)
        if self._watts is None:
            why = self._why
            self.close()
            raise Unusable(why)

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            watts = read_line(line)
            board = board_of(watts)
            if board is None:
                self._why = (
                    f"its rails ({', '.join(watts) or 'none'}) are not those of a known board"
                )
            else:
                self.parts = TOTALS[board]
                self._watts = sum(watts[name] for name in self.parts)
            self._first.set()
        self._watts, self._why = None, "tegrastats has ended"
        self._first.set()

    def read(self) -> float:
        if self._watts is None:
            raise Unusable(self._why)
        return self._watts

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


__all__ = ["Tegrastats", "read_line"]
