"""The one head that all exits of a decoder share: states in, tokens, logits and scores out; and
where the answers of a graph lie (`Made`), which unsplit gives too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Segment, Tensor
from edgeexit.errors import PolicyError
from edgeexit.runtime.engines.base import Array, Bound, Engine, Graph, Slot
from edgeexit.runtime.engines.host import fetch
from edgeexit.runtime.executor.slots import dtype_of

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

    def plain_name(self, name: str) -> str:
        """A score's own name, without the head's."""
        return name.removeprefix(self._prefix)

    @property
    def _prefix(self) -> str:
        return f"{self.segment.name}/"


class Made(Mapping[str, NDArray[Any]]):
    """What a graph answers. What most runs do not look at, logits, stays where it was computed
    until somebody asks for it."""

    def __init__(self, tensors: Sequence[Tensor], rows: int, engine: Engine) -> None:
        self.bound: dict[str, Bound] = {}
        self._arrays: dict[str, Any] = {}
        self._fetched: dict[str, NDArray[Any]] = {}
        for tensor in tensors:
            dtype = np.dtype(tensor.dtype)
            shape = (rows, *(int(size) for size in tensor.axes[1:]))  # type: ignore[arg-type]
            size_bytes = int(np.prod(shape)) * dtype.itemsize
            small = len(shape) == 1
            slot: Slot = (engine.allocate_host if small else engine.allocate)(size_bytes)
            self.bound[tensor.name] = (slot, dtype, shape)
            self._arrays[tensor.name] = slot.array(dtype, shape)

    def around(
        self, run: Callable[[], object], name: Callable[[str], str] = str
    ) -> tuple[Callable[[], object], Answers]:
        """What runs the graph, and what it then answers, by the names that `name` makes of the
        graph's own."""
        self._arrays = {name(key): array for key, array in self._arrays.items()}
        if all(isinstance(array, np.ndarray) for array in self._arrays.values()):
            return run, self._arrays

        def run_again() -> None:
            self._fetched.clear()
            run()

        return run_again, self

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._fetched:
            self._fetched[name] = fetch(self._arrays[name])
        return self._fetched[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Head:
    """The shared head: states ``[rows, width]`` to tokens, logits and scores.

    Attributes:
        scores: Those that it gives.
    """

    def __init__(self, shared: SharedHead, scores: frozenset[str]) -> None:
        self._graph, self._shared = shared.open(scores), shared
        self.scores = shared.scores
        self._bindings: dict[int, tuple[Callable[[], object], Array, Answers]] = {}

    def __call__(self, states: Array) -> Answers:
        """Runs on states ``[rows, width]``. The arrays given are overwritten by the next call with
        as many rows."""
        run, place, made = self._bindings.get(states.shape[0]) or self._bind(states.shape[0])
        place[...] = states
        run()
        return made

    def of(self, states: Sequence[Array]) -> Answers:
        """Runs on states ``[width]`` that lie apart."""
        run, place, made = self._bindings.get(len(states)) or self._bind(len(states))
        for row, state in enumerate(states):
            place[row] = state
        run()
        return made

    def _bind(self, rows: int) -> tuple[Callable[[], object], Array, Answers]:
        [state] = self._shared.segment.inputs
        engine, dtype, width = self._shared.engine, dtype_of(state), state.axes[-1]
        assert isinstance(width, int)
        slot = engine.allocate(rows * width * dtype.itemsize)
        made = Made(self._shared.outputs(self.scores), rows, engine)
        run = self._graph.bind({state.name: (slot, dtype, (rows, width))}, made.bound)
        run, answers = made.around(run, self._shared.plain_name)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[rows] = run, slot.array(dtype, (rows, width)), answers
        return bound


__all__ = ["BINDINGS_KEPT", "Answers", "Floats", "Head", "Made", "SharedHead"]
