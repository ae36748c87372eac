"""A decoder's graphs bound to buffers: segments and adapters with their caches, the shared head,
the embedding.

`Session` is the state of one batch of texts being written: caches, boundaries, and rings of states
that wait. What is run when, the modes decide (`edgeexit.runtime.programs.modes.full`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Decoding, Segment, Variant
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import EngineError, InputError, UsageError, first_line
from edgeexit.runtime.engines.base import Array, Bound, Engine, Graph, Slot
from edgeexit.runtime.engines.host import row_of
from edgeexit.runtime.executor.head import (
    BINDINGS_KEPT,
    Answers,
    Floats,
    Head,
    Made,
    SharedHead,
)
from edgeexit.runtime.executor.places import Places
from edgeexit.runtime.executor.slots import dtype_of
from edgeexit.runtime.executor.states import NewCaches, Ring, SegmentCaches

Form = Literal["in-place", "fixed", "append"]

CHUNK = 256
"""Prompt tokens that one run takes."""


@dataclass(frozen=True)
class Opened:
    """A decoder's graphs as opened on an engine; shared by every session.

    `adapters` gives the adapter of the exit behind a segment, by the segment's number; each is
    opened as a decoder of that one part.
    """

    bundle: Bundle
    decoding: Decoding
    engine: Engine
    segments: Sequence[Segment]
    variants: Sequence[Variant]
    graphs: Sequence[Graph]
    head: SharedHead | None
    table: Floats
    form: Form | None
    projections: dict[int, Graph] = field(default_factory=dict)
    adapters: Mapping[int, Opened] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """The most tokens that the model was made for."""
        return self.bundle.manifest.limits["positions"]

    @property
    def skippable(self) -> bool:
        """Whether tokens can skip every segment but the first (`Segment.projection`), and no exit's
        adapter would miss them."""
        return not self.adapters and all(
            segment.projection is not None for segment in self.segments[1:]
        )

    def projection(self, number: int) -> Graph:
        """The projection of a segment, opened when it is first needed."""
        if number not in self.projections:
            variant = self.segments[number].projection
            assert variant is not None
            self.projections[number] = self.engine.open(self.bundle.file(variant.graph))
        return self.projections[number]


def open_decoder(
    bundle: Bundle,
    engine: Engine,
    *,
    unsplit: bool = False,
    form: Form | None = None,
    scores: Collection[str] = (),
) -> Opened:
    """Opens a bundle's segments, adapters and head, or the unsplit graph as its one segment; in one
    form of the caches, or in the first one that the engine runs; the head with these scores for
    now."""
    manifest = bundle.manifest
    decoding = manifest.decoding
    assert decoding is not None
    (chain,) = manifest.chains.values()
    segments: list[Segment] = chain.segments
    if unsplit:
        caches = [cache for segment in segments for cache in segment.caches]
        whole = Segment(
            name="unsplit",
            variants=manifest.unsplit,
            inputs=[decoding.embedding.output, decoding.positions],
            outputs=list(manifest.outputs),
            caches=caches,
        )
        segments = [whole]
    adapters = {
        number: manifest.heads[leave.adapter]
        for number, segment in enumerate(segments)
        for leave in segment.exits
        if leave.adapter is not None
    }
    parts = [*segments, *adapters.values()]
    variants = [choose_variant(part, engine, form, bundle) for part in parts]
    wanted: list[tuple[Path, list[str] | None]] = [(bundle.file(v.graph), None) for v in variants]
    head = None
    if not unsplit:
        segment = manifest.heads[decoding.head]
        path = bundle.file(choose_variant(segment, engine).graph)
        head = SharedHead(segment, path, engine, frozenset(scores))
        wanted.append((path, head.names(head.scores)))
    graphs = list(engine.open_all(wanted))
    if head is not None:
        head.graph = graphs[-1]
    opened = Opened(
        bundle=bundle,
        decoding=decoding,
        engine=engine,
        segments=segments,
        variants=variants[: len(segments)],
        graphs=graphs[: len(segments)],
        head=head,
        table=_map_table(bundle, decoding),
        form=form,
    )
    own = {
        number: replace(opened, segments=[parts[k]], variants=[variants[k]], graphs=[graphs[k]])
        for k, number in enumerate(adapters, start=len(segments))
    }
    return replace(opened, adapters=own)


def choose_variant(
    segment: Segment, engine: Engine, form: Form | None = None, bundle: Bundle | None = None
) -> Variant:
    """The first form of a part whose requirements the engine meets, or the one that is asked for.
    Of engines that are built ahead, one that was built is preferred.

    Raises:
        UsageError: The part does not have the form asked for.
        EngineError: The engine lacks something that the form needs, or every one does.
    """
    variants = [one for one in segment.variants if form in (None, one.caches)]
    if not variants:
        known = ", ".join(dict.fromkeys(one.caches for one in segment.variants))
        raise UsageError(
            f"{segment.name} has no form {form!r} of its caches (it has {known})",
            fix="Ask for one of those, or for none: the fastest is then taken.",
        )
    fitting = [variant for variant in variants if set(variant.requires) <= engine.features]
    if bundle is not None:
        fitting.sort(key=lambda variant: not engine.offers(bundle.file(variant.graph)))
    if fitting:
        return fitting[0]
    raise EngineError(
        f"{segment.name} has no form for this engine (it has "
        f"{[variant.requires for variant in variants]}, the engine offers "
        f"{sorted(engine.features)})",
        fix="Export again with a newer edgeexit."
        if form is None
        else "Leave the form open, or use a newer version of the engine.",
    )


def _map_table(bundle: Bundle, decoding: Decoding) -> Floats:
    """The embedding's rows in the mapped weight store: only those that are used are read."""
    embedding = decoding.embedding
    width = embedding.output.axes[-1]
    assert isinstance(width, int)
    with bundle.file(WEIGHTS).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    count = embedding.vocabulary * width
    dtype = dtype_of(embedding.output)
    flat = np.frombuffer(mapped, dtype, count=count, offset=embedding.offset)
    return flat.reshape(embedding.vocabulary, width)


