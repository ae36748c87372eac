"""One component of a chain that runs token by token: its states, and its graph bound to memory.

A `Session` runs them.
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
from edgeexit.runtime.executor.head import BINDINGS_KEPT, Answers, Made
from edgeexit.runtime.executor.states import NewStates, TokenStates

if TYPE_CHECKING:
    from edgeexit.runtime.executor.session import Session

_REPORT = (
    "`edgeexit check BUNDLE` tells whether it is whole; if so, please report this, with the output "
    "of `edgeexit inspect`."
)

_Run = tuple[Callable[[], object], NewStates | None]
"""What runs a graph, and what new tokens add, which is then to be appended."""


class Part:
    """One component in a session: its states, and bindings per number of new tokens."""

    def __init__(self, session: Session, name: str, call: Call | None = None) -> None:
        opened = session.components[name]
        self.name, self.component, self.variant = name, opened.component, opened.variant
        self._session, self._engine, self._batch = session, session.engine, session.batch
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
        self._made = Made(answers, session.batch, self._engine)
        self.answers: Answers = {}

    @property
    def state(self) -> str:
        """The tensor that it hands on."""
        tensor = self._state[0] if self._state else self.component.outputs[0]
        return tensor.name

    @property
    def reads_prompt(self) -> bool:
        """Whether it reads what is made once for a prompt."""
        return bool(self._prompt_states)

    def make_prompt_states(self, new: int) -> None:
        """Lets the makers of its prompt states run, where they have not yet for this prompt."""
        for maker in dict.fromkeys(state.maker for state in self._prompt_states):
            self._session.gates.make(maker, self._prompt_states, new)

    def run(self, new: int) -> None:
        """Runs over the boundary; lengths are those before it."""
        if self._row_by_row(new):
            for row, length in enumerate(self.states.lengths):
                self._session.places.write_most(length + new)
                self._call(new, row)
            return
        made = self._call(new, None)
        if made is not None:
            self.states.append(made)

    def _row_by_row(self, new: int) -> bool:
        """ONNX Runtime's operator takes several new tokens behind a past for one row only."""
        several = self._batch > 1 and new > 1
        return several and "most" in self.variant.lengths and self.states.longest() > 0

    def _call(self, new: int, row: int | None) -> NewStates | None:
        key = new, row, self.states.extent, self._session.handed.epoch
        run, made = self._bindings.get(key) or self._bind(key)
        try:
            run()
        except Exception as error:
            raise self.failure(error) from error
        return made

    def only_call(self, new: int) -> Callable[[], object] | None:
        """The call that is all of `run`; None where there is more to do."""
        if self._appends or (new > 1 and self._row_by_row(new)):
            return None
        key = new, None, self.states.extent, self._session.handed.epoch
        run, _ = self._bindings.get(key) or self._bind(key)
        return run

    def failure(self, error: Exception) -> EdgeExitError:
        """What to raise when the engine fails."""
        return failure(error, self.name, self._engine, _REPORT)

    def _bind(self, key: tuple[int, int | None, int, int]) -> _Run:
        """Binds all rows, or one of them alone."""
        new, row, _, _ = key
        session = self._session
        sizes = {"batch": self._batch, "new": new}
        inputs = session.inputs_of(self.component.inputs, self._renamed, new)
        inputs |= {s.tensor.name: session.handed.bound[s.tensor.name] for s in self._prompt_states}
        inputs |= self.states.past() | session.places.lengths(self.variant.lengths)
        outputs: dict[str, Bound] = dict(self._made.bound)
        for tensor in self.component.outputs:
            if "new" in tensor.axes:
                outputs[tensor.name] = session.bindings.bound(tensor.name, sizes)
        made = None
        if self._appends:
            made = self._new_states(new)
            outputs |= made.bound
        else:
            outputs |= self.states.present()
        if row is not None:
            inputs = {k: v if v[2] == () else row_of(v, row) for k, v in inputs.items()}
            outputs = {k: row_of(v, row) for k, v in outputs.items()}
        run = session.components.graph(self.name).bind(inputs, outputs)
        if self._made.bound:
            run, self.answers = self._made.around(run)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[key] = run, made
        return bound

    def _new_states(self, new: int) -> NewStates:
        """Where what that many new tokens per row add goes."""
        made = self._new.get(new)
        if made is None:
            made = self._new[new] = NewStates(self._token_states, self._batch, new, self._engine)
        return made

    def project(self) -> NewStates | None:
        """What the boundary's states, one per row, leave if they skip the component; None where it
        keeps nothing of tokens."""
        if not self._token_states:
            return None
        if self._projection is None:
            own = self._new_states(1)
            session = self._session
            inputs = session.inputs_of(self.component.inputs, self._renamed, 1)
            graph = session.components.projection(self.name)
            self._projection = graph.bind(inputs, own.bound), own
        run, made = self._projection
        run()
        return made


def release(session: Session | None) -> None:
    """Frees a session and its states now: its parts refer back to it, so it would otherwise live
    until the garbage collector comes. It cannot be used again."""
    if session is not None:
        vars(session).clear()


__all__ = ["Part", "release"]
