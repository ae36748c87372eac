"""What a chain binds: places for its tensors, and segments bound over them, kept per set of sizes.

`Planner` owns the slots and the bindings. A `Plan` holds what one set of axis sizes needs, so that
running again with the same sizes binds nothing, and compacting rows is a move inside the slots and
a change of plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Exit, Segment, Tensor
from edgeexit.bundle.policy import Decision
from edgeexit.errors import EdgeExitError, EngineError, first_line
from edgeexit.runtime.engines.base import Array, Bound, Engine, Graph, Slot
from edgeexit.runtime.executor.launch_ahead import Ahead, Share
from edgeexit.runtime.executor.slots import assign_slots, dtype_of, shape_of

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Mark

PLANS_KEPT = 256
"""Sizes for which a chain keeps bindings. Each takes some KiB a segment: buffers are shared."""

EVERY_SCORE = "*"
"""Asks a step for every score of its exit."""


@dataclass
class Step:
    """A segment bound for one set of sizes.

    Attributes:
        run: Runs it.
        views: The answers it makes, as arrays over the bound buffers; on a GPU, they are there
            (`edgeexit.runtime.engines.host.fetch`).
        score: View of the score asked for ``[batch]``; None when the exit is not consulted.
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
    """The steps of a plan laid out for one policy: what a single row walks. Where segments
    are launched ahead, `marks` are set before and behind each, and `shares` counts rows."""

    decisions: Sequence[Decision]
    score: str
    full: list[Step]
    steps: list[tuple[Callable[[], object], memoryview | None, float]]
    marks: list[tuple[Mark, Mark]] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)


@dataclass
class Plan:
    """What a chain keeps for one set of axis sizes: places of its inputs, and steps by what is
    asked.
    """

    sizes: dict[str, int]
    inputs: list[tuple[str, NDArray[Any]]]
    steps: dict[tuple[int, str | None], Step] = field(default_factory=dict)
    route: Route | None = None


