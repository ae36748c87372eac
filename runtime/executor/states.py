"""What components keep of every token (keys and values), and how much of it counts.

A component's token states are buffers of a fixed capacity and one length per row. Taking back
tokens that were drafted in vain is a change of length, never a copy. Tokens may be missing in some
components, where their group left: positions run on, lengths do not (`TokenStates.gaps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeexit.bundle.manifest import TokenState
from edgeexit.errors import EngineError, InputError
from edgeexit.runtime.engines.base import Array, Bound, Engine, Slot
from edgeexit.runtime.engines.host import Window
from edgeexit.runtime.executor.slots import dtype_of

LEAST_EXTENT = 32
"""Places of the smallest extent, where the capacity is larger."""


def extents(capacity: int) -> list[int]:
    """How many places a graph may attend over that reads past tokens of any number: the capacity,
    and its halves.

    Each is at least twice the one before, so that caches can grow in place.

    >>> extents(1000)
    [62, 125, 250, 500, 1000]
    """
    found = [capacity]
    while found[0] // 2 >= LEAST_EXTENT:
        found.insert(0, found[0] // 2)
    return found


ALIGNMENT = 256
"""Bytes; TensorRT takes no address between two multiples of it."""


@dataclass
class _Group:
    """Caches of one form in one piece of memory: what is done to all of them is done at once.

    `region` is how many bytes each of them has.
    """

    states: list[TokenState]
    heads: int
    size: int
    dtype: np.dtype
    slot: Slot
    region: int

    def array(self, batch: int, extent: int) -> Array:
        """All of them, ``[cache, batch, heads, extent, size]``."""
        token = self.size * self.dtype.itemsize
        head, row = extent * token, extent * token * self.heads
        shape = (len(self.states), batch, self.heads, extent, self.size)
        strides = (self.region, row, head, token, self.dtype.itemsize)
        array: Array = self.slot.array(self.dtype, shape, strides)
        return array

    def bound(self, batch: int, extent: int) -> dict[str, Bound]:
        """Each of them, ``[batch, heads, extent, size]``, by the cache's name."""
        shape = (batch, self.heads, extent, self.size)
        found: dict[str, Bound] = {}
        for number, cache in enumerate(self.states):
            place = Window(self.slot.device, self.slot.pointer + number * self.region)
            found[cache.name] = (place, self.dtype, shape)
        return found


class TokenStates:
    """The caches of one segment.

    Args:
        states: As the manifest describes them; none: only lengths are kept.
        batch: Rows.
        capacity: Tokens that each row can hold.
        engine: Where memory comes from.
        grows: The graphs read a past of any extent, and do not write into it: what they attend over
            grows with the text (`extents`). Else it is the whole capacity.

    Attributes:
        lengths: Per row, how many tokens count. Never changed in place.
        gaps: Per row, how many tokens of the text before its next one never came here.
        extent: Places of a row that graphs read now.

    Raises:
        EngineError: There is not enough memory.
    """

    def __init__(
        self,
        states: Sequence[TokenState],
        batch: int,
        capacity: int,
        engine: Engine,
        *,
        grows: bool = False,
    ) -> None:
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch
        self.gaps: list[int] = [0] * batch
        self._extents = extents(capacity) if grows else [capacity]
        self.extent = self._extents[0]
        self._batch = batch
        self._groups = _group(states, batch, capacity, engine)
        self._place = {
            cache.name: (group, number)
            for group in self._groups
            for number, cache in enumerate(group.states)
        }

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

    @property
    def positions(self) -> list[int]:
        """Per row, where its next token stands in the text."""
        return [a + b for a, b in zip(self.lengths, self.gaps, strict=True)]

    def crop(self, positions: Sequence[int]) -> None:
        """Takes back tokens that stand at these positions or behind."""
        ends = zip(self.lengths, positions, self.gaps, strict=True)
        self.lengths = [min(length, max(end - gap, 0)) for length, end, gap in ends]

    def clear(self) -> None:
        """Forgets the texts."""
        self.lengths, self.gaps = [0] * self._batch, [0] * self._batch
        self.extent = self._extents[0]

    def past(self) -> dict[str, Bound]:
        """Graph input -> the part of the buffer that is read."""
        return self._bound("past")

    def present(self) -> dict[str, Bound]:
        """Graph output -> the same buffer, for forms that write into the cache they read."""
        return self._bound("present")

    def _bound(self, side: str) -> dict[str, Bound]:
        found: dict[str, Bound] = {}
        for group in self._groups:
            bound = group.bound(self._batch, self.extent)
            found |= {getattr(cache, side): bound[cache.name] for cache in group.states}
        return found

    def append(self, new: NewStates, rows: Sequence[int] | None = None) -> None:
        """Writes new keys and values behind each row's length.

        Args:
            new: What the segment made.
            rows: Which rows of the batch; None: all.
        """
        count = new.count
        self._reserve(self.longest() + count)
        first, *others = self.lengths
        for group, made in zip(self._groups, new.arrays, strict=True):
            whole = group.array(self._batch, self.extent)
            if rows is None and all(length == first for length in others):
                whole[:, :, :, first : first + count] = made
                continue
            for row in range(self._batch) if rows is None else rows:
                length = self.lengths[row]
                whole[:, row, :, length : length + count] = made[:, row]

    def _reserve(self, places: int) -> None:
        """Makes graphs read at least so many places of a row; what is there moves apart."""
        before = self.extent
        if places <= before:
            return
        self.extent = after = next(one for one in self._extents if one >= places)
        for group in self._groups:
            old, new = group.array(self._batch, before), group.array(self._batch, after)
            # From the end on: none is overwritten before it has moved.
            for row in reversed(range(self._batch)):
                for head in reversed(range(group.heads)):
                    if row or head:
                        new[:, row, head, :before] = old[:, row, head]

    def rows(self, name: str) -> Array:
        """A cache's buffer ``[batch, heads, extent, size]``, for tests and audits."""
        group, number = self._place[name]
        found: Array = group.array(self._batch, self.extent)[number]
        return found


