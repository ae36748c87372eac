"""Converts a checkpoint's tokenizer to the text preprocessing that the device executes, with a
sample. `edgeexit check` compares the device's result with the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeexit.bundle.manifest import TextPreprocessing
from edgeexit.errors import ExportError
from edgeexit.export.device_tokenizer import make_tokenizer
from edgeexit.export.image_processors import MEND
from edgeexit.export.library_errors import translated

_SAMPLE_TEXTS = (
    "The film was better than anyone had hoped, and I would watch it again tomorrow.",
    "No.",
    "Was it 3.50 or 4? Größe, naïveté, 東京 — and an e-mail to nobody@example.org!",
)
Sample = dict[str, np.ndarray]


def text_preprocessing(
    folder: Path, inputs: Sequence[str], positions: int
) -> tuple[TextPreprocessing, bytes, Sample] | None:
    """From a tokenizer's files; None when the checkpoint has no tokenizer.

    Args:
        folder: The checkpoint.
        inputs: Names of the inputs that the model takes.
        positions: The longest sequence that the model takes.

    Returns:
        The schema, the content of ``tokenizer.json``, and a sample ``{"text",
        "expected/<input>"}`` with padding and truncation.

    Raises:
        ExportError: transformers cannot read it, it pads on the left, or ids on the device would
            differ.
    """
    made = make_tokenizer(folder)
    if made is None:
        return None
    raw, tokenizer = made
    path = folder / "tokenizer.json"
    if tokenizer is None:
        raise _refused(path, "padding and truncation are unknown without transformers' tokenizer")
    if tokenizer.padding_side != "right" or tokenizer.truncation_side != "right":
        raise _refused(path, "padding or truncation on the left is not supported")
    if tokenizer.pad_token_id is None:
        raise _refused(path, "it has no padding token")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise _refused(path.with_name("tokenizer_config.json"), f"model_max_length is {longest!r}")
    schema = TextPreprocessing(
        max_length=int(min(longest, positions)),
        ids="input_ids",
        mask="attention_mask" if "attention_mask" in inputs else None,
        types="token_type_ids" if "token_type_ids" in inputs else None,
        pad_id=int(tokenizer.pad_token_id),
        pad_token=str(tokenizer.pad_token),
    )
    texts = [*_SAMPLE_TEXTS, " ".join([_SAMPLE_TEXTS[0]] * (schema.max_length // 12 + 1))]
    with translated(path, "transformers cannot encode texts with it", MEND):
        encoded = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=schema.max_length,
            return_token_type_ids=schema.types is not None,
            return_tensors="np",
        )
        expected = {f"expected/{name}": np.asarray(encoded[name], np.int64) for name in inputs}
    return schema, raw, {"text": np.array(texts), **expected}


def _refused(path: Path, why: str) -> ExportError:
    return ExportError(f"{path}: {why}", fix=MEND)
