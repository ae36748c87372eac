"""Keys and values that a decoder's segments keep from token to token, and how much of them counts.

A segment's caches are buffers of a fixed capacity and one length per row. Dropping tokens that were
drafted in vain is a change of length, never a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.manifest import Cache
from edgeexit.runtime.buffers import HostSlot
from edgeexit.runtime.engines import Bound, Engine, Slot


class SegmentCaches:
    """The caches of one segment.

    Args:
        caches: As the manifest describes them.
        batch: Rows.
        capacity: Tokens that each row can hold.
        engine: Where device memory comes from.

    Attributes:
        lengths: ``[batch]`` int64, tokens of each row that count.
    """

    def __init__(self, caches: Sequence[Cache], batch: int, capacity: int, engine: Engine) -> None:
        self.capacity = capacity
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self._caches = caches
        self._bound: dict[str, Bound] = {}
        sizes = {"batch": batch, "past": capacity}
        for cache in caches:
            shape = tuple(sizes[a] if isinstance(a, str) else int(a or 1) for a in cache.axes)
            dtype = np.dtype(cache.dtype)
            slot: Slot = engine.allocate(int(np.prod(shape)) * dtype.itemsize)
            self._bound[cache.name] = (slot, dtype, shape)

    def past(self) -> dict[str, Bound]:
        """Graph input -> the whole buffer."""
        return {cache.past: self._bound[cache.name] for cache in self._caches}

    def present(self) -> dict[str, Bound]:
        """Graph output -> the same buffer, for forms that append in place."""
        return {cache.present: self._bound[cache.name] for cache in self._caches}

    def append(self, new: dict[str, NDArray], rows: NDArray[np.bool_] | None = None) -> None:
        """Writes new keys and values ``[batch, heads, new, size]`` behind each row's length.

        Args:
            new: Graph output -> what the segment made.
            rows: Which rows of the batch; None: all.
        """
        chosen = range(len(self.lengths)) if rows is None else np.flatnonzero(rows).tolist()
        for cache in self._caches:
            whole, made = self.rows(cache.name), new[cache.present]
            for row in chosen:
                length = int(self.lengths[row])
                whole[row, :, length : length + made.shape[2]] = made[row]

    def rows(self, name: str) -> NDArray:
        """A cache's buffer ``[batch, heads, capacity, size]``, for tests and audits."""
        slot, dtype, shape = self._bound[name]
        assert isinstance(slot, HostSlot)
        return slot.array(dtype, shape)


class Ring:
    """States that passed a boundary and wait for the segments behind it.

    First in, first out, per row; drained as a whole, so it never wraps.

    Attributes:
        counts: ``[batch]`` int64, how many wait in each row.
    """

    def __init__(self, batch: int, capacity: int, width: int) -> None:
        self.capacity = capacity
        self.counts: NDArray[np.int64] = np.zeros(batch, np.int64)
        # Zeros, for what is padding must be finite: a NaN would spoil its neighbours' attention.
        self._states = np.zeros((batch, 0, width), np.float32)

    def push(self, states: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
        """Adds the first ``counts[row]`` of the states ``[batch, new, width]`` of each row."""
        needed = int((self.counts + counts).max())
        if needed > self._states.shape[1]:
            grown = max(needed, min(self.capacity, 2 * self._states.shape[1]), 16)
            batch, held, width = self._states.shape
            larger = np.zeros((batch, grown, width), np.float32)
            larger[:, :held] = self._states
            self._states = larger
        starts = self.counts.tolist()
        for row, (start, count) in enumerate(zip(starts, counts.tolist(), strict=True)):
            self._states[row, start : start + count] = states[row, :count]
        self.counts += counts

    def states(self, start: int, stop: int) -> NDArray[np.float32]:
        """States from `start` to `stop` of every row; those beyond a row's count are leftovers."""
        return self._states[:, start:stop]

    def clear(self) -> None:
        """Forgets all of them."""
        self.counts[:] = 0
