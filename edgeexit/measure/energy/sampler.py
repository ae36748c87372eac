"""`Sampler`: reads a sensor in a thread of its own, and integrates over a span of time."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from edgeexit.errors import MeasurementError
from edgeexit.measure.energy.source import Kind, Source, Unusable


class Sampler:
    """Reads a sensor while the ``with`` block runs. Times are those of `time.perf_counter`.

    Args:
        source: The sensor.
        interval_s: Time between readings; None: the sensor's own.
    """

    def __init__(self, source: Source, interval_s: float | None = None) -> None:
        self._source = source
        self._interval_s = source.interval_s if interval_s is None else interval_s
        self._times: list[float] = []
        self._values: list[float] = []
        self._failed: Unusable | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="energy", daemon=True)

    def __enter__(self) -> Sampler:
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def samples(self, start: float, end: float) -> int:
        """Readings between two times."""
        return sum(start <= one <= end for one in self._times)

    def joules(self, start: float, end: float) -> float:
        """Energy between two times. Waits for a reading behind `end`.

        Raises:
            MeasurementError: The sensor failed meanwhile, or has no reading around the times.
        """
        while self._times[-1] < end and self._thread.is_alive():
            time.sleep(self._interval_s / 2)
        if self._failed is not None:
            raise MeasurementError(
                f"{self._source.name}: {self._failed}", fix="Measure again, or without --energy."
            )
        return integrate(self._times, self._values, start, end, self._source.kind)

    def _read(self) -> None:
        before = time.perf_counter()
        value = self._source.read()
        self._times.append((before + time.perf_counter()) / 2)
        self._values.append(value)

    def _follow(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._read()
            except Unusable as error:
                self._failed = error
                return


def integrate(
    times: ArrayLike, values: ArrayLike, start: float, end: float, kind: Kind = "watts"
) -> float:
    """Joules between two times, between readings in a straight line.

    Args:
        times: Seconds of the readings ``[readings]``, growing.
        values: Watts, or joules of a counter ``[readings]``.

    Raises:
        MeasurementError: The readings do not cover the span.

    >>> integrate([0, 1, 2, 3], [10, 10, 20, 20], 0.5, 2.5)
    30.0
    """
    at, said = np.asarray(times, float), np.asarray(values, float)
    if not at[0] <= start < end <= at[-1]:
        raise MeasurementError(
            f"energy: readings from {at[0]:.3f} to {at[-1]:.3f} s do not cover {start:.3f} to "
            f"{end:.3f} s",
            fix="Measure for longer.",
        )
    if kind == "joules":
        return float(np.interp(end, at, said) - np.interp(start, at, said))
    inside = (at > start) & (at < end)
    knots = np.concatenate([[start], at[inside], [end]])
    heights = np.interp(knots, at, said)
    return float((np.diff(knots) * (heights[1:] + heights[:-1]) / 2).sum())


__all__ = ["Sampler", "integrate"]
