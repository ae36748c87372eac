"""Sides in processes of their own, blocks that alternate, and honest percentiles."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.errors import MeasurementError
from edgeexit.measure.bench import paired
from edgeexit.measure.bench.paired import (
    MIN_ROUNDS,
    MIN_RUNS,
    Lane,
    Side,
    alternate,
    best_setting,
    middle_mean,
    percentiles,
    spread,
)

CLOCKWORK = '''
import os
import time
from edgeexit.errors import DataError
from edgeexit.measure.bench.worker import Case, Subject

def make(ms=1.0, words="", fail="", threads=None):
    """Sleeps a known time per input number: 1, 2, 3 ... times ms."""
    if fail == "start":
        raise DataError("the clock is broken", fix="Wind it.")
    print("chatter of a library" + words)
    if threads is not None:
        ms = float(threads)
    def call(number):
        time.sleep((number + 1) * ms / 1000)
        if fail == "run":
            os._exit(7)
        if fail == "hang":
            time.sleep(600)
        if fail == "deaf":
            os.closerange(3, 64)  # the pipe to the parent, among others
            time.sleep(600)
        if fail == "bug":
            raise ZeroDivisionError("a bug")
        return number
    return Subject({"sleep": Case(call, read=lambda number: {"number": number})}, 4, {"ms": ms})
'''


@pytest.fixture(scope="module")
def clockwork(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a module whose cases take known times."""
    folder = tmp_path_factory.mktemp("clockwork")
    (folder / "clockwork.py").write_text(CLOCKWORK)
    return str(folder)


def test_percentiles_are_left_out_when_too_few_runs_support_them() -> None:
    assert percentiles([1.0] * 19) == {}
    assert list(percentiles([1.0] * 20)) == ["p50"]
    assert list(percentiles([1.0] * 199)) == ["p50", "p90"]
    assert list(percentiles([1.0] * 1000)) == ["p50", "p90", "p95", "p99"]
    assert list(percentiles([1.0] * 10000))[-1] == "p99.9"


@given(st.lists(st.floats(0, 1e6), min_size=20, max_size=300))
def test_percentiles_equal_numpys_when_given(times: list[float]) -> None:
    for name, value in percentiles(times).items():
        assert value == pytest.approx(np.percentile(times, float(name[1:])), abs=1e-4)


def test_middle_mean_ignores_outliers_on_both_sides() -> None:
    assert middle_mean([0.0, 1.0, 2.0, 1e9]) == 1.5
    assert middle_mean([3.0]) == 3.0


