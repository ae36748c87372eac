"""A chain: segments opened on an engine, run in order over buffers that are bound once per shape.

`Chain.run` is the inner loop of every program: run a segment, look at its exit's score, let rows go,
compact the others, go on. Only scores and the answers of rows that leave are read from the buffers.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle import Bundle
from edgeexit.errors import BundleError, EngineError
from edgeexit.manifest import Chain as ChainManifest
from edgeexit.manifest import Exit, Segment, Tensor
from edgeexit.runtime.buffers import HostSlot, assign_slots, shape_of
from edgeexit.runtime.engines import Binding, Bound, Engine, Slot
from edgeexit.runtime.policy import Decision

BINDINGS_KEPT = 512
"""Bound shapes kept per chain; the oldest go first. Each is a few KiB: buffers are shared."""


@dataclass
class Answers:
    """What a run gives, per row: outputs, the index of the exit taken, and its score there."""

    outputs: dict[str, NDArray]
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
    """

    def __init__(
        self, bundle: Bundle, manifest: ChainManifest, inputs: Sequence[Tensor], engine: Engine
    ) -> None:
        self.segments: list[Segment] = manifest.segments
        self.independent = manifest.rows == "independent"
        self.exits: list[Exit] = []
        for segment in self.segments:
            stops = [leave for leave in segment.exits if leave.action == "stop"]
            if len(stops) != 1:
                raise BundleError(
                    f"segment {segment.name} has {len(stops)} exits; one pass needs exactly one behind "
                    "each segment",
                    fix="Export again.",
                )
            self.exits += stops
        self._engine = engine
        paths = [bundle.file(_usable_graph(segment)) for segment in self.segments]
        self._graphs = engine.open_all(paths)
        self._inputs = list(inputs)
        self._on_host = {tensor.name for tensor in inputs}
        for leave in self.exits:
            self._on_host |= {*leave.outputs.values(), *leave.scores.values()}
        self._slot_of = assign_slots(inputs, self.segments, self._on_host)
        self._slots: dict[int, Slot] = {}
        self._tensors = {tensor.name: tensor for tensor in inputs}
        for segment in self.segments:
            self._tensors |= {tensor.name: tensor for tensor in segment.outputs}
        self._dtypes = {name: np.dtype(tensor.dtype) for name, tensor in self._tensors.items()}
        self._bindings: OrderedDict[tuple[object, ...], tuple[Binding, dict[str, NDArray]]]
        self._bindings = OrderedDict()
        self._learnt: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._alive_after = self._carried()

    def run(
        self,
        feeds: Mapping[str, NDArray],
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
            timed: Record the time of every segment.
        """
        sizes = dict(sizes)
        rows = sizes["batch"]
        self._write(feeds, sizes)
        answers = Answers({}, np.full(rows, -1, np.int64), np.full(rows, np.nan, np.float32))
        alive: NDArray[np.intp] | None = None  # None: all rows, in order
        streak = _Streak(rows, patience) if patience else None
        last = len(self.segments) - 1
        for number, (leave, decision) in enumerate(zip(self.exits, decisions, strict=True)):
            started = time.perf_counter_ns() if timed else 0
            binding, views = self._binding(number, sizes, score if decision.consult else None)
            binding.run()
            answers.segments_run = number + 1
            if number == last:
                stays = None
                self._answer(answers, leave, views, score, number, alive, None)
            elif decision.consult:
                fires = views[leave.scores[score]] >= decision.threshold
                if streak is not None:
                    fires &= streak.long_enough(alive, views[leave.outputs["logits"]])
                stays = self._leave(answers, leave, views, score, number, alive, fires)
            else:
                stays = _ALL
            if timed:
                answers.times_ns.append(time.perf_counter_ns() - started)
            if stays is None:
                return answers
            if stays is not _ALL:
                self._compact(number, sizes, stays)
                alive = stays if alive is None else alive[stays]
                sizes["batch"] = len(stays)
        raise AssertionError("the last segment answers for every row left")

    def run_all(
        self, feeds: Mapping[str, NDArray], sizes: Mapping[str, int], *, timed: bool = False
    ) -> tuple[list[dict[str, NDArray]], list[int]]:
        """Runs every segment for every row. Returns, per exit, copies of all outputs and scores
        (``{"logits": ..., "score/max_prob": ...}``), and the time of each segment."""
        self._write(feeds, sizes)
        found, times_ns = [], []
        for number, leave in enumerate(self.exits):
            started = time.perf_counter_ns() if timed else 0
            binding, views = self._binding(number, sizes, _EVERY)
            binding.run()
            if timed:
                times_ns.append(time.perf_counter_ns() - started)
            record = {name: views[tensor].copy() for name, tensor in leave.outputs.items()}
            record |= {f"score/{name}": views[t].copy() for name, t in leave.scores.items()}
            found.append(record)
        return found, times_ns

    def _write(self, feeds: Mapping[str, NDArray], sizes: Mapping[str, int]) -> None:
        for tensor in self._inputs:
            value = feeds[tensor.name]
            slot = self._slot(tensor.name, value.nbytes)
            assert isinstance(slot, HostSlot)
            np.copyto(slot.array(self._dtypes[tensor.name], value.shape), value)

    def _leave(
        self,
        answers: Answers,
        leave: Exit,
        views: Mapping[str, NDArray],
        score: str,
        number: int,
        alive: NDArray[np.intp] | None,
        fires: NDArray[np.bool_],
    ) -> NDArray[np.intp] | None:
        """Answers for the rows that fire. Returns the rows that stay, `_ALL`, or None for none."""
        if len(fires) == 1:
            if not fires[0]:
                return _ALL
            self._answer(answers, leave, views, score, number, alive, None)
            return None
        count = int(np.count_nonzero(fires))
        if count == len(fires):
            self._answer(answers, leave, views, score, number, alive, None)
            return None
        if count == 0 or not self.independent:
            return _ALL
        self._answer(answers, leave, views, score, number, alive, np.flatnonzero(fires))
        return np.flatnonzero(~fires)

    def _answer(
        self,
        answers: Answers,
        leave: Exit,
        views: Mapping[str, NDArray],
        score: str,
        number: int,
        alive: NDArray[np.intp] | None,
        rows: NDArray[np.intp] | None,
    ) -> None:
        """Copies the answers of `rows` of the current batch (None: all) to their original places."""
        whole = rows is None and alive is None
        places = alive if rows is None else rows if alive is None else alive[rows]
        for name, tensor in leave.outputs.items():
            made = views[tensor]
            if whole:
                answers.outputs[name] = made.copy()
                continue
            if name not in answers.outputs:
                shape = (len(answers.exits), *made.shape[1:])
                answers.outputs[name] = np.empty(shape, made.dtype)
            answers.outputs[name][places] = made if rows is None else made[rows]
        here = slice(None) if whole else places
        answers.exits[here] = number
        if score in leave.scores:
            made = views[leave.scores[score]]
            answers.scores[here] = made if rows is None else made[rows]

    def _compact(self, number: int, sizes: Mapping[str, int], stays: NDArray[np.intp]) -> None:
        for name in self._alive_after[number]:
            tensor = self._tensors[name]
            if tensor.row_axis is not None:
                shape = self._shape(number, tensor, sizes)
                slot = self._slots[self._slot_of[name]]
                slot.keep_rows(self._dtypes[name], shape, tensor.row_axis, stays)

    def _carried(self) -> list[list[str]]:
        """Per segment, the tensors that later segments still take."""
        later: set[str] = set()
        found: list[list[str]] = []
        for segment in reversed(self.segments):
            found.append(sorted(later))
            later = (later - {t.name for t in segment.outputs}) | {t.name for t in segment.inputs}
        return found[::-1]

    def _binding(
        self, number: int, sizes: Mapping[str, int], score: str | None
    ) -> tuple[Binding, dict[str, NDArray]]:
        """The segment bound for these sizes, and views of the answers it makes."""
        key = (number, score, _key(sizes))
        found = self._bindings.get(key)
        if found is not None:
            return found
        segment, leave = self.segments[number], self.exits[number]
        inputs = {t.name: self._bound(number, t, sizes) for t in segment.inputs}
        self._learn(number, inputs, sizes)
        wanted = set(self._alive_after[number])
        answers: list[str] = []
        if score is not None or number == len(self.segments) - 1:
            answers = [*leave.outputs.values()]
            answers += [t for name, t in leave.scores.items() if score in (name, _EVERY)]
        outputs = {
            tensor.name: self._bound(number, tensor, sizes)
            for tensor in segment.outputs
            if tensor.name in wanted or tensor.name in answers
        }
        binding = self._graphs[number].bind(inputs, outputs)
        views = {}
        for name in answers:
            slot, dtype, shape = outputs[name]
            assert isinstance(slot, HostSlot)
            views[name] = slot.array(dtype, shape)
        self._bindings[key] = (binding, views)
        while len(self._bindings) > BINDINGS_KEPT:
            self._bindings.popitem(last=False)
        return binding, views

    def _learn(self, number: int, inputs: Mapping[str, Bound], sizes: Mapping[str, int]) -> None:
        """Learns, by one run, the shapes of outputs whose axes the manifest leaves open."""
        key = _key(sizes)
        made = self.segments[number].outputs
        if all(shape_of(t, sizes) is not None or (t.name, key) in self._learnt for t in made):
            return
        shapes = self._graphs[number].output_shapes(inputs)
        self._learnt |= {(tensor.name, key): shapes[tensor.name] for tensor in made}

    def _shape(self, number: int, tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
        shape = shape_of(tensor, sizes) or self._learnt.get((tensor.name, _key(sizes)))
        if shape is None:
            raise EngineError(
                f"segment {self.segments[number].name}: the shape of {tensor.name} is not known",
                fix="This is a bug in edgeexit; please report it with the bundle's inspect output.",
            )
        return shape

    def _bound(self, number: int, tensor: Tensor, sizes: Mapping[str, int]) -> Bound:
        shape = self._shape(number, tensor, sizes)
        dtype = self._dtypes[tensor.name]
        return self._slot(tensor.name, int(np.prod(shape)) * dtype.itemsize), dtype, shape

    def _slot(self, name: str, size_bytes: int) -> Slot:
        """The slot of a tensor, at least that large. Growing loses what it held, which is dead then."""
        index = self._slot_of[name]
        slot = self._slots.get(index)
        if slot is None or slot.bytes < size_bytes:
            host = name in self._on_host
            grown = HostSlot(size_bytes) if host else self._engine.allocate(size_bytes)
            self._slots[index] = grown
            self._bindings.clear()
            slot = grown
        return slot


_ALL = np.empty(0, np.intp)
"""Says that every row stays. Compared by identity."""
_EVERY = "*"
"""Asks for every score."""


def _key(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))


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

    def long_enough(self, alive: NDArray[np.intp] | None, logits: NDArray) -> NDArray[np.bool_]:
        rows = np.arange(len(self.previous)) if alive is None else alive
        predicted = logits.argmax(-1)
        same = predicted == self.previous[rows]
        self.count[rows] = np.where(same, self.count[rows] + 1, 0)
        self.previous[rows] = predicted
        return self.count[rows] >= self.patience
