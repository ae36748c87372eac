"""Weights of 4 bits, in the forms that ONNX Runtime's own quantiser writes, stay what they are."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    QuantFormat,
)

from edgeexit.bundle.reader import WEIGHTS
from edgeexit.export import export_onnx
from edgeexit.export.evaluate import run_graph
from edgeexit.measure.check import check
from edgeexit.runtime import load

EXITS = ["e1", "e2", "e3"]
WIDTH = 256


def quantised(path: Path, form: QuantFormat, *, symmetric: bool) -> Path:
    """Three layers with 4-bit weights and an exit behind each."""
    seed, nodes, weights, state = np.random.default_rng(0), [], [], "x"
    for number in (1, 2, 3):
        for name, columns in ((f"w{number}", WIDTH), (f"v{number}", 3)):
            array = seed.standard_normal((WIDTH, columns)) / WIDTH**0.5
            weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        nodes += [
            helper.make_node("MatMul", [state, f"w{number}"], [f"h{number}"], name=f"m{number}"),
            helper.make_node("Relu", [f"h{number}"], [f"r{number}"], name=f"relu{number}"),
            helper.make_node(
                "MatMul", [f"r{number}", f"v{number}"], [f"e{number}"], name=f"{number}"
            ),
        ]
        state = f"r{number}"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["N", WIDTH])],
        [value(exit_, onnx.TensorProto.FLOAT, ["N", 3]) for exit_ in EXITS],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    config = DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=symmetric, quant_format=form, op_types_to_quantize=("MatMul",)
    )
    logging.disable(logging.INFO)
    try:
        quantiser = MatMulNBitsQuantizer(
            model, nodes_to_exclude=["1", "2", "3"], algo_config=config
        )
        quantiser.process()
    finally:
        logging.disable(logging.NOTSET)
    quantiser.model.save_model_to_file(str(path))
    return path


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_weights_keep_their_4_bits(tmp_path: Path, form: QuantFormat, symmetric: bool) -> None:
    path = quantised(tmp_path / "m.onnx", form, symmetric=symmetric)
    bundle = export_onnx(path, tmp_path / "b", exits=EXITS)
    variants = [c.variants[0] for c in bundle.manifest.components.values()]
    assert {variant.precision for variant in variants} == {"int4"}
    assert bundle.manifest.chains["main"].rows == "independent"
    assert bundle.file(WEIGHTS).stat().st_size < 1.05 * path.stat().st_size
    feeds = {"x": np.random.default_rng(4).standard_normal((5, WIDTH)).astype(np.float32)}
    [expected] = run_graph(path, [feeds])
    with load(bundle, all_scores=True) as model:
        assert all(one.passed for one in check(model).comparisons)
        made = model.trace(feeds).outputs
    for exit_, found in zip(EXITS, made, strict=True):
        largest = np.abs(expected[exit_]).max()
        np.testing.assert_allclose(found["logits"], expected[exit_], atol=0.03 * largest)
