"""`MadeStates`: prompt states that a component makes in its own run, such as the mean of a prompt's
states at a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from edgeexit.bundle.manifest import PromptState
from edgeexit.runtime.engines.base import Array, Bound, Engine
from edgeexit.runtime.executor.slots import dtype_of, shape_of


class MadeStates:
    """The prompt states that one component makes, a value per row.

    A run reads one copy and writes another, which `keep` copies back for rows whose prompt was in
    the run.

    Args:
        states: From the manifest; may be empty.
        batch: Rows.
        engine: The engine.

    Attributes:
        read, written: Names in the graph -> memory of all rows.
    """

    def __init__(self, states: Sequence[PromptState], batch: int, engine: Engine) -> None:
        self.read: dict[str, Bound] = {}
        self.written: dict[str, Bound] = {}
        self._pairs: list[tuple[Array, Array]] = []
        for state in states:
            assert state.made is not None
            dtype, shape = dtype_of(state.tensor), shape_of(state.tensor, {"batch": batch})
            assert shape is not None
            slots = [engine.allocate(math.prod(shape) * dtype.itemsize) for _ in range(2)]
            self.read[state.tensor.name] = (slots[0], dtype, shape)
            self.written[state.made] = (slots[1], dtype, shape)
            self._pairs.append((slots[0].array(dtype, shape), slots[1].array(dtype, shape)))

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def keep(self, rows: Iterable[int]) -> None:
        """Keeps what the last run made for these rows."""
        for row in rows:
            for read, written in self._pairs:
                read[row] = written[row]


__all__ = ["MadeStates"]
