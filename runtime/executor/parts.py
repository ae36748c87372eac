"""`Part`: one component of a chain that runs token by token, with its states and bindings.

`edgeexit.runtime.executor.session.Session` runs the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edgeexit.bundle.manifest import Call
from edgeexit.errors import EdgeExitError
from edgeexit.runtime.engines.base import Bound
from edgeexit.runtime.engines.host import row_of
from edgeexit.runtime.executor.bindings import failure
from edgeexit.runtime.executor.components import prompt_states, token_states
from edgeexit.runtime.executor.head import BINDINGS_KEPT, Answers, GraphAnswers
from edgeexit.runtime.executor.states import NewStates, TokenStates

if TYPE_CHECKING:
    from edgeexit.runtime.executor.session import Session

_Run = tuple[Callable[[], object], NewStates | None]
"""A call that runs a graph, and the new states, which must be appended after the run."""


class Part:
    """One component in a session: its states, and its bindings per number of new tokens."""

    def __init__(self, session: Session, name: str, call: Call | None = None) -> None:
        opened = session.components[name]
        self.name, self.component, self.variant = name, opened.component, opened.variant
        self._session, self._engine, self._batch = session, session.engine, session.batch
        self._bundle = session.components.bundle.path
        self._renamed: Mapping[str, str] = {} if call is None else call.inputs
        own = token_states(self.component)
        self._in_place = self.variant.states != "append"
        self.states = TokenStates(
            own, session.batch, session.capacity, self._engine, grows=not self._in_place
        )
        self._appends = bool(own) and not self._in_place
        self._token_states = own
        self._prompt_states = prompt_states(self.component)
        self._projection: tuple[Callable[[], object], NewStates] | None = None
        self._bindings: dict[tuple[int, int | None, int, int], _Run] = {}
        self._new: dict[int, NewStates] = {}
        self._state = [t for t in self.component.outputs if "new" in t.axes][-1:]
        answers = [tensor for tensor in self.component.outputs if "new" not in tensor.axes]
        self._answers = GraphAnswers(answers, session.batch, self._engine)
        self.answers: Answers = {}

    @property
    def state(self) -> str:
        """Name of the tensor that it passes to the next component."""
        tensor = self._state[0] if self._state else self.component.outputs[0]
        return tensor.name

    @property
    def reads_prompt(self) -> bool:
        """Whether it reads prompt states."""
        return bool(self._prompt_states)

    def make_prompt_states(self, new: int) -> None:
        """Runs the makers of its prompt states, if they have not run for this prompt."""
        for maker in dict.fromkeys(state.maker for state in self._prompt_states):
            self._session.gates.make(maker, self._prompt_states, new)

    def run(self, new: int, *, gaps: bool = False) -> None:
        """Runs over the new tokens at its boundary. The caller updates lengths afterwards.

        Args:
            gaps: Whether positions of new tokens do not follow each other.
        """
        # ONNX Runtime's operator takes only the first position of a run that fills empty states,
        # which it knows by `most`.
        least = new + 1 if gaps and new > 1 and not self.states.longest() else 0
        if self._row_by_row(new, gaps=gaps):
            for row, length in enumerate(self.states.lengths):
                self._session.places.write_most(max(length + new, least))
                self._call(new, row)
            return
        if least and "most" in self.variant.lengths:
            self._session.places.write_most(least)
        new_states = self._call(new, None)
        if new_states is not None:
            self.states.append(new_states)

    def _row_by_row(self, new: int, *, gaps: bool = False) -> bool:
        """Whether rows must run one by one: ONNX Runtime's operator supports several new tokens
        after a past, or with gaps between them, for a single row only."""
        several = self._batch > 1 and new > 1
        late = gaps or self.states.longest() > 0
        return several and "most" in self.variant.lengths and late

    def _call(self, new: int, row: int | None) -> NewStates | None:
        key = new, row, self.states.extent, self._session.handed.epoch
        run, new_states = self._bindings.get(key) or self._bind(key)
        try:
            run()
        except Exception as error:
            raise self.failure(error) from error
        return new_states

    def only_call(self, new: int) -> Callable[[], object] | None:
        """The single call that `run` consists of; None if `run` does more."""
        if self._appends or (new > 1 and self._row_by_row(new)):
            return None
        key = new, None, self.states.extent, self._session.handed.epoch
        run, _ = self._bindings.get(key) or self._bind(key)
        return run

    def failure(self, error: Exception) -> EdgeExitError:
        """The error for a failed run."""
        fix = f"Run `edgeexit check {self._bundle}`. If the bundle is intact, please report this, "
        fix += "with the output of `edgeexit inspect`."
        return failure(error, self.name, self._engine, fix)

    def _bind(self, key: tuple[int, int | None, int, int]) -> _Run:
        """Binds all rows, or a single row."""
        new, row, _, _ = key
        session = self._session
        sizes = {"batch": self._batch, "new": new}
        inputs = session.inputs_of(self.component.inputs, self._renamed, new)
        inputs |= {s.tensor.name: session.handed.bound[s.tensor.name] for s in self._prompt_states}
        inputs |= self.states.past() | session.places.lengths(self.variant.lengths)
        outputs: dict[str, Bound] = dict(self._answers.bound)
        for tensor in self.component.outputs:
            if "new" in tensor.axes:
                outputs[tensor.name] = session.bindings.bound(tensor.name, sizes)
        new_states = None
        if self._appends:
            new_states = self._new_states(new)
            outputs |= new_states.bound
        else:
            outputs |= self.states.present()
        if row is not None:
            inputs = {k: v if v[2] == () else row_of(v, row) for k, v in inputs.items()}
            outputs = {k: row_of(v, row) for k, v in outputs.items()}
        run = session.components.graph(self.name).bind(inputs, outputs)
        if self._answers.bound:
            run, self.answers = self._answers.around(run)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[key] = run, new_states
        return bound

    def _new_states(self, new: int) -> NewStates:
        """Memory for the states of that many new tokens per row."""
        states = self._new.get(new)
        if states is None:
            states = self._new[new] = NewStates(self._token_states, self._batch, new, self._engine)
        return states

    def project(self) -> NewStates | None:
        """Runs the projection: keys and values of tokens that skip the component, from the hidden
        states at its boundary, one per row. None if the component has no token states."""
        if not self._token_states:
            return None
        if self._projection is None:
            own = self._new_states(1)
            session = self._session
            inputs = session.inputs_of(self.component.inputs, self._renamed, 1)
            graph = session.components.projection(self.name)
            self._projection = graph.bind(inputs, own.bound), own
        run, new_states = self._projection
        run()
        return new_states


def release(session: Session | None) -> None:
    """Frees a session and its states immediately. Its parts refer to it, so otherwise only the
    garbage collector frees it. The session cannot be used afterwards."""
    if session is not None:
        vars(session).clear()


__all__ = ["Part", "release"]
