"""`HeldTexts`: which tokens the states of a session are of, so that a text that begins like the
last one need not compute its beginning again."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeexit.runtime.executor.parts import Part
    from edgeexit.runtime.executor.session import Session


class HeldTexts:
    """The tokens that a session's states hold.

    Attributes:
        kept: Per row, how many tokens of its prompt were in the states when its text began.
        whole: Whether the states are those that all layers compute for these tokens, and for
            nothing but tokens: not while a text is written, nor behind images or approximations.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: list[list[int]] = [[] for _ in range(session.batch)]
        self.kept = [0] * session.batch
        self.whole = False

    def note(self, tokens: NDArray[np.int64]) -> None:
        """Notes that tokens ``[batch, new]`` come behind those in the states of the first part."""
        for row, start in enumerate(self._session.parts[0].states.lengths):
            self._rows[row][start:] = tokens[row].tolist()

    def put(self, row: int, tokens: Sequence[int]) -> None:
        """Notes what states that were written otherwise are of."""
        self._rows[row] = list(tokens)

    def tokens(self, row: int) -> list[int]:
        """The tokens of a row that have passed the first part."""
        return self._rows[row][: self._session.parts[0].states.lengths[row]]

    def clear(self) -> None:
        """Forgets all texts."""
        self.kept, self.whole = [0] * self._session.batch, False

    def keep(self, counts: Sequence[int]) -> None:
        """Keeps the first tokens of each row, and what waits of them between parts."""
        session = self._session
        session.crop(counts)
        for number, ring in enumerate(session.rings):
            held = session.parts[number].states.lengths
            ring.crop([max(a - b, 0) if number else 0 for a, b in zip(counts, held, strict=True)])
        self.kept, self.whole = list(counts), False

    def usable(self, row: int, most: int, asked: Collection[int], *, waiting: bool) -> int:
        """How many of a row's first tokens are in the states of everything that a text needs.

        Args:
            most: Of interest at most.
            asked: Early exits whose adapters are needed.
            waiting: Tokens may also wait in front of later parts.
        """
        session = self._session
        held = [part.states.lengths[row] for part in session.parts]
        waits = [0, *(before - after for before, after in itertools.pairwise(held))]
        if not waiting or waits != [ring.counts[row] for ring in session.rings]:
            held = [min(held)] * len(held)
        most = min(most, held[0])
        for number in sorted(asked):
            own = least(session.adapters.path(number), row)
            if own is not None and own < min(most, held[number]):
                most = own
        return most


def least(parts: Sequence[Part], row: int) -> int | None:
    """Tokens of a row in the states of all of these parts; None: there are no parts."""
    return min((part.states.lengths[row] for part in parts), default=None)


__all__ = ["HeldTexts"]
