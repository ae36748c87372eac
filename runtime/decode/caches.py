"""Keys and values that a decoder's segments keep from token to token, and how much of them counts.

A segment's caches are buffers of a fixed capacity and one length per row. Dropping tokens that were
drafted in vain is a change of length, never a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import EngineError, InputError
from edgeexit.manifest import Cache
from edgeexit.runtime.buffers import HostSlot, dtype_of
from edgeexit.runtime.engines import Bound, Engine, Slot


class SegmentCaches:
    """The caches of one segment.

    Args:
        caches: As the manifest describes them.
        batch: Rows.
        capacity: Tokens that each row can hold.
        engine: Where device memory comes from.

    Attributes:
        lengths: Per row, how many tokens count. Never changed in place.

    Raises:
        EngineError: There is not enough memory.
    """

    def __init__(self, caches: Sequence[Cache], batch: int, capacity: int, engine: Engine) -> None:
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch
        self._caches = caches
        self._bound: dict[str, Bound] = {}
        sizes = {"batch": batch, "past": capacity}
        for cache in caches:
            shape = tuple(sizes[a] if isinstance(a, str) else int(a or 1) for a in cache.axes)
            dtype = dtype_of(cache)
            size_bytes = math.prod(shape) * dtype.itemsize
            try:
                slot: Slot = engine.allocate(size_bytes)
            except (MemoryError, ValueError, OverflowError) as error:
                raise EngineError(
                    f"{cache.name}: a cache of {batch} rows and {capacity} tokens needs "
                    f"{size_bytes} bytes, more than there are",
                    fix="Load with a smaller capacity, or give fewer prompts at a time.",
                ) from error
            self._bound[cache.name] = (slot, dtype, shape)

    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def check_room(self, new: int, where: str) -> int:
        """Refuses new tokens that some row has no place for, before anything is written.

        Returns:
            `longest`.
        """
        longest = self.longest()
        if longest + new > self.capacity:
            raise InputError(
                f"{where}: a row of the caches holds {longest} tokens, and {new} more need "
                f"{longest + new} places; the capacity is {self.capacity}",
                fix="Load with a larger capacity, or end the text earlier.",
            )
        return longest

    def advance(self, counts: Sequence[int]) -> None:
        """Lets so many more tokens of each row count."""
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]

    def crop(self, lengths: Sequence[int]) -> None:
        """Shortens rows that are longer to these lengths."""
        self.lengths = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]

    def past(self) -> dict[str, Bound]:
        """Graph input -> the whole buffer."""
        return {cache.past: self._bound[cache.name] for cache in self._caches}

    def present(self) -> dict[str, Bound]:
        """Graph output -> the same buffer, for forms that write into the cache they read."""
        return {cache.present: self._bound[cache.name] for cache in self._caches}

    def append(self, new: dict[str, NDArray], rows: Sequence[int] | None = None) -> None:
        """Writes new keys and values ``[batch, heads, new, size]`` behind each row's length.

        Args:
            new: Graph output -> what the segment made.
            rows: Which rows of the batch; None: all.
        """
        chosen = range(len(self.lengths)) if rows is None else rows
        for cache in self._caches:
            whole, made = self.rows(cache.name), new[cache.present]
            for row in chosen:
                length = self.lengths[row]
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
        counts: Per row, how many wait.
    """

    def __init__(self, batch: int, capacity: int, width: int, dtype: np.dtype) -> None:
        self.capacity = capacity
        self.counts = [0] * batch
        # Zeros, for what is padding must be finite: a NaN would spoil its neighbours' attention.
        self._states: NDArray[Any] = np.zeros((batch, 0, width), dtype)

    def push(self, states: NDArray[Any], counts: Sequence[int]) -> None:
        """Adds the first ``counts[row]`` of the states ``[batch, new, width]`` of each row."""
        after = [a + b for a, b in zip(self.counts, counts, strict=True)]
        needed = max(after)
        if needed > self._states.shape[1]:
            grown = max(needed, min(self.capacity, 2 * self._states.shape[1]), 16)
            batch, held, width = self._states.shape
            larger = np.zeros((batch, grown, width), self._states.dtype)
            larger[:, :held] = self._states
            self._states = larger
        for row, (start, stop) in enumerate(zip(self.counts, after, strict=True)):
            self._states[row, start:stop] = states[row, : stop - start]
        self.counts = after

    def most(self) -> int:
        """How many wait in the row where most do."""
        return max(self.counts)

    def states(self, start: int, stop: int) -> NDArray[Any]:
        """States from `start` to `stop` of every row; those beyond a row's count are leftovers."""
        return self._states[:, start:stop]

    def crop(self, counts: Sequence[int]) -> None:
        """Forgets the newest ones of rows in which more wait."""
        self.counts = [min(a, b) for a, b in zip(self.counts, counts, strict=True)]

    def clear(self) -> None:
        """Forgets all of them."""
        self.counts = [0] * len(self.counts)
