"""The data of the codelm example: the Python standard library's own sources.

Files are split into train and test by their names before anything else is done; the tokenizer
learns from the training files only. What this interpreter brings is what is read, so another Python
gives other text: training.json beside a checkpoint says which one it was made with.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

VOCABULARY = 2048
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
"""Folders that are not read: tests, tables, and what was installed beside the library."""

TEST_SHARE = 20
"""One file in so many is for testing."""

END = "<|end|>"
TOKENIZER = Path(__file__).resolve().parent / "checkpoint" / "tokenizer.json"


@functools.cache
def files(split: str) -> tuple[Path, ...]:
    """The files of ``train`` or ``test``, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.intersection(name.parts):
            continue
        number = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:4], "big")
        if (number % TEST_SHARE == 0) == (split == "test"):
            found.append(path)
    return tuple(found)


def texts(split: str) -> list[str]:
    """The sources of a split."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in files(split)]


def train_tokenizer(path: Path) -> None:
    """Trains a byte-level BPE tokenizer on the training files and writes tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts("train"), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def tokens(split: str, tokenizer: Path) -> np.ndarray:
    """All files of a split as one row of token ids, uint16 ``[tokens]``, ends between files."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    end = loaded.token_to_id(END)
    parts = []
    for encoding in loaded.encode_batch(texts(split)):
        parts += [np.array(encoding.ids, np.uint16), np.array([end], np.uint16)]
    return np.concatenate(parts)


def calibration() -> list[list[int]]:
    """Passages that int8 measures the ranges of activations on, and others to compare."""
    return prompts("train", TOKENIZER, 80, seed=1)


def prompts(split: str, tokenizer: Path, count: int, *, seed: int = 0) -> list[list[int]]:
    """Beginnings of passages of a split as token ids: random lines of random files, of 32 to 320
    tokens.

    For ``test``, seed 0 is what figures are made of and no other is used; ``train`` is for choosing
    thresholds.
    """
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    rng = np.random.default_rng(seed)
    sources = texts(split)
    found: list[list[int]] = []
    while len(found) < count:
        lines = sources[rng.integers(len(sources))].splitlines(keepends=True)
        start = int(rng.integers(max(1, len(lines))))
        ids = loaded.encode("".join(lines[start : start + 100])).ids
        length = int(rng.integers(32, 321))
        if len(ids) >= length:
            found.append(ids[:length])
    return found
