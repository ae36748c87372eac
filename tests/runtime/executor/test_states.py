"""Token states against plain lists of what was appended, whatever they grow through."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.bundle.manifest import TokenState
from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from edgeexit.runtime.executor.states import ALIGNMENT, NewStates, TokenStates, extents

ENGINE = OnnxRuntimeEngine()


@given(st.integers(1, 1 << 20))
def test_every_extent_is_twice_the_one_before_at_least_and_the_last_is_the_capacity(
    capacity: int,
) -> None:
    found = extents(capacity)
    assert found[-1] == capacity and found[0] >= min(capacity, 32)
    assert all(2 * a <= b < 2 * a + 2 for a, b in itertools.pairwise(found))


@st.composite
def token_states(draw: st.DrawFn) -> list[TokenState]:
    """Token states of one form or two."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        heads, size = draw(st.sampled_from([(1, 3), (2, 4)]))
        axes = ["batch", heads, "past", size]
        found.append(
            TokenState(
                name=f"c{number}",
                dtype="float32",
                axes=axes,
                past=f"p{number}",
                present=f"n{number}",
            )
        )
    return found


@given(st.data(), token_states(), st.integers(1, 3), st.integers(40, 300))
def test_what_was_appended_is_there_after_growing(
    data: st.DataObject, states: list[TokenState], batch: int, capacity: int
) -> None:
    held = TokenStates(states, batch, capacity, ENGINE, grows=True)
    random = np.random.default_rng(0)
    expected: dict[tuple[str, int], list[np.ndarray]] = {
        (state.name, row): [] for state in states for row in range(batch)
    }
    for _ in range(data.draw(st.integers(1, 8))):
        room = capacity - held.longest()
        if room < 1:
            break
        new = data.draw(st.integers(1, room))
        made = NewStates(states, batch, new, ENGINE)
        for array in made.arrays:
            array[...] = random.normal(size=array.shape).astype(np.float32)
        counts = [data.draw(st.integers(0, new)) for _ in range(batch)]
        values = _by_name(made, states)
        held.append(made)
        for state in states:
            for row in range(batch):
                grown = expected[state.name, row]
                grown += [values[state.name][row, :, n] for n in range(counts[row])]
        held.advance(counts)
        if data.draw(st.booleans()):
            lengths = [data.draw(st.integers(0, length)) for length in held.lengths]
            held.crop(lengths)
            for (_, row), grown in expected.items():
                del grown[lengths[row] :]
        for (name, row), grown in expected.items():
            assert held.lengths[row] == len(grown) <= held.extent
            if grown:
                there = np.asarray(held.rows(name))[row, :, : len(grown)]
                np.testing.assert_array_equal(there, np.stack(grown, axis=1))


def _by_name(made: NewStates, states: list[TokenState]) -> dict[str, np.ndarray]:
    """What was made, read through the addresses that graphs are given."""
    found = {}
    for state in states:
        place, dtype, shape = made.bound[state.present]
        assert place.pointer % 64 == 0
        for array in made.arrays:
            start = np.asarray(array).ctypes.data
            number, left = divmod(place.pointer - start, array.strides[0])
            if left == 0 and 0 <= number < len(array) and array.shape[1:] == shape:
                found[state.name] = np.array(array[number], dtype)
    return found


def test_states_begin_where_tensorrt_takes_them() -> None:
    """One behind the other, each at a multiple of 256 bytes behind the first."""
    states = [
        TokenState(
            name=n, dtype="float16", axes=["batch", 1, "past", 3], past=f"p{n}", present=f"n{n}"
        )
        for n in "abc"
    ]
    bound = TokenStates(states, 1, 33, ENGINE).past()
    places = [bound[state.past][0].pointer for state in states]
    assert all((place - places[0]) % ALIGNMENT == 0 for place in places)
    assert places == sorted(set(places))


def test_places_that_no_token_takes_take_no_memory() -> None:
    heads, size, capacity = 4, 64, 8192
    axes = ["batch", heads, "past", size]
    state = TokenState(name="keys", dtype="float32", axes=axes, past="p", present="n")
    states = TokenStates([state], 8, capacity, ENGINE)
    whole = 8 * heads * size * capacity * 4
    rows = np.asarray(states.rows("keys"))  # [batch, heads, capacity, size]
    before = resident_bytes()
    rows[:, :, :16] = 1
    assert whole == 1 << 26 and 0 < resident_bytes() - before < whole / 16


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
