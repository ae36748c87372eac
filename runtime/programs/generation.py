"""Texts being written: pieces as they come, and what is known of them so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import StateError
from edgeexit.runtime.programs.modes.full import Mode, Statistics
from edgeexit.runtime.text.tokenizer import Stream


@dataclass(frozen=True)
class Piece:
    """What came at once for one row: tokens, and the text that they make certain."""

    row: int
    tokens: list[int]
    text: str


@dataclass
class Generation:
    """Texts being written. Iterate over it, or call `finish`; closing or dropping it ends it early.

    Attributes:
        tokens: Per row, the tokens made so far; a stop token is not among them.
        texts: Per row, the text given out so far; empty strings without a tokenizer.
        statistics: What happened so far.
        first_token_s: Seconds to the first token, the prompt included.
        decode_s: Seconds from the first token to the last.
    """

    tokens: list[list[int]]
    texts: list[str]
    statistics: Statistics
    first_token_s: float = 0.0
    decode_s: float = 0.0
    _pieces: Generator[Piece, None, None] = field(default_factory=lambda: _no_pieces(), repr=False)
    _failed: str | None = field(default=None, repr=False)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second over all rows, from the second token on."""
        made = sum(map(len, self.tokens)) - len(self.tokens)
        return made / self.decode_s if self.decode_s and made > 0 else None

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Piece:
        if self._failed is not None:
            raise StateError(
                f"this text ended with an error ({self._failed}); it is not whole",
                fix="Generate it again.",
            )
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException as error:
            self._failed = type(error).__name__
            raise

    def finish(self) -> Generation:
        """Runs to the end and returns itself."""
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Ends it where it is; the model is free for the next text."""
        self._pieces.close()


class Rounds:
    """A mode's rounds, as pieces.

    Args:
        generation: What is filled.
        mode: What makes tokens.
        streams: Per row, what makes text of them; None: no text is wanted.
        ends: Tokens that end a row, and are not given out.
        most: The most tokens of a row.
        on_piece: Called with every piece before it is yielded.
    """

    def __init__(
        self,
        generation: Generation,
        mode: Mode,
        streams: Sequence[Stream] | None,
        ends: Collection[int],
        most: int,
        on_piece: Callable[[Piece], object] | None,
    ) -> None:
        self._generation, self._mode, self._streams = generation, mode, streams
        self._ends, self._most, self._on_piece = ends, most, on_piece
        self._active = [True] * len(generation.tokens)

    def run(
        self, prompts: Sequence[NDArray[np.int64]], started: float, check: Callable[[], object]
    ) -> Generator[Piece, None, None]:
        """Takes the prompts, then makes rounds until every row has ended.

        Args:
            started: When the text began, by `time.perf_counter`.
            check: Called before each round; raises if there must be no more.
        """
        generation, mode = self._generation, self._mode
        new = [[int(token)] for token in mode.prefill(prompts)]
        first = time.perf_counter()
        generation.first_token_s = first - started
        while True:
            for row, tokens in enumerate(new):
                if not self._active[row] or not tokens:
                    continue
                kept, written = self._take(row, tokens)
                generation.texts[row] += written
                generation.decode_s = time.perf_counter() - first
                piece = Piece(row, kept, written)
                if self._on_piece is not None:
                    self._on_piece(piece)
                yield piece
            if not any(self._active):
                break
            check()
            lengths = zip(generation.tokens, self._active, strict=True)
            done = [len(tokens) for tokens, on in lengths if on]
            new = mode.step(self._active, self._most - min(done))

    def _take(self, row: int, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Adds a round's tokens to a row, up to its end. Returns those, and the text they make."""
        kept, written = [], ""
        own, sampler = self._generation.tokens[row], self._mode.sampler
        stream = None if self._streams is None else self._streams[row]
        for token in tokens:
            if token in self._ends:
                self._active[row] = False
                break
            kept.append(token)
            own.append(token)
            if sampler is not None:
                sampler.histories[row].append(token)
            if stream is not None:
                written += stream.add(token)
            if len(own) == self._most or (stream is not None and stream.stopped):
                self._active[row] = False
                break
        if not self._active[row] and stream is not None:
            written += stream.end()
        return kept, written


def _no_pieces() -> Generator[Piece, None, None]:
    yield from ()


__all__ = ["Generation", "Piece", "Rounds"]
