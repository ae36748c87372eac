"""The oldest supported transformers, laid over the installed one: the families' parity tests and
trainings again.

The packages are kept in ``local/`` and fetched once per list of versions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PINS = Path(__file__).parent / "oldest-transformers.txt"
ROOT = Path(__file__).parent.parent.parent
PARITY = (
    "trunk_equals or (padding and not cosine) or (every_family and t5) "
    "or ((survive or bundle_equals) and vit)"
)
TESTS = ["tests/export/test_models.py", "tests/export/test_encoder_decoder.py"]


@pytest.fixture(scope="module")
def oldest() -> Path:
    """A folder of packages to put first on the path."""
    name = f"oldest-{hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]}"
    folder = ROOT / "local" / name
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--target", str(partial), "--requirement", str(PINS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        partial.rename(folder)
    return folder


def test_families_equal_transformers_when_it_is_the_oldest_supported(oldest: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(oldest), "TOKENIZERS_PARALLELISM": "false"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True)
    assert f"transformers=={found.stdout.strip()}" in PINS.read_text().splitlines()
    tests = ["-k", PARITY, *TESTS]
    _run(environment, tests)


def test_trainings_work_when_transformers_is_the_oldest_supported(oldest: Path) -> None:
    path = f"{oldest}{os.pathsep}{ROOT}"  # processes that torchrun starts look there, too
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    tests = [f"tests/export/test_{name}.py" for name in ("methods", "layerskip", "training")]
    _run(environment, tests)


def _run(environment: dict[str, str], tests: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    command += ["--override-ini=filterwarnings=default", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
