"""`Plans`: the bound graphs of a chain, per set of axis sizes, and the order in which a single row
runs them.

This module binds; `edgeexit.runtime.executor.rows` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Exit, Tensor
from edgeexit.bundle.policy import Decision
from edgeexit.errors import EdgeExitError
from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.bindings import Bindings, failure, size_key
from edgeexit.runtime.executor.components import (
    Components,
    exit_calls,
    outputs_asked,
    scored_before_path,
    scores_asked,
)
from edgeexit.runtime.executor.launch_ahead import Ahead, Share

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Mark

PLANS_KEPT = 256
"""Sets of sizes for which a chain keeps bindings. Each takes some KiB per component; buffers are
shared."""


@dataclass
class Step:
    """A component and the exit behind it, bound for one set of sizes.

    Attributes:
        run: Runs the component and the exit.
        views: Answers, as arrays over the bound buffers; with a GPU they are on the GPU
            (`edgeexit.runtime.engines.host.fetch`).
        score: View of the requested score ``[batch]``; None if the exit is not used.
        finish: Runs the exit's path where rows stop, if `run` did not; None: `run` did.
    """

    run: Callable[[], object]
    views: dict[str, Array]
    score: NDArray[Any] | None
    finish: Callable[[], object] | None = None

    @property
    def first_score(self) -> memoryview | None:
        """The score's memory. Reading a number through it runs less code than numpy does."""
        return None if self.score is None else self.score.data


@dataclass
class Route:
    """The steps of a plan under one policy, in the order in which a single row runs them. If
    components are launched ahead, `marks` are set before and after each, and `shares` counts
    rows."""

    decisions: Sequence[Decision]
    full: list[Step]
    steps: list[tuple[Callable[[], object], memoryview | None, float]]
    marks: list[tuple[Mark, Mark]] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)


@dataclass
class Plan:
    """The bindings of a chain for one set of axis sizes: arrays of its feeds, and its steps by
    number and requested score."""

    sizes: dict[str, int]
    feeds: list[tuple[str, NDArray[Any]]]
    steps: dict[tuple[int, str | None], Step] = field(default_factory=dict)
    route: Route | None = None


class Plans:
    """The plans of a chain, opened on an engine.

    Args:
        components, chain, feeds, asked: As for `edgeexit.runtime.executor.rows.RowPass`.
        ahead: Decides which components are launched ahead; None: none are.

    Attributes:
        exits: Exits with the action ``stop``, in order.
        exit_behind: Per component, the number of the exit behind it and that exit; None: no exit.
    """

    def __init__(
        self,
        components: Components,
        chain: Chain,
        feeds: Sequence[Tensor],
        asked: Sequence[str | None],
        ahead: Ahead | None,
    ) -> None:
        self._components, self._chain, self._feeds = components, chain, list(feeds)
        self.exits = chain.stops
        self._ahead, self._engine = ahead, components.engine
        self._names = chain.components
        stops = {exit_.behind: (n, exit_) for n, exit_ in enumerate(self.exits)}
        self.exit_behind = [stops.get(name) for name in self._names]
        self._alive_after = self._carried()
        self._bindings: Bindings
        self._is_open = False
        self._plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        self.open(asked)

    def open(self, asked: Sequence[str | None]) -> None:
        """Opens components again that lack a requested output. If that fails, nothing changes."""
        manifest = self._components.bundle.manifest
        opened = self._components.open(outputs_asked(manifest, self._chain, asked))
        if self._is_open and not opened:
            return
        # Scores are always read, and so are the last exit's answers; the answers of other exits
        # only if a row stops there.
        on_host = {*self.exits[-1].outputs.values()}
        for exit_ in self.exits:
            on_host |= {*exit_.scores.values()}
        self._plans.clear()
        self._is_open = True
        self._bindings = Bindings(
            self._chain,
            manifest.components,
            self._feeds,
            on_host,
            self._engine,
            ahead=self._ahead is not None,
            on_growth=self._plans.clear,
        )

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for these sizes. If there are too many plans, the oldest are dropped."""
        key = size_key(sizes)
        plan = self._plans.get(key)
        if plan is None:
            for tensor in self._feeds:
                # Before views are created: growing a slot drops every plan.
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

    def step(self, plan: Plan, number: int, ask: str | None) -> Step:
        """A component and its exit, bound for the plan's sizes and the requested score."""
        step = plan.steps.get((number, ask))
        if step is not None:
            return step
        name, behind = self._names[number], self.exit_behind[number]
        try:
            if behind is None or (ask is None and number < len(self._names) - 1):
                step = Step(self._bind(plan, name, {}, self._alive_after[number]), {}, None)
            else:
                step = self._exit_step(plan, number, behind[1], ask)
        except Exception as error:
            raise self.failure(error, number) from error
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
        # Components launched ahead leave no moment for a path of its own.
        if self._ahead is None and ask in scored_before_path(
            exit_, self._components.bundle.manifest.components
        ):
            return Step(runs[0], views, seen, _Sequence(runs[1:]))
        return Step(runs[0] if len(runs) == 1 else _Sequence(runs), views, seen)

    def _bind(
        self, plan: Plan, name: str, renamed: Mapping[str, str], wanted: set[str]
    ) -> Callable[[], object]:
        """Binds a component by name, with the wanted outputs only."""
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

    def route(self, plan: Plan, decisions: Sequence[Decision]) -> Route:
        """The plan's steps for these decisions; kept until the decisions change."""
        route = plan.route
        if route is None or route.decisions is not decisions:
            full, steps = [], []
            for number, behind in enumerate(self.exit_behind):
                decision = None if behind is None else decisions[behind[0]]
                ask = decision.score if decision is not None and decision.consult else None
                step = self.step(plan, number, ask)
                full.append(step)
                steps.append((step.run, step.first_score, decision.threshold if decision else 0.0))
            route = plan.route = Route(decisions, full, steps)
            if self._ahead is not None and (gpu := self._engine.gpu) is not None:
                route.shares = self._ahead.shares(decisions)
                route.marks = [(gpu.mark(timed=True), gpu.mark(timed=True)) for _ in steps]
        return route

    def compact(self, plan: Plan, number: int, stays: NDArray[np.intp]) -> Plan:
        """Moves the rows that stay to the front of every tensor that is still needed."""
        for name in self._alive_after[number]:
            self._bindings.keep_rows(name, plan.sizes, stays)
        return self.plan({**plan.sizes, "batch": len(stays)})

    def _carried(self) -> list[set[str]]:
        """Per component, the tensors that later components and their exits still take."""
        known = self._components.bundle.manifest.components
        behind = exit_calls(self._chain)
        later: set[str] = set()
        carried: list[set[str]] = []
        for name in reversed(self._names):
            carried.append(set(later))
            later -= {tensor.name for tensor in known[name].outputs}
            later |= {tensor.name for tensor in known[name].inputs}
            made = {tensor.name for tensor in known[name].outputs}
            for exit_ in behind[name]:
                for call in exit_.path:
                    own = known[call.component]
                    later |= {call.inputs.get(t.name, t.name) for t in own.inputs} - made
                    made |= {tensor.name for tensor in own.outputs}
        return carried[::-1]

    def failure(self, error: Exception, number: int) -> EdgeExitError:
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
        """Puts all of them on the GPU's stream, without waiting for their scores."""
        for run in self._runs:
            run.put()  # type: ignore[attr-defined]


__all__ = ["Plan", "Plans", "Route", "Step"]
