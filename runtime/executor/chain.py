"""A chain: segments opened on an engine and run in order, rows leaving where their score says so.

`Chain.run` is the inner loop of every program: run a segment, look at its exit's score, let rows
go, compact the others, go on. Only scores and the answers of rows that leave are read from the
buffers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain as ChainManifest
from edgeexit.bundle.manifest import Exit, Segment, Tensor
from edgeexit.bundle.policy import Decision
from edgeexit.bundle.reader import Bundle, Unchanged
from edgeexit.errors import BundleError, EngineError
from edgeexit.runtime.engines.base import Engine, Graph
from edgeexit.runtime.engines.host import fetch
from edgeexit.runtime.executor.bindings import EVERY_SCORE, Plan, Planner, Step
from edgeexit.runtime.executor.launch_ahead import Ahead, LaunchAhead


@dataclass(slots=True)
class Answers:
    """What a run gives, per row: outputs, the index of the exit taken, and its score there."""

    outputs: dict[str, NDArray[Any]]
    exits: NDArray[np.int64]
    scores: NDArray[np.float32]
    segments_run: int = 0
    times_ns: list[int] = field(default_factory=list)


class Chain:
    """Segments of one chain, opened on an engine.

    Args:
        bundle: The opened bundle.
        manifest: The chain.
        inputs: What its first segments take: the program's inputs.
        engine: What executes it.
        needs: Per exit, the score that its segment is opened with, None (no exit head at all) or
            `EVERY_SCORE`; whatever a later run needs besides is opened then, and kept.
        launch_ahead: Whether a single row's next segment is put on a GPU's stream before the score
            of the one before is there (`edgeexit.runtime.executor.launch_ahead`).
    """

    def __init__(
        self,
        bundle: Bundle,
        manifest: ChainManifest,
        inputs: Sequence[Tensor],
        engine: Engine,
        needs: Sequence[str | None],
        launch_ahead: LaunchAhead = "never",
    ) -> None:
        self.segments: list[Segment] = manifest.segments
        self.independent = manifest.rows == "independent"
        self.exits: list[Exit] = []
        for segment in self.segments:
            stops = [leave for leave in segment.exits if leave.action == "stop"]
            if len(stops) != 1:
                raise BundleError(
                    f"segment {segment.name} has {len(stops)} exits; one pass needs "
                    "exactly one behind each segment",
                    fix="Export again.",
                )
            self.exits += stops
        self._inputs = inputs
        self._engine = engine
        self.ahead = None if launch_ahead == "never" else Ahead(len(self.exits), launch_ahead)
        self._store = Unchanged(bundle)
        self._names = [_usable_graph(segment) for segment in self.segments]
        self._paths = [bundle.file(name).absolute() for name in self._names]
        self._graphs: list[Graph | None] = [None] * len(self.segments)
        self._has: list[str | None] = [None] * len(self.segments)
        self._ready_for: tuple[Sequence[Decision], str] | None = None
        self._planner: Planner
        self._open(needs)

    def _open(self, needs: Sequence[str | None]) -> None:
        """Opens the segments that do not yet give what is needed; if that fails, all stays as it
        was.

        The last segment always answers, so its head is always there.
        """
        needs = [
            need if need == EVERY_SCORE or need in leave.scores else None
            for need, leave in zip(needs, self.exits, strict=True)
        ]
        late = [
            number
            for number, need in enumerate(needs)
            if self._graphs[number] is None or not _covers(self._has[number], need)
        ]
        if not late:
            return
        if any(graph is not None for graph in self._graphs):
            self._store.require_unchanged([self._names[number] for number in late])
        taken = {tensor.name for segment in self.segments for tensor in segment.inputs}
        wanted = []
        for number in late:
            segment, leave = self.segments[number], self.exits[number]
            need = needs[number]
            unasked = {t for name, t in leave.scores.items() if need not in (name, EVERY_SCORE)}
            if need is None and number < len(needs) - 1:
                unasked |= {*leave.outputs.values()}
            else:
                unasked -= {leave.scores.get(need or ""), *leave.outputs.values()}
            unasked -= taken
            names = [t.name for t in segment.outputs if t.name not in unasked]
            wanted.append((self._paths[number], names if unasked else None))
        opened = self._engine.open_all(wanted)
        self.__dict__.pop("_planner", None)
        self._ready_for = None
        for number, graph in zip(late, opened, strict=True):
            self._graphs[number], self._has[number] = graph, needs[number]
        graphs = [graph for graph in self._graphs if graph is not None]
        self._planner = Planner(
            self.segments,
            self.exits,
            self._inputs,
            graphs,
            self._engine,
            ahead=self.ahead,
        )

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        sizes: Mapping[str, int],
        decisions: Sequence[Decision],
        *,
        score: str,
        patience: int = 0,
        timed: bool = False,
    ) -> Answers:
        """Runs rows until each has left at an exit.

        Args:
            feeds: Every program input.
            sizes: Size of every symbolic axis of the inputs; `batch` counts rows.
            decisions: One per exit.
            score: Which score the thresholds are about.
            patience: See `Policy`.
            timed: Record the time of every segment, its exit and compaction included.
        """
        ready = self._ready_for
        if ready is None or ready[0] is not decisions or ready[1] != score:
            self._open(needs(decisions, score))
            self._ready_for = decisions, score
        plan = self._planner.plan(sizes)
        self._feed(plan, feeds)
        rows = plan.sizes["batch"]
        if rows == 1 and not patience and not timed:
            if self.ahead is not None:
                return self._run_row_ahead(plan, decisions, score, self.ahead)
            return self._run_row(plan, decisions, score)
        answers = Answers({}, np.full(rows, -1, np.int64), np.full(rows, np.nan, np.float32))
        alive: NDArray[np.intp] | None = None  # None: all rows, in order
        streak = _Streak(rows, patience) if patience else None
        last = len(self.segments) - 1
        started = time.perf_counter_ns() if timed else 0
        for number, decision in enumerate(decisions):
            step = self._planner.step(plan, number, score if decision.consult else None)
            self._run_step(step, number)
            leave = self.exits[number]
            stays: NDArray[np.intp] | None = _ALL
            if number == last:
                self._answer(answers, leave, step, number, alive, None)
                stays = None
            elif step.score is not None:
                fires = step.score >= decision.threshold
                if streak is not None:
                    logits = fetch(step.views[leave.outputs["logits"]])
                    fires = fires & streak.long_enough(alive, logits)
                if fires.any():
                    stays = self._leave(answers, leave, step, number, alive, fires)
            if stays is not None and stays is not _ALL:
                plan = self._planner.compact(plan, number, stays)
                alive = stays if alive is None else alive[stays]
            if timed:
                now = time.perf_counter_ns()
                answers.times_ns.append(now - started)
                started = now
            if stays is None:
                answers.segments_run = number + 1
                return answers
        raise AssertionError("the last segment answers for every row left")

    def _feed(self, plan: Plan, feeds: Mapping[str, NDArray[Any]]) -> None:
        if self.ahead is not None:
            self._engine.settle()  # a segment launched for nothing may still read the last inputs
        for name, place in plan.inputs:
            place[...] = feeds[name]

    def _run_row(self, plan: Plan, decisions: Sequence[Decision], score: str) -> Answers:
        """One row, nothing but the decision between two segments.

        A segment's weights push Python's own code and data out of the caches, so every object
        touched between segments is a cache miss (benchmarks/README.md, "between segments").
        """
        route = self._planner.route(plan, decisions, score)
        number = 0
        try:
            for run, first_score, threshold in route.steps:
                run()
                if first_score is not None and first_score[0] >= threshold:
                    break
                number += 1
        except Exception as error:
            raise self._planner.failure(error, number) from error
        number = min(number, len(route.steps) - 1)
        return self._answer_row(route.full[number], number)

    def _run_row_ahead(
        self, plan: Plan, decisions: Sequence[Decision], score: str, ahead: Ahead
    ) -> Answers:
        """One row on a GPU, where the next segment may be on the stream before the score of this
        one is there."""
        route = self._planner.route(plan, decisions, score)
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
            raise self._planner.failure(error, number) from error
        return self._answer_row(route.full[number], number, beside=launched)

    def _answer_row(self, step: Step, number: int, *, beside: bool = False) -> Answers:
        outputs = self.exits[number].outputs
        return Answers(
            outputs={n: fetch(step.views[t], beside=beside).copy() for n, t in outputs.items()},
            exits=np.array([number]),
            scores=np.array([np.nan], np.float32) if step.score is None else step.score.copy(),
            segments_run=number + 1,
        )

    def _run_step(self, step: Step, number: int) -> None:
        try:
            step.run()
        except Exception as error:
            raise self._planner.failure(error, number) from error

    def run_all(
        self, feeds: Mapping[str, NDArray[Any]], sizes: Mapping[str, int], *, timed: bool = False
    ) -> tuple[list[dict[str, NDArray[Any]]], list[int]]:
        """Runs every segment for every row. Returns, per exit, copies of all outputs and scores
        (``{"logits": ..., "score/max_prob": ...}``), and the time of each segment."""
        self._open([EVERY_SCORE] * len(self.segments))
        plan = self._planner.plan(sizes)
        self._feed(plan, feeds)
        found, times_ns = [], []
        for number, leave in enumerate(self.exits):
            step = self._planner.step(plan, number, EVERY_SCORE)
            started = time.perf_counter_ns() if timed else 0
            self._run_step(step, number)
            if timed:
                times_ns.append(time.perf_counter_ns() - started)
            views = {t: fetch(view) for t, view in step.views.items()}
            record = {name: views[tensor].copy() for name, tensor in leave.outputs.items()}
            record |= {
                f"score/{name}": views[tensor].copy() for name, tensor in leave.scores.items()
            }
            found.append(record)
        return found, times_ns

    def _leave(
        self,
        answers: Answers,
        leave: Exit,
        step: Step,
        number: int,
        alive: NDArray[np.intp] | None,
        fires: NDArray[np.bool_],
    ) -> NDArray[np.intp] | None:
        """Answers for the rows that fire. Returns the rows that stay, `_ALL`, or None for none."""
        if fires.all():
            self._answer(answers, leave, step, number, alive, None)
            return None
        if not self.independent:
            return _ALL
        self._answer(answers, leave, step, number, alive, np.flatnonzero(fires))
        return np.flatnonzero(~fires)

    def _answer(
        self,
        answers: Answers,
        leave: Exit,
        step: Step,
        number: int,
        alive: NDArray[np.intp] | None,
        rows: NDArray[np.intp] | None,
    ) -> None:
        """Copies answers of `rows` of the current batch (None: all) to their original places."""
        if rows is None and alive is None:
            answers.outputs = {n: fetch(step.views[t]).copy() for n, t in leave.outputs.items()}
            answers.exits[:] = number
            if step.score is not None:
                answers.scores[:] = step.score
            return
        places = alive if rows is None else rows if alive is None else alive[rows]
        for name, tensor in leave.outputs.items():
            made = fetch(step.views[tensor])
            if name not in answers.outputs:
                shape = (len(answers.exits), *made.shape[1:])
                answers.outputs[name] = np.empty(shape, made.dtype)
            answers.outputs[name][places] = made if rows is None else made[rows]
        answers.exits[places] = number
        if step.score is not None:
            answers.scores[places] = step.score if rows is None else step.score[rows]


_ALL = np.empty(0, np.intp)
"""Says that every row stays. Compared by identity."""


def needs(decisions: Sequence[Decision], score: str) -> list[str | None]:
    """Per exit, what a policy asks of it: its score, or nothing where it is not consulted."""
    return [score if decision.consult else None for decision in decisions]


def _covers(has: str | None, need: str | None) -> bool:
    return need is None or has in (need, EVERY_SCORE)


def _usable_graph(segment: Segment) -> str:
    for variant in segment.variants:
        if not variant.requires:
            return variant.graph
    raise EngineError(
        f"segment {segment.name} has no variant for this engine (it has "
        f"{[variant.requires for variant in segment.variants]})",
        fix="Export again with a variant for it.",
    )


class _Streak:
    """Counts, per row, how many exits in a row predicted the same class."""

    def __init__(self, rows: int, patience: int) -> None:
        self.patience = patience
        self.previous = np.full(rows, -1, np.int64)
        self.count = np.zeros(rows, np.int64)

    def long_enough(
        self, alive: NDArray[np.intp] | None, logits: NDArray[Any]
    ) -> NDArray[np.bool_]:
        rows = np.arange(len(self.previous)) if alive is None else alive
        predicted = logits.argmax(-1)
        same = predicted == self.previous[rows]
        self.count[rows] = np.where(same, self.count[rows] + 1, 0)
        self.previous[rows] = predicted
        return self.count[rows] >= self.patience
