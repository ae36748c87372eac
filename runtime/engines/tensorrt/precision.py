"""Types that an engine computes in: from its network, and from the inspector's report on the built
engine.

Networks are strongly typed, so both should agree. `built_otherwise` detects engines that multiply
in float32 although the graph does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from edgeexit.bundle.documents import decode
from edgeexit.runtime.engines.tensorrt.api import INetworkDefinition, TensorRt

Types = dict[str, dict[str, int]]
"""Kind of layer -> type that it computes in -> number of layers."""

PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "ATTENTION_INPUT", "EINSUM")
"""Kinds of layers that multiply; they take most of the time."""

# The inspector's kernel names contain the operation: sm80_xmma_gemm_..., __myl_Fc_...,
# /layer.0/MatMul.
_MULTIPLIES = re.compile(
    r"gemm|conv(?!ert)|mat_?mul|matrixmultiply|mha|(?<![a-z])fc(?![a-z])", re.I
)
_NAMES = [
    ("INT8", re.compile(r"int8", re.I)),
    ("FP8", re.compile(r"fp8|float8", re.I)),
    ("BF16", re.compile(r"bf16|bfloat16", re.I)),
    ("HALF", re.compile(r"half|fp16|float16", re.I)),
    ("FLOAT", re.compile(r"float|fp32", re.I)),
]


class _Information(msgspec.Struct):
    layers: list[Any] = msgspec.field(name="Layers", default_factory=list)


def of_network(trt: TensorRt, network: INetworkDefinition) -> Types:
    """Types of a network's layers. A dequantising layer is fused into the next layer, which
    therefore counts as INT8."""
    network_types: Types = {}
    dequantised: set[str] = set()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        output = layer.get_output(0) if layer.num_outputs else None
        if output is None:
            continue
        if layer.type == trt.LayerType.DEQUANTIZE:
            dequantised.add(output.name)
        dtype = _last(output.dtype)
        first = layer.get_input(0)
        if first is not None and first.name in dequantised:
            dtype = "INT8"
        types = network_types.setdefault(_last(layer.type), {})
        types[dtype] = types.get(dtype, 0) + 1
    return network_types


def _last(member: Any) -> str:
    """The name of an enumeration's member."""
    return str(member).rsplit(".", 1)[-1]


def of_engine(information: str) -> dict[str, int]:
    """Types in which an engine multiplies, from the inspector's report (JSON): type of the first
    input -> number of layers that multiply.

    >>> of_engine('{"Layers": [{"Name": "/q/MatMul", "LayerType": "gemm", '
    ...           '"Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16"}]}]}')
    {'HALF': 1}

    Empty if the report has only names (engines built without detail) or lists the whole graph as
    one layer.

    Raises:
        ValueError: The text is not an inspector's report.
    """
    report = decode(information, _Information)
    counts: dict[str, int] = {}
    for layer in report.layers:
        if not isinstance(layer, Mapping):
            continue
        kernel = (
            f"{layer.get('LayerType', '')} {layer.get('Name', '')} {layer.get('TacticName', '')}"
        )
        inputs = layer.get("Inputs")
        first = inputs[0] if isinstance(inputs, list) and inputs else None
        if not isinstance(first, Mapping) or not _MULTIPLIES.search(kernel):
            continue
        spelt = str(first.get("Datatype") or first.get("Format/Datatype") or "")
        dtype = next((name for name, known in _NAMES if known.search(spelt)), spelt or "unknown")
        counts[dtype] = counts.get(dtype, 0) + 1
    return counts


def products(types: Types) -> dict[str, int]:
    """The layers of a network that multiply: type -> number of layers."""
    counts: dict[str, int] = {}
    for kind in PRODUCTS:
        for dtype, count in types.get(kind, {}).items():
            counts[dtype] = counts.get(dtype, 0) + count
    return counts


def built_otherwise(types: Types, inspected: Mapping[str, int]) -> bool:
    """Whether an engine multiplies in float32 although no product of its network does."""
    wanted = products(types)
    return bool(wanted) and "FLOAT" not in wanted and "FLOAT" in inspected


__all__ = ["Types", "built_otherwise", "of_engine", "of_network", "products"]
