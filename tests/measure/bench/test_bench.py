"""A measurement of rows or of texts: what is compared, and a result that adds up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.bench import command
from edgeexit.errors import DataError, MeasurementError, UsageError
from edgeexit.measure import environment
from edgeexit.measure.bench import cases
from edgeexit.measure.bench.bench import Options, bench, doubts
from edgeexit.measure.bench.cases import read_inputs, settings, write_inputs
from edgeexit.measure.bench.inputs import prepare_rows
from edgeexit.measure.bench.paired import Lane
from edgeexit.measure.bench.rows import natural_ratio, share_of_ideal
from edgeexit.runtime import Policy, Rule, load, write_policy
from tests.decoder_toys import VOCABULARY, make_decoder_toy, write_decoder_toy
from tests.toys import make_inputs
from tests.two_chains import write_two_chains

ROWS = 50


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(path, **make_inputs(ROWS), label=np.arange(ROWS) % 3)
    return path


@pytest.fixture(scope="module")
def policy_file(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    write_policy(Policy(rules={"forward": Rule(thresholds=0.8)}), path)
    return path


@pytest.fixture(scope="module")
def latency(toy_bundle: Bundle, data_file: Path, policy_file: Path) -> dict:
    """One short measurement in latency mode, shared by the tests that look at it."""
    options = Options(data=data_file, policy=policy_file, seconds=0.5, threads="blocking")
    return bench(toy_bundle, options)


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
    names = [exit_.name for exit_ in toy_bundle.manifest.last_chain.stops]
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
    with load(toy_bundle, policy=Rule(thresholds=0.8)) as model:
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
    for figure, key in (("p50_ms", "expected_ms"), ("ratio_to_unsplit", "expected_ratio")):
        of_exits = [leave[figure] for leave in latency["exits"]]
        expected = sum(rate * one for rate, one in zip(rates, of_exits, strict=True))
        assert latency["natural"][key] == pytest.approx(expected, abs=1e-3)


def test_bench_measures_whole_batches_in_throughput_mode(
    toy_bundle: Bundle, data_file: Path, policy_file: Path
) -> None:
    options = Options(
        mode="throughput",
        data=data_file,
        policy=policy_file,
        batch=16,
        seconds=0.2,
        threads="blocking",
    )
    found = bench(toy_bundle, options)
    assert found["data"]["rows"] == 48  # the last two rows fill no batch
    assert found["natural"]["rows_per_s"] > 0 and found["unsplit"]["rows_per_s"] > 0
    assert sum(leave["rate"] for leave in found["exits"]) == pytest.approx(1.0, abs=1e-5)
    assert found["natural"]["of_ideal"] > 0
    assert found["chain"]["rows_per_s"] > 0
    assert found["chain"]["ratio_to_unsplit"] == found["split_tax"]


def test_bench_promises_no_natural_figures_when_there_is_no_data(toy_bundle: Bundle) -> None:
    found = bench(toy_bundle, Options(seconds=0.1, threads="blocking"))
    assert found["natural"] is None
    assert {leave["rate"] for leave in found["exits"]} == {None}
    assert found["data"]["name"] == "samples"


def test_batches_hold_every_row_once_and_its_label_when_shuffled(
    toy_bundle: Bundle, data_file: Path, tmp_path: Path
) -> None:
    found = prepare_rows(toy_bundle, data_file, 10, str(tmp_path), seed=3)
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
        bench(toy_bundle, Options(mode="throughput", data=data_file, batch=64, seconds=0.1))


def test_bench_is_refused_when_options_are_out_of_range(toy_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--time"):
        bench(toy_bundle, Options(seconds=0))
    with pytest.raises(DataError, match="does not exist"):
        bench(toy_bundle, Options(data=tmp_path / "nothing.npz", seconds=0.1))


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
    stages = ["thread settings: unsplit ...", "thread settings: chain ...", "warm-up ..."]
    assert ran.stderr.splitlines() == [*stages, "blocks ..."]  # no terminal: no bar
    assert CliRunner().invoke(command, [*arguments, "-q"], catch_exceptions=False).stderr == ""
    assert any(line.startswith("split tax") for line in lines)


@pytest.mark.parametrize("text", ["30", "0s", "-1s", "s", "1e3s", "soon"])
def test_command_refuses_a_time_without_unit_or_sense(toy_bundle: Bundle, text: str) -> None:
    ran = CliRunner().invoke(command, [str(toy_bundle.path), "--time", text])
    assert ran.exit_code == 2 and "is not a time" in ran.stderr


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_decoder_toy(make_decoder_toy(), tmp_path_factory.mktemp("writer") / "bundle")


def test_bench_compares_every_mode_with_unsplit(writer: Bundle, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tokens": [5, 6, 7, 8, 9]}\n\n{"tokens": [5, 6, 7]}\n')
    policy = tmp_path / "policy.json"
    write_policy(Policy(rules={"decoder": Rule(thresholds=0.4)}), policy)
    found = bench(
        writer,
        Options(data=prompts, policy=policy, new_tokens=6, seconds=0.01, threads="blocking"),
    )
    assert set(found["modes"]) == {"full", "exact", "fast"}
    assert found["data"] == {"name": "prompts.jsonl", "prompts": 2, "tokens": [3, 5]}
    assert found["turns"] >= 5 and found["unsplit"]["tokens"] == found["turns"] * 6
    assert found["modes"]["full"]["tokens"] == found["unsplit"]["tokens"]
    assert found["modes"]["exact"]["turns_with_other_tokens_than_full"] == 0
    assert sum(found["modes"]["fast"]["exits"].values()) >= found["modes"]["fast"]["tokens"]
    assert found["split_tax"] == pytest.approx(
        found["modes"]["full"]["time_against_unsplit"]["decode"]
    )
    assert found["threads"] == {"unsplit": "blocking", "modes": "blocking"}
    assert set(found["thread_search"]) == {"unsplit", "modes"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_bench_without_prompts_takes_random_ones_and_full_depth(writer: Bundle) -> None:
    options = Options(prompt_tokens=5, new_tokens=4, seconds=0.01, threads=1)
    found = bench(writer, options)
    assert set(found["modes"]) == {"full"}
    assert found["data"] == {"name": "8 random prompts", "prompts": 8, "tokens": [5, 5]}


def test_bench_ignores_stop_tokens_of_random_prompts(tmp_path: Path) -> None:
    ends = tuple(range(VOCABULARY))
    bundle = write_decoder_toy(make_decoder_toy(stop_tokens=ends), tmp_path / "bundle")
    found = bench(bundle, Options(prompt_tokens=5, new_tokens=4, seconds=0.01, threads=1))
    assert found["unsplit"]["tokens"] == found["modes"]["full"]["tokens"] == found["turns"] * 4
    assert found["stop_tokens"] == "ignored" and found["sampling"] == "greedy"


def test_bench_refuses_a_policy_for_random_prompts(writer: Bundle, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    write_policy(Policy(rules={"decoder": Rule(thresholds=0.4)}), policy)
    with pytest.raises(UsageError, match="no effect on random prompts"):
        bench(writer, Options(policy=policy, threads=1))


def test_bench_tells_the_exits_of_an_encoder(tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(encoder=True), tmp_path / "bundle")
    samples = np.load(bundle.file("samples/reference.npz"))
    inputs = {t.name: samples[f"input/{t.name}"] for t in bundle.manifest.inputs}
    np.savez(tmp_path / "prompts.npz", **inputs)
    policy = tmp_path / "policy.json"
    rule = Rule(score="saturation", thresholds=float("-inf"))
    write_policy(Policy(rules={"encoder": rule, "decoder": Rule()}), policy)
    ran = CliRunner().invoke(
        command,
        [
            *(str(bundle.path), "--data", str(tmp_path / "prompts.npz"), "--policy", str(policy)),
            *("--new-tokens", "4", "--time", "10ms", "--threads", "1"),
            *("-o", str(tmp_path / "result.json")),
        ],
        catch_exceptions=False,
    )
    found = json.loads((tmp_path / "result.json").read_text())
    # The policy has no thresholds for fast.
    assert set(found["modes"]) == {"full", "full+policy", "exact"}
    names = [exit_.name for exit_ in bundle.manifest.chains["encoder"].stops]
    rates = dict.fromkeys(names, 0.0) | {names[0]: 1.0}
    assert found["earlier_exits"] == {"encoder": rates}
    assert f"encoder, of prompts: {names[0]} 100.00 %" in ran.stdout
    assert "texts are greedy" in ran.stdout


@pytest.mark.parametrize("toy", [{"encoder": True}, {"prefix": True}])
def test_bench_takes_prompts_with_what_earlier_chains_take(toy: dict, tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(**toy), tmp_path / "bundle")
    samples = np.load(bundle.file("samples/reference.npz"))
    inputs = {t.name: samples[f"input/{t.name}"] for t in bundle.manifest.inputs}
    np.savez(tmp_path / "prompts.npz", **inputs)
    options = Options(data=tmp_path / "prompts.npz", new_tokens=4, seconds=0.01, threads=1)
    found = bench(bundle, options)
    assert found["data"]["prompts"] == 3
    assert found["modes"]["exact"]["turns_with_other_tokens_than_full"] == 0
    name = "8 random prompts" if "encoder" in toy else "3 sample prompts"
    found = bench(bundle, Options(prompt_tokens=5, new_tokens=4, seconds=0.01, threads=1))
    assert found["data"]["name"] == name and set(found["modes"]) == {"full"}
    assert found["data"]["tokens"] == ([5, 5] if "encoder" in toy else [9, 9])


def test_bench_refuses_what_is_not_for_texts(writer: Bundle) -> None:
    with pytest.raises(MeasurementError, match="exceed the model's limit"):
        bench(writer, Options(prompt_tokens=40, new_tokens=9, threads=1))
    with pytest.raises(UsageError, match="--mode throughput is for rows"):
        bench(writer, Options(mode="throughput"))
    with pytest.raises(UsageError, match="--launch-ahead"):
        bench(writer, Options(launch_ahead="always", engine="cuda"))


def test_cases_of_texts_are_the_modes_and_further_settings(writer: Bundle, tmp_path: Path) -> None:
    write_inputs(tmp_path / "prompts.npz", [{"tokens": np.array([5, 6, 7])}])
    arguments = {"bundle": str(writer.path), "inputs": str(tmp_path / "prompts.npz")}
    settings = {"sure": {"mode": "fast", "thresholds": float("inf")}}
    subject = cases.chain(**arguments, new_tokens=40, settings=settings)
    modes = {"full", "full+policy", "exact", "fast", "approximate"}
    assert set(subject.cases) == modes | {"sure", "search", "given text", "memory"}
    made = {}
    for name in ("full", "sure", "search"):
        case = subject.cases[name]
        case.enter()
        made[name] = case.read(case.call(0))
    assert made["sure"]["tokens"] == made["full"]["tokens"]
    assert made["sure"]["exits"] == {"exit_4": 40}
    assert made["search"]["tokens"] == made["full"]["tokens"][:32]
    assert all(0 <= token < VOCABULARY for token in made["full"]["tokens"])
    subject.close()


def test_bench_measures_the_chain_that_answers_when_there_are_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **make_inputs(12))
    policy = tmp_path / "policy.json"
    rules = {"front": Rule(thresholds=0.6), "back": Rule(thresholds=0.5)}
    write_policy(Policy(rules=rules), policy)
    bundle = write_two_chains(tmp_path / "bundle")
    options = Options(data=tmp_path / "rows.npz", policy=policy, seconds=0.1, threads="blocking")
    found = bench(bundle, options)
    assert [exit_["name"] for exit_ in found["exits"]] == ["exit_3", "exit_4"]
    assert found["policy"] == {"score": "max_prob", "thresholds": "0.5"}
    with load(bundle, policy=Policy(rules=rules)) as model:
        taken = model(make_inputs(12)).exits
    assert found["exits"][0]["rate"] == pytest.approx((taken == 0).mean(), abs=1e-6)
