"""Weights in 4 or 8 bits: in products with weights, blocks of weights have scales of their own
(`edgeexit.export.passes.block_products`); everything else stays as it is.

Such a product reads a quarter, or an eighth, of the bytes of float32, which is what a token's time
is spent on. ONNX Runtime rounds activations to 8 bits, block by block, as it computes
(``accuracy_level`` 4), so no ranges of activations are measured; TensorRT multiplies in the type of
activations. `edgeexit.export.passes.roundings` chooses the numbers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.blocks import BLOCKS, Blocks
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.passes.block_products import Style, replace
from edgeexit.export.passes.roundings import METHODS, QUANTISERS, Method, gptq

logger = logging.getLogger(__name__)

BITS = (4, 8)
DEFAULT_BLOCKS = (32, 16)
NARROWEST = 16
"""Products with fewer columns stay as they are: gates, heads with a few classes."""


@dataclass(frozen=True)
class WeightBits:
    """How weights are stored.

    Attributes:
        bits: 4 or 8, of all products with weights but those of `head`.
        head: Bits of exit heads, and of a table of embeddings; 32: they stay in float32. None: as
            `bits`.
        block: Weights that share a scale. None: 32, or 16 where a row is not divided by 32. A
            weight whose rows are not divided by 16 either stays as it is.
        symmetric: Without zero points.
        method: What chooses the numbers.

    Raises:
        UsageError: A setting is not one of those above, or they exclude each other.
    """

    bits: int = 4
    head: int | None = None
    block: int | None = None
    symmetric: bool = False
    method: Method = "k-quant"

    def __post_init__(self) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "bits": BITS,
            "head": (None, *BITS, 32),
            "block": (None, *BLOCKS),
            "method": METHODS,
        }
        for name, choices in known.items():
            if (given := getattr(self, name)) not in choices or isinstance(given, bool):
                listed = ", ".join(str(one) for one in choices if one is not None)
                raise UsageError(f"weights: {name} is {given!r}", fix=f"Use one of {listed}.")
        if self.symmetric and self.method != "rtn":
            raise UsageError(
                f"weights: {self.method} chooses zero points, so it is not symmetric",
                fix="Use the method rtn, or leave symmetric out.",
            )

    def block_of(self, width: int) -> int | None:
        """Block of a row of that width; None: it is not quantised.

        Raises:
            ExportError: Another block than the given one would divide it.
        """
        if self.block is None or width % BLOCKS[0]:
            return next((block for block in DEFAULT_BLOCKS if not width % block), None)
        if width % self.block:
            smaller = max(block for block in BLOCKS if not width % block)
            raise ExportError(
                f"weights: rows of {width} cannot be divided into blocks of {self.block}",
                fix=f"Use blocks of {smaller}, or leave their size out.",
            )
        return self.block

    @property
    def head_bits(self) -> int | None:
        """Bits of heads; None: float32."""
        bits = self.bits if self.head is None else self.head
        return None if bits == 32 else bits


@dataclass
class Quantiser:
    """Quantises weights, each once, however many graphs have it.

    Attributes:
        settings: How.
        stored: Finds a matrix ``[rows, width]`` that the checkpoint holds in blocks already; these
            are kept.
        lenient: Other weights whose rows cannot be divided into blocks stay in float32.
        known: Digest of a weight and its bits -> its blocks.
        rows: Digest of a row and its bits -> its numbers, scales and zero points, of what was
            measured: one graph may have queries, keys and values apart, another one joined.
        left: Widths of weights that no block divides, which stay as they are.
    """

    settings: WeightBits
    stored: Callable[[NDArray[np.float32]], Blocks | None] = lambda weight: None
    lenient: bool = False
    known: dict[tuple[bytes, int], Blocks] = field(default_factory=dict)
    rows: dict[tuple[bytes, int], tuple[NDArray[Any], ...]] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)

    def takes(self, weight: NDArray[np.float32]) -> bool:
        """Whether a matrix ``[rows, width]`` is to be quantised."""
        width, settings = weight.shape[1], self.settings
        fits = not self._leaves(width) and settings.block_of(width) is not None
        if fits or self.stored(weight) is not None:
            return True
        if width not in self.left:
            self.left.add(width)
            logger.warning("weights with rows of %d stay as they are: no block divides them", width)
        return False

    def _leaves(self, width: int) -> bool:
        block = self.settings.block
        return self.lenient and block is not None and width % block != 0

    def knows(self, weight: NDArray[np.float32], bits: int) -> bool:
        """Whether its blocks need no data: they were made before, or the checkpoint has them."""
        if (_digest(weight), bits) in self.known or self.stored(weight) is not None:
            return True
        return all((_digest(row), bits) in self.rows for row in weight)

    def blocks(
        self,
        weight: NDArray[np.float32],
        bits: int,
        what: str,
        moments: NDArray[np.float64] | None = None,
    ) -> Blocks:
        """Blocks of a matrix ``[rows, width]``, whose rows are quantised independently.

        Args:
            what: The weight, for messages.
            moments: Second moments of a product's inputs ``[width, width]``, for ``gptq``.

        Raises:
            ExportError: Its rows cannot be divided into blocks.
        """
        key = _digest(weight), bits
        if key in self.known:
            return self.known[key]
        if (held := self.stored(weight)) is not None:
            self.known[key] = held
            return held
        block = self.settings.block_of(weight.shape[1])
        if block is None:
            raise ExportError(
                f"{what}: its rows of {weight.shape[1]} cannot be divided into blocks",
                fix="Use weights in float32.",
            )
        if self.rows and self.knows(weight, bits):
            own = zip(*(self.rows[_digest(row), bits] for row in weight), strict=True)
            numbers, scales, zero = map(np.stack, own)
            found = Blocks(numbers, scales, zero, bits, block, weight.shape[1])
        elif moments is not None:
            found = gptq(weight, moments, bits, block)
            assert found.zero_points is not None
            made = zip(found.numbers, found.scales, found.zero_points, strict=True)
            self.rows |= {(_digest(row), bits): own for row, own in zip(weight, made, strict=True)}
        else:
            method = QUANTISERS[self.settings.method]
            found = method(weight, bits, block, self.settings.symmetric)
        self.known[key] = found
        return found


def _digest(weight: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(weight).data).digest()


BitsOf = Callable[[ir.Node], "int | None"]
"""Bits of the weights of a product; None: it stays as it is."""


def measured_inputs(model: ir.Model, quantiser: Quantiser, bits_of: BitsOf) -> list[ir.Value]:
    """What products of a graph read whose blocks are not known yet."""
    read = [
        node.inputs[0]
        for node, weight, bits in _products(model, quantiser, bits_of)
        if not quantiser.knows(weight, bits)
    ]
    return [value for value in read if value is not None]


def _products(
    model: ir.Model, quantiser: Quantiser, bits_of: BitsOf
) -> Iterator[tuple[ir.Node, NDArray[np.float32], int]]:
    """Products that are to be replaced, their weights ``[rows, width]`` and bits."""
    for node in list(model.graph):
        weight = _weight_of(node)
        bits = None if weight is None or len(weight) < NARROWEST else bits_of(node)
        if weight is not None and bits is not None and quantiser.takes(weight):
            yield node, weight, bits


def rewrite(
    model: ir.Model,
    quantiser: Quantiser,
    bits_of: BitsOf,
    moments: Mapping[str, NDArray[np.float64]] | None = None,
    style: Style = "onnxruntime",
) -> int:
    """Replaces products with weights in a graph, in place.

    Args:
        model: Float32 or float16.
        quantiser: Gives the blocks.
        bits_of: Which, and how.
        moments: Tensor -> its second moments, for products that read it (``gptq``).
        style: The operators that take the products' place.

    Returns:
        How many products were replaced.

    Raises:
        ExportError: A weight cannot be divided into blocks.
    """
    replaced = 0
    for node, weight, bits in _products(model, quantiser, bits_of):
        source, operand = node.inputs[0], node.inputs[1]
        assert source is not None and operand is not None
        what = operand.name or node.op_type
        known = (moments or {}).get(str(source.name))
        replace(model, node, quantiser.blocks(weight, bits, what, known), what, style)
        replaced += 1
    if replaced:
        _remove_unused(model)
    return replaced


def _weight_of(node: ir.Node) -> NDArray[np.float32] | None:
    """The weight ``[columns, inputs]`` of a product; None: it has none, or is no plain product."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = _constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or weight.dtype not in (np.float32, np.float16):
        return None
    weight = weight.astype(np.float32, copy=False)
    if node.op_type == "MatMul":
        return np.ascontiguousarray(weight.T)
    attributes = {name: one.value for name, one in node.attributes.items()}
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    if attributes.get("transA", 0) or not plain:
        return None
    return weight if attributes.get("transB", 0) else np.ascontiguousarray(weight.T)


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """A value that no input changes: an initializer, or initializers that are joined (queries, keys
    and values)."""
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input():
        return None if value.const_value is None else value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Concat":
        return None
    parts = [_constant(one) for one in node.inputs]
    known = [part for part in parts if part is not None]
    return (
        np.concatenate(known, node.attributes["axis"].value) if len(known) == len(parts) else None
    )


def _remove_unused(model: ir.Model) -> None:
    """Removes weights, and what joined them, that nothing reads any more."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)


__all__ = [
    "BITS",
    "METHODS",
    "Quantiser",
    "WeightBits",
    "measured_inputs",
    "rewrite",
]
