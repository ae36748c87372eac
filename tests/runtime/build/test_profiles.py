"""Shapes as users spell them, and the profiles that follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.runtime.build.profiles import (
    Asked,
    Range,
    axis_sizes,
    decode_profiles,
    few_or_many,
    parse_shapes,
    row_buckets,
    shapes_of,
    usual_ranges,
)

NAMES = st.from_regex(r"\A[a-z_][a-z0-9_./]{0,8}\Z")
SHAPES = st.dictionaries(
    NAMES, st.lists(st.integers(1, 9999), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4
)
IDS = Tensor(name="ids", dtype="int64", axes=["batch", "seq"])
IMAGE = Tensor(name="image", dtype="float32", axes=["batch", 3, 8, 8])


@given(SHAPES)
def test_both_spellings_say_the_same(shapes: dict[str, tuple[int, ...]]) -> None:
    trtexec = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    polygraphy = " ".join(f"{name}:{list(shape)}" for name, shape in shapes.items())
    assert parse_shapes(trtexec, "--min-shapes") == shapes
    assert parse_shapes(polygraphy, "--min-shapes") == shapes


@pytest.mark.parametrize(
    "text", ["", "  ", "ids", "ids:", "ids:0x4", "ids:4x", "ids:[]", "ids:4,ids:5", "ids:-1", "1:4"]
)
def test_shapes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max-shapes.*pixel_values"):
        parse_shapes(text, "--max-shapes")


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"mask": (1, 2)}, "no input 'mask'.*takes ids, image"),
        ({"ids": (1, 2, 3)}, "ids has 2 axes, not 3.*batch x seq"),
        ({"image": (1, 3, 8, 9)}, "image is 1x3x8x9, but its axes are batch x 3 x 8 x 8"),
        ({"ids": (1, 2), "image": (2, 3, 8, 8)}, "but batch is 1"),
    ],
)
def test_shapes_that_do_not_fit_the_inputs_are_refused(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        axis_sizes(shapes, [IDS, IMAGE], "--opt-shapes")


def test_axes_go_from_one_over_the_sample_to_what_is_asked(toy_bundle: Bundle) -> None:
    manifest = toy_bundle.manifest
    assert usual_ranges(manifest, Asked({}, {}, {}), {"batch": 4}) == {"batch": Range(1, 1, 8)}
    asked = Asked({"batch": 2}, {}, {"batch": 32})
    assert usual_ranges(manifest, asked, {})["batch"] == Range(2, 2, 32)
    asked = Asked({}, {"batch": 64}, {})
    assert usual_ranges(manifest, asked, {})["batch"] == Range(1, 64, 64)
    with pytest.raises(UsageError, match="not in order"):
        usual_ranges(manifest, Asked({"batch": 9}, {"batch": 4}, {"batch": 16}), {})


@given(st.integers(1, 40), st.integers(0, 60))
def test_every_number_of_rows_has_one_bucket_that_is_tuned_near_it(least: int, more: int) -> None:
    rows = Range(least, least, least + more)
    for buckets in (row_buckets(rows), few_or_many(rows)):
        for count in range(rows.min, rows.max + 1):
            assert sum(one.min <= count <= one.max for one in buckets) == 1
        assert buckets[0].min == rows.min and buckets[-1].max == rows.max
        assert all(one.min <= one.opt <= one.max for one in buckets)
    for one in row_buckets(rows):
        assert one.max <= 2 * one.min
        assert one.opt == (1 if one.min == 1 else one.max)


@given(st.integers(1, 16), st.integers(1, 600), st.integers(2, 4096), st.data())
def test_decoding_has_profiles_that_take_every_run(
    most: int, chunk: int, capacity: int, data: st.DataObject
) -> None:
    chunk = min(chunk, capacity)
    rows = Range(1, 1, most)
    profiles = decode_profiles(rows, few_or_many(rows), chunk, capacity)
    run = {"batch": data.draw(st.integers(1, most)), "new": data.draw(st.integers(1, chunk))}
    assert any(all(p[a].min <= n <= p[a].max for a, n in run.items()) for p in profiles)
    for profile in profiles:
        assert profile["past"].max == capacity
        for one in profile.values():
            assert 1 <= one.min <= one.opt <= one.max


def test_inputs_of_one_shape_need_no_profile() -> None:
    ranges = {"batch": Range(1, 2, 4), "seq": Range(1, 8, 16)}
    found = shapes_of({"ids": ["batch", "seq"], "scale": [1]}, ranges, "segment_0")
    assert found == {"ids": ((1, 1), (2, 8), (4, 16))}
    with pytest.raises(
        UsageError, match=r"segment_0: the bundle gives no limit for the axis \? of h"
    ):
        shapes_of({"h": ["batch", None]}, ranges, "segment_0")
