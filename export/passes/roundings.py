"""Ways to choose the numbers, scales and zero points of a weight in blocks (`METHODS`):

- ``rtn``: rounding to nearest;
- ``hqq``: zero points that lessen the error's norm (half-quadratic quantisation);
- ``k-quant``: scales and zero points of least weighted squared error, as llama.cpp chooses them;
- ``gptq``: scales and zero points of ``k-quant``, but each input's rounding is made up for by those
  behind it (`edgeexit.export.passes.gptq`); it needs data. Products that no data reaches on its way
  through the chains, those of heads and adapters, are rounded as in ``k-quant``.

All but the last's rounding are ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.blocks import Blocks, packed, unpacked
from edgeexit.export.passes.gptq import Grid, round_in_turn
from edgeexit.export.quiet import keep_root_logger

Method = Literal["rtn", "hqq", "k-quant", "gptq"]
METHODS: tuple[Method, ...] = get_args(Method)


def _quantisers_of_onnxruntime() -> Any:
    with keep_root_logger():
        from onnxruntime.quantization import matmul_nbits_quantizer
    return matmul_nbits_quantizer


def _rtn(weight: NDArray[np.float32], bits: int, block: int, symmetric: bool) -> Blocks:
    library = _quantisers_of_onnxruntime()
    config = library.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, bits=bits
    )
    turned = np.ascontiguousarray(weight.T)
    numbers, scales, zero = library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(turned)
    return Blocks(numbers, scales, None if symmetric else zero, bits, block, weight.shape[1])


def _hqq(weight: NDArray[np.float32], bits: int, block: int, symmetric: bool) -> Blocks:
    import torch

    library = _quantisers_of_onnxruntime()
    config = library.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    numbers, scales, zero = library.HQQWeightOnlyQuantizer(config).quantize_internal(
        torch.from_numpy(weight), bits=bits, group_size=block
    )
    return _from_float_zero(numbers.numpy(), scales.numpy(), zero.numpy(), bits, block, weight)


def _from_float_zero(
    numbers: NDArray[Any],
    scales: NDArray[Any],
    zero: NDArray[Any],
    bits: int,
    block: int,
    weight: NDArray[np.float32],
) -> Blocks:
    """Rounds zero points, which ``MatMulNBits`` multiplies much faster as whole numbers, and rounds
    the weight once more with them."""
    most, blocks = (1 << bits) - 1, weight.shape[1] // block
    zero = np.clip(np.rint(zero), 0, most).reshape(-1, blocks).astype(np.uint8)
    scales = scales.reshape(-1, blocks).astype(np.float32)
    parts = weight.reshape(len(weight), blocks, block)
    with np.errstate(divide="ignore", invalid="ignore"):
        again = np.nan_to_num(np.rint(parts / scales[..., None]) + zero[..., None])
    numbers = np.clip(again, 0, most).astype(np.uint8)
    return _made(parts, numbers, scales, zero, bits)


def _made(
    parts: NDArray[np.float32],
    numbers: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero: NDArray[np.uint8],
    bits: int,
) -> Blocks:
    """Blocks of parts of a weight ``[rows, blocks, block]``. Parts whose elements are equal, which
    the quantisers do not heed, get their value as scale."""
    equal = (parts == parts[..., :1]).all(-1)
    numbers[equal], zero[equal], scales[equal] = 1, 0, parts[equal, 0]
    _, blocks, block = parts.shape
    return Blocks(packed(numbers, bits), scales, packed(zero, bits), bits, block, blocks * block)


def _k_quant(weight: NDArray[np.float32], bits: int, block: int, symmetric: bool) -> Blocks:
    from onnxruntime.quantization.neural_compressor import weight_only as library

    with np.errstate(divide="ignore", invalid="ignore"):
        numbers, scales, zero = library.quant_tensor_k_quant_cpu(weight, bits, block)
    blocks = weight.shape[1] // block
    numbers = np.nan_to_num(numbers).astype(np.uint8).reshape(len(weight), blocks, block)
    scales = scales.reshape(-1, blocks).astype(np.float32)
    parts = weight.reshape(len(weight), blocks, block)
    return _made(parts, numbers, scales, zero.reshape(-1, blocks), bits)


def gptq(
    weight: NDArray[np.float32], moments: NDArray[np.float64], bits: int, block: int
) -> Blocks:
    def grid(part: NDArray[np.float32]) -> Grid:
        made = _k_quant(part, bits, block, False)
        assert made.zero_points is not None
        zero = unpacked(made.zero_points, bits)
        return made.scales[:, 0], zero[:, 0].astype(np.float32)

    numbers, scales, zero = round_in_turn(weight, moments, bits, block, grid)
    return Blocks(packed(numbers, bits), scales, packed(zero, bits), bits, block, weight.shape[1])


QUANTISERS: Mapping[str, Callable[[NDArray[np.float32], int, int, bool], Blocks]] = {
    "rtn": _rtn,
    "hqq": _hqq,
    "k-quant": _k_quant,
    "gptq": _k_quant,  # where no data reaches
}


__all__ = ["METHODS", "QUANTISERS", "Method", "gptq"]
