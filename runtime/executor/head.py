"""`Head`: the head of an exit of a language model, from hidden states to tokens, logits and scores;
and `GraphAnswers`: the memory of such answers, which the unsplit graph uses too."""

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
"""Bindings that a graph keeps, one per number of new tokens or states."""

Floats = NDArray[Any]
"""Hidden states, float32 or float16 as in the manifest."""

Answers = Mapping[str, NDArray[Any]]
"""The head's answers for states ``[rows, width]``: token and scores ``[rows]``, logits."""


class GraphAnswers(Mapping[str, NDArray[Any]]):
    """Answers of a graph, by name. Large answers that few runs read, the logits, are copied from
    the device only when they are read."""

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
        """A call that runs the graph, and its answers; `name` converts the graph's output names to
        the names of the answers."""
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
    """The head of an exit: from states ``[rows, width]`` to tokens, logits and scores, under the
    exit's names. Exits with the same component share a head.

    Args:
        components: The bundle's components on an engine.
        exit_: The exit; the last component of its path is the head.
        scores: Scores to compute. Each takes time, and an engine computes all outputs of a graph.
        logits: Whether to compute logits, too.

    Raises:
        PolicyError: The exit does not have such a score.
    """

    def __init__(
        self, components: Components, exit_: Exit, scores: frozenset[str], *, logits: bool = True
    ) -> None:
        if unknown := sorted(scores - exit_.scores.keys()):
            raise PolicyError(
                f"exit {exit_.name} has no score {unknown[0]!r}",
                fix=f"Use one of {', '.join(exit_.scores)}.",
            )
        call = exit_.path[-1]
        self.scores, self.logits = scores, logits
        self._name, self._components, self._engine = call.component, components, components.engine
        component = components[call.component].component
        [self._state] = component.inputs
        tensors = {name: t for name, t in exit_.outputs.items() if logits or name != "logits"}
        tensors |= {name: exit_.scores[name] for name in scores}
        self._plain = {tensor: name for name, tensor in tensors.items()}
        self._outputs = [tensor for tensor in component.outputs if tensor.name in self._plain]
        components.open({self._name: list(self._plain)})
        self._bindings: dict[int, tuple[Callable[[], object], Array, Answers]] = {}

    def __call__(self, states: Array) -> Answers:
        """Runs on states ``[rows, width]``. The next call with the same number of rows overwrites
        the returned arrays."""
        run, place, answers = self._bindings.get(states.shape[0]) or self._bind(states.shape[0])
        place[...] = states
        run()
        return answers

    def of(self, states: Sequence[Array]) -> Answers:
        """Runs on separate states ``[width]``."""
        run, place, answers = self._bindings.get(len(states)) or self._bind(len(states))
        for row, state in enumerate(states):
            place[row] = state
        run()
        return answers

    def _bind(self, rows: int) -> tuple[Callable[[], object], Array, Answers]:
        state, engine = self._state, self._engine
        dtype, width = dtype_of(state), state.axes[-1]
        assert isinstance(width, int)
        slot = engine.allocate(rows * width * dtype.itemsize)
        outputs = GraphAnswers(self._outputs, rows, engine)
        inputs: dict[str, Bound] = {state.name: (slot, dtype, (rows, width))}
        run = self._components.graph(self._name).bind(inputs, outputs.bound)
        run, answers = outputs.around(run, self._plain.__getitem__)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[rows] = run, slot.array(dtype, (rows, width)), answers
        return bound


__all__ = ["BINDINGS_KEPT", "Answers", "Floats", "GraphAnswers", "Head"]
