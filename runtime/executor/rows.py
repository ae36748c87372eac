"""`RowPass`: runs a chain over rows. Each row stops at the first exit whose score is high enough.

This is the inner loop of classifiers and encoders: run a component, read the score of its exit,
answer the rows that stop, compact the others, continue. Only scores, and the answers of rows that
stop, are read from the buffers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.invalid_ids import invalid_id
from edgeexit.bundle.manifest import Chain, Exit, Tensor
from edgeexit.bundle.policy import Decision
from edgeexit.errors import EdgeExitError, EngineError, InputError
from edgeexit.runtime.engines.host import fetch
from edgeexit.runtime.executor.components import (
    EVERY_SCORE,
    Components,
)
from edgeexit.runtime.executor.exits import Streak
from edgeexit.runtime.executor.launch_ahead import Ahead, LaunchAhead
from edgeexit.runtime.executor.plans import Plan, Plans, Step

if TYPE_CHECKING:
    pass

ALL = np.empty(0, np.intp)
"""Means that every row stays. Compared by identity."""


@dataclass(slots=True)
class Answers:
    """Results of a run per row: outputs, the index of its exit, and its score at that exit."""

    outputs: dict[str, NDArray[Any]]
    exits: NDArray[np.int64]
    scores: NDArray[np.float32]
    times_ns: list[int] = field(default_factory=list)


class RowPass:
    """Runs a chain over rows, on an engine.

    Args:
        components: The bundle's components on the engine.
        chain: The chain.
        feeds: Inputs of the chain's components that come from outside the chain.
        asked: Per exit, the score that it is opened with (`outputs_asked`). Runs that need more
            open components again; the result is kept.
        launch_ahead: Whether a single row's next component is put on the GPU's stream before the
            current score is known (`edgeexit.runtime.executor.launch_ahead`).

    Attributes:
        exits: Exits with the action ``stop``, in order.
        largest_batch: Rows that the engine was built for; 1 if it takes any number.
    """

    def __init__(
        self,
        components: Components,
        chain: Chain,
        feeds: Sequence[Tensor],
        asked: Sequence[str | None],
        launch_ahead: LaunchAhead = "never",
    ) -> None:
        self.independent = chain.rows == "independent"
        self._engine = components.engine
        self.largest_batch = components.engine.largest.get("batch", 1)
        self.ahead = None if launch_ahead == "never" else Ahead(len(chain.stops), launch_ahead)
        self._plans = Plans(components, chain, feeds, asked, self.ahead)
        self.exits, self._exit_behind = self._plans.exits, self._plans.exit_behind
        self._ready_for: Sequence[Decision] | None = None

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        sizes: Mapping[str, int],
        decisions: Sequence[Decision],
        *,
        patience: int = 0,
        timed: bool = False,
    ) -> Answers:
        """Runs rows until each has stopped at an exit.

        Args:
            feeds: Every feed.
            sizes: Size of every symbolic axis of the feeds; `batch` is the number of rows.
            decisions: One per exit.
            patience: See `edgeexit.bundle.policy.Rule`.
            timed: Record the time of every component, including its exit and compaction.
        """
        if self._ready_for is not decisions:
            self._plans.open([d.score if d.consult else None for d in decisions])
            self._ready_for = decisions
        plan = self._plans.plan(sizes)
        self._feed(plan, feeds)
        rows = plan.sizes["batch"]
        try:
            if rows == 1 and not patience and not timed:
                if self.ahead is not None:
                    return self._run_row_ahead(plan, decisions, self.ahead)
                return self._run_row(plan, decisions)
            return self._run_rows(plan, decisions, patience, timed)
        except EngineError as error:
            raise _of_inputs(error, feeds) from error

    def run_all(
        self, feeds: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
    ) -> tuple[
        list[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]], list[tuple[int, int]]
    ]:
        """Runs every component for every row. Returns per exit copies of all outputs and scores,
        and the time of each component and of the exit behind it, in ns."""
        self._plans.open([EVERY_SCORE] * len(self.exits))
        plan = self._plans.plan(sizes)
        self._feed(plan, feeds)
        answers, times_ns = [], []
        for number, behind in enumerate(self._exit_behind):
            step = self._plans.step(plan, number, EVERY_SCORE)
            started = time.perf_counter_ns()
            try:
                self._run_step(step, number)
                ran = time.perf_counter_ns()
                self._finish(step, number)
            except EngineError as error:
                raise _of_inputs(error, feeds) from error
            times_ns.append((ran - started, time.perf_counter_ns() - ran))
            if behind is not None:
                views = {t: fetch(view).copy() for t, view in step.views.items()}
                outputs, scores = (
                    {name: views[tensor] for name, tensor in given.items()}
                    for given in (behind[1].outputs, behind[1].scores)
                )
                answers.append((outputs, scores))
        return answers, times_ns

    def _feed(self, plan: Plan, feeds: Mapping[str, NDArray[Any]]) -> None:
        if self.ahead is not None:
            self._engine.settle()  # a component launched ahead may still read the last inputs
        for name, place in plan.feeds:
            place[...] = feeds[name]

    def _run_rows(
        self, plan: Plan, decisions: Sequence[Decision], patience: int, timed: bool
    ) -> Answers:
        rows = plan.sizes["batch"]
        answers = Answers({}, np.full(rows, -1, np.int64), np.full(rows, np.nan, np.float32))
        alive: NDArray[np.intp] | None = None  # None: all rows, in order
        streak = Streak(rows, patience) if patience else None
        last = len(self._exit_behind) - 1
        started = time.perf_counter_ns() if timed else 0
        for number, behind in enumerate(self._exit_behind):
            decision = None if behind is None else decisions[behind[0]]
            asks = decision is not None and decision.consult
            step = self._plans.step(plan, number, decision.score if asks and decision else None)
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
                plan = self._plans.compact(plan, number, stays)
                alive = stays if alive is None else alive[stays]
            if timed:
                now = time.perf_counter_ns()
                answers.times_ns.append(now - started)
                started = now
            if stays is None:
                return answers
        raise AssertionError("the last component answers for every row left")

    def _run_row(self, plan: Plan, decisions: Sequence[Decision]) -> Answers:
        """Runs one row, with nothing but the decision between two components.

        A component's weights evict Python's code and data from the CPU caches, so every object that
        is used between two components is a cache miss (benchmarks/README.md, "between segments").
        """
        route = self._plans.route(plan, decisions)
        number = 0
        try:
            for run, first_score, threshold in route.steps:
                run()
                if first_score is not None and first_score[0] >= threshold:
                    break
                number += 1
        except Exception as error:
            raise self._plans.failure(error, number) from error
        number = min(number, len(route.steps) - 1)
        return self._answer_row(route.full[number], number)

    def _run_row_ahead(self, plan: Plan, decisions: Sequence[Decision], ahead: Ahead) -> Answers:
        """Runs one row on a GPU. The next component may be put on the stream before the current
        score is known."""
        route = self._plans.route(plan, decisions)
        last = len(route.steps) - 1
        number, launched = 0, False
        untimed: int | None = None  # boundary whose times can be read after the next wait
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
            raise self._plans.failure(error, number) from error
        return self._answer_row(route.full[number], number, beside=launched)

    def _answer_row(self, step: Step, number: int, *, beside: bool = False) -> Answers:
        exit_number, exit_ = self._exit_at(number)
        self._finish(step, number)
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
            raise self._plans.failure(error, number) from error

    def _finish(self, step: Step, number: int) -> None:
        """Runs an exit's path, if it only runs where rows stop."""
        if step.finish is None:
            return
        try:
            step.finish()
        except Exception as error:
            raise self._plans.failure(error, number) from error

    def _leave(
        self,
        answers: Answers,
        number: int,
        step: Step,
        alive: NDArray[np.intp] | None,
        fires: NDArray[np.bool_],
    ) -> NDArray[np.intp] | None:
        """Answers the rows that stop. Returns the rows that stay, `ALL`, or None if no row
        stays."""
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
        """Copies the answers of `rows` of the current batch (None: all) to their original
        places."""
        exit_number, exit_ = self._exit_at(number)
        self._finish(step, number)
        if rows is None and alive is None:
            answers.outputs = {n: fetch(step.views[t]).copy() for n, t in exit_.outputs.items()}
            answers.exits[:] = exit_number
            if step.score is not None:
                answers.scores[:] = step.score
            return
        places = alive if rows is None else rows if alive is None else alive[rows]
        for name, tensor in exit_.outputs.items():
            values = fetch(step.views[tensor])
            if name not in answers.outputs:
                shape = (len(answers.exits), *values.shape[1:])
                answers.outputs[name] = np.empty(shape, values.dtype)
            answers.outputs[name][places] = values if rows is None else values[rows]
        answers.exits[places] = exit_number
        if step.score is not None:
            answers.scores[places] = step.score if rows is None else step.score[rows]

    def _exit_at(self, number: int) -> tuple[int, Exit]:
        behind = self._exit_behind[number]
        assert behind is not None
        return behind


def _of_inputs(error: EngineError, feeds: Mapping[str, NDArray[Any]]) -> EdgeExitError:
    """The error for inputs with an id that the engine refuses; other errors as they are."""
    if said := invalid_id(str(error.__cause__ or error), feeds):
        return InputError(said, fix="Use the tokenizer that the model was trained with.")
    return error


__all__ = ["Answers", "RowPass"]
