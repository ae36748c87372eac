"""`inspect` tells sizes that follow from the manifest and the files themselves."""

from __future__ import annotations

import pytest

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.measure.inspect import axis_sizes, describe, tensor_bytes


def test_describe_counts_what_crosses_each_boundary(bert_bundle: Bundle) -> None:
    found = describe(bert_bundle, axis_sizes(bert_bundle, {"seq": 10}))
    segments = found["chains"]["main"]["segments"]
    state, mask = 10 * 32 * 4, 10 * 4
    assert [part["boundary_bytes"] for part in segments] == [state + mask] * 3 + [0]
    assert found["axis_sizes"] == {"batch": 1, "seq": 10}
    assert [leave["name"] for part in segments for leave in part["exits"]] == [
        f"exit_{number}" for number in range(1, 5)
    ]
    assert found["labels"] == ["bad", "fair", "good"]
    assert found["weights_bytes"] == (bert_bundle.path / "graphs/weights.bin").stat().st_size


def test_describe_counts_weights_of_each_graph(toy_bundle: Bundle) -> None:
    found = describe(toy_bundle, axis_sizes(toy_bundle))
    segments = found["chains"]["forward"]["segments"]
    assert [part["graphs"][0]["weights_bytes"] for part in segments] == [(36 + 18) * 4] * 4
    assert found["unsplit"][0]["weights_bytes"] == (4 * 36 + 18) * 4


def test_axis_sizes_are_those_of_the_samples_when_none_are_given(bert_bundle: Bundle) -> None:
    assert axis_sizes(bert_bundle) == {"batch": 1, "seq": 32}


@pytest.mark.parametrize(
    "axes,expected", [(["batch", 3], 24), (["batch", None], None), (["batch", "seq"], None)]
)
def test_tensor_bytes_are_unknown_when_an_axis_is(axes: list, expected: int | None) -> None:
    tensor = Tensor(name="t", dtype="float32", axes=axes)
    assert tensor_bytes(tensor, {"batch": 2}) == expected
