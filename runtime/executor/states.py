"""Token states of components (the KV cache), and the rings of tokens that wait between components.

A component's token states are buffers of a fixed capacity, with one length per row. Removing
rejected drafts only changes the length; nothing is copied. If a gate dropped tokens, the states
behind it hold fewer tokens than the text: `TokenStates.gaps` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import TokenState
from edgeexit.errors import EngineError, InputError
from edgeexit.runtime.engines.base import Array, Bound, Engine, Slot
from edgeexit.runtime.engines.host import Window
from edgeexit.runtime.executor.slots import dtype_of

LEAST_EXTENT = 32
"""Smallest extent in tokens, unless the capacity is smaller."""


def extents(capacity: int) -> list[int]:
    """Sizes of the past, in tokens, that graphs of the form ``append`` attend over: the capacity
    and its halves.

    Each is at least twice the one before, so that caches can grow in place.

    >>> extents(1000)
    [62, 125, 250, 500, 1000]
    """
    sizes = [capacity]
    while sizes[0] // 2 >= LEAST_EXTENT:
        sizes.insert(0, sizes[0] // 2)
    return sizes


ALIGNMENT = 256
"""Alignment in bytes; TensorRT requires it of every address."""


@dataclass
class _Group:
    """Caches with the same shape and dtype in one block of memory, so that one operation updates
    all of them. `region` is the size of each in bytes.
    """

    states: list[TokenState]
    heads: int
    size: int
    dtype: np.dtype
    slot: Slot
    region: int

    def array(self, batch: int, extent: int) -> Array:
        """All caches, ``[cache, batch, heads, extent, size]``."""
        token = self.size * self.dtype.itemsize
        head, row = extent * token, extent * token * self.heads
        shape = (len(self.states), batch, self.heads, extent, self.size)
        strides = (self.region, row, head, token, self.dtype.itemsize)
        array: Array = self.slot.array(self.dtype, shape, strides)
        return array

    def bound(self, batch: int, extent: int) -> dict[str, Bound]:
        """Cache name -> the cache, ``[batch, heads, extent, size]``."""
        shape = (batch, self.heads, extent, self.size)
        caches: dict[str, Bound] = {}
        for number, cache in enumerate(self.states):
            place = Window(self.slot.device, self.slot.pointer + number * self.region)
            caches[cache.name] = (place, self.dtype, shape)
        return caches


class TokenStates:
    """The caches of one component.

    Args:
        states: From the manifest; empty: only lengths are kept.
        batch: Rows.
        capacity: Tokens that each row can hold.
        engine: Allocates the memory.
        grows: The graphs read a past of any size and do not write into it: the extent grows with
            the text (`extents`). False: the extent is the capacity.

    Attributes:
        lengths: Per row, the number of valid tokens. Never changed in place.
        gaps: Per row, the number of earlier tokens of the text that were dropped before they
            reached this component.
        extent: Tokens per row that graphs read now.

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
        """Raises `InputError` if a row has no room for new tokens; nothing is written then.

        Returns:
            `longest`.
        """
        longest = self.longest()
        if longest + new > self.capacity:
            raise InputError(
                f"{where}: a row of the caches holds {longest} tokens and {new} more are "
                f"{longest + new}, above the capacity of {self.capacity}",
                fix="Load with a larger capacity, or end the text earlier.",
            )
        return longest

    def advance(self, counts: Sequence[int]) -> None:
        """Increases each row's length."""
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]

    def find_gaps(self, counts: Sequence[int], positions: Sequence[int | Sequence[int]]) -> None:
        """Updates `gaps` after tokens at these positions (`edgeexit.runtime.executor.blocks.Block`)
        were added."""
        for row, (count, place) in enumerate(zip(counts, positions, strict=True)):
            if count:
                end = place + count if isinstance(place, int) else place[count - 1] + 1
                self.gaps[row] = end - self.lengths[row]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token of a row, in all caches."""
        return sum(len(g.states) * g.heads * g.size * g.dtype.itemsize for g in self._groups)

    @property
    def positions(self) -> list[int]:
        """Per row, the position of its next token in the text."""
        return [a + b for a, b in zip(self.lengths, self.gaps, strict=True)]

    def crop(self, positions: Sequence[int]) -> None:
        """Removes each row's tokens from a position on."""
        ends = zip(self.lengths, positions, self.gaps, strict=True)
        self.lengths = [min(length, max(end - gap, 0)) for length, end, gap in ends]

    def clear(self) -> None:
        """Removes all tokens."""
        self.lengths, self.gaps = [0] * self._batch, [0] * self._batch
        self.extent = self._extents[0]

    def read(self, row: int, count: int) -> list[NDArray]:
        """A copy of a row's first tokens: per shape and dtype of caches, ``[cache, heads, count,
        size]``."""
        arrays = [group.array(self._batch, self.extent) for group in self._groups]
        return [np.array(array[:, row, :, :count]) for array in arrays]

    def forms(self, count: int) -> list[tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of each array that `read` gives."""
        return [(g.dtype, (len(g.states), g.heads, count, g.size)) for g in self._groups]

    def write(self, row: int, count: int, arrays: Sequence[NDArray]) -> None:
        """Replaces a row's tokens by the first `count` that `read` gave."""
        self._reserve(count)
        for group, array in zip(self._groups, arrays, strict=True):
            group.array(self._batch, self.extent)[:, row, :, :count] = array[:, :, :count]
        self.lengths = [count if n == row else own for n, own in enumerate(self.lengths)]
        self.gaps = [0 if n == row else own for n, own in enumerate(self.gaps)]

    def past(self) -> dict[str, Bound]:
        """Graph input -> the part of the buffer that the graph reads."""
        return self._bound("past")

    def present(self) -> dict[str, Bound]:
        """Graph output -> the same buffer, for forms that update the cache in place."""
        return self._bound("present")

    def _bound(self, side: str) -> dict[str, Bound]:
        tensors: dict[str, Bound] = {}
        for group in self._groups:
            bound = group.bound(self._batch, self.extent)
            tensors |= {getattr(cache, side): bound[cache.name] for cache in group.states}
        return tensors

    def append(self, new: NewStates, rows: Sequence[int] | None = None, *, first: int = 0) -> None:
        """Writes new keys and values after each row's last token. Lengths do not change.

        Args:
            new: Keys and values from a run.
            rows: Rows of the batch; None: all.
            first: The row of the batch that comes first in `new`.
        """
        count = new.count
        chosen = range(self._batch) if rows is None else rows
        self._reserve(max((self.lengths[row] for row in chosen), default=0) + count)
        length, *others = self.lengths
        for group, added in zip(self._groups, new.arrays, strict=True):
            whole = group.array(self._batch, self.extent)
            if rows is None and all(other == length for other in others):
                whole[:, :, :, length : length + count] = added
                continue
            for row in chosen:
                start = self.lengths[row]
                whole[:, row, :, start : start + count] = added[:, row - first]

    def _reserve(self, places: int) -> None:
        """Increases the extent to at least that many tokens, and moves the cache contents."""
        before = self.extent
        if places <= before:
            return
        self.extent = after = next(extent for extent in self._extents if extent >= places)
        for group in self._groups:
            old, new = group.array(self._batch, before), group.array(self._batch, after)
            # Backwards, so that nothing is overwritten before it was moved.
            for row in reversed(range(self._batch)):
                for head in reversed(range(group.heads)):
                    if row or head:
                        new[:, row, head, :before] = old[:, row, head]

    def rows(self, name: str) -> Array:
        """A cache's buffer ``[batch, heads, extent, size]``, for tests and audits."""
        group, number = self._place[name]
        cache: Array = group.array(self._batch, self.extent)[number]
        return cache


class NewStates:
    """Keys and values of new tokens from a run, before they are appended.

    Args:
        states, batch, engine: As for `TokenStates`.
        count: New tokens per row.

    Attributes:
        arrays: Per shape and dtype of caches: ``[cache, batch, heads, count, size]``.
        bound: Graph output -> its memory.
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
        self._groups = groups  # keeps the memory allocated


def _group(states: Sequence[TokenState], batch: int, places: int, engine: Engine) -> list[_Group]:
    """Groups caches by shape and dtype, and allocates memory for `places` tokens of each row."""
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
                f"{same[0].name}: not enough memory: caches of {batch} rows and {places} tokens "
                f"need {size_bytes} bytes",
                fix="Load with a smaller capacity, or give fewer prompts at a time.",
            ) from error
        groups.append(_Group(same, heads, size, dtype, slot, region))
    return groups


class Ring:
    """Hidden states of tokens that wait at a boundary for the components behind it.

    A queue per row. It is always emptied completely, so it never wraps.

    Attributes:
        counts: Per row, the number of waiting tokens.
        positions: Per row, their positions in the text; None if no tokens can be dropped.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        width: int,
        dtype: np.dtype,
        engine: Engine,
    ) -> None:
        self.capacity = capacity
        self.counts = [0] * batch
        self.positions: list[list[int]] | None = None
        self._engine = engine
        # Engines allocate zeros: padding must be finite, because a NaN would spread through
        # attention.
        room = min(16, capacity)
        self._slot = engine.allocate(batch * room * width * dtype.itemsize)
        self._states: Array = self._slot.array(dtype, (batch, room, width))

    def push(
        self,
        states: Array,
        counts: Sequence[int],
        positions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Adds the first ``counts[row]`` states of each row of ``[batch, new, width]``, with their
        positions."""
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
        """The largest number of waiting tokens of a row."""
        return max(self.counts)

    def states(self, start: int, stop: int) -> Array:
        """States `start` to `stop` of every row. Beyond a row's count, values are undefined but
        finite."""
        states: Array = self._states[:, start:stop]
        return states

    def crop(self, counts: Sequence[int]) -> None:
        """Limits each row to its first ``counts[row]`` tokens."""
        self.counts = [min(a, b) for a, b in zip(self.counts, counts, strict=True)]
        if self.positions is not None:
            pairs = zip(self.positions, self.counts, strict=True)
            self.positions = [places[:count] for places, count in pairs]

    def clear(self, *, positions: bool | None = None) -> None:
        """Removes all tokens.

        Args:
            positions: Whether to keep positions from now on; None: as before.
        """
        self.counts = [0] * len(self.counts)
        keeps = self.positions is not None if positions is None else positions
        self.positions = [[] for _ in self.counts] if keeps else None
