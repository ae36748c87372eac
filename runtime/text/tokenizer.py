"""Text in and out of a decoder: the bundle's tokenizer, pieces while they come, stop strings.

How a conversation becomes a text is in `edgeexit.runtime.text.chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError, EngineError, InputError

HELD_TOKENS = 8
"""Tokens that may wait for the rest of a character; then what they give is given out, broken."""

TOKENIZER_LIMIT_BYTES = 1 << 30


def open_tokenizer(bundle: Bundle) -> Any:
    """The bundle's tokenizer, which neither cuts nor pads.

    Raises:
        InputError: The bundle has none.
        EngineError: The library cannot be imported.
        BundleError: The file is damaged, or the library cannot read it.
    """
    name = bundle.manifest.tokenizer
    if name is None:
        raise InputError(
            f"{bundle.path}: the bundle has no tokenizer",
            fix="Export a checkpoint that has tokenizer.json, or give token ids from Python: "
            "generate([[1, 2, 3]]).",
        )
    try:
        import tokenizers
    except ImportError as error:
        raise EngineError(
            f"texts need tokenizers, which cannot be imported ({error})",
            fix='Install it: pip install "edgeexit[text]".',
        ) from error
    raw = bundle.read(name, limit_bytes=TOKENIZER_LIMIT_BYTES)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # tokenizers raises bare Exception, too
        raise BundleError(
            f"{name}: tokenizers {tokenizers.__version__} cannot read it ({error})",
            fix="Install a newer tokenizers, or export again from a checkpoint that it can read.",
        ) from error
    # A checkpoint's file may carry what its training cut and padded to.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises `InputError` for one that is not Unicode.

    Args:
        tokenizer: From `open_tokenizer`.
        special_tokens: Add those that the model expects around a text (a first one, say).
    """
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special_tokens).ids
    except Exception as error:  # bare here, too
        raise InputError(
            f"the tokenizer cannot encode the text {text[:40]!a} ({error})",
            fix="Give text that is valid Unicode.",
        ) from error
    return ids


def encode_batch(
    bundle: Bundle, texts: Sequence[str | tuple[str, str]], *, truncate: bool = True
) -> dict[str, NDArray[Any]]:
    """Texts, or pairs of them, to what the bundle's text preprocessing makes of them: token ids
    ``[batch, seq]`` padded to the longest, masks, types.

    Args:
        truncate: Cut what is longer than the model takes, as a classifier's own preprocessing does.

    Raises:
        InputError: The bundle has no text preprocessing, a text is not Unicode, or it is longer
            than the model takes and not to be cut.
    """
    preprocessing = bundle.manifest.preprocessing
    if not isinstance(preprocessing, TextPreprocessing):
        raise InputError(
            "the bundle has no text preprocessing",
            fix="Give the inputs as .npz, or export from a checkpoint with tokenizer.json.",
        )
    tokenizer = _padding_tokenizer(bundle, preprocessing)
    try:
        encodings = tokenizer.encode_batch(list(texts))
    except Exception as error:  # bare here, too
        raise InputError(
            f"the tokenizer cannot encode one of the texts {str(list(texts))[:60]!a} ({error})",
            fix="Give texts that are valid Unicode.",
        ) from error
    if not truncate:
        _check_whole(encodings, preprocessing.max_length)
    columns = {preprocessing.ids: "ids", preprocessing.mask: "attention_mask"}
    columns[preprocessing.types] = "type_ids"
    dtypes = {tensor.name: tensor.dtype for tensor in bundle.manifest.inputs}
    return {
        name: np.asarray([getattr(encoding, column) for encoding in encodings], dtypes[name])
        for name, column in columns.items()
        if name is not None
    }


def _check_whole(encodings: Sequence[Any], most: int) -> None:
    for row, encoding in enumerate(encodings):
        if over := sum(len(rest.ids) for rest in encoding.overflowing):
            raise InputError(
                f"the text of row {row} has about {len(encoding.ids) + over} tokens, the model "
                f"reads at most {most}",
                fix="Shorten it.",
            )


def _padding_tokenizer(bundle: Bundle, preprocessing: TextPreprocessing) -> Any:
    # Its own files are the cache key: a bundle never changes, a path may come to hold another.
    key = (bundle.digest, preprocessing.max_length)
    if key not in _padding:
        tokenizer = open_tokenizer(bundle)
        tokenizer.enable_truncation(preprocessing.max_length)
        tokenizer.enable_padding(pad_id=preprocessing.pad_id, pad_token=preprocessing.pad_token)
        _padding.clear()
        _padding[key] = tokenizer
    return _padding[key]


_padding: dict[tuple[str, int], Any] = {}


class Stream:
    """Turns one row's tokens into text as they come.

    Text is held back while its last character is incomplete, or while it could be the beginning of
    a stop string.

    Attributes:
        text: All that was given out so far.
        stopped: Whether a stop string came; nothing from it on is given out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token. Returns the text that is certain by now."""
        self._tokens.append(token)
        known = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        if now.endswith("\ufffd") and len(self._tokens) - self._read < HELD_TOKENS:
            return ""
        self._held += now[len(known) :]
        self._start, self._read = self._read, len(self._tokens)
        return self._release(final=False)

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        if not self.stopped and self._read < len(self._tokens):
            known = self._decode(self._start, self._read)
            self._held += self._decode(self._start, len(self._tokens))[len(known) :]
            self._read = len(self._tokens)
        return self._release(final=True)

    def _decode(self, start: int, stop: int) -> str:
        made: str = self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)
        return made

    def _release(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            given = self._held[: min(found)]
        else:
            keep = 0 if final else self._beginning()
            given = self._held[: len(self._held) - keep]
        self._held = self._held[len(given) :]
        self.text += given
        return given

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
