"""The bundle's tokenizer: text to token ids, and new tokens to text while they are generated, with
stop strings (`Stream`).

`edgeexit.runtime.text.chat` converts conversations to text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.preprocessing.texts import Text, cut_and_pad, encode_texts, encoding, read_tokenizer

logger = logging.getLogger(__name__)

HELD_TOKENS = 8
"""Most tokens that wait for the rest of a character. After that, the incomplete text is output."""

PROMPT_TOKENS = 8
"""Last tokens of the prompt that are decoded together with the first new token: only then does the
space between them appear."""

TOKENIZER_LIMIT_BYTES = 1 << 30


def open_tokenizer(bundle: Bundle) -> Any:
    """The bundle's tokenizer, without truncation and padding.

    Raises:
        InputError: The bundle has no tokenizer.
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
    return read_tokenizer(bundle.read(name, limit_bytes=TOKENIZER_LIMIT_BYTES), name)


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises `InputError` if the text is not valid Unicode.

    Args:
        tokenizer: From `open_tokenizer`.
        special_tokens: Add the special tokens that the model expects around a text, such as a start
            token.
    """
    with encoding(f"the text {text[:40]!a}"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special_tokens).ids
    return ids


def encode_batch(
    bundle: Bundle, texts: Sequence[Text], *, truncate: bool = True, tell: bool = False
) -> dict[str, NDArray[Any]]:
    """Applies the bundle's text preprocessing to texts, or pairs of texts: token ids
    ``[batch, seq]`` padded to the longest, masks and token types.

    Args:
        truncate: Truncate texts that are longer than the model's limit, as a classifier does.
        tell: The first time that a text of this bundle is truncated, log a warning.

    Raises:
        InputError: The bundle has no text preprocessing, a text is not valid Unicode, or a text is
            too long and `truncate` is False.
    """
    preprocessing = bundle.manifest.text_preprocessing
    if preprocessing is None:
        takes = "finished inputs" if bundle.manifest.image_preprocessing is None else "images"
        raise InputError(
            f"the bundle has no text preprocessing, it takes {takes}",
            fix=f"Give {takes}, or export a checkpoint that has a tokenizer.",
        )
    # The digest is the cache key, not the path: another bundle may be written to the same path.
    if bundle.digest not in _padding:
        _padding.clear()
        _warned.clear()
        _padding[bundle.digest] = cut_and_pad(open_tokenizer(bundle), preprocessing)
    dtypes = {tensor.name: tensor.dtype for tensor in bundle.manifest.inputs}

    def warn(row: int, length: int) -> None:
        _warned.add(bundle.digest)
        logger.warning(
            "the text %a has about %d tokens, the model reads the first %d: the rest is cut "
            "(further texts are cut without a warning)",
            str(texts[row])[:40],
            length,
            preprocessing.max_length,
        )

    on_cut = warn if tell and bundle.digest not in _warned else None
    tokenizer = _padding[bundle.digest]
    encoded = encode_texts(tokenizer, preprocessing, texts, cut=truncate, on_cut=on_cut)
    return {name: value.astype(dtypes[name], copy=False) for name, value in encoded.items()}


_padding: dict[str, Any] = {}
_warned: set[str] = set()


def special_stops(tokenizer: Any, stops: Sequence[str]) -> dict[str, int]:
    """Stop strings that are special tokens -> their ids. Output text has no special tokens, so
    these are matched by id.

    Raises:
        UsageError: A stop string contains a special token and other text: it would never match.
    """
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    stop_ids = {stop: special[stop] for stop in stops if stop in special}
    for stop in stops:
        if inside := [token for token in special if token in stop and stop not in stop_ids]:
            raise UsageError(
                f"the stop string {stop!r} contains the special token {inside[0]!r}, which does "
                "not appear in output text",
                fix=f"Stop at {inside[0]!r} alone, or at the text before or after it.",
            )
    return stop_ids


class Stream:
    """Converts one row's tokens to text while they are generated.

    Text is held back while its last character is incomplete, or while it could be the start of a
    stop string. The prompt's text followed by the output equals the text of all tokens.

    Args:
        tokenizer: From `open_tokenizer`.
        stops: Strings that end the text. A stop string may be a special token.
        prompt: Tokens of the prompt.
        label: What the text says for a token that is no text, a time; it returns None for others.

    Attributes:
        text: The output so far.
        stopped: Whether a stop string was reached; it and later text are not output.

    Raises:
        UsageError: A stop string contains a special token and other text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        label: Callable[[int], str | None] | None = None,
    ) -> None:
        self._tokenizer, self._label = tokenizer, label
        ends = special_stops(tokenizer, stops)
        self._ends = set(ends.values())
        self._stops = [stop for stop in stops if stop and stop not in ends]
        self._tokens = [int(token) for token in prompt[-PROMPT_TOKENS:]]
        self._start, self._read = 0, len(self._tokens)
        while self._read and self._decode(0, self._read).endswith("\ufffd"):
            self._read -= 1  # the prompt ends within a character
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token. Returns the new text that no later token can change."""
        if token in self._ends:
            given = self.end()
            self.stopped = True
            return given
        if self._label is not None and (label := self._label(token)) is not None:
            self._take_rest()
            self._tokens, self._start, self._read = [], 0, 0
            self._held += label
            return self._release(final=False)
        self._tokens.append(token)
        known = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        if now.endswith("\ufffd") and len(self._tokens) - self._read < HELD_TOKENS:
            return ""
        if now != known:  # else decode the next token together with the earlier ones
            self._held += now[len(known) :]
            self._start = self._read
        self._read = len(self._tokens)
        return self._release(final=False)

    def end(self) -> str:
        """Ends the text. Returns the text that was held back."""
        if not self.stopped:
            self._take_rest()
        return self._release(final=True)

    def _take_rest(self) -> None:
        """Holds the text of the tokens that wait for the rest of a character."""
        if self._read < len(self._tokens):
            known = self._decode(self._start, self._read)
            self._held += self._decode(self._start, len(self._tokens))[len(known) :]
            self._read = len(self._tokens)

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)
        return text

    def _release(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        matches = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if matches:
            self.stopped = True
            given = self._held[: min(matches)]
        else:
            keep = 0 if final else self._beginning()
            given = self._held[: len(self._held) - keep]
        self._held = self._held[len(given) :]
        self.text += given
        return given

    def _beginning(self) -> int:
        """Length of the longest suffix of the held text that is the start of a stop string."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