class NewStates:
    """Keys and values that a run made of new tokens, before they are appended.

    Args:
        states, batch, engine: As for `TokenStates`.
        count: New tokens per row.

    Attributes:
        arrays: Per form of caches ``[cache, batch, heads, count, size]``.
        bound: Graph output -> where it goes.
    """

    def __init__(
        self, states: Sequence[TokenState], batch: int, count: int, engine: Engine
    ) -> None:
        groups = _group(states, batch, count, engine)
        self.count = count
        self.arrays = [group.array(batch, count) for group in groups]
        self.bound: dict[str, Bound] = {}
        for group in groups:
            bound = group.bound(batch, count)
            self.bound |= {cache.present: bound[cache.name] for cache in group.states}
        self._groups = groups  # which hold the memory


def _group(states: Sequence[TokenState], batch: int, places: int, engine: Engine) -> list[_Group]:
    """Caches by their form, with memory for so many places of each row."""
    forms: dict[tuple[int, int, np.dtype], list[TokenState]] = {}
    for cache in states:
        rows, heads, past, size = cache.axes
        assert (rows, past) == ("batch", "past")
        assert isinstance(heads, int) and isinstance(size, int)
        forms.setdefault((heads, size, dtype_of(cache)), []).append(cache)
    groups = []
    for (heads, size, dtype), same in forms.items():
        region = -(-batch * heads * places * size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        size_bytes = len(same) * region
        try:
            slot = engine.allocate(size_bytes, sparse=True)
        except (MemoryError, ValueError, OverflowError) as error:
            raise EngineError(
                f"{same[0].name}: caches of {batch} rows and {places} tokens need {size_bytes} "
                "bytes, more than there are",
                fix="Load with a smaller capacity, or give fewer prompts at a time.",
            ) from error
        groups.append(_Group(same, heads, size, dtype, slot, region))
    return groups


class Ring:
    """States that passed a boundary and wait for the segments behind it.

    First in, first out, per row; drained as a whole, so it never wraps.

    Attributes:
        counts: Per row, how many wait.
        positions: Per row, where they stand in the text; kept where tokens may be missing.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        width: int,
        dtype: np.dtype,
        engine: Engine,
        *,
        positions: bool = False,
    ) -> None:
        self.capacity = capacity
        self.counts = [0] * batch
        self.positions: list[list[int]] | None = [[] for _ in range(batch)] if positions else None
        self._engine = engine
        # Memory begins as zeros: what is padding must be finite, for a NaN would spoil its
        # neighbours' attention.
        room = min(16, capacity)
        self._slot = engine.allocate(batch * room * width * dtype.itemsize)
        self._states: Array = self._slot.array(dtype, (batch, room, width))

    def push(
        self,
        states: Array,
        counts: Sequence[int],
        positions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Adds the first ``counts[row]`` of the states ``[batch, new, width]`` of each row, which
        stand at these positions."""
        after = [a + b for a, b in zip(self.counts, counts, strict=True)]
        needed = max(after)
        if needed > self._states.shape[1]:
            self._grow(needed)
        for row, (start, stop) in enumerate(zip(self.counts, after, strict=True)):
            if stop > start:
                self._states[row, start:stop] = states[row, : stop - start]
                if self.positions is not None and positions is not None:
                    self.positions[row] += positions[row][: stop - start]
        self.counts = after

    def _grow(self, needed: int) -> None:
        batch, held, width = self._states.shape
        dtype = self._states.dtype
        room = max(needed, min(self.capacity, 2 * held))
        slot = self._engine.allocate(batch * room * width * dtype.itemsize)
        larger = slot.array(dtype, (batch, room, width))
        larger[:, :held] = self._states
        self._states, self._slot = larger, slot

    def most(self) -> int:
        """How many wait in the row where most do."""
        return max(self.counts)

    def states(self, start: int, stop: int) -> Array:
        """States from `start` to `stop` of every row; those beyond a row's count are leftovers."""
        found: Array = self._states[:, start:stop]
        return found

    def crop(self, counts: Sequence[int]) -> None:
        """Forgets the newest ones of rows in which more wait."""
        self.counts = [min(a, b) for a, b in zip(self.counts, counts, strict=True)]
        if self.positions is not None:
            pairs = zip(self.positions, self.counts, strict=True)
            self.positions = [places[:count] for places, count in pairs]

    def clear(self) -> None:
        """Forgets all of them."""
        self.counts = [0] * len(self.counts)
        if self.positions is not None:
            self.positions = [[] for _ in self.counts]
