"""`Places`: the positions, lengths and token-group masks that components read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import LENGTHS
from edgeexit.runtime.engines.base import Bound, Engine


class Places:
    """Buffers with the positions of new tokens and the lengths of states, shared by all parts of a
    session.

    Consecutive components mostly need the same values, and even a small write is slow right after a
    component's weights have passed through the CPU caches. So values are written only when they
    change.

    Args:
        batch: Rows.
        most: Largest number of new tokens per row.
        engine: The engine that reads the buffers.
        masks: Names of the feeds that mark which new tokens belong to a group.
    """

    def __init__(self, batch: int, most: int, engine: Engine, masks: Sequence[str] = ()) -> None:
        self._batch, self._engine = batch, engine
        self._positions = engine.allocate_host(batch * most * 8)
        self._position_views: dict[int, NDArray[np.int64]] = {}
        self._lengths: dict[str, Bound] = {}
        self._views: dict[str, NDArray[np.int64]] = {}
        for kind, (dtype_name, axes) in LENGTHS.items():
            dtype, shape = np.dtype(dtype_name), (batch,) if axes else ()
            slot = engine.allocate_host(batch * dtype.itemsize)
            self._lengths[kind] = (slot, dtype, shape)
            self._views[kind] = slot.array(dtype, shape)
        self._written: tuple[object, ...] | None = None
        self._masks = {name: engine.allocate_host(batch * most) for name in masks}

    def positions(self, new: int) -> Bound:
        """The positions of that many new tokens, ``[batch, new]``, to be bound."""
        return self._positions, np.dtype(np.int64), (self._batch, new)

    def lengths(self, kinds: Sequence[str]) -> dict[str, Bound]:
        """Lengths of these kinds (`edgeexit.bundle.manifest.LENGTHS`), to be bound."""
        return {f"lengths/{kind}": self._lengths[kind] for kind in kinds}

    def mask(self, name: str, new: int) -> Bound:
        """A group's mask, ``[batch, new]``, to be bound."""
        return self._masks[name], np.dtype(np.bool_), (self._batch, new)

    def write_prompt(
        self,
        new: int,
        positions: Sequence[Sequence[int]],
        prompts: Sequence[int],
        groups: Mapping[str, Sequence[NDArray[np.bool_]]],
    ) -> list[int]:
        """Writes which new tokens belong to the prompt and to its groups.

        Args:
            new: Tokens per row.
            positions: Per row, the positions of its real tokens.
            prompts: Per row, the number of tokens in its prompt.
            groups: Mask -> per row, which tokens of the prompt belong to the group.

        Returns:
            The rows with tokens of the prompt.
        """
        self._engine.settle()
        places_of = [np.asarray(places, np.int64) for places in positions]
        for row, (places, length) in enumerate(zip(places_of, prompts, strict=True)):
            self._views["prompt"][row] = np.count_nonzero(places < length)
        for name, slot in self._masks.items():
            view = slot.array(np.dtype(np.bool_), (self._batch, new))
            view[...] = False
            for row, places in enumerate(places_of):
                own = groups[name][row]
                within = places < len(own)
                view[row, : len(places)][within] = own[places[within]]
        return np.flatnonzero(self._views["prompt"]).tolist()

    def end_prompt(self) -> None:
        """Writes that no new token belongs to a prompt."""
        self._engine.settle()
        self._views["prompt"][...] = 0

    def write(
        self,
        new: int,
        filled: Sequence[int],
        places: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        """Writes the positions of new tokens and the lengths of the states.

        Args:
            new: Tokens per row.
            filled: Per row, the number of tokens in the states.
            places: Per row, the position of its first new token, or of every real token; None: they
                follow the tokens in the states.
        """
        ragged = places is not None and not isinstance(places[0], int)
        written = None if ragged else (new, tuple(filled), places and tuple(places))
        if written is not None and written == self._written:
            return
        self._written = None  # an interruption in this function must not count as written
        self._engine.settle()
        positions = self._position_views.get(new)
        if positions is None:
            _, dtype, shape = self.positions(new)
            positions = self._position_views[new] = self._positions.array(dtype, shape)
        for row, place in enumerate(filled if places is None else places):
            if isinstance(place, int):
                positions[row] = place if new == 1 else np.arange(place, place + new)
            else:  # the rest is padding
                positions[row] = 0
                positions[row, : len(place)] = place
        views = self._views
        for row, length in enumerate(filled):
            views["past"][row] = length
            views["last"][row] = length + new - 1
        views["most"][()] = max(filled) + new
        self._written = written

    def write_rows(
        self, rows: Sequence[int], filled: Sequence[int], new: int, longest: int
    ) -> None:
        """Writes the lengths of some rows that run alone, over so many new tokens each. The next
        `write` replaces them.

        Args:
            longest: Tokens in the states of the longest of them.
        """
        self._engine.settle()
        for row in rows:
            self._views["last"][row] = filled[row] + new - 1
        self._views["most"][()] = longest + new
        self._written = None

    def write_most(self, most: int) -> None:
        """Writes another length of the longest row. The next `write` replaces it."""
        self._engine.settle()
        self._views["most"][()] = most
        self._written = None


__all__ = ["Places"]
