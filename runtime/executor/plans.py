"""What a chain of rows keeps for every set of sizes: its graphs bound to memory, and the order in
which a single row walks them.

`Plans` binds; `edgeexit.runtime.executor.rows` runs.
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
    scores_asked,
)
from edgeexit.runtime.executor.launch_ahead import Ahead, Share

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Mark

PLANS_KEPT = 256
"""Sizes for which a chain keeps bindings. Each takes some KiB a component: buffers are shared."""


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


class Plans:
    """The plans of a chain, opened on an engine.

    Args:
        components, chain, feeds, asked: As for `edgeexit.runtime.executor.rows.RowPass`.
        ahead: What launches components ahead, if anything does.

    Attributes:
        exits: Those that stop, in order.
        exit_behind: Per component, the number of the exit behind it and that exit; None where there
            is none.
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
        """Opens what does not yet give what is asked; if that fails, all stays as it was."""
        manifest = self._components.bundle.manifest
        opened = self._components.open(outputs_asked(manifest, self._chain, asked))
        if self._is_open and not opened:
            return
        # Scores are looked at every time, and the last exit's answers are wanted when it is come
        # to; those of the others only if a row leaves there.
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

    def step(self, plan: Plan, number: int, ask: str | None) -> Step:
        """A component and its exit bound for the plan's sizes, made to give what is asked."""
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

    def route(self, plan: Plan, decisions: Sequence[Decision]) -> Route:
        """The plan's steps laid out for these decisions; made once while they stay the same."""
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
        """Moves the rows that stay to the front of every tensor still needed."""
        for name in self._alive_after[number]:
            self._bindings.keep_rows(name, plan.sizes, stays)
        return self.plan({**plan.sizes, "batch": len(stays)})

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
        """Puts all of them on a GPU's stream; scores are there once somebody has waited."""
        for run in self._runs:
            run.put()  # type: ignore[attr-defined]


__all__ = ["Plan", "Plans", "Route", "Step"]
