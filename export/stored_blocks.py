"""Checkpoints whose weights are in 4 or 8 bits already: their integers are kept.

`read_stored` reads GPTQ, AWQ and compressed-tensors, as transformers writes them
(`edgeexit.export.gguf_files`: GGUF). It gives the weights in float32, for the model, and
`StoredRows`, in which the exporter finds the integers of a matrix again. It looks for them by the
content of rows: whatever a model's class does to its rows (joins queries, keys and values, orders
them anew), they are found.

Integers are kept where ``MatMulNBits`` can express them (`edgeexit.bundle.blocks`): blocks of 16 to
256 neighbours in a row, with whole zero points.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from edgeexit.bundle.blocks import BLOCKS, Blocks, packed
from edgeexit.errors import ExportError

logger = logging.getLogger(__name__)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each 4-bit value in an int32 of AWQ's ``gemm`` layout."""
Arrays = Mapping[str, NDArray[Any]]


class Unexpressed(Exception):
    """Why a matrix cannot be kept as it is stored."""


@dataclass
class StoredRows:
    """Rows of matrices that a checkpoint holds in few bits.

    Attributes:
        least: Fewest bits of any.
    """

    least: int = 8
    _matrices: list[Blocks] = field(default_factory=list)
    _rows: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def add(self, blocks: Blocks) -> NDArray[np.float32]:
        """Enters a matrix. Returns it in float32, ``[rows, width]``."""
        weight = blocks.floats()
        for row, digest in enumerate(_digests(weight)):
            self._rows[digest] = len(self._matrices), row
        self._matrices.append(blocks)
        self.least = min(self.least, blocks.bits)
        return weight

    def find(self, weight: NDArray[np.float32]) -> Blocks | None:
        """The integers of a matrix ``[rows, width]``; None: not all of its rows are known, or they
        are stored differently."""
        places = []
        for digest in _digests(weight):
            if (place := self._rows.get(digest)) is None:
                return None
            places.append(place)
        used = sorted({matrix for matrix, _ in places})
        first = self._matrices[used[0]]
        form = (first.bits, first.block, first.width)
        parts = [self._matrices[number] for number in used]
        if any((one.bits, one.block, one.width) != form for one in parts):
            return None
        starts = dict(
            zip(used, itertools.accumulate([0, *(len(p.scales) for p in parts)]), strict=False)
        )
        order = np.array([starts[matrix] + row for matrix, row in places])
        zero: NDArray[np.uint8] | None = None
        if any(one.zero_points is not None for one in parts):
            zero = np.concatenate([_zero_points(one) for one in parts])[order]
        return Blocks(
            np.concatenate([one.numbers for one in parts])[order],
            np.concatenate([one.scales for one in parts])[order],
            zero,
            *form,
        )

    @property
    def matrices(self) -> int:
        """How many matrices there are."""
        return len(self._matrices)


def _digests(weight: NDArray[np.float32]) -> Iterator[bytes]:
    for row in np.ascontiguousarray(weight, np.float32):
        yield hashlib.blake2b(row.data, digest_size=16).digest()


def _zero_points(blocks: Blocks) -> NDArray[np.uint8]:
    if blocks.zero_points is not None:
        return blocks.zero_points
    whole = np.full(blocks.scales.shape, 1 << (blocks.bits - 1), np.uint8)
    return packed(whole, blocks.bits)


