"""Device memory and what it counts, through cuda-bindings, on a driver that needs no GPU."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.errors import EngineError
from edgeexit.runtime.engines.tensorrt.cuda import row_moves
from edgeexit.runtime.engines.tensorrt.device import require_fitting
from tests.runtime.engines.tensorrt import on_host_driver

HERE = Path(__file__).parent
pytest.importorskip("cuda.bindings")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda that computes on the host."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    made = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([compiler, "-Wall", "-Werror", *made, str(HERE / "driver.c")], check=True)
    return folder


CASES = [
    name
    for name, one in inspect.getmembers(on_host_driver, inspect.isfunction)
    if one.__module__ == on_host_driver.__name__ and not inspect.signature(one).parameters
]


@pytest.mark.parametrize("name", CASES)
def test_on_host_driver(name: str, driver: Path) -> None:
    root = HERE.parents[3]
    done = subprocess.run(
        [sys.executable, "-m", on_host_driver.__name__, name],
        cwd=root,
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@given(st.data())
def test_moves_cover_the_front_without_gap_or_overlap(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    rows = np.flatnonzero(
        data.draw(st.lists(st.booleans(), min_size=shape[axis], max_size=shape[axis]))
    )
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    raw, made, end = values.tobytes(), bytearray(), 0
    for source, target, size in row_moves(2, shape, axis, rows):
        assert target == end and size > 0
        made += raw[source : source + size]
        end += size
    kept = np.take(values, rows, axis=axis)
    assert bytes(made) == (b"" if len(rows) == shape[axis] else kept.tobytes())


@pytest.mark.parametrize("bindings, driver, fits", [
    ("12.6.2", 12060, True), ("12.9.0", 12040, True), ("12.6.2", 13000, True),
    ("13.0.1", 12080, False), ("13.5.0", 13000, True),
])  # fmt: skip
def test_bindings_for_a_newer_driver_are_refused(bindings: str, driver: int, fits: bool) -> None:
    if fits:
        require_fitting(bindings, driver)
        return
    with pytest.raises(EngineError, match=r"speaks CUDA 12\.8.*cuda-bindings>=12,<13"):
        require_fitting(bindings, driver)
