"""examples/cpp is built against the installed ONNX Runtime, and answers like Python.

Its headers are in no Python package: `make headers` fetches them.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeexit.export import export
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import Policy, Rule, load, write_policy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
HEADERS = ROOT / "local" / "onnxruntime" / "include"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
    pytest.mark.skipif(not HEADERS.is_dir(), reason=f"{HEADERS} is missing: make headers"),
]


def place_of(package: str) -> Path:
    """Folder of an installed package."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations is not None, package
    return Path(found.submodule_search_locations[0])


def build(folder: Path) -> None:
    """Builds the program in a folder, against the installed ONNX Runtime."""
    onnxruntime, nlohmann = map(place_of, ("onnxruntime", "nlohmann_json"))
    own = folder / "onnxruntime"
    shutil.rmtree(own, ignore_errors=True)
    (own / "lib").mkdir(parents=True)
    (own / "include").symlink_to(HEADERS)
    [library] = (onnxruntime / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (own / "lib" / name).symlink_to(library)
    options = [f"-DONNXRUNTIME={own}", f"-DJSON_INCLUDE={nlohmann / 'include'}"]
    target = str(folder / "build")
    subprocess.run(["cmake", "-S", str(EXAMPLE), "-B", target, *options], check=True)
    subprocess.run(["cmake", "--build", target], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the program, the digits' bundle, and rows."""
    folder = tmp_path_factory.mktemp("cpp")
    build(folder)
    split = from_pretrained(ROOT / "examples" / "digits" / "checkpoint")
    export(split.split_model(), folder / "digits")
    rows = [sys.executable, str(EXAMPLE / "rows.py"), "validation", str(folder / "rows.npy")]
    subprocess.run(rows, check=True)
    return folder


def run(folder: Path, *more: str, policy: str = "policy.json") -> subprocess.CompletedProcess[str]:
    """The program's output."""
    rows = str(folder / "rows.npy")
    command = [str(folder / "build" / "exits"), str(folder / "digits"), str(folder / policy), rows]
    return subprocess.run([*command, *more], capture_output=True, text=True, check=False)


RULES = {
    "one": Rule(score="max_prob", thresholds=0.95),
    "each": Rule(score="margin", thresholds=[0.999] * 5 + [float("inf")] * 3 + [0.5] * 3),
    "by name": Rule(score="entropy", thresholds={"exit_2": 0.8, "exit_7": float("-inf")}),
    "never": Rule(),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_it_answers_like_python(rule: Rule, folder: Path) -> None:
    write_policy(Policy(rules={"main": rule}), folder / "policy.json")
    ran = run(folder)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    rows = np.load(folder / "rows.npy")
    assert len(lines) == len(rows) == 400
    with load(folder / "digits", policy=folder / "policy.json", threads=1) as model:
        for row, (answer, exit_, score, ms) in zip(rows, lines, strict=True):
            said = model({"pixel_values": row[None]})
            assert [answer, exit_] == [str(said.outputs["logits"].argmax()), said.exit_names[0]]
            assert abs(float(score) - float(said.scores[0])) < 1e-5 and float(ms) > 0


def test_it_says_what_it_does_not_know(folder: Path) -> None:
    write_policy(Policy(rules={"main": Rule(thresholds=0.9, patience=2)}), folder / "p.json")
    ran = run(folder, policy="p.json")
    assert ran.returncode == 1 and "patience is not known" in ran.stderr and not ran.stdout
    ran = run(folder, policy="missing.json")
    assert ran.returncode == 1 and "missing.json cannot be read" in ran.stderr
    assert run(folder, "0").returncode == 1
