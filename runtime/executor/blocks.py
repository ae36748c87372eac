"""Tokens on their way through a chain: how many stand at a boundary, and where in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeexit.runtime.engines.base import Array


@dataclass(frozen=True)
class Block:
    """New tokens at a boundary.

    Attributes:
        new: Places per row.
        counts: How many of them count, per row; the others are padding.
        positions: Per row, where those that count stand in the text, or where the first one does;
            None: behind what the component's states hold.
    """

    new: int
    counts: Sequence[int]
    positions: Sequence[int | Sequence[int]] | None = None


def keep_tokens(source: Array, target: Array, kept: Sequence[Sequence[int]]) -> None:
    """Copies some tokens of every row ``[batch, new, width]`` to the front of another array.

    Args:
        kept: Per row, which ones, ascending.
    """
    for row, places in enumerate(kept):
        at = 0
        for start, stop in runs(places):
            target[row, at : at + stop - start] = source[row, start:stop]
            at += stop - start


def runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges.

    >>> runs([0, 1, 2, 5, 7, 8])
    [(0, 3), (5, 6), (7, 9)]
    """
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def standing(block: Block, starts: Sequence[int]) -> list[list[int]]:
    """Where a block's tokens stand, per row, if those without positions begin at `starts`."""
    found = []
    places = starts if block.positions is None else block.positions
    for place, count in zip(places, block.counts, strict=True):
        found.append(
            list(range(place, place + count)) if isinstance(place, int) else list(place[:count])
        )
    return found


__all__ = ["Block", "keep_tokens", "runs", "standing"]
