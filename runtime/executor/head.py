"""Heads of exits that answer token by token: states in, tokens, logits and scores out; and where
the answers of a graph are stored (`Made`), which unsplit gives too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Exit, Tensor
from edgeexit.errors import PolicyError
from edgeexit.runtime.engines.base import Array, Bound, Engine, Slot
from edgeexit.runtime.engines.host import fetch
from edgeexit.runtime.executor.components import Components
from edgeexit.runtime.executor.slots import dtype_of

BINDINGS_KEPT = 1024
"""Numbers of new tokens or states for which a graph's bindings are kept."""

Floats = NDArray[Any]
"""States, float32 or float16 as the manifest says."""

Answers = Mapping[str, NDArray[Any]]
"""What the head says of states ``[rows, width]``: token and scores ``[rows]``, logits."""


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
    """The head of an exit: states ``[rows, width]`` to tokens, logits and scores, by the names that
    the exit gives them. Exits that share a component share it, too.

    Args:
        components: The bundle's, on an engine.
        exit_: The exit; the last component of its path is the head.
        scores: Those that it shall give: to compute one takes time, and engines compute all that a
            graph has.

    Raises:
        PolicyError: The exit does not have such a score.
    """

    def __init__(self, components: Components, exit_: Exit, scores: frozenset[str]) -> None:
        if unknown := sorted(scores - exit_.scores.keys()):
            raise PolicyError(
                f"exit {exit_.name} has no score {unknown[0]!r}",
                fix=f"Use one of {', '.join(exit_.scores)}.",
            )
        call = exit_.path[-1]
        self.scores = scores
        self._name, self._components, self._engine = call.component, components, components.engine
        component = components[call.component].component
        [self._state] = component.inputs
        tensors = exit_.outputs | {name: exit_.scores[name] for name in scores}
        self._plain = {tensor: name for name, tensor in tensors.items()}
        self._outputs = [tensor for tensor in component.outputs if tensor.name in self._plain]
        components.open({self._name: list(self._plain)})
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
        state, engine = self._state, self._engine
        dtype, width = dtype_of(state), state.axes[-1]
        assert isinstance(width, int)
        slot = engine.allocate(rows * width * dtype.itemsize)
        made = Made(self._outputs, rows, engine)
        inputs: dict[str, Bound] = {state.name: (slot, dtype, (rows, width))}
        run = self._components.graph(self._name).bind(inputs, made.bound)
        run, answers = made.around(run, self._plain.__getitem__)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[rows] = run, slot.array(dtype, (rows, width)), answers
        return bound


__all__ = ["BINDINGS_KEPT", "Answers", "Floats", "Head", "Made"]
