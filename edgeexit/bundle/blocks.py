"""Matrices in 4 or 8 bits: each block of a row has a scale, and possibly a zero point.

Layout and arithmetic are those of ONNX Runtime's ``MatMulNBits``: a row is padded to whole blocks,
the first of two 4-bit values is in a byte's lower half, and a value is ``(number - zero point) *
scale`` with unsigned numbers. Tables of embeddings may have the same layout, and share their bytes
with the head (`edgeexit.bundle.manifest.TableBlocks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeexit.bundle.manifest import ITEM_BYTES, Gather

Buffer = Any
"""What ``numpy.frombuffer`` reads."""


BLOCKS = (16, 32, 64, 128, 256)
"""Elements that may share a scale."""
FLOATS = ("float32", "float16")
"""Types of what is looked up in a table in blocks."""


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers ``[..., n]`` of bytes ``[..., n * bits / 8]``.

    >>> unpacked(np.array([[0x21, 0x43]], np.uint8), 4).tolist()
    [[1, 2, 3, 4]]
    """
    if bits == 8:
        return packed
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)


def packed(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Bytes of numbers ``[..., n]``; the reverse of `unpacked`, an odd number is padded with 0.

    >>> packed(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
    return np.asarray(numbers[..., ::2] | (numbers[..., 1::2] << 4), np.uint8)


def dequantised(
    numbers: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    bits: int,
    width: int,
) -> NDArray[np.float32]:
    """Rows of a matrix ``[..., width]``.

    Args:
        numbers: Packed, ``[..., blocks, block * bits / 8]``.
        scales: ``[..., blocks]``.
        zero_points: Packed, ``[..., blocks * bits / 8]``; None: half of the range everywhere.
        bits: 4 or 8.
        width: Elements of a row; the rest of its last block is padding.
    """
    blocks = scales.shape[-1]
    if zero_points is None:
        zero: Any = np.float32(1 << (bits - 1))
    else:
        zero = unpacked(zero_points, bits)[..., :blocks, None].astype(np.float32)
    values = (unpacked(numbers, bits).astype(np.float32) - zero) * scales[..., None]
    return np.asarray(values.reshape(*scales.shape[:-1], -1)[..., :width], np.float32)


@dataclass(frozen=True)
class Table:
    """A table of rows in the weight store.

    Attributes:
        rows: ``[size, width]``; or numbers, packed, ``[size, blocks, block * bits / 8]``.
        scales, zero_points, bits: As for `dequantised`; None: rows are stored as they are.
        width: Elements of a row.
        dtype: Of what `take` gives, if rows are in blocks.
    """

    rows: NDArray[Any]
    width: int
    scales: NDArray[np.float32] | None = None
    zero_points: NDArray[np.uint8] | None = None
    bits: int = 8
    dtype: DTypeLike = np.float32

    @classmethod
    def of(cls, step: Gather, store: Buffer, dtype: np.dtype[Any]) -> Table:
        """The table of a step in the bytes of a weight store; `dtype`: its output's."""
        places = table_parts(step)
        width, blocks = int(step.output.axes[-1] or 0), step.blocks

        def part(name: str, dtype: Any) -> NDArray[Any]:
            offset, size = places[name]
            count = size // np.dtype(dtype).itemsize
            return np.frombuffer(store, dtype, count, offset).reshape(step.size, -1)

        if blocks is None:
            return cls(part("rows", dtype), width)
        return cls(
            part("rows", np.uint8).reshape(step.size, width // blocks.block, -1),
            width,
            part("scales", np.float32),
            part("zero_points", np.uint8) if "zero_points" in places else None,
            blocks.bits,
            dtype,
        )

    def take(self, ids: NDArray[Any], out: Any = None) -> NDArray[Any]:
        """Rows ``[..., width]`` of ids of any shape; `out`: where to write them."""
        if self.scales is None:
            return np.asarray(self.rows.take(ids, axis=0, out=out))
        zero = None if self.zero_points is None else self.zero_points[ids]
        made = dequantised(self.rows[ids], self.scales[ids], zero, self.bits, self.width)
        if out is None:
            return made.astype(self.dtype, copy=False)
        out[...] = made
        return made


def table_parts(step: Gather) -> dict[str, tuple[int, int]]:
    """Parts of a step's table in the weight store: ``rows``, ``scales``, ``zero_points`` -> first
    byte and number of bytes."""
    width, blocks = int(step.output.axes[-1] or 0), step.blocks
    if blocks is None:
        return {"rows": (step.offset, step.size * width * ITEM_BYTES[step.output.dtype])}
    count = width // blocks.block
    parts = {
        "rows": (step.offset, step.size * width * blocks.bits // 8),
        "scales": (blocks.scales, step.size * count * 4),
    }
    if blocks.zero_points is not None:
        parts["zero_points"] = (blocks.zero_points, step.size * -(-count * blocks.bits // 8))
    return parts


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        numbers: Packed, uint8 ``[rows, blocks, block * bits / 8]``.
        scales: float32 ``[rows, blocks]``.
        zero_points: Packed, uint8 ``[rows, blocks * bits / 8]``; None: half of the range.
        bits: 4 or 8.
        block: Elements that share a scale.
        width: Elements of a row.
    """

    numbers: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    bits: int
    block: int
    width: int

    def floats(self) -> NDArray[np.float32]:
        """The matrix ``[rows, width]`` in float32."""
        return dequantised(self.numbers, self.scales, self.zero_points, self.bits, self.width)


__all__ = [
    "BLOCKS",
    "FLOATS",
    "Blocks",
    "Table",
    "dequantised",
    "packed",
    "table_parts",
    "unpacked",
]
