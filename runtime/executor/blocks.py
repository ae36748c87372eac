"""`Block`: the new tokens at a boundary between two components, with their positions in the
text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeexit.runtime.engines.base import Array

CHUNK = 384
"""Most prompt tokens of a row in one run. Each run reads all weights, so few are faster, but much
longer ones are slower again (benchmarks/README.md)."""


@dataclass(frozen=True)
class Block:
    """New tokens at a boundary.

    Attributes:
        new: Tokens per row, padding included.
        counts: Per row, the number of real tokens; the rest is padding.
        positions: Per row, the positions of the real tokens in the text, or the position of the
            first; None: they follow the tokens in the component's states.
    """

    new: int
    counts: Sequence[int]
    positions: Sequence[int | Sequence[int]] | None = None


def have_gaps(block: Block) -> bool:
    """Whether the positions of a row's tokens do not follow each other."""
    return any(
        not isinstance(places, int) and len(places) and places[-1] - places[0] >= len(places)
        for places in block.positions or ()
    )


def keep_tokens(source: Array, target: Array, kept: Sequence[Sequence[int]]) -> None:
    """Copies some tokens of every row ``[batch, new, width]`` to the start of another array.

    Args:
        kept: Per row, the indices of the tokens, ascending.
    """
    for row, places in enumerate(kept):
        at = 0
        for start, stop in runs(places):
            target[row, at : at + stop - start] = source[row, start:stop]
            at += stop - start


def last_of(positions: Sequence[int | Sequence[int]], counts: Sequence[int]) -> list[int]:
    """Per row, the position of its last token (`Block.positions`); 0 for rows without tokens.

    >>> last_of([4, [0, 2, 7], []], [3, 2, 0])
    [6, 2, 0]
    """
    return [
        0 if not count else place + count - 1 if isinstance(place, int) else place[count - 1]
        for place, count in zip(positions, counts, strict=True)
    ]


def runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges.

    >>> runs([0, 1, 2, 5, 7, 8])
    [(0, 3), (5, 6), (7, 9)]
    """
    ranges: list[tuple[int, int]] = []
    for place in places:
        if ranges and ranges[-1][1] == place:
            ranges[-1] = (ranges[-1][0], place + 1)
        else:
            ranges.append((place, place + 1))
    return ranges


def standing(block: Block, starts: Sequence[int]) -> list[list[int]]:
    """Per row, the positions of a block's real tokens. If the block has none, they begin at
    `starts`."""
    positions = []
    places = starts if block.positions is None else block.positions
    for place, count in zip(places, block.counts, strict=True):
        positions.append(
            list(range(place, place + count)) if isinstance(place, int) else list(place[:count])
        )
    return positions


def even_chunk(tokens: int, most: int) -> int:
    """Tokens of a row in one run, for a prompt of so many: in as few runs as possible, all alike,
    because a short one reads all weights for a few tokens.

    >>> even_chunk(600, 384), even_chunk(288, 384), even_chunk(0, 384)
    (300, 288, 1)
    """
    runs_needed = -(-tokens // most)
    return max(1, -(-tokens // max(1, runs_needed)))


__all__ = ["CHUNK", "Block", "even_chunk", "have_gaps", "keep_tokens", "runs", "standing"]
