"""Texts being written: pieces as they come, and what is known of them so far."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from edgeexit.errors import StateError
from edgeexit.runtime.programs.modes.full import Statistics


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


def _no_pieces() -> Generator[Piece, None, None]:
    yield from ()


__all__ = ["Generation", "Piece"]
