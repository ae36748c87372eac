"""Exits of an encoder alone, and thresholds for them, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeexit.bundle.policy import Policy, Rule, write_policy
from edgeexit.cli import cli
from edgeexit.errors import EdgeExitError
from tests.decoder_toys import make_decoder_toy
from tests.decoder_words import write_with_words
from tests.encoder_decoders import FAMILIES, save_checkpoint


def call(*arguments: object) -> Result:
    # A pool of its own: the default, the process's pool, would be for all later tests, too.
    threads = ("--threads", "1") if arguments[0] == "run" else ()
    return CliRunner().invoke(cli, [str(one) for one in (*arguments, *threads)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(FAMILIES["t5"](), tmp_path_factory.mktemp("t5") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    output = checkpoint.parent / "bundle"
    made = call("export", "-m", checkpoint, "--encoder-exits", "1,2", "-o", output)
    assert made.exit_code == 0, made.output
    assert "--encoder-threshold" in made.stderr and str(output) in made.stderr
    assert "warning: nothing says that the model was trained" in made.stderr
    weights = made.stdout.strip().rpartition("weights ")[2]
    assert call("inspect", output).stdout.count(f"files, weights {weights}\n") == 1
    return output


def test_a_threshold_for_the_encoder_stops_it_early(bundle: Path) -> None:
    texts: dict[str, Any] = {}
    for threshold, exit_ in (("-1", "encoder_exit_1"), ("inf", "encoder_exit_3")):
        common = ("--prompt", "abc", "--max-new-tokens", "6", "--json")
        ran = call("run", bundle, *common, "--encoder-threshold", threshold)
        assert ran.exit_code == 0, ran.output
        found = json.loads(ran.stdout)
        assert found["statistics"]["earlier"] == {"encoder": [exit_]}
        assert ("the thresholds are not calibrated" in ran.stderr) == (threshold == "-1")
        texts[threshold] = found["texts"][0]["tokens"]
    assert texts["-1"] != texts["inf"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--encoder-threshold", "2"), r"--encoder-threshold 2 is out of range \(-1 to 1\)"),
        (("--encoder-threshold", "1", "--policy", "p.json"), "exclude each other"),
        (("--mode", "fast"), "no early exits in the decoder. .*--encoder-threshold, in every"),
        (("--mode", "exact"), "no early exits in the decoder"),
        (("--mode", "fast", "--threshold", "0.1"), "no early exits in the decoder"),
        (("--threshold", "0.1"), "Leave it out: the decoder has no early exits; the encoder stops"),
    ],
)
def test_options_that_cannot_be_are_refused(
    bundle: Path, options: tuple[str, ...], words: str
) -> None:
    result = call("run", bundle, "--prompt", "abc", *options)
    assert isinstance(result.exception, EdgeExitError)
    with pytest.raises(EdgeExitError, match=words.format(bundle=bundle)):
        raise result.exception


@pytest.mark.parametrize(
    "options, words",
    [
        ((), "Name layers from 1 to 2, as in 1,2, of the decoder (--exits), encoder (--encoder-"),
        (("--exits", "9"), "the model has layers 1 to 3. Name layers from 1 to 2, as in 1,2;"),
        (("--exits", "1", "--encoder-exits", "7"), "no layer 7; the encoder has layers 1 to 3"),
        (("--exits", "2,1"), "exits of the model: 2,1 are not in order"),
    ],
)
def test_messages_name_layers_that_the_model_has(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    result = call("export", "-m", checkpoint, *options, "-o", tmp_path / "bundle")
    assert isinstance(result.exception, EdgeExitError) and words in str(result.exception)


def test_a_bundle_without_an_encoder_has_no_such_threshold(toy_bundle: Any) -> None:
    result = call("run", toy_bundle.path, "--data", "d.npz", "--encoder-threshold", "0.5")
    assert "has no encoder with exits" in str(result.exception)


def test_a_model_that_answers_rows_refuses_options_of_texts(toy_bundle: Any) -> None:
    result = call("run", toy_bundle.path, "--data", "d.npz", "--mode", "exact")
    assert "is for models that write text, and" in str(result.exception)
    assert str(result.exception).endswith("does not. Leave it out.")


def test_fast_with_a_threshold_of_the_encoder_needs_one_of_the_decoder(tmp_path: Path) -> None:
    bundle = write_with_words(make_decoder_toy(encoder=True), tmp_path / "bundle").path
    given = ("--prompt", "w5", "--mode", "fast", "--encoder-threshold", "0.5")
    result = call("run", bundle, *given)
    assert "needs thresholds for the decoder. Add --threshold" in str(result.exception)


def test_bench_measures_the_modes_that_a_bundle_has(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "cba abc"}\n')
    policy = tmp_path / "policy.json"
    write_policy(Policy(rules={"encoder": Rule(score="saturation", thresholds=-1.0)}), policy)
    given = ("--data", tmp_path / "prompts.jsonl", "--policy", policy, "--new-tokens", "4")
    ran = call("bench", bundle, *given, "--time", "10ms", "--threads", "1", "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert set(found["modes"]) == {"full", "full+policy"}
    assert found["earlier_exits"]["encoder"]["encoder_exit_1"] == 1.0
    assert any("thresholds are not calibrated" in warning for warning in found["warnings"])


def test_a_chain_without_early_exits_is_not_calibrated(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "abc", "target": "abc"}\n')
    output = tmp_path / "trace.npz"
    given = ("--data", tmp_path / "texts.jsonl", "-o", output, "--threads", "1")
    traced = call("trace", bundle, *given)
    assert traced.exit_code == 0, traced.output
    assert "warning: the chain main has no early exit" in traced.stderr
    refused = call("calibrate", output, "--max-risk", "5%", "-o", tmp_path / "policy.json")
    assert "the chain main has no early exit, so there is nothing" in str(refused.exception)
