"""Text in and out of a decoder: the bundle's tokenizer, pieces while they come, stop strings.

How a conversation becomes a text is in `edgeexit.runtime.text.chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from edgeexit.bundle.manifest import ImagePreprocessing, TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.preprocessing.texts import Text, cut_and_pad, encode_texts, encoding, read_tokenizer

HELD_TOKENS = 8
"""Tokens that may wait for the rest of a character; then what they give is given out, broken."""

PROMPT_TOKENS = 8
"""Tokens of a prompt behind which the first new one is made text of: a space between them shows
there only."""

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
    return read_tokenizer(bundle.read(name, limit_bytes=TOKENIZER_LIMIT_BYTES), name)


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises `InputError` for one that is not Unicode.

    Args:
        tokenizer: From `open_tokenizer`.
        special_tokens: Add those that the model expects around a text (a first one, say).
    """
    with encoding(f"the text {text[:40]!a}"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special_tokens).ids
    return ids


def encode_batch(
    bundle: Bundle, texts: Sequence[Text], *, truncate: bool = True
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
        takes = "images" if isinstance(preprocessing, ImagePreprocessing) else "finished inputs"
        raise InputError(
            f"the bundle has no text preprocessing, it takes {takes}",
            fix="Give those; for texts, export a checkpoint that has a tokenizer.",
        )
    # Its own files are the cache key: a bundle never changes, a path may come to hold another.
    if bundle.digest not in _padding:
        _padding.clear()
        _padding[bundle.digest] = cut_and_pad(open_tokenizer(bundle), preprocessing)
    dtypes = {tensor.name: tensor.dtype for tensor in bundle.manifest.inputs}
    made = encode_texts(_padding[bundle.digest], preprocessing, texts, cut=truncate)
    return {name: value.astype(dtypes[name], copy=False) for name, value in made.items()}


_padding: dict[str, Any] = {}


def special_stops(tokenizer: Any, stops: Sequence[str]) -> dict[str, int]:
    """Those stop strings that are special tokens, which texts are given out without -> their ids.

    Raises:
        UsageError: One holds a special token and more: that never comes.
    """
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    found = {stop: special[stop] for stop in stops if stop in special}
    for stop in stops:
        if inside := [one for one in special if one in stop and stop not in found]:
            raise UsageError(
                f"the stop string {stop!r} holds the special token {inside[0]!r}, which is no part "
                "of texts",
                fix=f"Stop at {inside[0]!r} alone, or at what stands around it.",
            )
    return found


class Stream:
    """Turns one row's tokens into text as they come.

    Text is held back while its last character is incomplete, or while it could be the beginning of
    a stop string. The prompt's text and what is given out are together the text of all tokens.

    Args:
        tokenizer: From `open_tokenizer`.
        stops: Strings that end the text; one may be a special token, which is no part of texts.
        prompt: The tokens before.

    Attributes:
        text: All that was given out so far.
        stopped: Whether a stop string came; nothing from it on is given out.

    Raises:
        UsageError: A stop string holds a special token and more.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
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
        """Takes a token. Returns the text that is certain by now."""
        if token in self._ends:
            given = self.end()
            self.stopped = True
            return given
        self._tokens.append(token)
        known = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        if now.endswith("\ufffd") and len(self._tokens) - self._read < HELD_TOKENS:
            return ""
        if now != known:  # behind a token without text the next one stands as behind those before
            self._held += now[len(known) :]
            self._start = self._read
        self._read = len(self._tokens)
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
