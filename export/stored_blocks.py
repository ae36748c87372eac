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
LAYOUTS = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
    "compressed-tensors": ("pack-quantized", "int-quantized"),
}
"""Layouts that can be read; the first is the default."""
UNUSED = ("input_activations", "kv_cache_scheme", "output_activations")
"""Settings of compressed-tensors that are not about weights."""
DTYPES = {
    **dict.fromkeys(("qweight", "qzeros", "weight_packed"), "int32"),
    **dict.fromkeys(("scales", "weight_scale"), "float32"),
}
Arrays = Mapping[str, NDArray[Any]]


class Unexpressed(Exception):
    """Why a matrix cannot be kept as it is stored."""


class Damaged(Exception):
    """Which tensor of a matrix is wrong, and why."""


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


def _spread(words: NDArray[np.int32], bits: int, axis: int, size: int = -1) -> NDArray[np.uint8]:
    """Values of int32 words, from the lowest bits up, along an axis; without padding, if `size`
    values need so many words."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    last = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint32)
    values = (last[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    spread = values.reshape(*last.shape[:-1], -1).astype(np.uint8)
    if last.shape[-1] == -(-size * bits // 32):
        spread = spread[..., :size]
    return np.moveaxis(spread, -1, axis)


def _gptq(stored: Arrays, about: Mapping[str, Any]) -> Matrix:
    """``qweight`` ``[in * bits / 32, out]``, ``qzeros`` ``[groups, out * bits / 32]``, ``scales``
    ``[groups, out]``, and possibly ``g_idx`` ``[in]``, the group of each input."""
    bits = int(about["bits"])
    zero = _spread(stored["qzeros"], bits, 1)
    if about["layout"] == "gptq":  # the first format stores one less
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
    bits, is_packed = int(about["bits"]), about["layout"] == "pack-quantized"
    half = 1 << (bits - 1)
    if is_packed:
        words, shape = stored["weight_packed"], stored["weight_shape"].ravel().tolist()
        numbers = _spread(words, bits, 1, int(shape[-1]))
        if list(numbers.shape) != shape:
            raise Damaged(f"weight_packed {list(words.shape)} does not fit weight_shape {shape}")
    else:
        numbers = (stored["weight"].astype(np.int16) + half).astype(np.uint8)
        if numbers.max() >= 2 * half:
            raise Damaged(f"weight has numbers that need more than {bits} bits")
    scales, given = stored["weight_scale"], stored.get("weight_zero_point")
    zero: NDArray[Any] = np.full(scales.shape, half)
    if given is not None and is_packed and given.dtype == np.int32:
        zero = _spread(given, bits, 0, len(numbers))
    elif given is not None:
        zero = given + np.int16(half)
    return Matrix(numbers, scales, zero, bits, stored.get("weight_g_idx"))


_GPTQ = ("qweight", "scales", "qzeros", "g_idx")
_COMPRESSED = ("weight_scale", "weight_zero_point", "weight_g_idx")
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Arrays, Mapping[str, Any]], Matrix]]] = {
    "gptq": (_GPTQ, _gptq),
    "gptq_v2": (_GPTQ, _gptq),
    "gemm": (_GPTQ[:3], _awq),
    "pack-quantized": (("weight_packed", *_COMPRESSED, "weight_shape"), _compressed),
    "int-quantized": (("weight", *_COMPRESSED), _compressed),
}
"""Layout -> its tensors (numbers, scales, zero points, groups), and what reads a matrix of them."""


def _read(stored: Arrays, about: Mapping[str, Any]) -> Matrix:
    """A matrix. Raises `Damaged` if its tensors do not fit each other."""
    (first, scales, zero, *more), reader = _FORMATS[about["layout"]]
    for part, array in stored.items():
        dtype = DTYPES.get(part, str(array.dtype))
        if part in (first, scales, zero) and (array.dtype != dtype or array.ndim != 2):
            raise Damaged(f"{part} is {array.dtype} {list(array.shape)}, not {dtype} with two axes")
        if not array.size or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            raise Damaged(f"{part} {list(array.shape)} has values that are not finite, or none")
    matrix = reader(stored, about)
    (rows, width), count, size = matrix.numbers.shape, matrix.scales.shape[1], about["group_size"]
    groups, even = matrix.groups, count * min(size or width // count, width) == width
    for part, other, fits in (
        (scales, first, matrix.scales.shape == (rows, count) and (even or groups is not None)),
        (zero, scales, matrix.zero.shape == (rows, count)),
        (more[0] if more else "", first, groups is None or groups.shape == (width,)),
    ):
        if not fits:
            shapes = [f"{name} {list(stored[name].shape)}" for name in (part, other)]
            of = f"{matrix.bits} bits" + (f" and group_size {size}" if size else "")
            raise Damaged(f"{' does not fit '.join(shapes)} with {of}")
    if groups is not None and not np.isin(groups, np.arange(count, dtype=groups.dtype)).all():
        least, most = groups.min(), groups.max()
        raise Damaged(f"{more[0]} names groups {least} to {most}; there are 0 to {count - 1}")
    if not np.isin(matrix.zero, np.arange(1 << matrix.bits)).all():
        raise Damaged(f"{zero} has zero points that are not whole numbers of {matrix.bits} bits")
    return matrix


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
    bits, size, why, known = about.get("bits"), about.get("group_size"), "", False
    if kind == "compressed-tensors":
        groups = [dict(one.get("weights") or {}) for one in _schemes(about)]
        both = {one.get("num_bits") for one in groups} | {one.get("type") for one in groups}
        layout = about.get("format")
        known = layout in LAYOUTS[kind] and both in ({4, "int"}, {8, "int"})
        why = f" of the format {layout} with {sorted(map(str, both))}"
        bits, sizes = next(iter(both - {"int"}), None), {one.get("group_size") for one in groups}
        size = sizes.pop() if len(sizes) == 1 else None
    elif kind in LAYOUTS:
        own = about.get("checkpoint_format") or (kind == "awq" and about.get("version"))
        layout = str(own or about.get("format") or LAYOUTS[kind][0]).lower()
        layout = "marlin" if about.get("is_marlin_format") else layout
        layout = "llm-awq" if about.get("backend") == "llm-awq" else layout
        known = bits in ((4,) if kind == "awq" else (4, 8)) and layout in LAYOUTS[kind]
        why = f" with {bits!r} bits in the {'version' if kind == 'awq' else 'format'} {layout}"
    if not known:
        raise ExportError(
            f"{path}: its weights are already quantised by {kind}{why}, which edgeexit cannot read",
            fix="Give the original checkpoint and --weights int4 or int8; known are GPTQ "
            "(gptq, gptq_v2) and compressed-tensors in 4 or 8 bits, AWQ (gemm) in 4, and GGUF "
            "files.",
        )
    if type(size) is not int or size < 1 or about.get("dynamic"):
        size = None  # rows are one group, or matrices differ
    return kind, about | {"bits": bits, "group_size": size, "layout": layout}


def _schemes(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of groups of matrices."""
    groups = about.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    return [one for one in found if isinstance(one, Mapping)]


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
        ExportError: The format is not known, or a tensor is missing or damaged.
    """
    kind, settings = settings_of(path, about)
    parts, _ = _FORMATS[settings["layout"]]
    plain: dict[str, torch.Tensor] = {}
    matrices: dict[str, dict[str, NDArray[Any]]] = {}
    for name, tensor in _tensors(folder):
        place, _, part = name.rpartition(".")
        if part not in parts or (part == "weight" and tensor.dtype != torch.int8):
            plain[name] = tensor
        else:
            wide = tensor.float() if tensor.is_floating_point() else tensor
            matrices.setdefault(place, {})[part] = wide.numpy()
    given = [settings, *_schemes(settings)]
    if unused := [name for name in UNUSED if any(one.get(name) for one in given)]:
        logger.warning(
            "%s: %s of config.json: ignored, only the quantisation of weights is kept",
            path,
            ", ".join(unused),
        )
    rows, left = StoredRows(), []
    for place, stored in matrices.items():
        try:
            matrix = _read(stored, settings)
        except (KeyError, Damaged) as error:
            missing = f" has no tensor {error.args[0]}"
            raise ExportError(
                f"{path}: {place}{missing if isinstance(error, KeyError) else f'.{error}'}",
                fix="The checkpoint is damaged, or config.json is of another one: download it "
                "again, or give the original one.",
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
