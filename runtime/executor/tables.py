"""Embedding tables in the memory-mapped weight store. Only the rows that are used are read."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.blocks import Table
from edgeexit.bundle.manifest import Gather
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import InputError
from edgeexit.runtime.executor.slots import dtype_of


class Tables:
    """The tables of a bundle's weight store, mapped on first use."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._mapped: mmap.mmap | None = None
        self._known: dict[tuple[int, int], Table] = {}

    def table(self, step: Gather) -> Table:
        """The table of a step."""
        key = step.offset, step.size
        if key not in self._known:
            if self._mapped is None:
                with self._bundle.file(WEIGHTS).open("rb") as file:
                    self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._known[key] = Table.of(step, self._mapped, dtype_of(step.output))
        return self._known[key]

    def look_up(self, step: Gather, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a step's table for ids of any shape. Raises `InputError` for unknown ids."""
        check_ids(step, ids)
        return self.table(step).take(ids)


def check_ids(step: Gather, ids: NDArray[np.int64]) -> None:
    """Raises `InputError` for token ids outside the vocabulary."""
    bad = ids[(ids < 0) | (ids >= step.size)]
    if bad.size:
        raise InputError(
            f"token id {int(bad[0])} is outside the vocabulary (0 to {step.size - 1})",
            fix="Use the bundle's tokenizer.",
        )


__all__ = ["Tables", "check_ids"]