class Planner:
    """Slots and bindings of one chain.

    Args:
        segments: The chain's segments.
        exits: The exit behind each.
        inputs: What the chain takes.
        graphs: The opened graph of each segment.
        engine: Where device memory comes from, and what to name when it fails.
        ahead: Segments may be launched while the answers of the one before are still wanted, as
            this decides.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        exits: Sequence[Exit],
        inputs: Sequence[Tensor],
        graphs: Sequence[Graph],
        engine: Engine,
        *,
        ahead: Ahead | None = None,
    ) -> None:
        self._ahead = ahead
        self._segments, self._exits, self._graphs = segments, exits, graphs
        self._engine = engine
        self._inputs = list(inputs)
        # Scores are looked at every time, and the last exit's answers are wanted when it is come
        # to; those of the others only if a row leaves there.
        self._on_host = {tensor.name for tensor in inputs} | {*exits[-1].outputs.values()}
        for leave in exits:
            self._on_host |= {*leave.scores.values()}
        self._slot_of = assign_slots(inputs, segments, self._on_host, ahead=ahead is not None)
        self._slots: dict[int, Slot] = {}
        tensors = [*inputs, *(tensor for segment in segments for tensor in segment.outputs)]
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._dtypes = {tensor.name: dtype_of(tensor) for tensor in tensors}
        self._plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        self._learnt: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._alive_after = self._carried()

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for these sizes; the least recently made go when there are too many."""
        key = _key(sizes)
        plan = self._plans.get(key)
        if plan is None:
            for tensor in self._inputs:
                self._bound(
                    0, tensor, sizes
                )  # grows slots, which drops every plan, before views exist
            places: list[tuple[str, NDArray[Any]]] = []
            for tensor in self._inputs:
                place = self._view(tensor.name, self._bound(0, tensor, sizes))
                assert isinstance(place, np.ndarray)
                places.append((tensor.name, place))
            plan = self._plans[key] = Plan(dict(sizes), places)
            while len(self._plans) > PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
        return plan

    def step(self, plan: Plan, number: int, score: str | None) -> Step:
        """The segment bound for the plan's sizes, made to give what is asked."""
        step = plan.steps.get((number, score))
        if step is not None:
            return step
        sizes, segment, leave = plan.sizes, self._segments[number], self._exits[number]
        inputs = {t.name: self._bound(number, t, sizes) for t in segment.inputs}
        self._learn(number, inputs, sizes)
        answers: list[str] = []
        if score is not None or number == len(self._segments) - 1:
            answers = [*leave.outputs.values()]
            answers += [t for name, t in leave.scores.items() if score in (name, EVERY_SCORE)]
        wanted = {*answers, *self._alive_after[number]}
        outputs = {
            tensor.name: self._bound(number, tensor, sizes)
            for tensor in segment.outputs
            if tensor.name in wanted
        }
        try:
            run = self._graphs[number].bind(inputs, outputs)
        except Exception as error:
            raise self.failure(error, number) from error
        views = {name: self._view(name, outputs[name]) for name in answers}
        own = leave.scores.get(score) if score is not None else None
        seen = None if own is None else views[own]
        assert seen is None or isinstance(seen, np.ndarray)
        step = Step(run, views, seen)
        plan.steps[number, score] = step
        return step

    def route(self, plan: Plan, decisions: Sequence[Decision], score: str) -> Route:
        """The plan's steps laid out for these decisions; made once while they stay the same."""
        route = plan.route
        if route is None or route.decisions is not decisions or route.score != score:
            full = [
                self.step(plan, number, score if decision.consult else None)
                for number, decision in enumerate(decisions)
            ]
            steps = [
                (step.run, step.first_score, decision.threshold)
                for step, decision in zip(full, decisions, strict=True)
            ]
            route = plan.route = Route(decisions, score, full, steps)
            if self._ahead is not None and (gpu := self._engine.gpu) is not None:
                route.shares = self._ahead.shares(decisions, score)
                route.marks = [(gpu.mark(timed=True), gpu.mark(timed=True)) for _ in steps]
        return route

    def compact(self, plan: Plan, number: int, stays: NDArray[np.intp]) -> Plan:
        """Moves the rows that stay to the front of every tensor still needed."""
        fewer = {**plan.sizes, "batch": len(stays)}
        for name in self._alive_after[number]:
            tensor = self._tensors[name]
            shape = self._shape(number, tensor, plan.sizes)
            if (axis := tensor.row_axis) is not None:
                slot = self._slots[self._slot_of[name]]
                slot.keep_rows(self._dtypes[name], shape, axis, stays)
                shape = (*shape[:axis], len(stays), *shape[axis + 1 :])
            if shape_of(tensor, fewer) is None:  # its segment never ran with so few rows
                self._learnt[name, _key(fewer)] = shape
        return self.plan(fewer)

    def failure(self, error: Exception, number: int) -> EdgeExitError:
        """What to raise when the engine refused to run a segment."""
        if isinstance(error, EdgeExitError):
            return error
        engine = self._engine.describe()
        return EngineError(
            f"segment {self._segments[number].name}: {engine['library']} {engine['version']} "
            f"failed: {first_line(error)}",
            fix="Check the sizes of the inputs against `edgeexit inspect`.",
        )

    def _carried(self) -> list[list[str]]:
        """Per segment, the tensors that later segments still take."""
        later: set[str] = set()
        found: list[list[str]] = []
        for segment in reversed(self._segments):
            found.append(sorted(later))
            later = (later - {t.name for t in segment.outputs}) | {t.name for t in segment.inputs}
        return found[::-1]

    def _learn(self, number: int, inputs: Mapping[str, Bound], sizes: Mapping[str, int]) -> None:
        """Learns, by one run, the shapes of outputs whose axes the manifest leaves open."""
        key = _key(sizes)
        made = self._segments[number].outputs
        if all(shape_of(t, sizes) is not None or (t.name, key) in self._learnt for t in made):
            return
        try:
            shapes = self._graphs[number].output_shapes(inputs)
        except Exception as error:
            raise self.failure(error, number) from error
        self._learnt |= {
            (tensor.name, key): shapes[tensor.name] for tensor in made if tensor.name in shapes
        }

    def _shape(self, number: int, tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
        shape = shape_of(tensor, sizes)
        if shape is None:
            shape = self._learnt.get((tensor.name, _key(sizes)))
        if shape is None:
            raise EngineError(
                f"segment {self._segments[number].name}: the shape of {tensor.name} is not known",
                fix="This is a bug in edgeexit; please report it with the bundle's inspect output.",
            )
        return shape

    def _bound(self, number: int, tensor: Tensor, sizes: Mapping[str, int]) -> Bound:
        shape = self._shape(number, tensor, sizes)
        dtype = self._dtypes[tensor.name]
        return self._slot(tensor.name, int(np.prod(shape)) * dtype.itemsize), dtype, shape

    def _view(self, name: str, bound: Bound) -> Array:
        _, dtype, shape = bound
        array: Array = self._slots[self._slot_of[name]].array(dtype, shape)
        return array

    def _slot(self, name: str, size_bytes: int) -> Slot:
        """The slot of a tensor, at least that large. Growing loses what it held: dead by then."""
        index = self._slot_of[name]
        slot = self._slots.get(index)
        if slot is None or slot.bytes < size_bytes:
            host = name in self._on_host
            try:
                engine = self._engine
                grown = engine.allocate_host(size_bytes) if host else engine.allocate(size_bytes)
            except (MemoryError, ValueError, OverflowError) as error:
                raise EngineError(
                    f"{name} needs {size_bytes} bytes, more than there are",
                    fix="Run fewer rows at a time.",
                ) from error
            if slot is not None:
                self._plans.clear()  # their bindings point into the old memory
            self._slots[index] = slot = grown
        return slot


def _key(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))
