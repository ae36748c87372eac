"""Where new tokens stand: written when it changes, whole or not at all."""

from __future__ import annotations

import pytest

from edgeexit.runtime.engines.host import HostSlot
from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from edgeexit.runtime.executor.places import Places


def read(places: Places, new: int) -> dict[str, list[int]]:
    bound = {"positions": places.positions(new), **places.lengths(["past", "last", "most"])}
    found = {}
    for name, (slot, dtype, shape) in bound.items():
        assert isinstance(slot, HostSlot)
        found[name.removeprefix("lengths/")] = slot.array(dtype, shape).reshape(-1).tolist()
    return found


def test_places_follow_what_the_caches_hold() -> None:
    places = Places(2, 4, OnnxRuntimeEngine())
    places.write(3, [5, 0])
    assert read(places, 3) == {
        "positions": [5, 6, 7, 0, 1, 2],
        "past": [5, 0],
        "last": [7, 2],
        "most": [8],
    }
    places.write(1, [5, 0], [9, 2])
    assert read(places, 1) == {"positions": [9, 2], "past": [5, 0], "last": [5, 0], "most": [6]}


def test_an_interrupted_write_is_made_up_for_by_the_next() -> None:
    places = Places(2, 1, OnnxRuntimeEngine())
    places.write(1, [4, 4])
    before = read(places, 1)
    with pytest.raises(TypeError):
        places.write(1, [9, None])  # type: ignore[list-item]
    places.write(1, [4, 4])
    assert read(places, 1) == before


def test_a_length_said_for_one_row_is_forgotten_by_the_next_write() -> None:
    places = Places(2, 2, OnnxRuntimeEngine())
    places.write(2, [4, 1])
    before = read(places, 2)
    places.write_most(3)
    assert read(places, 2)["most"] == [3]
    places.write(2, [4, 1])
    assert read(places, 2) == before
