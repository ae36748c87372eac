"""A chain run over rows: each leaves at the exit where its own score says so.

The inner loop of every program that takes all of an input at once: run a component, look at the
score of its exit, let rows go, compact the others, go on. Only scores and the answers of rows that
leave are read from the buffers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Exit, Tensor
from edgeexit.bundle.policy import Decision
from edgeexit.errors import EdgeExitError
from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.engines.host import fetch
from edgeexit.runtime.executor.bindings import Bindings, failure, size_key
from edgeexit.runtime.executor.components import (
    EVERY_SCORE,
    Components,
    exit_calls,
    outputs_asked,
    scores_asked,
)
from edgeexit.runtime.executor.exits import Streak
from edgeexit.runtime.executor.launch_ahead import Ahead, LaunchAhead, Share

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Mark

PLANS_KEPT = 256
"""Sizes for which a chain keeps bindings. Each takes some KiB a component: buffers are shared."""

ALL = np.empty(0, np.intp)
"""Says that every row stays. Compared by identity."""


@dataclass(slots=True)
class Answers:
    """What a run gives, per row: outputs, the index of the exit taken, and its score there."""

    outputs: dict[str, NDArray[Any]]
    exits: NDArray[np.int64]
    scores: NDArray[np.float32]
    times_ns: list[int] = field(default_factory=list)


@dataclass
class Step:
    """A component and the exit behind it, bound for one set of sizes.

    Attributes:
        run: Runs it.
        views: The answers it makes, as arrays over the bound buffers; on a GPU, they are there
            (`edgeexit.runtime.engines.host.fetch`).
        score: View of the score asked for ``[batch]``; None when the exit is not asked.
    """

    run: Callable[[], object]
    views: dict[str, Array]
    score: NDArray[Any] | None

    @property
    def first_score(self) -> memoryview | None:
        """The score's memory: reading a number through it touches less code than numpy does."""
        return None if self.score is None else self.score.data


@dataclass
class Route:
    """The steps of a plan laid out for one policy: what a single row walks. Where components
    are launched ahead, `marks` are set before and behind each, and `shares` counts rows."""

    decisions: Sequence[Decision]
    full: list[Step]
    steps: list[tuple[Callable[[], object], memoryview | None, float]]
    marks: list[tuple[Mark, Mark]] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)


@dataclass
class Plan:
    """What a chain keeps for one set of axis sizes: places of its feeds, and steps by what is
    asked."""

    sizes: dict[str, int]
    feeds: list[tuple[str, NDArray[Any]]]
    steps: dict[tuple[int, str | None], Step] = field(default_factory=dict)
    route: Route | None = None


