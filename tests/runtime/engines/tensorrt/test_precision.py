"""What engines compute in, by network and by inspector."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeexit.runtime.engines.tensorrt.precision import built_otherwise, of_engine, products


def told(*layers: tuple[str, str, str] | str, key: str = "Format/Datatype") -> str:
    """What an inspector tells of layers: name, kind, type of the first input; or a name only."""
    found: list[Any] = [
        one if isinstance(one, str)
        else {"Name": one[0], "LayerType": one[1], "Inputs": [{"Name": "x", key: one[2]}]}
        for one in layers
    ]  # fmt: skip
    return json.dumps({"Layers": found, "Bindings": ["x"]})


@pytest.mark.parametrize("spelt, dtype", [
    ("Half", "HALF"), ("Row major linear FP16 format", "HALF"), ("FP32", "FLOAT"),
    ("Float", "FLOAT"),
    ("BFloat16", "BF16"), ("Int8", "INT8"), ("Four wide channel vectorized row major Int8", "INT8"),
    ("FP8", "FP8"), ("E2M1", "E2M1"),
])  # fmt: skip
def test_types_are_read_in_every_spelling(spelt: str, dtype: str) -> None:
    assert of_engine(told(("/layer.0/MatMul", "gemm", spelt))) == {dtype: 1}
    assert of_engine(told(("/layer.0/MatMul", "gemm", spelt), key="Datatype")) == {dtype: 1}


def test_only_layers_that_multiply_count() -> None:
    layers = [
        ("__myl_Fc_myl0_3", "kgen", "Half"),
        ("sm80_xmma_gemm_f16", "CaskGemmMatrixMultiply", "Half"),
        ("__myl_MeanMulSqrt_myl0_4", "kgen", "Float"),
        ("/embeddings/Convert", "Reformat", "Float"),
    ]
    assert of_engine(told(*layers)) == {"HALF": 2}


def test_names_without_detail_say_nothing() -> None:
    assert of_engine(told("/layer.0/MatMul", "{ForeignNode[a...b]}")) == {}
    assert of_engine("{}") == {}


def test_float32_that_the_graph_does_not_ask_for_is_noticed() -> None:
    half = {"MATRIX_MULTIPLY": {"HALF": 8}, "REDUCE": {"FLOAT": 3}, "CONVOLUTION": {"HALF": 1}}
    assert products(half) == {"HALF": 9}
    assert built_otherwise(half, {"HALF": 7, "FLOAT": 1})
    assert not built_otherwise(half, {"HALF": 7})
    assert not built_otherwise(half, {})
    mixed = {"MATRIX_MULTIPLY": {"HALF": 8, "FLOAT": 1}}
    assert not built_otherwise(mixed, {"HALF": 7, "FLOAT": 1})
    assert not built_otherwise({"REDUCE": {"FLOAT": 3}}, {"FLOAT": 1})
