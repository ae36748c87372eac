"""The one head that all exits of a decoder share: states in, tokens, logits and scores out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import PolicyError
from edgeexit.manifest import Segment, Tensor
from edgeexit.runtime.buffers import HostSlot, dtype_of
from edgeexit.runtime.engines import Bound, Engine, Graph

BINDINGS_KEPT = 1024
"""Numbers of new tokens or states for which a graph's bindings are kept."""

Floats = NDArray[Any]
"""States, float32 or float16 as the manifest says."""

Answers = Mapping[str, NDArray[Any]]
"""What the head says of states ``[rows, width]``: token and scores ``[rows]``, logits."""


@dataclass
class SharedHead:
    """The head that all exits share, opened with the scores that were asked for so far: to compute
    one takes time, and engines compute all that a graph has."""

    segment: Segment
    path: Path
    engine: Engine
    scores: frozenset[str] = frozenset()
    graph: Graph | None = None

    def outputs(self, scores: frozenset[str]) -> list[Tensor]:
        """The outputs of a graph with only these scores: token and logits beside them."""
        known = {t.name.removeprefix(self._prefix): t for t in self.segment.outputs}
        if unknown := sorted(scores - known.keys()):
            raise PolicyError(
                f"the head has no score {unknown[0]!r}",
                fix=f"Use one of {', '.join(n for n, t in known.items() if t.name != n)}.",
            )
        return [t for name, t in known.items() if t.name == name or name in scores]

    def names(self, scores: frozenset[str]) -> list[str]:
        """Names of `outputs`."""
        return [tensor.name for tensor in self.outputs(scores)]

    def open(self, scores: frozenset[str]) -> Graph:
        """The graph with these scores at least; opened again if it lacks one."""
        if self.graph is None or not scores <= self.scores:
            wanted = self.scores | scores
            graph = self.engine.open(self.path, self.names(wanted))
            self.graph, self.scores = graph, wanted
        return self.graph

    def plain_name(self, tensor: Tensor) -> str:
        """A score's own name, without the head's."""
        return tensor.name.removeprefix(self._prefix)

    @property
    def _prefix(self) -> str:
        return f"{self.segment.name}/"


class Head:
    """The shared head: states ``[rows, width]`` to tokens, logits and scores.

    Attributes:
        scores: Those that it gives.
    """

    def __init__(self, shared: SharedHead, scores: frozenset[str]) -> None:
        self._graph, self._shared = shared.open(scores), shared
        self.scores = shared.scores
        self._bindings: dict[int, tuple[Callable[[], object], Floats, dict[str, Any]]] = {}

    def __call__(self, states: Floats) -> Mapping[str, NDArray[Any]]:
        """Runs on states ``[rows, width]``. The arrays given are overwritten by the next call with
        as many rows."""
        rows = len(states)
        bound = self._bindings.get(rows)
        if bound is None:
            bound = self._bind(rows)
        run, place, made = bound
        place[...] = states
        run()
        return made

    def _bind(self, rows: int) -> tuple[Callable[[], object], Floats, dict[str, Any]]:
        [state] = self._shared.segment.inputs
        taken, width = dtype_of(state), state.axes[-1]
        assert isinstance(width, int)
        slot = HostSlot(rows * width * taken.itemsize)
        inputs: dict[str, Bound] = {state.name: (slot, taken, (rows, width))}
        outputs: dict[str, Bound] = {}
        made: dict[str, Any] = {}
        for tensor in self._shared.outputs(self.scores):
            dtype = np.dtype(tensor.dtype)
            shape = (rows, *(int(size) for size in tensor.axes[1:]))  # type: ignore[arg-type]
            own = HostSlot(int(np.prod(shape)) * dtype.itemsize)
            outputs[tensor.name] = (own, dtype, shape)
            made[self._shared.plain_name(tensor)] = own.array(dtype, shape)
        place = slot.array(taken, (rows, width))
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        self._bindings[rows] = bound = (self._graph.bind(inputs, outputs), place, made)
        return bound


__all__ = ["BINDINGS_KEPT", "Answers", "Floats", "Head", "SharedHead"]