class RowPass:
    """A chain that rows pass through, opened on an engine.

    Args:
        components: The bundle's, on the engine.
        chain: The chain.
        feeds: What its components take from outside.
        asked: Per exit, what it is opened with (`outputs_asked`); whatever a later run needs
            besides is opened then, and kept.
        launch_ahead: Whether a single row's next component is put on a GPU's stream before the
            score of the one before is there (`edgeexit.runtime.executor.launch_ahead`).

    Attributes:
        exits: Those that stop, in order.
    """

    def __init__(
        self,
        components: Components,
        chain: Chain,
        feeds: Sequence[Tensor],
        asked: Sequence[str | None],
        launch_ahead: LaunchAhead = "never",
    ) -> None:
        self._components, self._chain, self._feeds = components, chain, list(feeds)
        self.exits = chain.stops
        self.independent = chain.rows == "independent"
        self._engine = components.engine
        self.ahead = None if launch_ahead == "never" else Ahead(len(self.exits), launch_ahead)
        self._names = chain.components
        stops = {exit_.behind: (n, exit_) for n, exit_ in enumerate(self.exits)}
        self._exit_behind = [stops.get(name) for name in self._names]
        self._alive_after = self._carried()
        self._ready_for: Sequence[Decision] | None = None
        self._bindings: Bindings
        self._plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        self._open(asked)

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        sizes: Mapping[str, int],
        decisions: Sequence[Decision],
        *,
        patience: int = 0,
        timed: bool = False,
    ) -> Answers:
        """Runs rows until each has left at an exit.

        Args:
            feeds: Every feed.
            sizes: Size of every symbolic axis of the feeds; `batch` counts rows.
            decisions: One per exit.
            patience: See `edgeexit.bundle.policy.Rule`.
            timed: Record the time of every component, its exit and compaction included.
        """
        if self._ready_for is not decisions:
            self._open([d.score if d.consult else None for d in decisions])
            self._ready_for = decisions
        plan = self._plan(sizes)
        self._feed(plan, feeds)
        rows = plan.sizes["batch"]
        if rows == 1 and not patience and not timed:
            if self.ahead is not None:
                return self._run_row_ahead(plan, decisions, self.ahead)
            return self._run_row(plan, decisions)
        return self._run_rows(plan, decisions, patience, timed)

    def run_all(
        self, feeds: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
    ) -> tuple[list[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]], list[int]]:
        """Runs every component for every row. Returns, per exit, copies of all outputs and all
        scores, and the time of each component with its exit, in ns."""
        self._open([EVERY_SCORE] * len(self.exits))
        plan = self._plan(sizes)
        self._feed(plan, feeds)
        found, times_ns = [], []
        for number, behind in enumerate(self._exit_behind):
            step = self._step(plan, number, EVERY_SCORE)
            started = time.perf_counter_ns()
            self._run_step(step, number)
            times_ns.append(time.perf_counter_ns() - started)
            if behind is not None:
                views = {t: fetch(view).copy() for t, view in step.views.items()}
                outputs, scores = (
                    {name: views[tensor] for name, tensor in given.items()}
                    for given in (behind[1].outputs, behind[1].scores)
                )
                found.append((outputs, scores))
        return found, times_ns

    def _open(self, asked: Sequence[str | None]) -> None:
        """Opens what does not yet give what is asked; if that fails, all stays as it was."""
        manifest = self._components.bundle.manifest
        opened = self._components.open(outputs_asked(manifest, self._chain, asked))
        if not opened and self._plans is not None and hasattr(self, "_bindings"):
            return
        # Scores are looked at every time, and the last exit's answers are wanted when it is come
        # to; those of the others only if a row leaves there.
        on_host = {*self.exits[-1].outputs.values()}
        for exit_ in self.exits:
            on_host |= {*exit_.scores.values()}
        self._plans.clear()
        self._ready_for = None
        self._bindings = Bindings(
            self._chain,
            manifest.components,
            self._feeds,
            on_host,
            self._engine,
            ahead=self.ahead is not None,
            on_growth=self._plans.clear,
        )

    def _feed(self, plan: Plan, feeds: Mapping[str, NDArray[Any]]) -> None:
        if self.ahead is not None:
            self._engine.settle()  # one launched for nothing may still read the last inputs
        for name, place in plan.feeds:
            place[...] = feeds[name]

    def _run_rows(
        self, plan: Plan, decisions: Sequence[Decision], patience: int, timed: bool
    ) -> Answers:
        rows = plan.sizes["batch"]
        answers = Answers({}, np.full(rows, -1, np.int64), np.full(rows, np.nan, np.float32))
        alive: NDArray[np.intp] | None = None  # None: all rows, in order
        streak = Streak(rows, patience) if patience else None
        last = len(self._names) - 1
        started = time.perf_counter_ns() if timed else 0
        for number, behind in enumerate(self._exit_behind):
            decision = None if behind is None else decisions[behind[0]]
            asks = decision is not None and decision.consult
            step = self._step(plan, number, decision.score if asks and decision else None)
            self._run_step(step, number)
            stays: NDArray[np.intp] | None = ALL
            if number == last:
                self._answer(answers, number, step, alive, None)
                stays = None
            elif step.score is not None and decision is not None and behind is not None:
                fires = step.score >= decision.threshold
                if streak is not None:
                    logits = fetch(step.views[behind[1].outputs["logits"]])
                    fires = fires & streak.long_enough(alive, logits)
                if fires.any():
                    stays = self._leave(answers, number, step, alive, fires)
            if stays is not None and stays is not ALL:
                plan = self._compact(plan, number, stays)
                alive = stays if alive is None else alive[stays]
            if timed:
                now = time.perf_counter_ns()
                answers.times_ns.append(now - started)
                started = now
            if stays is None:
                return answers
        raise AssertionError("the last component answers for every row left")

    def _run_row(self, plan: Plan, decisions: Sequence[Decision]) -> Answers:
        """One row, nothing but the decision between two components.

        A component's weights push Python's own code and data out of the caches, so every object
        touched between two of them is a cache miss (benchmarks/README.md, "between segments").
        """
        route = self._route(plan, decisions)
        number = 0
        try:
            for run, first_score, threshold in route.steps:
                run()
                if first_score is not None and first_score[0] >= threshold:
                    break
                number += 1
        except Exception as error:
            raise self._failure(error, number) from error
        number = min(number, len(route.steps) - 1)
        return self._answer_row(route.full[number], number)

    def _run_row_ahead(self, plan: Plan, decisions: Sequence[Decision], ahead: Ahead) -> Answers:
        """One row on a GPU, where the next component may be on the stream before the score of this
        one is there."""
        route = self._route(plan, decisions)
        last = len(route.steps) - 1
        number, launched = 0, False
        untimed: int | None = None  # a boundary whose times can be read at the next wait
        try:
            while True:
                run, first_score, threshold = route.steps[number]
                begin, end = route.marks[number]
                if not launched:
                    begin.set()
                    run.put()  # type: ignore[attr-defined]
                    end.set()
                launched = False
                if first_score is None and number < last:
                    number += 1
                    continue
                if number < last and ahead.launches(number, route.shares):
                    launched = True
                    next_begin, next_end = route.marks[number + 1]
                    next_begin.set()
                    route.steps[number + 1][0].put()  # type: ignore[attr-defined]
                    next_end.set()
                end.wait()
                if untimed is not None:
                    (_, before), (start, stop) = route.marks[untimed : untimed + 2]
                    ahead.times[untimed].add(start.ms_since(before), stop.ms_since(start))
                    untimed = None
                if number == last:
                    break
                assert first_score is not None
                leaves = bool(first_score[0] >= threshold)
                route.shares[number].count(leaves)
                if leaves:
                    break
                if not launched:
                    untimed = number
                number += 1
        except Exception as error:
            raise self._failure(error, number) from error
        return self._answer_row(route.full[number], number, beside=launched)

    def _answer_row(self, step: Step, number: int, *, beside: bool = False) -> Answers:
        exit_number, exit_ = self._exit_at(number)
        return Answers(
            outputs={
                n: fetch(step.views[t], beside=beside).copy() for n, t in exit_.outputs.items()
            },
            exits=np.array([exit_number]),
            scores=np.array([np.nan], np.float32) if step.score is None else step.score.copy(),
        )

    def _run_step(self, step: Step, number: int) -> None:
        try:
            step.run()
        except Exception as error:
            raise self._failure(error, number) from error

    def _leave(
        self,
        answers: Answers,
        number: int,
        step: Step,
        alive: NDArray[np.intp] | None,
        fires: NDArray[np.bool_],
    ) -> NDArray[np.intp] | None:
        """Answers for the rows that fire. Returns the rows that stay, `ALL`, or None for none."""
        if fires.all():
            self._answer(answers, number, step, alive, None)
            return None
        if not self.independent:
            return ALL
        self._answer(answers, number, step, alive, np.flatnonzero(fires))
        return np.flatnonzero(~fires)

    def _answer(
        self,
        answers: Answers,
        number: int,
        step: Step,
        alive: NDArray[np.intp] | None,
        rows: NDArray[np.intp] | None,
    ) -> None:
        """Copies answers of `rows` of the current batch (None: all) to their original places."""
        exit_number, exit_ = self._exit_at(number)
        if rows is None and alive is None:
            answers.outputs = {n: fetch(step.views[t]).copy() for n, t in exit_.outputs.items()}
            answers.exits[:] = exit_number
            if step.score is not None:
                answers.scores[:] = step.score
            return
        places = alive if rows is None else rows if alive is None else alive[rows]
        for name, tensor in exit_.outputs.items():
            made = fetch(step.views[tensor])
            if name not in answers.outputs:
                shape = (len(answers.exits), *made.shape[1:])
                answers.outputs[name] = np.empty(shape, made.dtype)
            answers.outputs[name][places] = made if rows is None else made[rows]
        answers.exits[places] = exit_number
        if step.score is not None:
            answers.scores[places] = step.score if rows is None else step.score[rows]

    def _exit_at(self, number: int) -> tuple[int, Exit]:
        behind = self._exit_behind[number]
        assert behind is not None
        return behind

    def _plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for these sizes; the least recently made go when there are too many."""
        key = size_key(sizes)
        plan = self._plans.get(key)
        if plan is None:
            for tensor in self._feeds:
                # Grows slots, which drops every plan, before views exist.
                self._bindings.bound(tensor.name, sizes)
            places: list[tuple[str, NDArray[Any]]] = []
            for tensor in self._feeds:
                place = self._bindings.view(tensor.name, sizes)
                assert isinstance(place, np.ndarray)
                places.append((tensor.name, place))
            plan = self._plans[key] = Plan(dict(sizes), places)
            while len(self._plans) > PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
        return plan

    def _step(self, plan: Plan, number: int, ask: str | None) -> Step:
        """A component and its exit bound for the plan's sizes, made to give what is asked."""
        step = plan.steps.get((number, ask))
        if step is not None:
            return step
        name, behind = self._names[number], self._exit_behind[number]
        try:
            if behind is None or (ask is None and number < len(self._names) - 1):
                step = Step(self._bind(plan, name, {}, self._alive_after[number]), {}, None)
            else:
                step = self._exit_step(plan, number, behind[1], ask)
        except Exception as error:
            raise self._failure(error, number) from error
        plan.steps[number, ask] = step
        return step

    def _exit_step(self, plan: Plan, number: int, exit_: Exit, ask: str | None) -> Step:
        scores = {n: exit_.scores[n] for n in scores_asked(exit_, ask or "")}
        answers = {*exit_.outputs.values(), *scores.values()}
        alive = self._alive_after[number]
        path_takes: set[str] = set()
        for call in exit_.path:
            own = self._components.bundle.manifest.components[call.component]
            path_takes |= {call.inputs.get(t.name, t.name) for t in own.inputs}
        runs = [self._bind(plan, self._names[number], {}, {*alive, *answers, *path_takes})]
        for call in exit_.path:
            runs.append(self._bind(plan, call.component, call.inputs, answers | path_takes))
        views = {name: self._bindings.view(name, plan.sizes) for name in sorted(answers)}
        seen = views[scores[ask]] if ask in scores else None
        assert seen is None or isinstance(seen, np.ndarray)
        return Step(runs[0] if len(runs) == 1 else _Sequence(runs), views, seen)

    def _bind(
        self, plan: Plan, name: str, renamed: Mapping[str, str], wanted: set[str]
    ) -> Callable[[], object]:
        """A component bound by name; of its outputs those that are wanted."""
        component = self._components.bundle.manifest.components[name]
        bindings, graph = self._bindings, self._components.graph(name)
        inputs = {
            tensor.name: bindings.bound(renamed.get(tensor.name, tensor.name), plan.sizes)
            for tensor in component.inputs
        }
        given = self._components[name].outputs
        makes = [tensor for tensor in component.outputs if tensor.name in given]
        bindings.learn(graph, makes, inputs, plan.sizes)
        outputs = {t.name: bindings.bound(t.name, plan.sizes) for t in makes if t.name in wanted}
        return graph.bind(inputs, outputs)

    def _route(self, plan: Plan, decisions: Sequence[Decision]) -> Route:
        """The plan's steps laid out for these decisions; made once while they stay the same."""
        route = plan.route
        if route is None or route.decisions is not decisions:
            full, steps = [], []
            for number, behind in enumerate(self._exit_behind):
                decision = None if behind is None else decisions[behind[0]]
                ask = decision.score if decision is not None and decision.consult else None
                step = self._step(plan, number, ask)
                full.append(step)
                steps.append((step.run, step.first_score, decision.threshold if decision else 0.0))
            route = plan.route = Route(decisions, full, steps)
            if self.ahead is not None and (gpu := self._engine.gpu) is not None:
                route.shares = self.ahead.shares(decisions)
                route.marks = [(gpu.mark(timed=True), gpu.mark(timed=True)) for _ in steps]
        return route

    def _compact(self, plan: Plan, number: int, stays: NDArray[np.intp]) -> Plan:
        """Moves the rows that stay to the front of every tensor still needed."""
        for name in self._alive_after[number]:
            self._bindings.keep_rows(name, plan.sizes, stays)
        return self._plan({**plan.sizes, "batch": len(stays)})

    def _carried(self) -> list[set[str]]:
        """Per component, the tensors that later ones, and the paths of their exits, still take."""
        known = self._components.bundle.manifest.components
        behind = exit_calls(self._chain)
        later: set[str] = set()
        found: list[set[str]] = []
        for name in reversed(self._names):
            found.append(set(later))
            later -= {tensor.name for tensor in known[name].outputs}
            later |= {tensor.name for tensor in known[name].inputs}
            made = {tensor.name for tensor in known[name].outputs}
            for exit_ in behind[name]:
                for call in exit_.path:
                    own = known[call.component]
                    later |= {call.inputs.get(t.name, t.name) for t in own.inputs} - made
                    made |= {tensor.name for tensor in own.outputs}
        return found[::-1]

    def _failure(self, error: Exception, number: int) -> EdgeExitError:
        return failure(
            error,
            self._names[number],
            self._engine,
            "Check the sizes of the inputs against `edgeexit inspect`.",
        )


class _Sequence:
    """A component and its exit's path, as one run."""

    def __init__(self, runs: Sequence[Callable[[], object]]) -> None:
        self._runs = runs

    def __call__(self) -> None:
        for run in self._runs:
            run()

    def put(self) -> None:
        """Puts all of them on a GPU's stream; scores are there once somebody has waited."""
        for run in self._runs:
            run.put()  # type: ignore[attr-defined]


__all__ = ["Answers", "RowPass"]
