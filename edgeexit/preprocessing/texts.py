"""Text preprocessing with tokenizers, which is imported with the first text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import TextPreprocessing
from edgeexit.errors import BundleError, EngineError, InputError

Text = str | tuple[str, str]
"""A text, or a pair of texts."""


def read_tokenizer(raw: bytes, name: str) -> Any:
    """Reads ``tokenizer.json``: a ``tokenizers.Tokenizer`` without truncation and padding.

    Args:
        raw: Content of the file.
        name: Its name in messages.

    Raises:
        EngineError: tokenizers cannot be imported.
        BundleError: tokenizers cannot read the file.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise EngineError(
            f"texts need tokenizers, which cannot be imported ({error})",
            fix='Install it: pip install "edgeexit[text]".',
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # tokenizers also raises bare Exception
        raise BundleError(
            f"{name}: tokenizers {tokenizers.__version__} cannot read it ({error})",
            fix="Install a newer tokenizers, or export again from a checkpoint that it can read.",
        ) from error
    # The file may contain the truncation and padding of the training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def cut_and_pad(tokenizer: Any, preprocessing: TextPreprocessing) -> Any:
    """Makes the tokenizer truncate to the model's maximum length and pad to the longest text of a
    batch."""
    tokenizer.enable_truncation(preprocessing.max_length)
    tokenizer.enable_padding(pad_id=preprocessing.pad_id, pad_token=preprocessing.pad_token)
    return tokenizer


@contextlib.contextmanager
def encoding(what: str) -> Iterator[None]:
    """Turns exceptions of tokenizers, bare Exception included, into an `InputError`."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"the tokenizer cannot encode {what} ({error})",
            fix="Give texts that are valid Unicode.",
        ) from error


def encode_texts(
    tokenizer: Any,
    preprocessing: TextPreprocessing,
    texts: Sequence[Text],
    *,
    cut: bool = True,
    on_cut: Callable[[int, int], object] | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Converts texts to the inputs ``[batch, seq]`` that `TextPreprocessing` names.

    Args:
        tokenizer: From `cut_and_pad`.
        cut: Truncate texts that are longer than the model's limit, as classifiers do.
        on_cut: Called with the row of the first truncated text, and its approximate length in
            tokens.

    Raises:
        InputError: A text is not valid Unicode or has no tokens, or is too long and `cut` is false.
    """
    with encoding(f"one of the texts {str(list(texts))[:60]!a}"):
        encodings = tokenizer.encode_batch(list(texts))
    for row, encoded in enumerate(encodings):
        if not any(encoded.attention_mask):
            raise InputError(
                f"the text of row {row} has no tokens: {texts[row]!a}",
                fix="Give a text that is not empty.",
            )
    if not cut:
        _check_whole(encodings, preprocessing.max_length)
    elif on_cut is not None:
        for row, encoded in enumerate(encodings):
            if encoded.overflowing:
                on_cut(row, _whole_length(encoded))
                break
    columns = {preprocessing.ids: "ids", preprocessing.mask: "attention_mask"}
    columns[preprocessing.types] = "type_ids"
    return {
        name: np.asarray([getattr(encoding, column) for encoding in encodings], np.int64)
        for name, column in columns.items()
        if name is not None
    }


def _check_whole(encodings: Sequence[Any], most: int) -> None:
    for row, encoding in enumerate(encodings):
        if encoding.overflowing:
            raise InputError(
                f"the text of row {row} has about {_whole_length(encoding)} tokens, the model "
                f"reads at most {most}",
                fix="Shorten it.",
            )


def _whole_length(encoding: Any) -> int:
    """Number of tokens of a text before truncation; special tokens may count more than once."""
    return sum(sum(part.attention_mask) for part in (encoding, *encoding.overflowing))


__all__ = ["Text", "cut_and_pad", "encode_texts", "encoding", "read_tokenizer"]