class Session:
    """Caches, boundaries and waiting states of one batch.

    Args:
        opened: The decoder.
        batch: Rows.
        capacity: Tokens that each row can hold, prompt included.
        chunk: The most new tokens of a row that one run takes.

    Attributes:
        parts: The segments; `parts[k]` reads boundary k and writes boundary k + 1.
        rings: ``rings[k]`` holds what waits for `parts[k]`; the first one stays empty.
        adapters: ``adapters[k]`` stands between `parts[k]` and the head, where an exit has one.
    """

    def __init__(self, opened: Opened, batch: int, capacity: int, chunk: int) -> None:
        self.opened, self.batch, self.capacity, self.chunk = opened, batch, capacity, chunk
        engine = opened.engine
        boundaries: list[Boundary] = []
        for tensor in [s.inputs[0] for s in opened.segments] + [opened.segments[-1].outputs[0]]:
            width = tensor.axes[-1] if "new" in tensor.axes else 0  # unsplit ends with answers
            assert isinstance(width, int)
            dtype = dtype_of(tensor)
            size_bytes = batch * chunk * width * dtype.itemsize
            # Embeddings come from the host; what segments hand over stays where they compute.
            slot = engine.allocate(size_bytes) if boundaries else engine.allocate_host(size_bytes)
            boundaries.append(Boundary(slot, width, dtype))
        self._places = places = Places(batch, chunk, engine)
        self.parts = [
            Part(opened, number, batch, capacity, places, boundaries[number : number + 2])
            for number in range(len(opened.segments))
        ]
        self.rings = [
            Ring(batch, capacity, one.width, one.dtype, engine) for one in boundaries[:-1]
        ]
        self._boundaries = boundaries
        self._views: dict[tuple[int, int], Array] = {}
        self._rows: dict[str, Array] = {}
        self._head: Head | None = None
        self._late: dict[int, Ring] = {}
        self.adapters: dict[int, Part] = {}
        self._adapted: dict[int, int] = {}  # where among the boundaries an adapter's states come
        for number, own in opened.adapters.items():
            before = boundaries[number + 1]
            slot = engine.allocate(batch * chunk * before.width * before.dtype.itemsize)
            after = Boundary(slot, before.width, before.dtype)
            self._adapted[number] = len(boundaries)
            boundaries.append(after)
            self.adapters[number] = Part(own, 0, batch, capacity, places, [before, after])

    @property
    def cached(self) -> list[Part]:
        """Everything that keeps caches: the segments and the adapters."""
        return [*self.parts, *self.adapters.values()]

    def head(self, scores: Collection[str] = ()) -> Head:
        """The shared head, which gives token, logits and these scores at least."""
        shared = self.opened.head
        assert shared is not None
        if self._head is None or not self._head.scores.issuperset(scores):
            self._head = Head(shared, frozenset(scores))
        return self._head

    def boundary(self, number: int, new: int) -> Array:
        """A boundary's buffer for that many new tokens, ``[batch, new, width]``."""
        view = self._views.get((number, new))
        if view is None:
            one = self._boundaries[number]
            view = self._views[number, new] = one.slot.array(
                one.dtype, (self.batch, new, one.width)
            )
        return view

    def row_states(self, name: str, like: Array) -> Array:
        """A place to keep one state per row, ``[batch, width]``, of the width and dtype of others.
        Under one name it is always the same."""
        states = self._rows.get(name)
        if states is None:
            shape = (self.batch, like.shape[-1])
            slot = self.opened.engine.allocate(shape[0] * shape[1] * like.dtype.itemsize)
            states = self._rows[name] = slot.array(like.dtype, shape)
        return states

    def late(self, number: int) -> Ring:
        """The ring of what waits for an exit's own caches, emptied."""
        ring = self._late.get(number)
        if ring is None:
            one, engine = self._boundaries[number + 1], self.opened.engine
            ring = self._late[number] = Ring(
                self.batch, self.capacity, one.width, one.dtype, engine
            )
        ring.clear()
        return ring

    def embed(self, tokens: NDArray[np.int64]) -> None:
        """Gathers the embeddings of tokens ``[batch, new]`` into the first boundary."""
        self.opened.engine.settle()
        first = self.boundary(0, tokens.shape[1])
        np.take(self.opened.table, tokens, axis=0, out=cast("Floats", first))

    def run(
        self,
        number: int,
        new: int,
        counts: Sequence[int] | None = None,
        *,
        places: Sequence[int] | None = None,
    ) -> Array:
        """Runs a segment over what its boundary holds.

        Args:
            number: Which segment.
            new: Tokens per row in the boundary.
            counts: How many of them count, per row; None: all. The others were padding.
            places: Position of each row's first new token, ``[batch]``; None: behind what the
                segment's caches hold. They differ where tokens are missing there.

        Returns:
            The next boundary, ``[batch, new, width]``.

        Raises:
            InputError: Some row's cache has no room for so many.
        """
        self._advance(self.parts[number], new, counts, places)
        return self.boundary(number + 1, new)

    def run_all(
        self, first: int, last: int, new: int, counts: Sequence[int] | None = None
    ) -> Array:
        """Runs segments from `first` to before `last`, one after the other.

        With a segment's weights just passed through the processor's caches, every line of Python
        starts cold; so, where it can be, everything is written before the first of them.

        Args:
            first, last: Which segments.
            new, counts: As for `run`.

        Returns:
            Boundary `last`, ``[batch, new, width]``.
        """
        parts = self.parts[first:last]
        lengths = parts[0].caches.lengths
        calls = [call for part in parts if (call := part.only_call(new)) is not None]
        if len(calls) < len(parts) or any(part.caches.lengths != lengths for part in parts):
            for number in range(first, last):
                self.run(number, new, counts)
            return self.boundary(last, new)
        for part in parts:
            part.caches.check_room(new, part.segment.name)
        self._places.write(new, lengths)
        done = 0
        try:
            for call in calls:
                call()
                done += 1
        except Exception as error:
            raise parts[done].failure(error) from error
        added = [new] * self.batch if counts is None else counts
        for part in parts:
            part.caches.advance(added)
        return self.boundary(last, new)

    def adapt(self, number: int, new: int, counts: Sequence[int] | None = None) -> Array:
        """Lets the exit behind a segment take what the segment's run has just made.

        Caches of an adapter must have no holes: whoever asks an exit gives it every state that
        passes, each once and in order.

        Args:
            number, new, counts: As for `run`.

        Returns:
            What the head looks at, ``[batch, new, width]``: the adapter's states, or without an
            adapter the boundary itself.
        """
        if number not in self.adapters:
            return self.boundary(number + 1, new)
        self._advance(self.adapters[number], new, counts)
        return self.boundary(self._adapted[number], new)

    def _advance(
        self,
        part: Part,
        new: int,
        counts: Sequence[int] | None,
        places: Sequence[int] | None = None,
    ) -> None:
        caches = part.caches
        caches.check_room(new, part.segment.name)
        self._places.write(new, caches.lengths, places)
        part.run(new)
        caches.advance([new] * self.batch if counts is None else counts)

    def project(self, number: int, rows: Sequence[int], places: Sequence[int]) -> None:
        """Lets one state per row skip a segment: what its boundary holds for these rows leaves keys
        and values in the segment's caches (`Segment.projection`), and is not changed.

        Args:
            rows: Which rows.
            places: Position of each row's state, ``[batch]``.
        """
        part = self.parts[number]
        self._places.write(1, part.caches.lengths, places)
        part.caches.append(part.project(), rows)
        part.caches.advance([int(row in rows) for row in range(self.batch)])

    def crop(self, lengths: Sequence[int]) -> None:
        """Shortens every cache that is longer to these lengths ``[batch]``."""
        for part in self.cached:
            part.caches.crop(lengths)

    def empty(self) -> None:
        """Forgets the texts."""
        self.crop([0] * self.batch)
        for ring in self.rings:
            ring.clear()

    def portions(
        self, ring: Ring, part: Part, number: int
    ) -> Iterator[tuple[int, list[int], list[tuple[int, int]]]]:
        """Empties a ring into a boundary that a part reads, as much at a time as one run takes.

        Yields:
            New tokens per row in boundary `number`; how many of them count, per row; and for every
            row whose newest state is among them, the row and its place.
        """
        waiting, start = ring.counts, 0
        while start < max(waiting):
            # Rows with fewer states are padded, and padding must not run over the end of a cache.
            new = min(self.chunk, max(waiting) - start, self.capacity - part.caches.longest())
            self.boundary(number, new)[...] = ring.states(start, start + new)
            counts = [min(max(count - start, 0), new) for count in waiting]
            ends = [(n, c - start - 1) for n, c in enumerate(waiting) if start < c <= start + new]
            yield new, counts, ends
            start += new
        ring.clear()


