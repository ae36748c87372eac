"""Cost of a graph's nodes: which are heavy, and which a later segment computes again instead of
receiving their outputs. `edgeexit.export.cut.cut` decides by it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from edgeexit.export.cut.read_onnx import subgraphs

_SMALL_BYTES = 1 << 20
_HEAVY = frozenset({
    "MatMul", "Gemm", "Einsum", "MatMulInteger", "QLinearMatMul", "Conv", "ConvTranspose",
    "ConvInteger", "QLinearConv", "DeformConv", "LSTM", "GRU", "RNN", "Attention",
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization",
    "RMSNormalization", "LpNormalization", "LRN", "AveragePool", "MaxPool", "GlobalAveragePool",
    "GlobalMaxPool", "LpPool", "GlobalLpPool", "Resize", "GridSample", "RoiAlign",
    "NonMaxSuppression", "TopK", "STFT", "DFT",
})  # fmt: skip
_OWN_DOMAINS = ("", "ai.onnx")


class Nature:
    """Sorts the nodes of a graph by cost: constant, cheap, heavy."""

    def __init__(self, graph: ir.Graph) -> None:
        self.inputs: dict[ir.Node, list[ir.Value]] = {}
        self.constant: set[ir.Node] = set()
        self.heavy: set[ir.Node] = set()
        self.cheap: set[ir.Node] = set()
        self._dequantise: set[ir.Node] = set()
        for node in graph:
            taken = self.inputs[node] = _inputs(node)
            standard = node.domain in _OWN_DOMAINS
            makers = [value.producer() for value in taken]
            if all(
                v.is_initializer() or m in self.constant for v, m in zip(taken, makers, strict=True)
            ):
                self.constant.add(node)
                continue
            if standard and node.op_type in ("Shape", "Size"):
                self.cheap.add(node)
                continue
            big = any(_bytes(value) > _SMALL_BYTES for value in self._weights(taken))
            if not standard or big or subgraphs(node) or node.op_type in _HEAVY:
                self.heavy.add(node)
            elif all(maker is None or maker in self.cheap | self.constant for maker in makers):
                self.cheap.add(node)
            elif node.op_type == "DequantizeLinear":
                self._dequantise.add(node)

    def again(self, node: ir.Node) -> bool:
        """Whether a later segment computes this node again instead of receiving its output."""
        return node in self.cheap or node in self.constant or node in self._dequantise

    def _weights(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        """The initializers among values, and those that constant values are computed from."""
        weights, stack, seen = [], list(values), set()
        while stack:
            value = stack.pop()
            if value.is_initializer():
                weights.append(value)
            maker = value.producer()
            if maker in self.constant and maker not in seen:
                seen.add(maker)
                stack += self.inputs[maker]
        return weights


def _inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node, and the outer values that its subgraphs use."""
    inputs = [value for value in node.inputs if value is not None]
    inner_graphs = subgraphs(node)
    if not inner_graphs:
        return inputs
    owned: set[ir.Value] = set()
    used: list[ir.Value] = []
    while inner_graphs:
        graph = inner_graphs.pop()
        owned |= {*graph.inputs, *graph.initializers.values()}
        used.extend(graph.outputs)
        for inner in graph:
            owned |= set(inner.outputs)
            used += [value for value in inner.inputs if value is not None]
            inner_graphs += subgraphs(inner)
    return inputs + [value for value in dict.fromkeys(used) if value not in owned]


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


__all__ = ["Nature"]
