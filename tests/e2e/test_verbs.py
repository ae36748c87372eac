"""Every verb as a user runs it, when all is well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli import VERBS
from edgeexit.runtime import load
from tests.e2e.conftest import Cli
from tests.toys import make_inputs


def test_help_names_every_verb_and_loads_nothing_heavy(cli: Cli) -> None:
    code = (
        "import sys; from edgeexit.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'transformers', 'numpy', 'rich', 'PIL'}\n"
        "print('loaded:', *(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_a_verb_tells_its_options(cli: Cli, verb: str) -> None:
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: edgeexit {verb}")
    assert "--json" in ran.out
    assert "-v, --verbose" in ran.out


def test_version_is_the_packages(cli: Cli) -> None:
    import edgeexit

    assert cli("--version").out == f"edgeexit, version {edgeexit.__version__}\n"


def test_inspect_tells_what_is_in_a_bundle(cli: Cli, bert_bundle: Bundle) -> None:
    shown = cli("inspect", bert_bundle.path)
    assert shown.code == 0
    assert "state_1 float32[batch, seq, 32]" in shown.out
    assert shown.err == ""
    found = cli("inspect", bert_bundle.path, "--axis", "seq=7", "--json").json
    assert found["digest"] == bert_bundle.digest
    boundary = found["chains"]["main"]["components"][0]["boundary"]
    assert sum(tensor["bytes"] for tensor in boundary) == 7 * 33 * 4


def test_check_holds_on_a_fresh_bundle(cli: Cli, vit_bundle: Bundle) -> None:
    shown = cli("check", vit_bundle.path)
    assert (shown.code, shown.err) == (0, "")
    assert "comparisons passed" in shown.out
    found = cli("check", vit_bundle.path, "--json").json
    assert found["passed"]
    assert {"exit_1", "exit_3", "unsplit", "preprocessing"} <= {
        one["where"] for one in found["comparisons"]
    }


def test_trace_calibrate_check_and_run_follow_each_other(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    traced = cli("trace", toy_bundle.path, "--data", toy_data, "-o", "trace.npz", "--json")
    assert traced.code == 0, traced.err
    assert traced.json["rows"] == 40
    assert traced.json["labelled"]
    calibrated = cli("calibrate", "trace.npz", "--max-risk", "20%", "-o", "policy.json", "--json")
    assert calibrated.code == 0, calibrated.err
    about = calibrated.json["calibration"]
    assert about["measured_risk"] <= 0.2
    assert about["uncertified"]
    policy = json.loads((cli.folder / "policy.json").read_text())
    assert policy["bundle"] == toy_bundle.digest
    checked = cli("check", toy_bundle.path, "--policy", "policy.json")
    assert checked.code == 0, checked.err
    ran = cli("run", toy_bundle.path, "--data", toy_data, "--policy", "policy.json", "--json")
    rows = ran.json["rows"]
    taken = [row["exit"] for row in rows]
    shares = {name: taken.count(name) / 40 for name in about["exit_shares"]}
    assert shares == about["exit_shares"]
    with load(toy_bundle) as model:
        whole = model(make_inputs(40)).outputs["logits"].argmax(-1)
    differ = sum(row["class"] != last for row, last in zip(rows, whole, strict=True))
    assert differ / 40 == about["measured_risk"]


def test_calibrate_shows_the_curve_and_marks_its_choice(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    cli("trace", toy_bundle.path, "--data", toy_data, "-o", "trace.npz", "--batch-size", 8)
    shown = cli("calibrate", "trace.npz", "--max-risk", "0.3", "--per-exit", "-o", "policy.json")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert sum(line.endswith("<- common") for line in lines) == 1
    assert any(line.split()[:2] == ["never", "0.00"] for line in lines)
    assert "Measured, not certified." in lines[-1]
    policy = json.loads((cli.folder / "policy.json").read_text())
    thresholds = policy["rules"]["forward"]["thresholds"]
    assert list(thresholds) == ["exit_1", "exit_2", "exit_3"]
    [start] = [n for n, line in enumerate(lines) if line == "chosen: a threshold per exit"]
    for line, (name, threshold) in zip(lines[start + 3 :], thresholds.items(), strict=False):
        said = line.split()[:2]
        assert said[0] == name
        assert said[1] == threshold or float(said[1]) == pytest.approx(threshold, abs=1e-4)
    one = cli("calibrate", "trace.npz", "--max-risk", "0.3", "-o", "one.json", "--plot", "a.svg")
    assert sum(line.endswith("<- chosen") for line in one.out.splitlines()) == 1
    again = cli("calibrate", "trace.npz", "--max-risk", "0.3", "-o", "two.json", "--plot", "a.svg")
    assert again.code == 2 and "a.svg exists. Choose another --plot" in again.err


def test_run_answers_texts_with_their_labels(cli: Cli, bert_bundle: Bundle) -> None:
    ran = cli(
        "run", bert_bundle.path, "--text", "w1 w2", "--text", "w9", "--exit", "exit_2", "--json"
    )
    rows = ran.json["rows"]
    assert [row["exit"] for row in rows] == ["exit_2", "exit_2"]
    assert all(row["answer"] in ("bad", "fair", "good") for row in rows)
    assert len(rows[0]["batch_times_ms"]) == 2


def test_run_answers_an_image_as_the_model_does(cli: Cli, vit_bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(cli.folder / "image.png")
    ran = cli("run", vit_bundle.path, "--image", "image.png", "-v")
    assert ran.code == 0, ran.err
    row = ran.out.splitlines()[-1].split()
    names = ("cat", "dog", "owl")
    assert row[1] in names and row[2] == f"({names.index(row[1])})"
    assert row[3] == "exit_3"
    assert len(row) == 5 + 3


def test_run_stops_at_the_first_exit_when_the_threshold_is_low(
    cli: Cli, toy_bundle: Bundle, toy_data: Path
) -> None:
    ran = cli("run", toy_bundle.path, "--data", toy_data, "--threshold", "0", "--rows", 3, "--json")
    assert [row["exit"] for row in ran.json["rows"]] == ["exit_1"] * 3


def test_nan_never_exits_early_when_run(cli: Cli, toy_bundle: Bundle) -> None:
    inputs = make_inputs(2)
    inputs["x"][0] = np.nan
    np.savez(cli.folder / "nan.npz", **inputs)
    ran = cli("run", toy_bundle.path, "--data", "nan.npz", "--threshold", "-inf", "--json")
    first, second = ran.json["rows"]
    assert (first["exit"], first["score"]) == ("exit_4", None)
    assert second["exit"] == "exit_1"


def test_doctor_tells_what_is_installed(cli: Cli) -> None:
    found = cli("doctor", "--json").json
    assert found["packages"]["onnxruntime"] is not None
    assert found["problems"] == []
    shown = cli("doctor")
    assert shown.code == 0
    assert "CPUExecutionProvider" in shown.out


def test_doctor_fails_with_the_repair_when_the_engine_is_broken(cli: Cli) -> None:
    (cli.folder / "onnxruntime").mkdir()
    (cli.folder / "onnxruntime/__init__.py").write_text("raise ImportError('libfoo.so')")
    cli.environment |= {"PYTHONPATH": str(cli.folder)}
    ran = cli("doctor", "--json")
    assert ran.code == 1
    assert "libfoo.so" in ran.json["problems"][0]["what"]
    assert "fix: python -m pip install --force-reinstall" in ran.err


def test_a_closed_pipe_is_quiet(cli: Cli, toy_bundle: Bundle) -> None:
    process = cli.start("inspect", toy_bundle.path)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize("option", [["-q"], []])
def test_progress_is_not_shown_when_stderr_is_no_terminal(
    cli: Cli, toy_bundle: Bundle, toy_data: Path, option: list[str]
) -> None:
    ran = cli("trace", toy_bundle.path, "--data", toy_data, "-o", "trace.npz", *option)
    assert ran.err == ""
    assert (ran.out == "") == bool(option)


def test_export_reads_a_checkpoint_and_its_exits(cli: Cli, bert_checkpoint: Path) -> None:
    ran = cli(
        *("export", "-m", bert_checkpoint, "--exits", "2", "-o", "bundle", "--name", "mine"),
        *("--task", "text-classification", "--json"),
    )
    assert ran.code == 0, ran.err
    assert ran.err == ""
    bundle = open_bundle(cli.folder / "bundle")
    assert ran.json["digest"] == bundle.digest
    assert ran.json["exits"] == ["exit_2", "exit_4"]
    assert bundle.manifest.name == "mine"
    assert os.listdir(cli.folder) == ["bundle"]
    assert cli("check", "bundle").code == 0


def test_export_reads_a_model_of_the_users_own(cli: Cli, torch_model: str) -> None:
    ran = cli("export", "-m", torch_model, "-o", "bundle", "--dtype", "fp16")
    assert ran.code == 0, ran.err
    bundle = open_bundle(cli.folder / "bundle")
    exits = bundle.manifest.chains["main"].exits
    assert [exit_.name for exit_ in exits] == ["exit_0", "exit_1", "exit_2"]
    assert bundle.manifest.components["unsplit"].variants[0].precision == "float16"
    again = cli("export", "-m", torch_model, "-o", "bundle")
    assert again.code == 2
    assert "bundle exists. Choose another -o, or add --overwrite." in again.err
    assert open_bundle(cli.folder / "bundle").digest == bundle.digest


def test_export_cuts_an_onnx_file_at_its_exits(cli: Cli) -> None:
    random = np.random.default_rng(0)
    shapes = {"W1": (6, 6), "H1": (6, 3), "W2": (6, 6), "H2": (6, 3)}
    weights = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["a"]),
        helper.make_node("Tanh", ["a"], ["h"]),
        helper.make_node("MatMul", ["h", "H1"], ["logits_1"]),
        helper.make_node("MatMul", ["h", "W2"], ["b"]),
        helper.make_node("Tanh", ["b"], ["g"]),
        helper.make_node("MatMul", ["g", "H2"], ["logits"]),
    ]
    x, *answers = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 6), ("logits_1", 3), ("logits", 3))
    )
    graph = helper.make_graph(nodes, "two_exits", [x], answers, weights)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), cli.folder / "m.onnx")
    random_rows = random.normal(size=(3, 6)).astype(np.float32)
    np.savez(cli.folder / "rows.npz", x=random_rows)
    ran = cli(
        *("export", "-m", "m.onnx", "--exits", "logits_1,logits", "--data", "rows.npz"),
        *("-o", "bundle", "--json"),
    )
    assert ran.code == 0, ran.err
    assert ran.json["exits"] == ["logits_1", "logits"]
    assert cli("check", "bundle").code == 0
    with np.load(cli.folder / "bundle/samples/reference.npz") as file:
        assert np.array_equal(file["input/x"], random_rows)
