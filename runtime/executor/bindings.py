"""What a chain binds: memory for its tensors, and components bound over it by name.

`Bindings` owns the slots. A tensor is found by its name, whichever component makes it; what the
chain does not make (positions, states, what an earlier chain handed on) is bound beside it.
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
    """The tensors of one chain, in memory of an engine.

    Args:
        chain: The chain.
        components: Every component of the bundle.
        feeds: What the chain is given from outside into memory of its own.
        on_host: Tensors that the host reads or writes, besides the feeds.
        engine: Where memory comes from, and what to name when it fails.
        ahead: A component may be launched while answers of the one before are still wanted.
        on_growth: Called when memory is replaced by larger: what was bound over it is no longer
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
        """Where a tensor lies, for these axis sizes. Makes room for it."""
        shape, dtype = self.shape(name, sizes), self._dtypes[name]
        return self._slot(name, math.prod(shape) * dtype.itemsize), dtype, shape

    def view(self, name: str, sizes: Sizes) -> Array:
        """A tensor as an array over its memory."""
        slot, dtype, shape = self.bound(name, sizes)
        array: Array = slot.array(dtype, shape)  # type: ignore[attr-defined]
        return array

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Shape of a tensor for these axis sizes, where they say it or a run has told it."""
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
        """Learns, by one run, the shapes of outputs whose axes the manifest leaves open."""
        key = size_key(sizes)
        if all(shape_of(t, sizes) is not None or (t.name, key) in self._learnt for t in makes):
            return
        shapes = graph.output_shapes(inputs)
        self._learnt |= {(t.name, key): shapes[t.name] for t in makes if t.name in shapes}

    def keep_rows(self, name: str, sizes: Sizes, rows: np.ndarray) -> None:
        """Moves the given rows (ascending) of a tensor to the front; it then holds only those."""
        tensor, shape = self.tensors[name], self.shape(name, sizes)
        if (axis := tensor.row_axis) is not None:
            slot = self._slots[self._slot_of[name]]
            slot.keep_rows(self._dtypes[name], shape, axis, rows)
            shape = (*shape[:axis], len(rows), *shape[axis + 1 :])
        fewer = {**sizes, "batch": len(rows)}
        if shape_of(tensor, fewer) is None:  # its component never ran with so few rows
            self._learnt[name, size_key(fewer)] = shape

    def _slot(self, name: str, size_bytes: int) -> Slot:
        """The slot of a tensor, at least that large. Growing loses what it held: dead by then."""
        index = self._slot_of[name]
        slot = self._slots.get(index)
        if slot is None or slot.bytes < size_bytes:
            engine, host = self.engine, name in self._on_host
            try:
                grown = engine.allocate_host(size_bytes) if host else engine.allocate(size_bytes)
            except (MemoryError, ValueError, OverflowError) as error:
                raise EngineError(
                    f"{name} needs {size_bytes} bytes, more than there are",
                    fix="Run fewer rows at a time.",
                ) from error
            if slot is not None:
                self._on_growth()
            self._slots[index] = slot = grown
        return slot


def size_key(sizes: Sizes) -> tuple[tuple[str, int], ...]:
    """Axis sizes as a key of dictionaries."""
    return tuple(sorted(sizes.items()))


def failure(error: Exception, component: str, engine: Engine, fix: str) -> EdgeExitError:
    """What to raise when an engine refused to run a component."""
    if isinstance(error, EdgeExitError):
        return error
    about = engine.describe()
    return EngineError(
        f"component {component}: {about['library']} {about['version']} failed: {first_line(error)}",
        fix=fix,
    )


__all__ = ["Bindings", "Sizes", "failure", "size_key"]