@dataclass(frozen=True)
class Matrix:
    """A matrix as it is stored: ``(number - zero point) * scale``.

    Attributes:
        numbers: Unsigned, ``[rows, width]``.
        scales, zero: ``[rows, groups]``; zero points are whole numbers in the range of numbers.
        bits: 4 or 8.
        groups: Group of each column ``[width]``, if not neighbours form groups of one size.
    """

    numbers: NDArray[np.uint8]
    scales: NDArray[Any]
    zero: NDArray[Any]
    bits: int
    groups: NDArray[Any] | None = None

    def floats(self) -> NDArray[np.float32]:
        """The matrix ``[rows, width]`` in float32."""
        width = self.numbers.shape[1]
        size = -(-width // self.scales.shape[1])
        groups = np.arange(width) // size if self.groups is None else self.groups
        shifted = self.numbers.astype(np.float32) - self.zero.astype(np.float32)[:, groups]
        return np.asarray(shifted * self.scales.astype(np.float32)[:, groups], np.float32)

    def blocks(self) -> Blocks:
        """The same as blocks.

        Raises:
            Unexpressed: The groups cannot be divided into blocks.
        """
        rows, width = self.numbers.shape
        group, rest = divmod(width, self.scales.shape[1])
        neighbours = np.arange(width) // max(group, 1)
        if self.groups is not None and not np.array_equal(self.groups, neighbours):
            raise Unexpressed("groups of columns that are no neighbours (desc_act)")
        fitting = [block for block in BLOCKS if group and not group % block]
        if rest or not fitting:
            raise Unexpressed(f"{self.scales.shape[1]} groups in rows of {width}")
        block = fitting[-1]
        scales = np.repeat(self.scales.astype(np.float32), group // block, axis=1)
        zero = np.repeat(self.zero.astype(np.uint8), group // block, axis=1)
        numbers = packed(np.ascontiguousarray(self.numbers), self.bits)
        plain = bool((zero == 1 << (self.bits - 1)).all())
        return Blocks(
            numbers.reshape(rows, width // block, -1),
            scales,
            None if plain else packed(zero, self.bits),
            self.bits,
            block,
            width,
        )


def _spread(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.uint8]:
    """Values of int32 words, from the lowest bits up, along an axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    last = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint32)
    values = (last[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return np.moveaxis(values.reshape(*last.shape[:-1], -1).astype(np.uint8), -1, axis)


def _gptq(stored: Arrays, about: Mapping[str, Any]) -> Matrix:
    """``qweight`` ``[in * bits / 32, out]``, ``qzeros`` ``[groups, out * bits / 32]``, ``scales``
    ``[groups, out]``, and possibly ``g_idx`` ``[in]``, the group of each input."""
    bits = int(about["bits"])
    zero = _spread(stored["qzeros"], bits, 1)
    if about.get("checkpoint_format", "gptq") == "gptq":  # the first format stores one less
        zero = (zero + 1) & np.uint8((1 << bits) - 1)
    numbers = _spread(stored["qweight"], bits, 0).T
    return Matrix(numbers, stored["scales"].T, zero.T, bits, stored.get("g_idx"))


def _awq(stored: Arrays, about: Mapping[str, Any]) -> Matrix:
    """``qweight`` ``[in, out / 8]``, ``qzeros`` ``[groups, out / 8]``, ``scales`` ``[groups,
    out]``; the values of a word are in the order `AWQ_ORDER`."""
    bits, order = int(about["bits"]), np.argsort(AWQ_ORDER)

    def columns(words: NDArray[np.int32]) -> NDArray[np.uint8]:
        values = _spread(words, bits, 1)
        return values.reshape(len(values), -1, len(order))[..., order].reshape(len(values), -1)

    return Matrix(
        columns(stored["qweight"]).T, stored["scales"].T, columns(stored["qzeros"]).T, bits
    )


def _compressed(stored: Arrays, about: Mapping[str, Any]) -> Matrix:
    """``weight_packed`` ``[out, in * bits / 32]`` with ``weight_shape``, or ``weight`` in int8
    ``[out, in]``; ``weight_scale`` ``[out, groups]``; and possibly ``weight_zero_point``, packed
    along the rows. Numbers are signed; packed ones have half of the range added."""
    bits = int(about["bits"])
    half = 1 << (bits - 1)
    if "weight_packed" in stored:
        rows, width = (int(size) for size in stored["weight_shape"])
        numbers = _spread(stored["weight_packed"], bits, 1)[:rows, :width]
    else:
        numbers = (stored["weight"].astype(np.int16) + half).astype(np.uint8)
    scales = stored["weight_scale"].reshape(len(numbers), -1)
    zero: NDArray[Any] = np.full(scales.shape, half)
    if (given := stored.get("weight_zero_point")) is not None:
        signed = given.dtype != np.int32
        zero = given.astype(np.int16) + half if signed else _spread(given, bits, 0)
        zero = zero[: len(numbers)].reshape(scales.shape)
    return Matrix(numbers, scales, zero, bits, stored.get("weight_g_idx"))


@dataclass(frozen=True)
class _Format:
    """How a kind of checkpoint stores a matrix.

    Attributes:
        parts: Last parts of the names of its tensors.
        read: Makes a matrix of them.
    """

    parts: tuple[str, ...]
    read: Callable[[Arrays, Mapping[str, Any]], Matrix]


_FORMATS = {
    "gptq": _Format(("qweight", "qzeros", "scales", "g_idx"), _gptq),
    "awq": _Format(("qweight", "qzeros", "scales"), _awq),
    "compressed-tensors": _Format(
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        _compressed,
    ),
    "int-quantized": _Format(("weight", "weight_scale", "weight_zero_point"), _compressed),
}


def settings_of(path: str | Path, about: Any) -> tuple[str, dict[str, Any]]:
    """The format of a quantised checkpoint and what it needs to know.

    Args:
        path: For messages.
        about: ``quantization_config`` of ``config.json``.

    Raises:
        ExportError: The format is not known.
    """
    about = dict(about) if isinstance(about, Mapping) else {}
    kind = str(about.get("quant_method") or "quantization_config")
    known, why = kind in _FORMATS, ""
    if kind == "compressed-tensors":
        groups = [
            dict(one.get("weights") or {}) for one in (about.get("config_groups") or {}).values()
        ]
        bits = {one.get("num_bits") for one in groups} | {one.get("type") for one in groups}
        layout = about.get("format")
        known = layout in ("pack-quantized", "int-quantized") and bits in ({4, "int"}, {8, "int"})
        why = f" of the format {layout} with {sorted(map(str, bits))}"
        if known:
            about["bits"] = next(iter(bits - {"int"}))
            kind = "int-quantized" if layout == "int-quantized" else kind
    elif known:
        bits_, version = about.get("bits"), about.get("version", "gemm")
        known = bits_ in (4, 8) and (kind != "awq" or (bits_, str(version).lower()) == (4, "gemm"))
        why = f" with {bits_} bits" + (f" in the version {version}" if kind == "awq" else "")
    if not known:
        raise ExportError(
            f"{path}: its weights are already quantised by {kind}{why}, which edgeexit cannot read",
            fix="Give the original checkpoint and --weights int4 or int8; known are GPTQ and "
            "compressed-tensors in 4 or 8 bits, AWQ (gemm) in 4, and GGUF files.",
        )
    return kind, about


def read_stored(
    path: str | Path, folder: Path, about: Any
) -> tuple[dict[str, torch.Tensor], StoredRows]:
    """Reads a quantised checkpoint.

    Args:
        path: For messages.
        folder: Where it is.
        about: As for `settings_of`.

    Returns:
        Weights by name, those that were quantised in float32; and their integers.

    Raises:
        ExportError: The format is not known, or a tensor is missing.
    """
    kind, settings = settings_of(path, about)
    layout = _FORMATS[kind]
    plain: dict[str, torch.Tensor] = {}
    matrices: dict[str, dict[str, NDArray[Any]]] = {}
    for name, tensor in _tensors(folder):
        place, _, part = name.rpartition(".")
        if part not in layout.parts or (part == "weight" and tensor.dtype != torch.int8):
            plain[name] = tensor
        else:
            wide = tensor.float() if tensor.is_floating_point() else tensor
            matrices.setdefault(place, {})[part] = wide.numpy()
    rows, left = StoredRows(), []
    for place, stored in matrices.items():
        try:
            matrix = layout.read(stored, settings)
        except KeyError as error:
            raise ExportError(
                f"{path}: {place} has no tensor {error.args[0]}",
                fix="Download the checkpoint again, or give the original one.",
            ) from error
        try:
            weight = rows.add(matrix.blocks())
        except Unexpressed as error:
            left.append((place, error))
            weight = matrix.floats()
        plain[f"{place}.weight"] = torch.from_numpy(weight)
    if not matrices:
        logger.warning("%s: config.json says %s, but no weight is stored so", path, kind)
    if left:
        logger.warning(
            "%s: %d of %d matrices cannot keep their integers and are quantised anew: %s stores %s",
            path,
            len(left),
            len(matrices),
            *left[0],
        )
    return plain, rows


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                yield name, opened.get_tensor(name)


__all__ = ["Matrix", "StoredRows", "read_stored", "settings_of"]
