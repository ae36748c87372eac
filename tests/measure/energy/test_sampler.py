"""Energy over a span of time, of loads whose energy is known."""

from __future__ import annotations

import math
import time

import pytest

from edgeexit.errors import MeasurementError
from edgeexit.measure.energy.sampler import Sampler, integrate
from edgeexit.measure.energy.source import Source, Unusable


class Wave(Source):
    """A load of ``10 + 5 sin(4 pi t)`` watts since it was made, or the counter of its energy."""

    name, parts, interval_s = "wave", ("all",), 0.005

    def __init__(self, kind: str) -> None:
        self.kind = kind  # type: ignore[assignment]
        self.start = time.perf_counter()
        self.left = 10**9

    def read(self) -> float:
        self.left -= 1
        if self.left < 0:
            raise Unusable("it is gone")
        now = time.perf_counter() - self.start
        return 10 + 5 * math.sin(4 * math.pi * now) if self.kind == "watts" else self.energy(now)

    @staticmethod
    def energy(until: float) -> float:
        return 10 * until + 5 * (1 - math.cos(4 * math.pi * until)) / (4 * math.pi)


@pytest.mark.parametrize("kind", ["watts", "joules"])
def test_a_known_load_integrates_to_within_one_percent(kind: str) -> None:
    source = Wave(kind)
    with Sampler(source) as sampler:
        time.sleep(0.1)
        start = time.perf_counter()
        time.sleep(0.9)
        end = time.perf_counter()
        found = sampler.joules(start, end)
    expected = source.energy(end - source.start) - source.energy(start - source.start)
    assert found == pytest.approx(expected, rel=0.01)
    assert sampler.samples(start, end) > 10


def test_a_sensor_that_fails_ends_the_measurement() -> None:
    source = Wave("watts")
    with Sampler(source) as sampler:
        start = time.perf_counter()
        source.left = 3
        time.sleep(0.2)
        with pytest.raises(MeasurementError, match="wave: it is gone"):
            sampler.joules(start, time.perf_counter())


def test_only_the_span_counts() -> None:
    times, watts = [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 100.0, 100.0]
    assert integrate(times, watts, 0.0, 1.0) == pytest.approx(1.0)
    assert integrate(times, watts, 2.25, 2.75) == pytest.approx(50.0)
    assert integrate(times, [0.0, 4.0, 4.0, 8.0], 0.5, 2.5, "joules") == pytest.approx(4.0)
    with pytest.raises(MeasurementError, match="do not cover"):
        integrate(times, watts, 1.0, 3.5)
