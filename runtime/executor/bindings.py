"""`Bindings`: memory for the tensors of a chain, by name.

`Bindings` owns the slots. Tensors that the chain does not make (positions, states, tensors of
earlier chains) are bound separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np

from edgeexit.bundle.manifest import Chain, Component, Tensor
from edgeexit.errors import EdgeExitError, EngineError, first_line
from edgeexit.runtime.engines.base import Array, Bound, Engine, Graph, Slot
from edgeexit.runtime.executor.slots import assign_slots, dtype_of, shape_of, stages

Sizes = Mapping[str, int]


class Bindings:
    """The tensors of one chain, in an engine's memory.

    Args:
        chain: The chain.
        components: Every component of the bundle.
        feeds: Inputs of the chain that the caller writes.
        on_host: Tensors that the host reads or writes, besides the feeds.
        engine: Allocates the memory.
        ahead: A component may be launched while answers of the one before are still needed.
        on_growth: Called when a slot is replaced by a larger one: bindings over it are no longer
            valid.
    """

    def __init__(
        self,
        chain: Chain,
        components: Mapping[str, Component],
        feeds: Sequence[Tensor],
        on_host: Set[str],
        engine: Engine,
        *,
        ahead: bool = False,
        on_growth: Callable[[], object] = lambda: None,
    ) -> None:
        self.engine = engine
        self._on_host = on_host | {tensor.name for tensor in feeds}
        order = stages(chain, components)
        self._slot_of = assign_slots(feeds, order, self._on_host, ahead=ahead)
        self._slots: dict[int, Slot] = {}
        self.tensors = {tensor.name: tensor for tensor in feeds}
        for stage in order:
            self.tensors |= {tensor.name: tensor for tensor in stage.makes}
        self._dtypes = {name: dtype_of(tensor) for name, tensor in self.tensors.items()}
        self._learnt: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._on_growth = on_growth

    def bound(self, name: str, sizes: Sizes) -> Bound:
        """A tensor's memory, dtype and shape for these axis sizes. Allocates it if necessary."""
        shape, dtype = self.shape(name, sizes), self._dtypes[name]
        return self._slot(name, math.prod(shape) * dtype.itemsize), dtype, shape

    def view(self, name: str, sizes: Sizes) -> Array:
        """A tensor as an array over its memory."""
        slot, dtype, shape = self.bound(name, sizes)
        array: Array = slot.array(dtype, shape)  # type: ignore[attr-defined]
        return array

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Shape of a tensor for these axis sizes: from the manifest, or learnt from a run."""
        shape = shape_of(self.tensors[name], sizes)
        if shape is None:
            shape = self._learnt.get((name, size_key(sizes)))
        if shape is None:
            raise EngineError(
                f"the shape of {name} is not known",
                fix="This is a bug in edgeexit; please report it with the bundle's inspect output.",
            )
        return shape

    def learn(
        self, graph: Graph, makes: Sequence[Tensor], inputs: Mapping[str, Bound], sizes: Sizes
    ) -> None:
        """Learns from one run the shapes of outputs that the manifest does not give."""
        key = size_key(sizes)
        if all(shape_of(t, sizes) is not None or (t.name, key) in self._learnt for t in makes):
            return
        shapes = graph.output_shapes(inputs)
        self._learnt |= {(t.name, key): shapes[t.name] for t in makes if t.name in shapes}

    def keep_rows(self, name: str, sizes: Sizes, rows: np.ndarray) -> None:
        """Moves the given rows (ascending) of a tensor to the front and drops the others."""
        tensor, shape = self.tensors[name], self.shape(name, sizes)
        if (axis := tensor.row_axis) is not None:
            slot = self._slots[self._slot_of[name]]
            slot.keep_rows(self._dtypes[name], shape, axis, rows)
            shape = (*shape[:axis], len(rows), *shape[axis + 1 :])
        fewer = {**sizes, "batch": len(rows)}
        if shape_of(tensor, fewer) is None:  # not learnt yet for this number of rows
            self._learnt[name, size_key(fewer)] = shape

    def _slot(self, name: str, size_bytes: int) -> Slot:
        """The slot of a tensor, of at least that size. Growing loses its contents, which are no
        longer needed then."""
        index = self._slot_of[name]
        slot = self._slots.get(index)
        if slot is None or slot.bytes < size_bytes:
            engine, host = self.engine, name in self._on_host
            try:
                grown = engine.allocate_host(size_bytes) if host else engine.allocate(size_bytes)
            except (MemoryError, ValueError, OverflowError) as error:
                raise EngineError(
                    f"{name}: not enough memory for {size_bytes} bytes",
                    fix="Run fewer rows at a time.",
                ) from error
            if slot is not None:
                self._on_growth()
            self._slots[index] = slot = grown
        return slot


def size_key(sizes: Sizes) -> tuple[tuple[str, int], ...]:
    """Axis sizes as a dictionary key."""
    return tuple(sorted(sizes.items()))


def failure(error: Exception, component: str, engine: Engine, fix: str) -> EdgeExitError:
    """The error for a component that an engine failed to run."""
    if isinstance(error, EdgeExitError):
        return error
    about = engine.describe()
    return EngineError(
        f"component {component}: {about['library']} {about['version']} failed: {first_line(error)}",
        fix=fix,
    )


__all__ = ["Bindings", "Sizes", "failure", "size_key"]
