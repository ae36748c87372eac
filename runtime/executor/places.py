"""Where new tokens stand: the positions and lengths that components read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import LENGTHS
from edgeexit.runtime.engines.base import Bound, Engine


class Places:
    """One set of buffers for all parts of a session.

    Segments that run one after the other mostly stand at the same places, and with the weights of
    a segment just passed through the processor's caches even a small write is slow. So they are
    written only where they change.

    Args:
        batch: Rows.
        most: The most new tokens of a row.
        engine: Whose runs read them.
        masks: Feeds that say which new tokens belong to a group.
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
        """What to bind as the positions of that many new tokens, ``[batch, new]``."""
        return self._positions, np.dtype(np.int64), (self._batch, new)

    def lengths(self, kinds: Sequence[str]) -> dict[str, Bound]:
        """What to bind as lengths of these kinds (`edgeexit.bundle.manifest.LENGTHS`)."""
        return {f"lengths/{kind}": self._lengths[kind] for kind in kinds}

    def mask(self, name: str, new: int) -> Bound:
        """What to bind as a group's mask, ``[batch, new]``."""
        return self._masks[name], np.dtype(np.bool_), (self._batch, new)

    def write_prompt(
        self,
        new: int,
        positions: Sequence[Sequence[int]],
        prompts: Sequence[int],
        groups: Mapping[str, Sequence[NDArray[np.bool_]]],
    ) -> None:
        """Says which new tokens are of a prompt, and of which group of it.

        Args:
            new: Tokens per row.
            positions: Per row, where those that count stand.
            prompts: Tokens of every row's prompt.
            groups: Mask -> per row, which tokens of the prompt belong to the group.
        """
        self._engine.settle()
        for row, (places, length) in enumerate(zip(positions, prompts, strict=True)):
            self._views["prompt"][row] = sum(place < length for place in places)
        for name, slot in self._masks.items():
            view = slot.array(np.dtype(np.bool_), (self._batch, new))
            view[...] = False
            for row, places in enumerate(positions):
                own = groups[name][row]
                view[row, : len(places)] = [place < len(own) and own[place] for place in places]

    def write(
        self,
        new: int,
        filled: Sequence[int],
        places: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        """Says where new tokens stand.

        Args:
            new: Tokens per row.
            filled: What every row's states hold before them.
            places: Position of each row's first new token, or of every one that counts; None:
                behind what the states hold.
        """
        ragged = places is not None and not isinstance(places[0], int)
        written = None if ragged else (new, tuple(filled), places and tuple(places))
        if written is not None and written == self._written:
            return
        self._written = None  # until all is written: an interruption must not leave half of it
        self._engine.settle()
        positions = self._position_views.get(new)
        if positions is None:
            _, dtype, shape = self.positions(new)
            positions = self._position_views[new] = self._positions.array(dtype, shape)
        for row, place in enumerate(filled if places is None else places):
            if isinstance(place, int):
                positions[row] = place if new == 1 else np.arange(place, place + new)
            else:  # what is behind those that count is padding
                positions[row] = 0
                positions[row, : len(place)] = place
        views = self._views
        for row, length in enumerate(filled):
            views["past"][row] = length
            views["last"][row] = length + new - 1
        views["most"][()] = max(filled) + new
        self._written = written

    def write_most(self, most: int) -> None:
        """Says another length for the longest row, until `write` says something new."""
        self._engine.settle()
        self._views["most"][()] = most
        self._written = None


__all__ = ["Places"]
