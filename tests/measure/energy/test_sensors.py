"""Sensors on file trees and lines in the formats of boards: what is added, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeexit.measure.energy.find import find_source
from edgeexit.measure.energy.nvml import Nvml
from edgeexit.measure.energy.rails import TOTALS, Rails, find_rails
from edgeexit.measure.energy.rapl import Rapl
from edgeexit.measure.energy.source import Unusable
from edgeexit.measure.energy.tegrastats import Tegrastats
from tests.measure.energy.boards import (
    CHIPS,
    LINE_WATTS,
    LINES,
    WATTS,
    write_board,
    write_program,
)


@pytest.mark.parametrize("board", CHIPS)
def test_only_the_rails_that_are_the_total_are_added(board: str, tmp_path: Path) -> None:
    source = Rails(write_board(tmp_path, board))
    assert source.read() == pytest.approx(WATTS[board])
    assert source.parts in TOTALS.values() and source.board in TOTALS
    every = sum(rail.watts() for rail in find_rails(tmp_path))
    assert every > source.read()  # parents and children are all there


def test_rails_follow_their_files(tmp_path: Path) -> None:
    source = Rails(write_board(tmp_path, "orin-nano"))
    file = tmp_path / "sys/class/hwmon/hwmon0/curr1_input"
    file.write_text("2000\n")
    assert source.read() == pytest.approx(10.0)
    file.unlink()
    with pytest.raises(Unusable, match="curr1_input"):
        source.read()


def test_unknown_rails_are_named_and_not_added(tmp_path: Path) -> None:
    write_board(tmp_path, "orin-nano")
    (tmp_path / "sys/class/hwmon/hwmon0/in1_label").write_text("VDD_NEW")
    with pytest.raises(Unusable, match="VDD_NEW, VDD_CPU_GPU_CV, VDD_SOC are not known"):
        Rails(tmp_path)
    with pytest.raises(Unusable, match="no Jetson"):
        Rails(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_board(tmp_path, "orin-nano")
    (tmp_path / "sys/class/hwmon/hwmon0/in1_input").chmod(0)
    with pytest.raises(Unusable, match="in1_input may not be read: sudo chmod"):
        Rails(tmp_path)


@pytest.mark.parametrize("board", LINES)
def test_tegrastats_gives_the_newest_line(board: str, tmp_path: Path) -> None:
    source = Tegrastats(str(write_program(tmp_path / "tegrastats", LINES[board])))
    assert source.read() == pytest.approx(LINE_WATTS[board])
    assert source.parts in TOTALS.values()
    source.close()
    with pytest.raises(Unusable, match="has ended"):
        source.read()


def test_tegrastats_without_power_is_refused(tmp_path: Path) -> None:
    program = write_program(tmp_path / "tegrastats", "RAM 1/2MB CPU [off]")
    with pytest.raises(Unusable, match="rails \\(none\\) are not those"):
        Tegrastats(str(program))
    with pytest.raises(Unusable, match="no Jetson"):
        Tegrastats(str(tmp_path / "nothing"))


def write_packages(root: Path, microjoules: list[int]) -> None:
    folder = root / "sys/class/powercap"
    for number, value in enumerate(microjoules):
        for name, zone in (
            (f"package-{number}", f"intel-rapl:{number}"),
            ("core", f"intel-rapl:{number}:0"),
        ):
            own = folder / zone
            own.mkdir(parents=True, exist_ok=True)
            (own / "name").write_text(f"{name}\n")
            (own / "energy_uj").write_text(f"{value}\n")
            (own / "max_energy_range_uj").write_text("1000000000\n")


def test_packages_are_added_without_their_cores_and_counters_start_again(tmp_path: Path) -> None:
    write_packages(tmp_path, [5_000_000, 7_000_000])
    source = Rapl(tmp_path)
    assert source.parts == ("package-0", "package-1") and source.kind == "joules"
    assert source.read() == pytest.approx(12.0)
    write_packages(tmp_path, [1_000_000, 8_000_000])
    assert source.read() == pytest.approx(1000.0 + 1.0 + 8.0)
    with pytest.raises(Unusable, match="virtual machines"):
        Rapl(tmp_path / "empty")


def test_every_refusal_has_a_reason(tmp_path: Path) -> None:
    source, reasons = find_source(tmp_path, gpu=True)
    if source is not None:  # a GPU's counter does not depend on the folder
        assert source.name == "nvml"
        source.close()
    else:
        assert {*reasons} >= {"hwmon", "nvml", "rapl"} and all(reasons.values())
        with pytest.raises(Unusable, match="NVML|nvidia-ml-py"):
            Nvml()
    write_packages(tmp_path, [1])
    write_board(tmp_path, "thor")
    source, reasons = find_source(tmp_path)
    assert source is not None and (source.name, reasons) == ("hwmon", {})
