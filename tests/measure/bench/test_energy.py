"""Joules of every exit, on a board's files."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.bench_notes import print_energy
from edgeexit.errors import MeasurementError
from edgeexit.measure.bench import energy
from edgeexit.measure.bench.bench import Options, bench
from edgeexit.measure.energy.find import find_source
from tests.measure.energy.boards import WATTS, write_board


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LEAST_S", 0.3), ("LEAST_SAMPLES", 5), ("IDLE_S", 0.1), ("BLOCK_S", 0.1)):
        monkeypatch.setattr(energy, name, value)


@pytest.mark.usefixtures("quick")
def test_every_exit_has_its_joules(
    toy_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = write_board(tmp_path, "agx-orin")
    monkeypatch.setattr(energy, "find_source", functools.partial(find_source, root))
    found = bench(toy_bundle, Options(seconds=0.2, threads="blocking", energy=True))["energy"]
    exits = [exit_.name for exit_ in toy_bundle.manifest.last_chain.stops]
    assert [*found["cases"]] == ["unsplit", *exits]
    assert found["sensor"] == "hwmon" and len(found["parts"]) == 3
    assert found["idle_watts"] == pytest.approx(WATTS["agx-orin"], rel=1e-3)
    for own in found["cases"].values():  # the power never changes
        assert own["watts"] == pytest.approx(WATTS["agx-orin"], rel=1e-3)
        assert own["joules"] == pytest.approx(own["watts"] * own["seconds"] / own["runs"], rel=0.05)
        assert own["joules_above_idle"] == pytest.approx(0, abs=1e-3 * own["joules"] + 1e-6)
        assert own["samples"] >= 5
    print_energy(found)
    shown = capsys.readouterr().out
    assert "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0" in shown and "J per 1 rows" in shown


def test_without_a_sensor_the_reasons_are_told(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "find_source", functools.partial(find_source, tmp_path))
    with pytest.raises(MeasurementError, match="no sensor can be read \\(hwmon: .*rapl: "):
        bench(toy_bundle, Options(seconds=0.2, threads="blocking", energy=True))
