"""GGUF files: models, tokenizers and integers, read with transformers and the package gguf.

transformers gives a model in float32. Of matrices of the types ``Q4_0`` and ``Q8_0`` the integers
are kept (`edgeexit.export.stored_blocks`); other types of few bits have minima, or scales of
scales, which ``MatMulNBits`` cannot express.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import transformers

from edgeexit.errors import ExportError
from edgeexit.export.stored_blocks import Matrix, StoredRows

logger = logging.getLogger(__name__)


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return Path(path).suffix == ".gguf" and Path(path).is_file()


def config_of(file: Path) -> transformers.PretrainedConfig:
    """The configuration of the model in a file."""
    return transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def tokenizer_of(file: Path) -> Path:
    """A folder with the tokenizer of a file, which stays until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="edgeexit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    return folder


def stored_rows(file: Path) -> StoredRows | None:
    """The integers of a file's matrices; None: there are none that can be kept."""
    import gguf

    rows, others = StoredRows(), set()
    kinds = gguf.GGMLQuantizationType
    for tensor in gguf.GGUFReader(str(file)).tensors:
        kind = tensor.tensor_type
        if kind not in (kinds.Q4_0, kinds.Q8_0):
            if kind.name.startswith(("Q", "IQ")):
                others.add(kind.name)
            continue
        width = int(tensor.shape[0])
        count = int(np.prod(tensor.shape[1:]))
        parts = np.asarray(tensor.data, np.uint8).reshape(count, width // 32, -1)
        scales = np.ascontiguousarray(parts[..., :2]).view(np.float16)[..., 0]
        values, bits = parts[..., 2:], 4 if kind == kinds.Q4_0 else 8
        if bits == 4:  # the first half of a block is in the lower halves of its bytes
            numbers = np.concatenate([values & 15, values >> 4], axis=-1)
        else:
            numbers = values ^ np.uint8(128)  # from signed to unsigned
        zero = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        rows.add(Matrix(numbers.reshape(count, width), scales, zero, bits).blocks())
    if others:
        logger.warning(
            "%s: weights of the type %s cannot keep their integers and are read as floats%s",
            file,
            ", ".join(sorted(others)),
            "" if rows.matrices else "; --weights int4 or int8 quantises them anew",
        )
    return rows if rows.matrices else None


def require_gguf(file: Path) -> None:
    """Raises `ExportError` if the package gguf, which transformers needs, is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"{file}: the package gguf is needed to read it", fix="pip install gguf"
        ) from error


__all__ = ["config_of", "is_gguf", "require_gguf", "stored_rows", "tokenizer_of"]
