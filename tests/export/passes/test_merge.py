"""Merging segments gives the model without exits again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import ExportError
from edgeexit.export.passes.merge import merge
from edgeexit.export.trace.torch_graph import save_graph
from tests.toys import Toy, make_inputs, reference


def _segments(bundle: Bundle) -> list[ir.Model]:
    (chain,) = bundle.manifest.chains.values()
    parts = [bundle.manifest.components[name] for name in chain.components]
    return [ir.load(bundle.path / part.variants[0].graph) for part in parts]


def _answers(bundle: Bundle) -> list[str]:
    """The tensor that holds each exit's logits."""
    (chain,) = bundle.manifest.chains.values()
    return [exit_.outputs["logits"] for exit_ in chain.exits]


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_merge_answers_as_the_exit_does_when_exits_before_it_are_dropped(
    toy: Toy, toy_bundle: Bundle, tmp_path: Path, depth: int
) -> None:
    answer = _answers(toy_bundle)[depth - 1]
    merged = merge(_segments(toy_bundle)[:depth], [answer])
    shutil.copyfile(toy_bundle.path / WEIGHTS, tmp_path / "weights.bin")
    save_graph(merged, str(tmp_path / "merged.onnx"))
    session = onnxruntime.InferenceSession(
        tmp_path / "merged.onnx", providers=["CPUExecutionProvider"]
    )
    inputs = make_inputs(5)
    assert {value.name for value in session.get_inputs()} == set(inputs)
    (found,) = session.run(None, inputs)
    np.testing.assert_allclose(
        found, reference(toy, inputs)[depth - 1]["logits"], rtol=1e-4, atol=1e-5
    )
    single = _segments(toy_bundle)[:depth]
    heads = sum(1 for model in single for node in model.graph if node.op_type == "Softmax")
    assert heads and not any(node.op_type == "Softmax" for node in merged.graph)


def test_merge_keeps_shapes_of_boundaries_only(toy_bundle: Bundle) -> None:
    answer = _answers(toy_bundle)[-1]
    boundaries = {value.name for model in _segments(toy_bundle) for value in model.graph.outputs}
    merged = merge(_segments(toy_bundle), [answer])
    assert [value.name for value in merged.graph.outputs] == [answer]
    made = [value for node in merged.graph for value in node.outputs]
    assert {value.name for value in made if value.shape is not None} <= boundaries
    assert any(value.shape is None for value in made)


def test_merge_names_the_output_when_no_segment_makes_it(toy_bundle: Bundle) -> None:
    with pytest.raises(ExportError, match="no segment gives nothing"):
        merge(_segments(toy_bundle)[:2], ["nothing"])
