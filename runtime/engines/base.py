"""The interface of engines: `Engine`, `Graph` and `Slot`.

An engine opens graphs. An opened graph binds buffers once and then runs many times. The executor
uses engine libraries only through this interface.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Device
    from edgeexit.runtime.engines.host import HostSlot

Pool = Literal["brief", "blocking", "spinning", "process"]
Threads = int | Pool
"""Threads of an engine, as `edgeexit.runtime.load` takes them: a number, or a kind of pool."""
POOLS: tuple[str, ...] = get_args(Pool)


class Place(Protocol):
    """Where a tensor is stored: device and address."""

    device: str
    pointer: int


class Array(Protocol):
    """An array in an engine's memory: numpy's on the host, `DeviceArray` on a GPU.

    Indices are integers, slices and ``...``; assigned values have the same shape and dtype.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...
    def reshape(self, *shape: Any) -> Any: ...


class Slot(Place, Protocol):
    """Device or host memory that several tensors use in turn. Initially zero."""

    @property
    def bytes(self) -> int: ...

    def array(
        self,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> Any:
        """An `Array` over the start of the slot, without a copy. `strides` are in bytes per axis;
        None means contiguous."""

    def keep_rows(
        self, dtype: np.dtype, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
    ) -> None:
        """Moves the given rows (ascending) along an axis to the front."""


Bound = tuple[Place, np.dtype, tuple[int, ...]]
"""A bound tensor: place, dtype, shape."""


class Graph(Protocol):
    """An opened graph."""

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        """Binds buffers and returns the call that runs the graph over them.

        Outputs may be left out. The call returns when all outputs on the host are written; outputs
        on a GPU may still be in progress, in the order of the calls. It raises the library's own
        exceptions, which the executor turns into `EngineError`.
        """

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Shapes of all outputs, where the manifest does not give them. May run the graph."""


class Engine(Protocol):
    """An engine library on a device."""

    name: str
    features: frozenset[str]
    """What its graphs may use beyond plain ONNX: a variant's `requires` must be among them."""
    largest: Mapping[str, int]
    """Largest size per named axis that its graphs accept; other axes are not limited."""
    gpu: Device | None
    """The GPU on whose stream graphs run (bound calls are then `DeviceRun`); None on the host."""

    def describe(self) -> dict[str, str]:
        """Name, library, version and settings, for results and policies."""

    def offers(self, path: Path) -> bool:
        """Whether it can open a graph. TensorRT engines may have been built for some graphs
        only."""

    def open(self, path: Path, outputs: Collection[str] | None = None) -> Graph:
        """Opens a graph, with all its outputs or only some. Raises `EngineError` with its name."""

    def open_all(self, graphs: Sequence[tuple[Path, Collection[str] | None]]) -> Sequence[Graph]:
        """Opens several graphs, in parallel where that is faster."""

    def allocate(self, size_bytes: int, *, sparse: bool = False) -> Slot:
        """Memory for tensors that components pass to each other.

        Args:
            size_bytes: Its size.
            sparse: Part of it may never be used, as in caches: on the host, unused pages then take
                no memory.
        """

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Host memory for tensors that the caller reads or writes."""

    def settle(self) -> None:
        """Waits until earlier runs have read their host memory. Call it before writing to that
        memory."""
