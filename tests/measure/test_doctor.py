"""`doctor` reads what is installed from a Python environment, real ones made here included."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from edgeexit.measure.doctor import EXTRAS, PACKAGES, diagnose

REPORT = """
import json
from edgeexit.measure.doctor import diagnose
found = diagnose()
print(json.dumps([found.packages, found.extras, found.problems]))
"""


def report_with(folder: Path) -> list:
    """What `doctor` says in a process that finds `folder` before everything else."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    asked = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(asked.stdout)


def install(folder: Path, package: str, version: str) -> None:
    """Leaves the metadata of a package, as pip does."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_diagnose_finds_this_environment_when_it_is_whole() -> None:
    found = diagnose()
    assert found.problems == []
    assert "CPUExecutionProvider" in found.providers
    assert found.extras["cpu"]["complete"]
    assert set(found.packages) == set(PACKAGES)
    assert set(found.extras) == set(EXTRAS)
    assert 1 <= found.machine["cores_usable"] <= found.machine["cores"]


def test_doctor_knows_every_extra_and_its_packages() -> None:
    """As the distribution's metadata has them; doctor does not list those of a Jetson."""
    given = importlib.metadata.metadata("edgeexit").get_all("Provides-Extra") or []
    assert set(EXTRAS) == {extra for extra in given if extra not in ("dev", "jetson6", "jetson7")}
    required = [Requirement(one) for one in importlib.metadata.requires("edgeexit") or []]
    for extra, (_, packages) in EXTRAS.items():
        own = {
            requirement.name
            for requirement in required
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        }
        assert set(packages) == own, extra
    assert {"gguf", "peft", "soundfile", "soxr"} <= set(PACKAGES)


def test_diagnose_names_the_clash_when_two_engines_are_installed(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.31.0")
    packages, extras, problems = report_with(tmp_path)
    assert packages["onnxruntime-gpu"] == "1.31.0"
    assert extras["cuda"]["complete"]
    assert len(problems) == 1
    assert "both installed" in problems[0]["what"]
    assert "uninstall -y onnxruntime onnxruntime-gpu" in problems[0]["fix"]


def test_diagnose_names_the_fault_when_the_engine_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text("raise ImportError('libfoo.so is missing')")
    _, _, problems = report_with(tmp_path)
    assert len(problems) == 1
    assert "libfoo.so is missing" in problems[0]["what"]
    assert "--force-reinstall" in problems[0]["fix"]


def test_diagnose_names_the_fault_when_the_engine_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text("")
    _, _, problems = report_with(tmp_path)
    assert "InferenceSession" in problems[0]["what"]
