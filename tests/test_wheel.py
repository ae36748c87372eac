"""The wheel, where users install it: clean environments of Python 3.10 and 3.12, without torch.

What a wheel needs besides itself is installed once per constraints file and kept in ``local/``; the
wheel under test is built and installed anew each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeexit
from edgeexit.bundle.reader import Bundle
from tests.checkpoints import FAMILIES

pytestmark = pytest.mark.slow
ROOT = Path(edgeexit.__file__).parent.parent
SOURCES = ["edgeexit", "export", "runtime", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
SOURCES += ["MANIFEST.in", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "benchmarks", "examples"]
LINKS = ["edgeexit/export", "edgeexit/runtime"]
ONNX_RUNTIME_OF_JETPACK_6 = "1.23.2"

RUN = """
import importlib.util, json, sys
from pathlib import Path
import numpy as np, onnxruntime
from edgeexit.runtime import Rule, load

def worst(found, expected):
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)))

report = {"onnxruntime": onnxruntime.__version__, "graphs": 0, "differences": {}}
report["heavy"] = [n for n in ("torch", "transformers", "onnx") if importlib.util.find_spec(n)]
for path in map(Path, sys.argv[1:]):
    for graph in sorted(path.glob("graphs/*.onnx")):
        onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        report["graphs"] += 1
    differences = report["differences"][path.name] = []
    with load(path, verify="full") as model, np.load(path / "samples/reference.npz") as sample:
        inputs = {n[6:]: sample[n] for n in sample if n.startswith("input/")}
        trace = model.trace(inputs)
        for leave, outputs, scores in zip(model.exits, trace.outputs, trace.scores):
            for name, value in {**outputs, **scores}.items():
                differences.append(worst(value, sample[f"{leave.name}/{name}"]))
        model.policy = Rule(thresholds=-np.inf)
        assert set(model(inputs).exit_names) == {model.exits[0].name}
    with load(path, unsplit=True) as model:
        last = trace.outputs[-1]["logits"]
        differences.append(worst(model(inputs).outputs["logits"], last))
print(json.dumps(report))
"""


def copy_sources(target: Path, *, links: bool) -> Path:
    """The tree as git gives it: with the links, or with the files it makes where there are none."""
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    for name in LINKS:
        (target / name).unlink()
        if links:
            (target / name).symlink_to(f"../{Path(name).name}")
        else:
            (target / name).write_text(f"../{Path(name).name}")
    return target


def build(source: Path, *kinds: str) -> Path:
    """Builds into ``dist`` with the setuptools that is installed; returns that folder."""
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return source / "dist"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tree with links and the same tree without."""
    folder = tmp_path_factory.mktemp("sources")
    linked = copy_sources(folder / "linked", links=True)
    return linked, copy_sources(folder / "unlinked", links=False)


@pytest.fixture(scope="session")
def dist(sources: tuple[Path, Path]) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    return build(sources[0])


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names if not name.endswith("RECORD")}


def modules() -> set[str]:
    """Every module of the tree, by its place in the package."""
    found = set()
    for top, place in (("edgeexit", ""), ("export", "edgeexit/"), ("runtime", "edgeexit/")):
        for directory, folders, files in os.walk(ROOT / top):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in files:
                path = (Path(directory) / name).relative_to(ROOT).as_posix()
                found.add(f"{place}{path}")
    return found


def test_wheel_holds_every_module_once_and_the_licence(wheel: Path) -> None:
    found = contents(wheel)
    packaged = {name for name in found if ".dist-info/" not in name}
    assert packaged == modules()
    licence = next(name for name in found if name.endswith("licenses/LICENSE"))
    assert found[licence] == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in found[licence]


def test_description_has_no_link_to_a_file_that_is_not_there(wheel: Path) -> None:
    name = next(name for name in contents(wheel) if name.endswith("/METADATA"))
    _, _, description = contents(wheel)[name].decode().partition("\n\n")
    assert description.startswith("# edgeexit")
    assert "docs/decoding.md: " in description  # the text of a link that the README has
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert [one for one in links if not one.startswith(("https://", "#"))] == []


def test_source_distribution_holds_what_the_readme_links_to(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    linked = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert linked
    assert set(linked) - held == set()
    assert not [name for name in held if name.endswith((".safetensors", ".npz"))]


def test_wheel_is_the_same_from_a_tree_in_which_git_made_no_links(
    wheel: Path, sources: tuple[Path, Path]
) -> None:
    (other,) = build(sources[1], "--wheel").glob("*.whl")
    assert contents(other) == contents(wheel)


def interpreter(version: str) -> str | None:
    """An interpreter of that version which can make environments, from PATH or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))
    for one in candidates:
        check = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
        if one is None:
            continue
        done = subprocess.run([one, "-c", check], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return one
    return None


@pytest.fixture(scope="session", params=["3.10", "3.12"])
def clean_python(request: pytest.FixtureRequest, wheel: Path) -> tuple[str, Path]:
    """Python of an environment with the wheel, its dependencies, and the extra ``cpu``; no more."""
    version = request.param
    base = interpreter(version)
    if base is None:
        pytest.skip(f"no Python {version} on this machine")
    metadata = next(data for name, data in contents(wheel).items() if name.endswith("/METADATA"))
    wanted = [line for line in metadata.splitlines() if line.startswith(b"Requires-Dist")]
    wanted.append((ROOT / "constraints.txt").read_bytes())
    name = f"clean-{version}-{hashlib.sha256(b' '.join(wanted)).hexdigest()[:12]}"
    folder = ROOT / "local" / name
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (folder / "ready").exists():
        for old in folder.parent.glob(f"clean-{version}-*"):
            shutil.rmtree(old)
        run([base, "-m", "venv", str(folder)])
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        run([*pip, "install", *constraints, f"edgeexit[cpu] @ {wheel.as_uri()}"])
        (folder / "ready").touch()
    run([*pip, "install", "--no-deps", "--force-reinstall", str(wheel)])
    return version, python


def run(command: list[str], **options: Any) -> str:
    """Runs a command without this environment; returns its standard output."""
    inherited = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, **options
    )
    assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


def test_wheel_runs_bundles_of_every_family_where_torch_is_not_installed(
    clean_python: tuple[str, Path],
    toy_bundle: Bundle,
    family_bundle: Callable[[str], Bundle],
    tmp_path: Path,
) -> None:
    version, python = clean_python
    bundles = [toy_bundle, *(family_bundle(family) for family in FAMILIES)]
    paths = [str(bundle.path) for bundle in bundles]
    report = json.loads(run([str(python), "-c", RUN, *paths], cwd=tmp_path))
    if version == "3.10":
        assert report["onnxruntime"] == ONNX_RUNTIME_OF_JETPACK_6
    assert report["heavy"] == []
    assert report["graphs"] == sum(
        sum(name.endswith(".onnx") for name in bundle.manifest.files) for bundle in bundles
    )
    for path in paths:
        differences = report["differences"][Path(path).name]
        assert len(differences) > 8
        assert max(differences) < 1e-4, path


def test_command_line_of_the_wheel_checks_a_bundle(
    clean_python: tuple[str, Path], toy_bundle: Bundle, tmp_path: Path
) -> None:
    _, python = clean_python
    command = [str(python.parent / "edgeexit"), "check", str(toy_bundle.path), "--json"]
    report = json.loads(run(command, cwd=tmp_path))
    assert report
