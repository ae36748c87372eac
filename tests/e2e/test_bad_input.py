"""Bad input gets one line that names the thing and the remedy, the right code, no leftovers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.runtime import Policy, Rule, write_policy
from tests.e2e.conftest import Cli, Ran
from tests.toys import make_inputs


def assert_clear(ran: Ran, code: int, *parts: str) -> None:
    """One error, no traceback, nothing on stdout."""
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert ran.err.count("rror: ") == 1
    for part in parts:
        assert part in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["check", "nowhere"],
        ["run", "nowhere", "--text", "a"],
        ["trace", "nowhere", "--data", "d.npz", "-o", "t.npz"],
        ["calibrate", "nowhere", "--max-risk", "1%", "-o", "p.json"],
        ["export", "-m", "./nowhere", "-o", "b"],
        ["export", "-m", "nowhere.onnx", "--exits", "a,b", "-o", "b"],
    ],
)
def test_a_path_that_does_not_exist_is_named(cli: Cli, arguments: list[str]) -> None:
    ran = cli(*arguments)
    assert ran.code in (1, 2)
    assert_clear(ran, ran.code, "nowhere", "does not exist")
    assert not list(cli.folder.iterdir())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["fly"], "No such command 'fly'"),
        (["check"], "Missing argument 'BUNDLE'"),
        (["export", "-m", "x"], "Missing option '-o'"),
        (["trace", "b", "--data", "d", "-o", "t", "--batch-size", "0"], "--batch-size"),
        (["check", "b", "--engine", "abacus"], "'abacus' is not one of"),
        (["check", "b", "--threads", "0"], "not a number from 1 up"),
        (["check", "b", "--atol", "-1"], "--atol"),
        (["calibrate", "t", "--max-risk", "two", "-o", "p"], "--max-risk two"),
        (["calibrate", "t", "--max-risk", "150%", "-o", "p"], "--max-risk 150%"),
        (["calibrate", "t", "--max-risk", "-1", "-o", "p"], "--max-risk -1"),
        (["run", "b"], "one kind of input"),
        (["run", "b", "--text", "a", "--image", "b.png"], "one kind of input"),
        (["run", "b", "--text", "a", "--exit", "e", "--threshold", "1"], "exclude each other"),
        (["run", "b", "--text", "a", "--threshold", "5"], "is out of range (0 to 1)"),
        (["run", "b", "--text", "a", "--threshold", "nan"], "is out of range (0 to 1)"),
        (["bench", "b", "--launch-ahead", "sometimes"], "sometimes"),
        (["bench", "b", "--launch-ahead", "measured"], "--launch-ahead is for GPUs"),
        (["export", "-m", "m.onnx", "-o", "b"], "which outputs are exits"),
        (["export", "-m", "m.onnx", "--exits", "a", "--dtype", "fp16", "-o", "b"], "--dtype"),
        (["export", "-m", "m.onnx", "--untrained-exits", "1", "-o", "b"], "--untrained-exits"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli: Cli, arguments: list[str], message: str) -> None:
    assert_clear(cli(*arguments), 2, message)
    assert not list(cli.folder.iterdir())


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda a: {k: v for k, v in a.items() if k != "x"}, "input x is missing"),
        (lambda a: a | {"z": a["x"]}, "no input z"),
        (lambda a: a | {"x": a["x"].astype(np.int64)}, "input x is int64"),
        (lambda a: a | {"x": a["x"][0]}, "input x has the shape [6]"),
        (lambda a: a | {"x": a["x"][:, :4]}, "input x has the shape [4, 4]"),
        (lambda a: a | {"x": a["x"][:0], "shift": a["shift"][:0]}, "is empty"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    cli: Cli, toy_bundle: Bundle, change: object, message: str
) -> None:
    np.savez(cli.folder / "bad.npz", **change(make_inputs(4)))
    assert_clear(cli("run", toy_bundle.path, "--data", "bad.npz"), 1, "bad.npz", message)


def test_a_policy_of_another_bundle_is_refused(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    rules = {"forward": Rule(thresholds=0.5)}
    write_policy(Policy(rules=rules, bundle="0" * 64), cli.folder / "policy.json")
    for verb in (["check"], ["run", "--data", toy_data]):
        ran = cli(verb[0], toy_bundle.path, *verb[1:], "--policy", "policy.json")
        assert_clear(ran, 1, "made for the bundle 000000000000", "Calibrate again")


def test_thresholds_of_the_wrong_count_are_refused(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    rules = {"forward": Rule(thresholds=[0.5, 0.6])}
    write_policy(Policy(rules=rules), cli.folder / "policy.json")
    ran = cli("run", toy_bundle.path, "--data", toy_data, "--policy", "policy.json")
    assert_clear(ran, 1, "2 thresholds for 3 early exits")


@pytest.mark.parametrize("content", ["", "[]", '{"format": "9.0"}', '{"format": "2.0"}'])
def test_a_policy_that_is_none_is_refused(cli: Cli, toy_bundle: Bundle, content: str) -> None:
    (cli.folder / "policy.json").write_text(content)
    assert_clear(cli("check", toy_bundle.path, "--policy", "policy.json"), 1, "policy.json")


def test_an_exit_that_is_not_there_is_named(cli: Cli, toy_bundle: Bundle, toy_data: Path) -> None:
    ran = cli("run", toy_bundle.path, "--data", toy_data, "--exit", "exit_9")
    assert_clear(ran, 2, "--exit exit_9", "exit_1, exit_2, exit_3, exit_4")


def test_an_axis_that_is_not_there_is_named(cli: Cli, toy_bundle: Bundle) -> None:
    assert_clear(cli("inspect", toy_bundle.path, "--axis", "seq=3"), 2, "--axis seq=3", "batch")
    asked = cli("inspect", toy_bundle.path, "--capacity", "64")
    assert_clear(asked, 2, "does not write text", "Leave out the capacity (--capacity)")


def test_check_fails_with_code_3_when_weights_were_altered(cli: Cli, toy_copy: Path) -> None:
    path = toy_copy / "graphs/weights.bin"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    assert_clear(cli("check", toy_copy), 3, "graphs/weights.bin: sha256 differs")


def test_check_is_exit_code_3_when_tolerances_do_not_hold(cli: Cli, toy_bundle: Bundle) -> None:
    ran = cli("check", toy_bundle.path, "--atol", "0", "--rtol", "0", "--json")
    assert ran.code == 3
    assert not ran.json["passed"]
    assert ran.err.startswith("error: exit_")
    assert "differs from the reference by" in ran.err


def test_calibrate_is_exit_code_3_when_nothing_passes(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    cli("trace", toy_bundle.path, "--data", toy_data, "-o", "trace.npz")
    with np.load(cli.folder / "trace.npz") as file:
        arrays = dict(file)
    arrays["predictions"][:-1] = (arrays["predictions"][-1] + 1) % 3
    np.savez(cli.folder / "trace.npz", **arrays)
    ran = cli("calibrate", "trace.npz", "--max-risk", "0.1%", "-o", "policy.json")
    assert_clear(ran, 3, "run the full model")
    assert not (cli.folder / "policy.json").exists()


def test_calibrate_says_what_it_understood_and_that_rows_are_few(
    cli: Cli, toy_bundle: Bundle
) -> None:
    np.savez(cli.folder / "rows.npz", **make_inputs(4))
    assert cli("trace", str(toy_bundle.path), "--data", "rows.npz", "-o", "trace.npz").code == 0
    ran = cli("calibrate", "trace.npz", "-o", "policy.json")
    assert_clear(ran, 2, "--max-risk is missing", "--max-risk 0.5%")
    given = ["calibrate", "trace.npz", "--max-risk", "0.4", "-o", "policy.json"]
    ran = cli(*given)
    assert ran.code == 0 and "--max-risk 0.4 is a risk of 40 %" in ran.err
    assert "warning: 4 rows cannot show a risk of 40 %" in ran.err
    ran = cli(*given, "--json", "--overwrite")
    assert ran.code == 0 and ran.json["calibration"]["rows_needed"] == 6
    assert len(ran.json["calibration"]["warnings"]) == 1
    ran = cli("run", str(toy_bundle.path), "--data", "rows.npz", "--policy", "policy.json")
    assert "warning: calibration of the policy: 4 rows cannot show" in ran.err


def test_calibrate_refuses_a_trace_of_another_bundle(
    cli: Cli, toy_bundle: Bundle, vit_bundle: Bundle, toy_data: Path
) -> None:
    cli("trace", toy_bundle.path, "--data", toy_data, "-o", "trace.npz")
    options = ("--max-risk", "1%", "-o", "policy.json", "--bundle", vit_bundle.path)
    assert_clear(cli("calibrate", "trace.npz", *options), 1, "trace.npz: trace of the bundle")


def test_calibrate_needs_labels_for_the_performance_risk(cli: Cli, toy_bundle: Bundle) -> None:
    np.savez(cli.folder / "d.npz", **make_inputs(10))
    cli("trace", toy_bundle.path, "--data", "d.npz", "-o", "trace.npz")
    ran = cli("calibrate", "trace.npz", "--max-risk", "1%", "--risk", "performance", "-o", "p.json")
    assert_clear(ran, 1, "no labels", "--risk consistency")


def test_an_output_is_never_an_input(cli: Cli, toy_bundle: Bundle, toy_data: Path) -> None:
    before = toy_data.read_bytes()
    ran = cli("trace", toy_bundle.path, "--data", toy_data, "-o", toy_data)
    assert_clear(ran, 2, "is both input and output", "another name")
    assert toy_data.read_bytes() == before
    assert cli("trace", toy_bundle.path, "--data", toy_data, "-o", "t.npz").code == 0
    ran = cli("calibrate", "t.npz", "--max-risk", "50%", "-o", "t.npz")
    assert_clear(ran, 2, "is both input and output", "another name")


def test_results_that_exist_are_replaced_when_asked_alone(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    policy, figures = ("calibrate", "t.npz", "--max-risk", "50%", "-o", "p.json"), "b.json"
    for arguments in (
        ("trace", toy_bundle.path, "--data", toy_data, "-o", "t.npz"),
        policy,
        ("bench", toy_bundle.path, "--data", toy_data, "-o", figures),
    ):
        output = cli.folder / str(arguments[-1])
        output.write_bytes(b"mine")
        assert_clear(cli(*arguments), 2, f"{output.name} exists", "add --overwrite")
        assert output.read_bytes() == b"mine"
        if arguments[0] != "bench":
            assert cli(*arguments, "--overwrite").code == 0
            assert output.read_bytes() != b"mine"


def test_a_policy_of_another_bundle_is_named(cli: Cli, toy_bundle: Bundle, toy_data: Path) -> None:
    write_policy(Policy(rules={"main": Rule()}, bundle="0" * 64), cli.folder / "other.json")
    ran = cli("run", toy_bundle.path, "--data", toy_data, "--policy", "other.json")
    assert_clear(ran, 1, "other.json: the policy was made for the bundle 000000000000")


def test_rows_that_are_no_numbers_are_said(cli: Cli, toy_bundle: Bundle) -> None:
    inputs = make_inputs(4)
    inputs["x"][2, 1] = np.nan
    inputs["x"][3, 0] = np.inf
    np.savez(cli.folder / "d.npz", **inputs)
    options = ("--data", "d.npz", "--threshold", "0")
    ran = cli("run", toy_bundle.path, *options, "--json")
    assert ran.code == 0 and "d.npz: x has NaN or infinity in row 2 and 1 more" in ran.err
    assert "row 2: the outputs have NaN" in ran.err
    exits = [row["exit"] for row in ran.json["rows"]]
    assert exits[:2] == ["exit_1"] * 2 and exits[2] == "exit_4"
    assert "no_number" not in ran.json["rows"][0] and ran.json["rows"][2]["score"] is None


def test_labels_under_another_name_are_said(cli: Cli, toy_bundle: Bundle) -> None:
    np.savez(cli.folder / "d.npz", **make_inputs(4), labels=np.zeros(4, np.int64))
    ran = cli("trace", toy_bundle.path, "--data", "d.npz", "-o", "t.npz")
    assert_clear(ran, 1, "d.npz: labels is not an input", "Name labels label")


def test_run_without_input_names_what_the_bundle_takes(cli: Cli, toy_bundle: Bundle) -> None:
    ran = cli("run", toy_bundle.path)
    assert_clear(ran, 2, "one kind of input. Give --data.")


def test_a_trace_never_goes_into_a_bundle(cli: Cli, toy_copy: Path, toy_data: Path) -> None:
    ran = cli("trace", toy_copy, "--data", toy_data, "-o", toy_copy / "trace.npz")
    assert_clear(ran, 2, "inside the bundle")


def test_a_trace_that_fails_leaves_nothing(cli: Cli, toy_bundle: Bundle) -> None:
    (cli.folder / "user_data.py").write_text(
        "from tests.toys import make_inputs\n"
        "def rows():\n    yield make_inputs(2), None\n    yield make_inputs(2), [7, 7]\n"
    )
    root = str(Path(__file__).parents[2])
    cli.environment |= {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    ran = cli("trace", toy_bundle.path, "--data", "user_data:rows", "-o", "trace.npz")
    assert_clear(ran, 1, "user_data:rows: batch 1", "row 0: the label 7")
    assert [path.name for path in cli.folder.iterdir()] == ["user_data.py"]


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (["--exits", "1,two"], 2, "--exits: 'two' is not a layer number"),
        (["--exits", "3,1"], 2, "not in order"),
        (["--exits", "1,1"], 2, "layer 1 is given twice"),
        (["--exits", "9"], 2, "there is no layer 9"),
        (["--exits", "1", "--untrained-exits", "2"], 2, "exclude each other"),
        (["--task", "translation"], 2, "--task translation"),
        (["--opset", "3"], 2, "opset 3"),
        (["--data", "d.npz"], 2, "--data is for ONNX"),
    ],
)
def test_export_refuses_invalid_arguments(
    bert_checkpoint: Path,
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    run_here: Callable[..., Ran],
) -> None:
    ran = run_here("export", "-m", bert_checkpoint, "-o", tmp_path / "bundle", *arguments)
    assert_clear(ran, code, message)
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_checkpoint_when_it_has_no_exits(
    tmp_path: Path, bert_checkpoint: Path, run_here: Callable[..., Ran]
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(bert_checkpoint, plain)
    for name in ("edgeexit.json", "exits.safetensors"):
        (plain / name).unlink()
    ran = run_here("export", "-m", plain, "-o", tmp_path / "bundle")
    assert_clear(ran, 1, "the checkpoint has no exits")
    assert not (tmp_path / "bundle").exists()


def test_export_refuses_a_folder_that_is_no_bundle_when_told_to_overwrite(
    cli: Cli, torch_model: str
) -> None:
    (cli.folder / "mine").mkdir()
    (cli.folder / "mine/thesis.txt").write_text("ten years of work")
    ran = cli("export", "-m", torch_model, "-o", "mine", "--overwrite")
    assert_clear(ran, 2, "mine is not a bundle")
    assert (cli.folder / "mine/thesis.txt").read_text() == "ten years of work"


def test_a_bug_shows_its_traceback(cli: Cli, torch_model: str) -> None:
    ran = cli("export", "-m", torch_model.replace("make", "broken"), "-o", "bundle")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "TypeError" in ran.err
    assert not (cli.folder / "bundle").exists()


def test_an_error_leaves_stdout_empty_when_json_is_asked_for(cli: Cli, toy_copy: Path) -> None:
    manifest = json.loads((toy_copy / "manifest.json").read_text())
    manifest["format"] = "3.0"
    (toy_copy / "manifest.json").write_text(json.dumps(manifest))
    assert_clear(cli("inspect", toy_copy, "--json"), 1, "the format is 3.0", "Install the edgeexit")


def test_a_prompt_for_a_model_of_one_pass_is_refused(cli: Cli, toy_bundle: Bundle) -> None:
    ran = cli("run", toy_bundle.path, "--prompt", "x")
    assert_clear(ran, 2, "does not write text. Give --data.")


def test_export_says_what_it_needs_where_it_is_not_installed(
    run_here: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from edgeexit.cli import export

    monkeypatch.setattr(export, "NEEDED", ("torch", "not_installed_anywhere"))
    for model in ("checkpoint", "model.onnx"):
        ran = run_here("export", "-m", model, "--exits", "a,b", "-o", tmp_path / "bundle")
        assert_clear(ran, 1, "needs not_installed_anywhere", "edgeexit[export]")