def test_spread_is_the_distance_of_quartiles_when_there_are_four() -> None:
    assert spread([1.0, 1.0, 1.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.0)


def test_side_runs_the_inputs_asked_for_when_the_library_prints(clockwork: str) -> None:
    with Side("clockwork:make", {"ms": 0.1}, folder=clockwork) as side:
        block = side.run("sleep", [2, 0, 3])
        assert [record["number"] for record in block["records"]] == [2, 0, 3]
        assert all(
            ms >= (number + 1) * 0.1
            for ms, number in zip(block["times_ms"], (2, 0, 3), strict=True)
        )
        assert side.facts == {"ms": 0.1}


def test_side_lives_in_a_process_of_its_own_and_ends_with_its_block(clockwork: str) -> None:
    with Side("clockwork:make", {}, folder=clockwork) as side:
        process = side._process
        assert process.pid != os.getpid() and process.poll() is None
    assert process.poll() is not None


def test_side_reports_an_error_of_ours_as_one_line_when_it_cannot_start(clockwork: str) -> None:
    with pytest.raises(MeasurementError, match="the clock is broken.*Wind it"):
        Side("clockwork:make", {"fail": "start"}, folder=clockwork)


def test_side_shows_the_traceback_when_the_subject_has_a_bug(clockwork: str) -> None:
    with (
        Side("clockwork:make", {"fail": "bug"}, folder=clockwork) as side,
        pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"),
    ):
        side.run("sleep", [0])


def test_side_says_so_when_its_process_dies(clockwork: str) -> None:
    with (
        Side("clockwork:make", {"fail": "run"}, folder=clockwork) as side,
        pytest.raises(MeasurementError, match="ended with status 7"),
    ):
        side.run("sleep", [0])


def test_side_says_so_when_its_process_hangs(clockwork: str) -> None:
    with (
        Side("clockwork:make", {"fail": "hang"}, folder=clockwork, answer_s=5.0) as side,
        pytest.raises(MeasurementError, match="did not answer within 5 s during run"),
    ):
        side.run("sleep", [0])
    assert side._process.poll() is not None


def test_side_says_so_when_its_process_closes_the_pipe_and_lives_on(clockwork: str) -> None:
    with (
        Side("clockwork:make", {"fail": "deaf"}, folder=clockwork) as side,
        pytest.raises(MeasurementError, match="ended with status -9"),
    ):
        side.run("sleep", [0])


def test_alternate_ends_when_inputs_are_slower_than_in_the_warm_up(clockwork: str) -> None:
    """It measures the rounds that a figure needs, not those that were planned."""
    with Side("clockwork:make", {"ms": 8.0}, folder=clockwork) as side:
        one, two = (Lane(name, side, "sleep", expected_ms=1e-3) for name in ("one", "two"))
        rounds = alternate(one, [two], seconds=0.2, block_ms=5e-3)
    assert rounds == MIN_ROUNDS
    assert len(two.times_ms) >= MIN_RUNS


def test_side_is_refused_when_the_subject_does_not_exist(clockwork: str) -> None:
    with pytest.raises(MeasurementError, match="clockwork:nothing"):
        Side("clockwork:nothing", {}, folder=clockwork)


def test_alternate_pairs_the_same_inputs_when_blocks_are_run(clockwork: str) -> None:
    with (
        Side("clockwork:make", {"ms": 0.05}, folder=clockwork) as one,
        Side("clockwork:make", {"ms": 0.05}, folder=clockwork) as other,
    ):
        baseline = Lane("baseline", one, "sleep", expected_ms=1.0)
        lane = Lane("lane", other, "sleep", expected_ms=1.0)
        rounds = alternate(baseline, [lane], seconds=0.01, block_ms=4.0, whole=lane)
    assert rounds >= 5 and len(lane.ratios) == rounds
    assert len(lane.times_ms) >= MIN_RUNS
    assert lane.numbers == baseline.numbers
    assert [record["number"] for record in lane.records] == lane.numbers
    assert sorted(lane.numbers[:4]) == [0, 1, 2, 3]  # every input once before any twice


def test_best_setting_finds_the_fastest_when_they_differ_tenfold(clockwork: str) -> None:
    def make(setting: float) -> Side:
        return Side("clockwork:make", {"threads": setting}, folder=clockwork)

    side, best, relative = best_setting(make, "sleep", [5.0, 0.5, 20.0], seconds=0.05)
    with side:
        assert best == 0.5 and side.facts == {"ms": 0.5}
        assert list(relative) == ["5.0", "0.5", "20.0"]


def test_the_search_ends_a_comparison_that_takes_too_long(
    clockwork: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a loaded machine, inputs are slower than the warm-up let expect."""
    monkeypatch.setattr(paired, "DUEL_S", 0.05)
    with Side("clockwork:make", {"ms": 5.0}, folder=clockwork) as side:
        pair = [Lane(name, side, "sleep", expected_ms=2.0) for name in ("champion", "challenger")]
        assert paired._duel(*pair) > 0
    assert len(pair[1].ratios) == 1


def test_ratios_are_those_of_the_medians_of_neighbouring_blocks(clockwork: str) -> None:
    with (
        Side("clockwork:make", {"ms": 0.2}, folder=clockwork) as one,
        Side("clockwork:make", {"ms": 0.4}, folder=clockwork) as other,
    ):
        baseline = Lane("baseline", one, "sleep", expected_ms=1.0)
        lane = Lane("lane", other, "sleep", expected_ms=1.0)
        alternate(baseline, [lane], seconds=0.01, block_ms=4.0)
    blocks = [slice(start, start + 4) for start in range(0, len(lane.times_ms), 4)]
    expected = [
        statistics.median(lane.times_ms[block]) / statistics.median(baseline.times_ms[block])
        for block in blocks
    ]
    assert lane.ratios == pytest.approx(expected)


def test_a_side_is_stopped_between_its_turns(clockwork: str) -> None:
    """Threads of a pool that spin for a while would take cores from the other sides."""
    with Side("clockwork:make", {}, folder=clockwork) as side:
        for _ in range(2):
            _await_state(side._process.pid, "T")
            assert side.run("sleep", [0])["records"] == [{"number": 0}]
        process = side._process
    assert process.returncode == 0


def test_a_stopped_side_ends_when_its_parent_is_killed(clockwork: str) -> None:
    code = (
        "import sys, time; from edgeexit.measure.bench.paired import Side; "
        "side = Side('clockwork:make', {}, folder=sys.argv[1]); "
        "print(side._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, clockwork], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    _await_state(child, "T")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _await_state(child, "", "Z")


def _await_state(pid: int, *wanted: str) -> None:
    until = time.monotonic() + 10
    while (state := _state(pid)) not in wanted:
        assert time.monotonic() < until, f"{state}, not {wanted}"
        time.sleep(0.01)


def _state(pid: int) -> str:
    """Of a process, as Linux has it (T: stopped, Z: ended); empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
