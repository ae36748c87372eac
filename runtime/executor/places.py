"""Where new tokens stand: the positions and lengths that every part of a decoder reads."""

from __future__ import annotations

from collections.abc import Sequence

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
    """

    def __init__(self, batch: int, most: int, engine: Engine) -> None:
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

    def positions(self, new: int) -> Bound:
        """What to bind as the positions of that many new tokens, ``[batch, new]``."""
        return self._positions, np.dtype(np.int64), (self._batch, new)

    def lengths(self, kinds: Sequence[str]) -> dict[str, Bound]:
        """What to bind as lengths of these kinds (`edgeexit.bundle.manifest.LENGTHS`)."""
        return {f"lengths/{kind}": self._lengths[kind] for kind in kinds}

    def write(self, new: int, filled: Sequence[int], places: Sequence[int] | None = None) -> None:
        """Says where new tokens stand.

        Args:
            new: Tokens per row.
            filled: What every row's caches hold before them.
            places: Position of each row's first new token; None: behind what the caches hold.
        """
        written = (new, tuple(filled), None if places is None else tuple(places))
        if written == self._written:
            return
        self._written = None  # until all is written: an interruption must not leave half of it
        self._engine.settle()
        positions = self._position_views.get(new)
        if positions is None:
            _, dtype, shape = self.positions(new)
            positions = self._position_views[new] = self._positions.array(dtype, shape)
        for row, place in enumerate(filled if places is None else places):
            positions[row] = place if new == 1 else np.arange(place, place + new)
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
