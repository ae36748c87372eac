"""Makes the device's tokenizer from a checkpoint: one file for the library tokenizers.

transformers converts older files and changes ``tokenizer.json`` by ``tokenizer_config.json``. The
bundle therefore gets the tokenizer that transformers makes, and both are compared on texts in many
scripts.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers

from edgeexit.errors import BundleError, ExportError, InputError, first_line
from edgeexit.export.library_errors import translated
from edgeexit.preprocessing.texts import read_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
FILES = (
    *(TOKENIZER, "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
"""Files of tokenizers; a checkpoint with a tokenizer has at least one of them."""

_MEND = "Repair the tokenizer's files, or remove them: the bundle then works with token ids."

TEXTS = (
    "The film was better than anyone had hoped, and I would watch it again tomorrow.",
    "NO!!  Two  spaces,\ttabs\nand\r\nlines … “quotes” — dashes; isn't  it?   ",
    " leading and trailing ",
    "Größe, naïveté, ŒUVRE, İstanbul, e\u0301 and \u00e9, \ufb01ne, \u1e9e, Ǆ",
    "東京は夜の七時。 서울의 밤 北京市 你好",
    "Привет, мир! Ёлка Γειά σου Κόσμε",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "🙂👍🏽👩‍👩‍👧 1,234.56 3½ m² a_b camelCase snake_case https://example.org/a?b=c&d",
    "for i in range(10):\n    print(f'{i:>4}')  # 4 spaces\n",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \ufeffmark \u0000\u0007\ufffd",
)
"""Texts for which both tokenizers must give the same ids."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint has a tokenizer in any file format."""
    return any((folder / name).is_file() for name in FILES)


def make_tokenizer(folder: Path) -> tuple[bytes, Any] | None:
    """The content of ``tokenizer.json`` for the device, and the tokenizer of transformers; None if
    the checkpoint has no tokenizer.

    If transformers cannot make the tokenizer but ``tokenizer.json`` exists, the file is used
    unchanged, with a warning, and the second value is None.

    Raises:
        ExportError: The files are damaged, or the two tokenizers give different ids for a text.
    """
    if not has_tokenizer(folder):
        return None
    file = folder / TOKENIZER
    try:
        own = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # many types, for damaged or unsupported files
        reason = f"transformers cannot make its tokenizer ({first_line(error)})"
        if not file.is_file():
            raise ExportError(
                f"{folder}: {reason}",
                fix="Save it as tokenizer.json where it can be read: transformers' AutoTokenizer."
                "from_pretrained(folder).save_pretrained(folder). " + _MEND,
            ) from error
        raw = file.read_bytes()
        _read(folder, raw)
        logger.warning("%s: %s; the file is used unchanged", file, reason)
        return raw, None
    if getattr(own, "backend_tokenizer", None) is None:
        raise _refused(
            folder, f"{type(own).__name__} runs in Python only, which devices do not support"
        )
    with translated(folder, "its tokenizer cannot be used", _MEND):
        raw = own.backend_tokenizer.to_str().encode()
        device = _read(folder, raw)
        for text in TEXTS:
            _compare(folder, text, list(own(text)["input_ids"]), list(device.encode(text).ids))
    return raw, own


def _compare(folder: Path, text: str, expected: list[int], found: list[int]) -> None:
    if expected != found:
        raise _refused(
            folder,
            f"ids on the device would differ for {text[:24]!r} from transformers: {found[:8]}, not "
            f"{expected[:8]}",
        )


def _read(folder: Path, raw: bytes) -> Any:
    try:
        return read_tokenizer(raw, TOKENIZER)
    except (BundleError, InputError) as error:
        raise _refused(folder, error.what) from error


def _refused(folder: Path, why: str) -> ExportError:
    return ExportError(f"{folder}: {why}", fix=_MEND)


__all__ = ["TOKENIZER", "has_tokenizer", "make_tokenizer"]