@dataclass(frozen=True)
class Boundary:
    """Where states ``[batch, new, width]`` pass from one segment to the next."""

    slot: Slot
    width: int
    dtype: np.dtype


class Part:
    """One segment or adapter: graph, caches, and bindings per number of new tokens."""

    def __init__(
        self,
        opened: Opened,
        number: int,
        batch: int,
        capacity: int,
        places: Places,
        boundaries: Sequence[Boundary],
    ) -> None:
        self.segment, self.variant = opened.segments[number], opened.variants[number]
        self._graph, self._engine, self._batch = opened.graphs[number], opened.engine, batch
        grows = self.variant.caches == "append"
        self.caches = SegmentCaches(
            self.segment.caches, batch, capacity, opened.engine, grows=grows
        )
        self._places, self._boundaries = places, boundaries
        self._opened, self._number = opened, number
        self._projection: tuple[Callable[[], object], NewCaches] | None = None
        self._bindings: dict[tuple[int, int | None, int], _Call] = {}
        self._new: dict[int, NewCaches] = {}
        answers = [tensor for tensor in self.segment.outputs if "new" not in tensor.axes]
        self._made = Made(answers, batch, opened.engine)
        self.answers: Answers = {}

    def run(self, new: int) -> None:
        """Runs over the boundary; lengths are those before it."""
        if self._row_by_row(new):
            for row, length in enumerate(self.caches.lengths):
                self._places.write_most(length + new)
                self._call(new, row)
            return
        made = self._call(new, None)
        if made is not None:
            self.caches.append(made)

    def _row_by_row(self, new: int) -> bool:
        """ONNX Runtime's operator takes several new tokens behind a past for one row only."""
        several = self._batch > 1 and new > 1
        return several and "most" in self.variant.lengths and self.caches.longest() > 0

    def _call(self, new: int, row: int | None) -> NewCaches | None:
        key = new, row, self.caches.extent
        run, made = self._bindings.get(key) or self._bind(*key)
        try:
            run()
        except Exception as error:
            raise self.failure(error) from error
        return made

    def only_call(self, new: int) -> Callable[[], object] | None:
        """The call that is all of `run`; None where there is more to do."""
        if self.variant.caches == "append" or self._row_by_row(new):
            return None
        key = new, None, self.caches.extent
        run, _ = self._bindings.get(key) or self._bind(*key)
        return run

    def failure(self, error: Exception) -> EngineError:
        """What to raise when the engine fails."""
        engine = self._engine.describe()
        return EngineError(
            f"segment {self.segment.name}: {engine['library']} {engine['version']} failed: "
            f"{first_line(error)}",
            fix="`edgeexit check BUNDLE` tells whether it is whole; if so, please report this, "
            "with the output of `edgeexit inspect`.",
        )

    def _bind(self, new: int, row: int | None, extent: int) -> _Call:
        """Binds all rows, or one of them alone."""
        batch = self._batch
        before, after = self._boundaries
        state, positions, *_ = self.segment.inputs
        inputs: dict[str, Bound] = {
            state.name: (before.slot, before.dtype, (batch, new, before.width)),
            positions.name: self._places.positions(new),
            **self.caches.past(),
            **self._places.lengths(self.variant.lengths),
        }
        outputs: dict[str, Bound] = dict(self._made.bound)
        for tensor in self.segment.outputs:
            if "new" in tensor.axes:
                last = tensor.axes[-1]
                assert isinstance(last, int)
                outputs[tensor.name] = (after.slot, dtype_of(tensor), (batch, new, last))
        made = None
        if self.variant.caches == "append":
            made = self._new_caches(new)
            outputs |= made.bound
        else:
            outputs |= self.caches.present()
        if row is not None:
            inputs = {k: v if v[2] == () else row_of(v, row) for k, v in inputs.items()}
            outputs = {k: row_of(v, row) for k, v in outputs.items()}
        run = self._graph.bind(inputs, outputs)
        if self._made.bound:
            run, self.answers = self._made.around(run)
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        bound = self._bindings[new, row, extent] = run, made
        return bound

    def _new_caches(self, new: int) -> NewCaches:
        """Where keys and values of that many new tokens per row go."""
        made = self._new.get(new)
        if made is None:
            caches, engine = self.segment.caches, self._engine
            made = self._new[new] = NewCaches(caches, self._batch, new, engine)
        return made

    def project(self) -> NewCaches:
        """Keys and values that the boundary's states, one per row, leave if they skip the
        segment."""
        if self._projection is None:
            own = self._new_caches(1)
            before, _ = self._boundaries
            state, positions, *_ = self.segment.inputs
            inputs: dict[str, Bound] = {
                state.name: (before.slot, before.dtype, (self._batch, 1, before.width)),
                positions.name: self._places.positions(1),
            }
            graph = self._opened.projection(self._number)
            self._projection = graph.bind(inputs, own.bound), own
        run, made = self._projection
        run()
        return made


_Call = tuple[Callable[[], object], NewCaches | None]
"""What runs a graph, and the new keys and values that are then to be appended."""


def check_tokens(opened: Opened, tokens: NDArray[np.int64]) -> None:
    """Refuses token ids outside the vocabulary."""
    vocabulary = opened.decoding.embedding.vocabulary
    bad = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if bad.size:
        raise InputError(
            f"token id {int(bad[0])} is outside the vocabulary (0 to {vocabulary - 1})",
            fix="Use the bundle's own tokenizer.",
        )
