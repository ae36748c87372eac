"""Device memory and what it counts, through cuda-bindings, on a driver that needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.errors import EngineError
from edgeexit.runtime.engines.cuda.arrays import plan_copy
from edgeexit.runtime.engines.cuda.device import row_moves
from edgeexit.runtime.engines.cuda.driver import require_fitting
from tests.runtime.engines.cuda import on_host_driver
from tests.runtime.engines.cuda.conftest import RunOnDriver, cases_of


@pytest.mark.parametrize("name", cases_of(on_host_driver))
def test_on_host_driver(name: str, run_on_driver: RunOnDriver) -> None:
    run_on_driver(on_host_driver.__name__, name)


@given(st.data())
def test_moves_keep_rows_in_place_and_no_copy_overlaps_itself(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    rows = np.flatnonzero(
        data.draw(st.lists(st.booleans(), min_size=shape[axis], max_size=shape[axis]))
    )
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    memory = bytearray(values.tobytes())
    for source, target, size in row_moves(2, shape, axis, rows):
        assert target + size <= source
        memory[target : target + size] = memory[source : source + size]
    kept = np.take(values, rows, axis=axis)
    assert bytes(memory[: kept.nbytes]) == kept.tobytes()


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    """An array of int16 of that shape, cut out of a larger one."""
    whole = tuple(size + draw(st.integers(0, 3)) for size in shape)
    values = np.arange(np.prod(whole), dtype=np.int16).reshape(whole)
    starts = [draw(st.integers(0, w - s)) for w, s in zip(whole, shape, strict=True)]
    return values[tuple(slice(a, a + s) for a, s in zip(starts, shape, strict=True))]


@given(st.data())
def test_blocks_copy_every_element_to_its_place(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    source, target = data.draw(views(shape)), data.draw(views(shape))
    moved = {}
    for block in plan_copy(shape, target.strides, source.strides, 2):
        assert block.height == 1 or block.width <= min(block.target_pitch, block.source_pitch)
        for layer in range(block.depth):
            for line in range(block.height):
                to = block.target + (layer * block.target_lines + line) * block.target_pitch
                of = block.source + (layer * block.source_lines + line) * block.source_pitch
                moved |= {to + n: of + n for n in range(0, block.width, 2)}
    for place in np.ndindex(shape):
        to = sum(n * s for n, s in zip(place, target.strides, strict=True))
        of = sum(n * s for n, s in zip(place, source.strides, strict=True))
        assert moved.pop(to) == of
    assert not moved


def test_caches_of_a_row_are_one_copy() -> None:
    """Keys and values of all layers of a segment, one row of a batch of 3, 2 new tokens."""
    whole = np.empty((8, 3, 4, 64, 16), np.float16)
    made = np.empty((8, 3, 4, 2, 16), np.float16)
    target, source = whole[:, 1, :, 10:12], made[:, 1]
    [block] = plan_copy(target.shape, target.strides, source.strides, 2)
    assert (block.width, block.height, block.depth) == (2 * 16 * 2, 4, 8)


@pytest.mark.parametrize("bindings, driver, fits", [
    ("12.6.2", 12060, True), ("12.9.0", 12040, True), ("12.6.2", 13000, True),
    ("13.0.1", 12080, False), ("13.5.0", 13000, True),
])  # fmt: skip
def test_bindings_for_a_newer_driver_are_refused(bindings: str, driver: int, fits: bool) -> None:
    if fits:
        require_fitting(bindings, driver)
        return
    with pytest.raises(EngineError, match=r"supports CUDA 12\.8.*cuda-bindings>=12,<13"):
        require_fitting(bindings, driver)
