"""The driver that computes on the host, and processes that use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("cuda.bindings")
RunOnDriver = Callable[..., None]


@pytest.fixture(scope="session")
def run_on_driver(tmp_path_factory: pytest.TempPathFactory) -> RunOnDriver:
    """``run(module, *arguments)``: runs a module in a process whose CUDA driver is driver.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    made = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([compiler, "-Wall", "-Werror", *made, str(HERE / "driver.c")], check=True)

    def run(module: str, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=HERE.parents[3],
            env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


def cases_of(module: object) -> list[str]:
    """Names of the public functions that a module defines itself."""
    return [
        name
        for name, one in vars(module).items()
        if callable(one)
        and not isinstance(one, type)
        and not name.startswith("_")
        and getattr(one, "__module__", "") == getattr(module, "__name__", None)
    ]
