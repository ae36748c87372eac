"""`Generation`: texts while they are being written, as an iterator over `Piece`s; and `Rounds`,
which runs a mode and produces the pieces."""

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
    """New tokens of one row, and the new text that no later token can change."""

    row: int
    tokens: list[int]
    text: str


@dataclass
class Generation:
    """Texts being written. Iterate over it, or call `finish`. To stop early, call `close` or delete
    it.

    Attributes:
        tokens: Per row, the tokens so far, without the stop token.
        texts: Per row, the text so far; empty without a tokenizer.
        statistics: Counts so far.
        first_token_s: Seconds to the first token, prompt included.
        earlier_s: Of these, seconds of the steps before the text: encoders, a vision tower.
        chains_s: Of these, seconds of each chain that ran.
        decode_s: Seconds from the first token to the last.
        reused_tokens: Tokens of the prompts that were not computed again, over all rows.
        reasons: Per row, why it ended: ``stop`` (the model ended it, or a stop string did),
            ``length`` (the most new tokens), or an empty string: it has not. Empty for sounds.
    """

    tokens: list[list[int]]
    texts: list[str]
    statistics: Statistics
    first_token_s: float = 0.0
    earlier_s: float = 0.0
    chains_s: dict[str, float] = field(default_factory=dict)
    decode_s: float = 0.0
    reused_tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    _pieces: Generator[Piece, None, None] = field(default_factory=lambda: _no_pieces(), repr=False)
    _failed: str | None = field(default=None, repr=False)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second over all rows, from the second token on."""
        decoded = sum(map(len, self.tokens)) - len(self.tokens)
        return decoded / self.decode_s if self.decode_s and decoded > 0 else None

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Piece:
        if self._failed is not None:
            raise StateError(
                f"this text ended with an error ({self._failed}) and is not complete",
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
        """Generates all remaining tokens. Returns itself."""
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Stops generating. The model can then write the next text."""
        self._pieces.close()


class Rounds:
    """Runs the rounds of a mode and yields their pieces.

    Args:
        generation: Receives tokens, texts and times.
        mode: Generates the tokens.
        streams: Per row, converts tokens to text; None: no text.
        ends: Tokens that end a row; they are not part of the result.
        most: Most tokens of a row.
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
        generation.reasons = [""] * len(generation.tokens)

    def run(
        self,
        prompts: Sequence[NDArray[np.int64]],
        forced: Sequence[int],
        started: float,
        check: Callable[[], object],
    ) -> Generator[Piece, None, None]:
        """Processes the prompts, then runs rounds until every row has ended.

        Args:
            forced: The tokens at the end of each prompt that are the first of its result.
            started: Start of the generation, from `time.perf_counter`.
            check: Called before each round; raises an error to stop.
        """
        generation, mode = self._generation, self._mode
        new = [[*forced, int(token)] for token in mode.prefill(prompts)]
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
        """Adds a round's tokens to a row, up to its end. Returns the added tokens and their
        text."""
        kept, written = [], ""
        own, sampler = self._generation.tokens[row], self._mode.sampler
        stream = None if self._streams is None else self._streams[row]
        for token in tokens:
            if token in self._ends:
                self._end(row, "stop")
                break
            kept.append(token)
            own.append(token)
            if sampler is not None:
                sampler.histories[row].append(token)
            if stream is not None:
                written += stream.add(token)
            if stream is not None and stream.stopped:
                self._end(row, "stop")
                break
            if len(own) == self._most:
                self._end(row, "length")
                break
        if not self._active[row] and stream is not None:
            written += stream.end()
            if stream.stopped:  # also by what was held back until now
                self._generation.reasons[row] = "stop"
        return kept, written

    def _end(self, row: int, reason: str) -> None:
        self._active[row] = False
        self._generation.reasons[row] = reason


def _no_pieces() -> Generator[Piece, None, None]:
    yield from ()


__all__ = ["Generation", "Piece", "Rounds"]
