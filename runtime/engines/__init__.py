"""Engines: what executes a segment. One module per engine library, imported when it is asked for.

An engine opens graphs; an opened graph binds buffers once and then runs many times. `Engine`,
`Graph` and `Slot` are all the chain knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeexit.runtime.buffers import HostSlot


class Place(Protocol):
    """Where a tensor lies: on which device, and from which address on."""

    device: str
    pointer: int


class Slot(Place, Protocol):
    """Memory of the device or the host that tensors take turns in."""

    @property
    def bytes(self) -> int: ...

    def keep_rows(
        self, dtype: np.dtype, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
    ) -> None: ...


Bound = tuple[Place, np.dtype, tuple[int, ...]]
"""A bound tensor: place, dtype, shape."""


class Graph(Protocol):
    """An opened graph."""

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        """Binds buffers and returns the call that runs the graph over them.

        Outputs may be left out. The call returns when the outputs are there, and
        raises the library's own exceptions, which the chain turns into `EngineError`.
        """

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Runs once to learn the shapes of outputs that the manifest leaves open."""


class Engine(Protocol):
    """An engine library on a device."""

    name: str
    features: frozenset[str]
    """What its graphs may use beyond plain ONNX; a variant's `requires` is held against it."""

    def describe(self) -> dict[str, str]:
        """Name, library, version and settings, for results and policies."""

    def open(self, path: Path, outputs: Collection[str] | None = None) -> Graph:
        """Opens a graph, with all its outputs or only some; raises `EngineError` naming it."""

    def open_all(self, graphs: Sequence[tuple[Path, Collection[str] | None]]) -> Sequence[Graph]:
        """Opens several graphs, side by side where that is faster."""

    def allocate(self, size_bytes: int) -> Slot:
        """Memory for tensors that stay between segments."""

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Host memory for what comes from the caller or goes to it."""
