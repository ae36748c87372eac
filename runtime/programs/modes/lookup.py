"""`Lookup`: drafts from the text itself (mode ``exact``).

A text often repeats what it, or its prompt, said before: names, code, quotations. The tokens that
followed the last occurrence of its latest tokens are a draft that costs nothing (prompt lookup
decoding; an n-gram case of arXiv:2304.04487).
"""

from __future__ import annotations

from collections.abc import Iterable


class Lookup:
    """The tokens of one text, prompt included, and where each short sequence of them occurred.

    >>> text = Lookup([5, 6, 7, 8, 5, 6])
    >>> text.following(3)
    [7, 8, 5]
    >>> Lookup([5, 6, 7, 8]).following(3)
    []
    """

    SHORTEST, LONGEST = 2, 4
    """Lengths of sequences that are looked for; the longest that occurred counts."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens at the end."""
        for token in tokens:
            place = len(self._tokens)
            for length in range(self.SHORTEST, min(self.LONGEST, place) + 1):
                self._behind[tuple(self._tokens[place - length :])] = place
            self._tokens.append(token)

    def following(self, most: int) -> list[int]:
        """What may follow the text: up to `most` tokens; none if its end is new. A text that
        repeats itself goes on doing so."""
        known, end = self._tokens, len(self._tokens)
        for length in range(min(self.LONGEST, end), self.SHORTEST - 1, -1):
            place = self._behind.get(tuple(known[end - length :]))
            if place is not None:
                return [known[place + n % (end - place)] for n in range(most)]
        return []


__all__ = ["Lookup"]
