"""`Part`: one component of a chain that runs token by token, with its states and bindings.

`edgeexit.runtime.executor.session.Session` runs the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgeexit.bundle.manifest import Call
from edgeexit.errors import EdgeExitError
from edgeexit.runtime.engines.base import Bound
from edgeexit.runtime.engines.host import rows_of
from edgeexit.runtime.executor.bindings import failure
from edgeexit.runtime.executor.blocks import Block, have_gaps
from edgeexit.runtime.executor.components import made_by_others, prompt_states, token_states
from edgeexit.runtime.executor.head import BINDINGS_KEPT, Answers, GraphAnswers
from edgeexit.runtime.executor.made_states import MadeStates
from edgeexit.runtime.executor.states import NewStates, TokenStates

if TYPE_CHECKING:
    from edgeexit.runtime.executor.session import Session

_Run = tuple[Callable[[], object], NewStates | None]
"""A call that runs a graph, and the new states, which must be appended after the run."""


class _Group(NamedTuple):
    """Rows `start` to before `stop` of a batch, and how many of their new tokens run. Only a single
    row can run fewer tokens than there are at the boundary: those of several would not lie one
    after the other."""

    start: int
    stop: int
    tokens: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


_Key = tuple[_Group | None, int, int, int]
"""Rows (None: all), new tokens per row at the boundary, extent of the states, epoch of the tensors
of earlier steps."""


def _part_of(bound: Bound, group: _Group, token_axis: int | None) -> Bound:
    """A group's part of a tensor. What has no axes is the same for all rows."""
    if bound[2] == ():
        return bound
    place, dtype, shape = rows_of(bound, group.start, group.stop)
    if token_axis is not None:
        shape = (*shape[:token_axis], group.tokens, *shape[token_axis + 1 :])
    return place, dtype, shape


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
        self._prompt_states = made_by_others(self.component)
        made = [state for state in prompt_states(self.component) if state.made]
        self.made = MadeStates(made, session.batch, self._engine)
        self._projections: dict[int, tuple[Callable[[], object], NewStates]] = {}
        self._bindings: dict[_Key, _Run] = {}
        self._new: dict[tuple[int, int], NewStates] = {}
        scores = session.token_scores.tensors
        states = [t for t in self.component.outputs if "new" in t.axes and t.name not in scores]
        self._state = states[-1:]
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
        """Whether it reads prompt states, or makes some."""
        return bool(self._prompt_states or self.made)

    def make_prompt_states(self, new: int) -> None:
        """Runs the makers of its prompt states, if they have not run for this prompt."""
        for maker in dict.fromkeys(state.maker for state in self._prompt_states):
            self._session.gates.make(maker, self._prompt_states, new)

    def run(self, new: int, *, gaps: bool = False, counts: Sequence[int] | None = None) -> None:
        """Runs over the new tokens at its boundary. The caller updates lengths afterwards.

        Args:
            gaps: Whether positions of new tokens do not follow each other.
            counts: Per row, the number of real tokens, if a gate dropped some; None: not known.
        """
        groups = self._groups(new, counts, gaps=gaps)
        if groups is None:
            if gaps:
                self.write_gaps(new)
            new_states = self._call(None, new)
            if new_states is not None:
                self.states.append(new_states)
            return
        least = int(gaps and self._fills_empty(new))
        for group in groups:
            rows = range(group.start, group.stop)
            longest = max(self.states.lengths[row] for row in rows)
            self._session.places.write_rows(
                rows, self.states.lengths, group.tokens, longest + least
            )
            new_states = self._call(group, new)
            if new_states is not None:
                self.states.append(new_states, rows, first=group.start)

    def write_gaps(self, new: int) -> None:
        """Writes, behind all else, what a run needs whose positions do not follow each other."""
        if "most" in self.variant.lengths and self._fills_empty(new):
            self._session.places.write_most(new + 1)

    def _fills_empty(self, new: int) -> bool:
        """Whether several tokens fill empty states. Of such a run, which it knows by ``most``, ONNX
        Runtime's operator takes the first position only, so ``most`` must be larger."""
        return new > 1 and not self.states.longest()

    def _groups(self, new: int, counts: Sequence[int] | None, *, gaps: bool) -> list[_Group] | None:
        """The rows that run together, for a run of more than one call; None: all rows in one call.

        Where a gate dropped tokens of some rows only, these rows run alone, over few tokens.
        """
        if self._row_by_row(new, gaps=gaps):
            own = [new] * self._batch if counts is None else counts
            return [_Group(row, row + 1, count) for row, count in enumerate(own) if count]
        if counts is None or min(counts) > new // 2:
            return None
        groups: list[_Group] = []
        for row, count in enumerate(counts):
            if count > new // 2 and groups and groups[-1].stop == row and groups[-1].tokens == new:
                groups[-1] = _Group(groups[-1].start, row + 1, new)
            elif count:
                groups.append(_Group(row, row + 1, new if count > new // 2 else count))
        return groups

    def _row_by_row(self, new: int, *, gaps: bool = False) -> bool:
        """Whether rows must run one by one: ONNX Runtime's operator supports several new tokens
        after a past, or with gaps between them, for a single row only."""
        several = self._batch > 1 and new > 1
        late = gaps or self.states.longest() > 0
        return several and "most" in self.variant.lengths and late

    def _call(self, group: _Group | None, new: int) -> NewStates | None:
        key = group, new, self.states.extent, self._session.handed.epoch
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
        key = None, new, self.states.extent, self._session.handed.epoch
        run, _ = self._bindings.get(key) or self._bind(key)
        return run

    def forget_bindings(self) -> None:
        """Binds again at the next run, as its graph was opened again."""
        self._bindings.clear()

    def failure(self, error: Exception) -> EdgeExitError:
        """The error for a failed run."""
        fix = f"Run `edgeexit check {self._bundle}`. If the bundle is intact, please report this, "
        fix += "with the output of `edgeexit inspect`."
        return failure(error, self.name, self._engine, fix)

    def _bind(self, key: _Key) -> _Run:
        """Binds all rows, or some."""
        group, new, _, _ = key
        session = self._session
        sizes = {"batch": self._batch, "new": new}
        inputs = session.inputs_of(self.component.inputs, self._renamed, new)
        inputs |= {s.tensor.name: session.handed.bound[s.tensor.name] for s in self._prompt_states}
        inputs |= self.made.read | self.states.past()
        inputs |= session.places.lengths(self.variant.lengths)
        outputs: dict[str, Bound] = self._answers.bound | self.made.written
        graph = session.components.graph(self.name)
        given = session.components[self.name].outputs
        for tensor in self.component.outputs:
            if "new" in tensor.axes and tensor.name in given:
                outputs[tensor.name] = session.bindings.bound(tensor.name, sizes)
        if not self._appends:
            outputs |= self.states.present()
        if group is not None:
            per_token = [*self.component.inputs, *self.component.outputs]
            axes = {t.name: t.axes.index("new") for t in per_token if "new" in t.axes}
            inputs = {k: _part_of(v, group, axes.get(k)) for k, v in inputs.items()}
            outputs = {k: _part_of(v, group, axes.get(k)) for k, v in outputs.items()}
        new_states = None
        if self._appends:
            rows, count = (self._batch, new) if group is None else (group.rows, group.tokens)
            new_states = self._new_states(rows, count)
            outputs |= new_states.bound
        run = graph.bind(inputs, outputs)
        if self._answers.bound:
            run, self.answers = self._answers.around(run)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[key] = run, new_states
        return bound

    def _new_states(self, rows: int, count: int) -> NewStates:
        """Memory for the states of so many new tokens per row."""
        states = self._new.get((rows, count))
        if states is None:
            states = NewStates(self._token_states, rows, count, self._engine)
            self._new[rows, count] = states
        return states

    def project(self, new: int) -> NewStates | None:
        """Runs the projection: keys and values of tokens that skip the component, from the states
        at its boundary. None if the component has no token states."""
        if not self._token_states:
            return None
        bound = self._projections.get(new)
        if bound is None:
            session = self._session
            own = NewStates(self._token_states, self._batch, new, self._engine)
            inputs = session.inputs_of(self.component.inputs, self._renamed, new)
            graph = session.components.projection(self.name)
            while len(self._projections) >= BINDINGS_KEPT:
                self._projections.pop(next(iter(self._projections)))
            bound = self._projections[new] = graph.bind(inputs, own.bound), own
        run, new_states = bound
        run()
        return new_states


def alike(one: Part, other: Part, *, gaps: bool) -> bool:
    """Whether the states of two parts have the same lengths and, with `gaps`, the same gaps."""
    same = one.states.lengths == other.states.lengths
    return same and (not gaps or one.states.gaps == other.states.gaps)


def only_calls(parts: Sequence[Part], new: int) -> list[Callable[[], object]]:
    """The only call of each part (`Part.only_call`); none if a part does more."""
    calls = []
    for part in parts:
        call = part.only_call(new)
        if call is None:
            return []
        calls.append(call)
    return calls


def run_calls(
    session: Session, parts: Sequence[Part], calls: Sequence[Callable[[], object]], block: Block
) -> None:
    """Runs parts of a session by their only calls (`Part.only_call`)."""
    start, gaps = 0, have_gaps(block)
    while start < len(parts):
        stop = start + 1  # behind a gate that dropped tokens, states are shorter
        while stop < len(parts) and alike(parts[start], parts[stop], gaps=session.ragged):
            stop += 1
        session.place(parts[start], block)
        if gaps:
            for part in parts[start:stop]:
                part.write_gaps(block.new)
        run_alike(parts[start:stop], calls[start:stop], block.counts)
        if block.positions is not None:
            for part in parts[start:stop]:
                part.states.find_gaps(block.counts, block.positions)
        start = stop


def run_alike(
    parts: Sequence[Part], calls: Sequence[Callable[[], object]], added: Sequence[int]
) -> None:
    """Runs parts whose states are alike, and advances their states.

    Args:
        calls: The only call of each (`Part.only_call`).
        added: Per row, the number of real tokens.
    """
    states = parts[0].states
    done = 0
    try:
        for call in calls:
            call()
            done += 1
    except Exception as error:
        raise parts[done].failure(error) from error
    states.advance(added)
    for part in parts:  # a new list, so parts can share it
        part.states.lengths = states.lengths


def release(session: Session | None) -> None:
    """Frees a session and its states immediately. Its parts refer to it, so otherwise only the
    garbage collector frees it. The session cannot be used afterwards."""
    if session is not None:
        vars(session).clear()


__all__ = ["Part", "alike", "only_calls", "release", "run_alike", "run_calls"]
