"""Engines: what executes a segment. One module per engine library, imported when it is asked for.

An engine opens graphs; an opened graph binds buffers once and then runs many times. `Engine`,
`Graph` and `Slot` are all the chain knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Device
    from edgeexit.runtime.engines.host import HostSlot


class Place(Protocol):
    """Where a tensor lies: on which device, and from which address on."""

    device: str
    pointer: int


class Array(Protocol):
    """An array where its engine computes: numpy's on the host, `DeviceArray` on a GPU.

    Indices are integers, slices and ``...``; what is assigned has the same shape and dtype.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...
    def reshape(self, *shape: Any) -> Any: ...


class Slot(Place, Protocol):
    """Memory of the device or the host that tensors take turns in. It begins as zeros."""

    @property
    def bytes(self) -> int: ...

    def array(
        self,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> Any:
        """The beginning of the slot as an `Array` of that form; no copy. Without strides (bytes,
        per axis), elements lie one behind the other."""

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

        Outputs may be left out. The call returns when those on the host are there; on a GPU, what
        stays on it may still be computed, in the order of the calls. It raises the library's own
        exceptions, which the chain turns into `EngineError`.
        """

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Runs once to learn the shapes of outputs that the manifest leaves open."""


class Engine(Protocol):
    """An engine library on a device."""

    name: str
    features: frozenset[str]
    """What its graphs may use beyond plain ONNX; a variant's `requires` is held against it."""
    largest: Mapping[str, int]
    """The largest sizes of named axes that its graphs take; what is not there has no limit."""
    gpu: Device | None
    """The GPU whose stream its runs are put on (they are `DeviceRun`); None on the host."""

    def describe(self) -> dict[str, str]:
        """Name, library, version and settings, for results and policies."""

    def offers(self, path: Path) -> bool:
        """Whether it can open a graph: engines that are built ahead may be of some only."""

    def open(self, path: Path, outputs: Collection[str] | None = None) -> Graph:
        """Opens a graph, with all its outputs or only some; raises `EngineError` naming it."""

    def open_all(self, graphs: Sequence[tuple[Path, Collection[str] | None]]) -> Sequence[Graph]:
        """Opens several graphs, side by side where that is faster."""

    def allocate(self, size_bytes: int) -> Slot:
        """Memory for tensors that stay between segments."""

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Host memory for what comes from the caller or goes to it."""

    def settle(self) -> None:
        """To be called before host memory is written that earlier runs read: they may not have
        come to it."""
