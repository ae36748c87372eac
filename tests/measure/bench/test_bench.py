"""Measuring: sides in processes of their own, honest percentiles, and a result that adds up."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.bench import command
from edgeexit.errors import DataError, MeasurementError, UsageError
from edgeexit.measure import environment
from edgeexit.measure.bench.bench import (
    bench,
    doubts,
    natural_ratio,
    prepare_inputs,
    share_of_ideal,
)
from edgeexit.measure.bench.cases import read_inputs, settings, write_inputs
from edgeexit.measure.bench.paired import (
    MIN_RUNS,
    Lane,
    Side,
    alternate,
    best_setting,
    middle_mean,
    percentiles,
    spread,
)
from edgeexit.runtime import Policy, load, write_policy
from tests.toys import make_inputs

ROWS = 50

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


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(path, **make_inputs(ROWS), label=np.arange(ROWS) % 3)
    return path


@pytest.fixture(scope="module")
def policy_file(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    write_policy(Policy(thresholds=0.8), path)
    return path


@pytest.fixture(scope="module")
def latency(toy_bundle: Bundle, data_file: Path, policy_file: Path) -> dict:
    """One short measurement in latency mode, shared by the tests that look at it."""
    return bench(toy_bundle, data=data_file, policy=policy_file, seconds=0.5, threads="blocking")


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


def test_settings_offer_one_when_a_gpu_computes() -> None:
    assert settings("cuda", 8) == ["spinning", "blocking"]
    assert settings("cpu", 8)[-3:] == [1, 2, 4]


def test_inputs_come_back_equal_and_in_order_when_shapes_differ(tmp_path: Path) -> None:
    inputs = [{"a": np.full((1, n + 1), n), "b": np.arange(n, dtype=np.int64)} for n in range(12)]
    write_inputs(tmp_path / "inputs.npz", inputs)
    found = read_inputs(tmp_path / "inputs.npz")
    for one, other in zip(inputs, found, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value)


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


def test_natural_ratio_weights_the_median_of_each_exit_by_its_rate() -> None:
    lane = Lane("natural", None, "natural")  # type: ignore[arg-type]
    lane.relative = [0.1, 0.1, 0.9, 1.0, 1.0]
    lane.records = [{"exits": [number]} for number in (0, 0, 0, 2, 2)]
    assert natural_ratio(lane, [0.5, 0.0, 0.5]) == pytest.approx(0.5 * 0.1 + 0.5 * 1.0)


def test_share_of_ideal_is_one_when_rows_pay_for_their_segments_only() -> None:
    timed = Lane("segments", None, "segments")  # type: ignore[arg-type]
    timed.records, timed.mean_ratios = [[1.0, 1.0, 2.0]] * 4, [1.0] * 4
    natural = Lane("natural", None, "natural")  # type: ignore[arg-type]
    natural.records = [{"exits": [0, 0, 1, 2]}]
    natural.mean_ratios = [0.25 + 0.5 * 0.25 + 0.25 * 0.5]
    assert share_of_ideal(natural, timed) == pytest.approx(1.0)


def test_doubts_are_raised_when_others_used_the_machine() -> None:
    calm = {"other_load_cores": 0.01, "steal_share": 0.0}
    assert doubts(calm, []) == []
    assert len(doubts({"other_load_cores": 0.5, "steal_share": 0.2}, ["chain"])) == 3
    assert doubts({"other_load_cores": None, "steal_share": None}, []) == []


def test_environment_names_no_folder_when_paths_are_absolute() -> None:
    found = environment.describe(
        command=["/somewhere/bin/edgeexit", "bench", "--data=/somewhere/rows.npz"]
    )
    assert found["command"] == "edgeexit bench --data=rows.npz"
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["packages"]["numpy"] == np.__version__
    assert "/" not in json.dumps(found["command"])


def test_watch_counts_this_process_as_other_load_when_it_is_not_declared() -> None:
    watch = environment.Watch()
    sum(number * number for number in range(2_000_000))
    found = watch.stop(own_cpu_s=0.0)
    assert found["elapsed_s"] > 0
    assert found["other_load_cores"] is None or found["other_load_cores"] > 0


def test_bench_gives_every_promised_figure_in_latency_mode(
    latency: dict, toy_bundle: Bundle
) -> None:
    names = [leave.name for leave in toy_bundle.exits()]
    assert latency["mode"] == "latency"
    assert latency["unsplit"]["p50_ms"] > 0 and latency["split_tax"] > 0
    assert [leave["name"] for leave in latency["exits"]] == names
    for leave in latency["exits"]:
        assert {"name", "p50_ms", "ratio_to_unsplit", "rate", "accuracy"} <= leave.keys()
    assert {"p50_ms", "mean_ms", "ratio_to_unsplit", "accuracy"} <= latency["natural"].keys()
    assert latency["environment"]["bundle"]["digest"] == toy_bundle.digest
    assert latency["data"]["rows"] == ROWS
    assert json.loads(json.dumps(latency, allow_nan=False)) == latency


def test_bench_finds_the_rates_and_accuracies_of_the_model_when_run_on_real_data(
    latency: dict, toy_bundle: Bundle
) -> None:
    inputs, labels = make_inputs(ROWS), np.arange(ROWS) % 3
    with load(toy_bundle, policy=Policy(thresholds=0.8)) as model:
        result = model(inputs)
    right = result.outputs["logits"].argmax(-1) == labels
    assert latency["natural"]["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert latency["natural"]["rows"] == ROWS
    for number, leave in enumerate(latency["exits"]):
        here = result.exits == number
        assert leave["rate"] == pytest.approx(here.mean(), abs=1e-6)
        expected = right[here].mean() if here.any() else None
        assert leave["accuracy"] == (
            None if expected is None else pytest.approx(expected, abs=1e-6)
        )
    rates = [leave["rate"] for leave in latency["exits"]]
    means = [leave["mean_ms"] for leave in latency["exits"]]
    expected_ms = sum(rate * mean for rate, mean in zip(rates, means, strict=True))
    assert latency["natural"]["expected_mean_ms"] == pytest.approx(expected_ms, abs=1e-3)


def test_bench_measures_whole_batches_in_throughput_mode(
    toy_bundle: Bundle, data_file: Path, policy_file: Path
) -> None:
    found = bench(
        toy_bundle,
        mode="throughput",
        data=data_file,
        policy=policy_file,
        batch=16,
        seconds=0.2,
        threads="blocking",
    )
    assert found["data"]["rows"] == 48  # the last two rows fill no batch
    assert found["natural"]["rows_per_s"] > 0 and found["unsplit"]["rows_per_s"] > 0
    assert sum(leave["rate"] for leave in found["exits"]) == pytest.approx(1.0, abs=1e-5)
    assert found["natural"]["of_ideal"] > 0


def test_bench_promises_no_natural_figures_when_there_is_no_data(toy_bundle: Bundle) -> None:
    found = bench(toy_bundle, seconds=0.1, threads="blocking")
    assert found["natural"] is None
    assert {leave["rate"] for leave in found["exits"]} == {None}
    assert found["data"]["name"] == "samples"


def test_batches_hold_every_row_once_and_its_label_when_shuffled(
    toy_bundle: Bundle, data_file: Path, tmp_path: Path
) -> None:
    found = prepare_inputs(toy_bundle, data_file, 10, str(tmp_path), seed=3)
    whole = make_inputs(ROWS)
    batches = read_inputs(found.path)
    assert found.count == 5 and found.labels is not None
    seen = []
    for one, labels in zip(batches, found.labels, strict=True):
        np.testing.assert_array_equal(one["scale"], whole["scale"])
        for row, label in zip(one["x"], labels, strict=True):
            (place,) = np.flatnonzero((whole["x"] == row).all(-1))
            assert label == place % 3
            seen.append(place)
    assert sorted(seen) == list(range(ROWS)) and seen != sorted(seen)


def test_bench_is_refused_when_no_batch_fills(toy_bundle: Bundle, data_file: Path) -> None:
    with pytest.raises(MeasurementError, match="fewer rows than one batch of 64"):
        bench(toy_bundle, mode="throughput", data=data_file, batch=64, seconds=0.1)


def test_bench_is_refused_when_arguments_cannot_be_meant(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--time"):
        bench(toy_bundle, seconds=0)
    with pytest.raises(DataError, match="does not exist"):
        bench(toy_bundle, data=tmp_path / "nothing.npz", seconds=0.1)


def test_command_prints_one_object_and_writes_the_same_when_asked_for_json(
    toy_bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    arguments = [
        str(toy_bundle.path),
        "--time",
        "100ms",
        "--threads",
        "1",
        "--json",
        "-o",
        str(output),
    ]
    ran = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    printed = json.loads(ran.stdout)
    assert printed == json.loads(output.read_text())
    assert printed["unsplit"]["threads"] == "1"
    assert str(tmp_path) not in output.read_text()


def test_command_prints_a_table_with_unsplit_first_otherwise(toy_bundle: Bundle) -> None:
    arguments = [str(toy_bundle.path), "--time", "100ms", "--threads", "blocking"]
    ran = CliRunner().invoke(command, arguments, catch_exceptions=False)
    lines = ran.stdout.splitlines()
    assert "p50 ms" in lines[1] and lines[3].startswith("unsplit")
    assert any(line.startswith("split tax") for line in lines)


@pytest.mark.parametrize("text", ["30", "0s", "-1s", "s", "1e3s", "soon"])
def test_command_refuses_a_time_without_unit_or_sense(toy_bundle: Bundle, text: str) -> None:
    ran = CliRunner().invoke(command, [str(toy_bundle.path), "--time", text])
    assert ran.exit_code == 2 and "is not a time" in ran.stderr


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
