"""Products with weights in blocks (`edgeexit.bundle.blocks`), as operators of a graph:

- ``MatMulNBits`` of ONNX Runtime, which multiplies the numbers as they are;
- ``DequantizeLinear`` of opset 21 and ``MatMul``, which TensorRT makes one product of.

Both refer to the same bytes of the weight store. TensorRT multiplies signed numbers without zero
points only. So `standard` has unsigned ones whose zero point is half of the range, which become
signed ones when an engine is built (`edgeexit.bundle.onnx_wire.sign_numbers`); and what the real
zero points make of the inputs' means, block by block, is subtracted from the product.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.blocks import Blocks, unpacked

Style = Literal["onnxruntime", "standard"]
REQUIRES: dict[Style, str] = {"onnxruntime": "onnxruntime-operators", "standard": "blocked-weights"}
"""Features that an engine needs."""
DOMAIN, OPSET = "com.microsoft", 21


def replace(model: ir.Model, node: ir.Node, blocks: Blocks, what: str, style: Style) -> None:
    """Replaces a product with a weight, ``MatMul`` or ``Gemm``, in a graph.

    Args:
        model: Its graph has the node.
        node: Multiplies ``[..., width]`` with the weight's ``[rows, width]``, and may add a bias.
        blocks: The weight.
        what: Its name.
        style: Which operators.
    """
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    dtype = source.dtype or ir.DataType.FLOAT
    product = _Product(model.graph, node, dtype, f"{what}/{output.name}")
    if style == "onnxruntime":
        product.multiply_as_they_are(source, blocks)
        model.opset_imports.setdefault(DOMAIN, 1)
    else:
        product.dequantise(source, blocks)
        model.opset_imports[""] = max(model.opset_imports[""], OPSET)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        product.add("Add", [product.last, node.inputs[2]])
    last, name = product.last, output.name or ""
    last.shape = output.shape
    model.graph.insert_before(node, product.nodes)
    ir.convenience.replace_all_uses_with(output, last, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    last.name = name


class _Product:
    """Nodes that replace a product.

    Args:
        graph: Gets the weight's parts.
        node: The product.
        dtype: Of what it reads and gives.
        prefix: Of the names of parts.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, dtype: ir.DataType, prefix: str) -> None:
        self._graph, self._node, self._dtype, self._prefix = graph, node, dtype, prefix
        self.nodes: list[ir.Node] = []

    @property
    def last(self) -> ir.Value:
        """What the last node gives."""
        return self.nodes[-1].outputs[0]

    def add(self, kind: str, inputs: list[ir.Value | None], domain: str = "", **given: Any) -> None:
        """Adds a node."""
        name = f"{self._node.name}/{kind}.{len(self.nodes)}"
        node = ir.node(kind, inputs, given, domain=domain, name=name)
        node.outputs[0].dtype = self._dtype
        self.nodes.append(node)

    def multiply_as_they_are(self, source: ir.Value, blocks: Blocks) -> None:
        """``MatMulNBits``."""
        parts = [self._part("numbers", blocks.numbers), self._scales(blocks)]
        if blocks.zero_points is not None:
            parts.append(self._part("zero_points", blocks.zero_points))
        self.add(
            "MatMulNBits",
            [source, *parts],
            domain=DOMAIN,
            K=blocks.width,
            N=len(blocks.scales),
            bits=blocks.bits,
            block_size=blocks.block,
            accuracy_level=4,
        )

    def dequantise(self, source: ir.Value, blocks: Blocks) -> None:
        """``DequantizeLinear``, ``MatMul``, and what zero points change."""
        count, groups = blocks.scales.shape
        half = 1 << (blocks.bits - 1)
        middle = half * 0x11 if blocks.bits == 4 else half
        numbers = self._numbers("numbers", blocks.numbers, blocks.bits, (count, blocks.width))
        zero = np.full(-(-count * groups * blocks.bits // 8), middle, np.uint8)
        zeros = self._numbers("middle", zero, blocks.bits, (count, groups))
        scales = self._scales(blocks)
        parts: list[ir.Value | None] = [numbers, scales, zeros]
        self.add("DequantizeLinear", parts, axis=1, block_size=blocks.block)
        self.add("Transpose", [self.last], perm=[1, 0])
        self.add("MatMul", [source, self.last])
        if blocks.zero_points is None:
            return
        product = self.last
        above = unpacked(blocks.zero_points, blocks.bits)[:, :groups].astype(np.int16) - half
        self._means(source, groups, blocks.block)
        means = self.last
        # Means instead of sums, which could overflow in float16; the block's size is a scale.
        size = self._part("size", np.array(blocks.block, self._dtype.numpy()))
        self.add("DequantizeLinear", [self._part("above", above.astype(np.int8)), size])
        self.add("Mul", [self.last, scales])
        self.add("Transpose", [self.last], perm=[1, 0])
        self.add("MatMul", [means, self.last])
        self.add("Sub", [product, self.last])

    def _means(self, source: ir.Value, groups: int, block: int) -> None:
        """Means ``[..., groups]`` of neighbouring inputs."""
        self.add("Shape", [source], end=-1)
        self.last.dtype = ir.DataType.INT64
        sizes = self._part("groups", np.array([groups, block], np.int64))
        self.add("Concat", [self.last, sizes], axis=0)
        self.last.dtype = ir.DataType.INT64
        self.add("Reshape", [source, self.last])
        self.add(
            "ReduceMean", [self.last, self._part("axis", np.array([-1], np.int64))], keepdims=0
        )

    def _scales(self, blocks: Blocks) -> ir.Value:
        return self._part("scales", blocks.scales.astype(self._dtype.numpy(), copy=False))

    def _part(self, kind: str, array: NDArray[Any]) -> ir.Value:
        return self._initializer(ir.tensor(array, name=f"{self._prefix}/{kind}"))

    def _numbers(
        self, kind: str, packed: NDArray[np.uint8], bits: int, shape: tuple[int, int]
    ) -> ir.Value:
        name = f"{self._prefix}/{kind}"
        if bits == 8:
            return self._initializer(ir.tensor(packed.reshape(shape), name=name))
        flat = np.ascontiguousarray(packed).reshape(-1)
        return self._initializer(ir.PackedTensor(flat, ir.DataType.UINT4, shape=shape, name=name))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, const_value=tensor)
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        self._graph.register_initializer(value)
        return value


__all__ = ["REQUIRES", "Style", "replace"]
