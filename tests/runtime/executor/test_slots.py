"""Slots: tensors take turns in memory and never meet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.bundle.manifest import Tensor
from edgeexit.runtime.engines.host import ALIGNMENT, HostSlot
from edgeexit.runtime.executor.slots import Stage, assign_slots, shape_of

FORMS = [("float32", ["batch", 4]), ("float32", ["batch", None]), ("float16", ["batch", 4])]


def tensor(name: str, form: int = 0) -> Tensor:
    dtype, axes = FORMS[form]
    return Tensor(name=name, dtype=dtype, axes=axes)  # type: ignore[arg-type]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Tensor], list[Stage], set[str]]:
    """A chain in which every component takes any tensors that were made before it."""
    form = st.integers(0, len(FORMS) - 1)
    inputs = [tensor(f"in{n}", draw(form)) for n in range(draw(st.integers(1, 3)))]
    known, stages = list(inputs), []
    for number in range(draw(st.integers(1, 6))):
        taken = draw(st.lists(st.sampled_from(known), unique_by=lambda t: t.name, max_size=4))
        made = [tensor(f"t{number}_{n}", draw(form)) for n in range(draw(st.integers(1, 3)))]
        stages.append(Stage([t.name for t in taken], made))
        known += made
    on_host = draw(st.sets(st.sampled_from([t.name for t in known])))
    return inputs, stages, on_host


def lives(inputs: list[Tensor], stages: list[Stage]) -> dict[str, tuple[int, int]]:
    """First and last stage during which each tensor must be in memory; inputs come before all."""
    found = {one.name: (-1, -1) for one in inputs}
    for number, part in enumerate(stages):
        found |= {one.name: (number, number) for one in part.makes}
        found |= {name: (found[name][0], number) for name in part.takes}
    return found


@given(chains())
def test_tensors_in_one_slot_have_one_form_and_never_live_at_once(
    chain: tuple[list[Tensor], list[Stage], set[str]],
) -> None:
    inputs, stages, on_host = chain
    slots = assign_slots(inputs, stages, on_host)
    made = {one.name: one for part in stages for one in part.makes}
    made |= {one.name: one for one in inputs}
    alive = lives(inputs, stages)
    assert slots.keys() == alive.keys()
    for one in made:
        for other in made:
            if one >= other or slots[one] != slots[other]:
                continue
            assert (made[one].dtype, made[one].axes) == (made[other].dtype, made[other].axes)
            assert (one in on_host) == (other in on_host)
            (from_one, to_one), (from_other, to_other) = alive[one], alive[other]
            assert to_one < from_other or to_other < from_one


@given(chains())
def test_what_a_stage_makes_outlives_the_next_one_that_is_launched_ahead(
    chain: tuple[list[Tensor], list[Stage], set[str]],
) -> None:
    inputs, stages, on_host = chain
    slots = assign_slots(inputs, stages, on_host, ahead=True)
    for part, following in itertools.pairwise(stages):
        made = {slots[one.name] for one in part.makes}
        assert not made & {slots[one.name] for one in following.makes}
    usual = assign_slots(inputs, stages, on_host)
    assert len(set(usual.values())) <= len(set(slots.values()))


def test_a_chain_of_any_length_needs_two_states() -> None:
    parts = [Stage([f"h{n}"], [tensor(f"h{n + 1}")]) for n in range(20)]
    assert len(set(assign_slots([tensor("h0")], parts).values())) == 2


def test_a_tensor_with_an_open_axis_shares_with_none() -> None:
    states = [tensor(f"t{number}", 1) for number in range(6)]
    stages = [Stage([states[number].name], states[number + 1 : number + 2]) for number in range(5)]
    slots = assign_slots(states[:1], stages)
    assert len(set(slots.values())) == len(states)


def test_inputs_never_share_a_slot_even_if_unused() -> None:
    slots = assign_slots([tensor("a"), tensor("b")], [Stage(["a"], [tensor("c")])])
    assert slots["a"] != slots["b"]
    assert slots["c"] != slots["a"]


@pytest.mark.parametrize(
    "axes, sizes, shape",
    [
        (["batch", 4], {"batch": 2}, (2, 4)),
        (["batch", "seq"], {"batch": 2, "seq": 7}, (2, 7)),
        (["batch", None], {"batch": 2}, None),
        (["batch", "seq"], {"batch": 2}, None),
        ([], {}, ()),
    ],
)
def test_shape_follows_from_the_sizes_unless_left_open(
    axes: list[str | int | None], sizes: dict[str, int], shape: tuple[int, ...] | None
) -> None:
    assert shape_of(Tensor(name="t", dtype="float32", axes=axes, row_axis=None), sizes) == shape


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "float16", "int64", "bool"]),
    data=st.data(),
)
def test_keep_rows_leaves_those_rows_at_the_front(
    shape: list[int], dtype: str, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    rows = data.draw(st.sets(st.integers(0, shape[axis] - 1)))
    kept = np.array(sorted(rows), np.intp)
    slot = HostSlot(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    array = slot.array(np.dtype(dtype), tuple(shape))
    array[...] = np.arange(array.size).reshape(shape).astype(dtype)
    expected = np.take(array, kept, axis=axis).copy()
    slot.keep_rows(np.dtype(dtype), tuple(shape), axis, kept)
    np.testing.assert_array_equal(slot.array(np.dtype(dtype), expected.shape), expected)


@given(st.integers(1, 1000))
def test_slots_are_aligned_and_as_large_as_asked(size: int) -> None:
    slot = HostSlot(size)
    assert slot.bytes == size
    assert slot.pointer % ALIGNMENT == 0
    assert slot.array(np.dtype(np.uint8), (size,)).ctypes.data == slot.pointer
