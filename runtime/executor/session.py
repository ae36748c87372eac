"""A chain that runs token by token: its components with their states, for one batch of texts.

`Session` holds what a batch of texts being written needs: states, rings of what waits between two
components, what an earlier step handed on. What is run when, the modes decide
(`edgeexit.runtime.programs.modes`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Decoding, Exit, Gather, Tensor
from edgeexit.runtime.engines.base import Array, Bound
from edgeexit.runtime.executor.bindings import Bindings
from edgeexit.runtime.executor.blocks import Block, standing
from edgeexit.runtime.executor.components import (
    NO_SCORE,
    Components,
    inputs_taken,
    outputs_asked,
    token_states,
)
from edgeexit.runtime.executor.gates import Gates
from edgeexit.runtime.executor.handed import Handed
from edgeexit.runtime.executor.head import Floats, Head
from edgeexit.runtime.executor.parts import Part
from edgeexit.runtime.executor.places import Places
from edgeexit.runtime.executor.states import Ring

CHUNK = 256
"""Prompt tokens that one run takes."""


class Session:
    """States, boundaries and waiting tokens of one batch.

    Args:
        components: The bundle's, on an engine.
        chain: What runs for every token.
        embedded: What the chain begins with.
        decoding: How the program writes text.
        batch: Rows.
        capacity: Tokens that each row can hold, prompt included.
        chunk: The most new tokens of a row that one run takes.

    Attributes:
        parts: The chain's components; `parts[k]` reads boundary k and writes boundary k + 1.
        exits: Per component, the exit behind it that stops; None where there is none.
        rings: ``rings[k]`` holds what waits for `parts[k]`; the first one stays empty.
        takes: Tensors of earlier steps that components and makers read.
        prompts: Tokens of every row's prompt.
        group_masks: Mask -> per row, which tokens of the prompt belong to the group.
    """

    def __init__(
        self,
        components: Components,
        chain: Chain,
        embedded: Gather,
        table: Floats,
        decoding: Decoding,
        batch: int,
        capacity: int,
        chunk: int,
    ) -> None:
        self.components, self.chain, self.decoding = components, chain, decoding
        self.batch, self.capacity = batch, capacity
        self._table, self._embedded = table, embedded.output.name
        manifest = components.bundle.manifest
        stops = {exit_.behind: exit_ for exit_ in chain.stops}
        self.exits: list[Exit | None] = [stops.get(name) for name in chain.components]
        components.open(outputs_asked(manifest, chain, [NO_SCORE] * len(chain.stops)))
        self.engine = components.engine
        self._masks = masks = [g.mask for g in decoding.groups.values() if g.mask is not None]
        self.gates = Gates(self, chain)
        self.chunk = chunk = capacity if self.gates.whole_prompts else chunk
        self.places = Places(batch, chunk, self.engine, masks)
        self.bindings = Bindings(chain, manifest.components, [embedded.output], set(), self.engine)
        self.handed = Handed()
        self.ragged = self.gates.any
        self._sizes = {"batch": batch, "new": chunk}
        self.parts = [Part(self, name) for name in chain.components]
        self.boundaries = [self._embedded, *(part.state for part in self.parts)]
        for name in self.boundaries:
            if "new" in self.bindings.tensors[name].axes:
                self.bindings.bound(name, self._sizes)  # as large as it will ever be
        self.rings = [self._ring(name) for name in self.boundaries[:-1]]
        self._views: dict[tuple[str, int], Array] = {}
        self._rows: dict[str, Array] = {}
        self._heads: dict[tuple[object, ...], Head] = {}
        self._late: dict[int, Ring] = {}
        self._paths = [self._path_parts(exit_) for exit_ in self.exits]
        self.takes = inputs_taken(manifest, chain)
        self.prompts: list[int] = [0] * batch
        self._prefix: list[tuple[NDArray[np.int64], NDArray]] = []
        self.group_masks: dict[str, list[NDArray[np.bool_]]] = {}

    @property
    def stateful(self) -> list[Part]:
        """Everything that keeps something of every token: components and paths of exits."""
        return [*self.parts, *(part for path in self._paths for part in path)]

    @property
    def answers_itself(self) -> bool:
        """Whether the last component gives tokens, without a head."""
        exit_ = self.exits[-1]
        assert exit_ is not None
        return not exit_.path

    def shares(self) -> list[float]:
        """Per component, the share of the chain's layers that it and those before it have, by
        their states."""
        layers = [max(1, len(token_states(part.component))) for part in self.parts]
        return [sum(layers[: n + 1]) / sum(layers) for n in range(len(layers))]

    def adapter(self, number: int) -> Part | None:
        """The last component that stands between a component and the head of its exit."""
        path = self._paths[number]
        return path[-1] if path else None

    def head(self, number: int, scores: Collection[str] = ()) -> Head:
        """The head of the exit behind a component, which gives these scores at least."""
        exit_ = self.exits[number]
        assert exit_ is not None and exit_.path
        key = (exit_.path[-1].component, *sorted((exit_.outputs | exit_.scores).items()))
        head = self._heads.get(key)
        if head is None or not head.scores.issuperset(scores):
            known = head.scores if head is not None else frozenset()
            head = self._heads[key] = Head(self.components, exit_, known | frozenset(scores))
        return head

    def boundary(self, number: int, new: int) -> Array:
        """A boundary's buffer for that many new tokens, ``[batch, new, width]``."""
        return self.tensor(self.boundaries[number], new)

    def tensor(self, name: str, new: int) -> Array:
        """A tensor of the chain for that many new tokens."""
        view = self._views.get((name, new))
        if view is None:
            sizes = {"batch": self.batch, "new": new}
            view = self._views[name, new] = self.bindings.view(name, sizes)
        return view

    def row_states(self, name: str, like: Array) -> Array:
        """A place to keep one state per row, ``[batch, width]``, of the width and dtype of others.
        Under one name it is always the same."""
        states = self._rows.get(name)
        if states is None:
            shape = (self.batch, like.shape[-1])
            slot = self.engine.allocate(shape[0] * shape[1] * like.dtype.itemsize)
            states = self._rows[name] = slot.array(like.dtype, shape)
        return states

    def late(self, number: int) -> Ring:
        """The ring of what waits for an exit's own states, emptied."""
        ring = self._late.get(number)
        if ring is None:
            ring = self._late[number] = self._ring(self.boundaries[number + 1])
        ring.clear()
        return ring

    def begin(
        self,
        prompts: Sequence[int],
        prefix: Sequence[tuple[NDArray[np.int64], NDArray]] = (),
        groups: Mapping[str, Sequence[NDArray[np.bool_]]] | None = None,
        handed: Mapping[str, NDArray] | None = None,
    ) -> None:
        """Begins new texts.

        Args:
            prompts: Tokens of every row's prompt.
            prefix: Per row, the places in the prompt of tokens whose embeddings come from another
                chain, and those embeddings ``[places, width]``; empty: there are none.
            groups: Token group -> per row, which tokens of the prompt belong to it.
            handed: What earlier steps hand on, by name.
        """
        self.empty()
        self.prompts, self._prefix = list(prompts), list(prefix)
        self.group_masks = {
            group.mask: list((groups or {})[name])
            for name, group in self.decoding.groups.items()
            if group.mask is not None
        }
        for name, value in (handed or {}).items():
            self.handed.put(name, value, self.engine)
        self.gates.begin(groups or {})

    def embed(self, tokens: NDArray[np.int64], start: int | None = None) -> None:
        """Gathers the embeddings of tokens ``[batch, new]`` into the first boundary.

        Args:
            start: Where in the prompt they begin; None: they are not of a prompt.
        """
        self.engine.settle()
        first = self.boundary(0, tokens.shape[1])
        self._table.take(tokens, axis=0, out=first)  # type: ignore[call-overload]
        if start is None:
            return
        for row, (places, rows) in enumerate(self._prefix):
            chosen = (places >= start) & (places < start + tokens.shape[1])
            if chosen.any():
                first[row, places[chosen] - start] = rows[chosen]

    def run(self, number: int, block: Block) -> Block:
        """Runs a component over what its boundary holds.

        Returns:
            What then stands at the next boundary: fewer tokens where a group left.

        Raises:
            InputError: Some row's states have no room for so many, or none of its tokens are left.
        """
        self._advance(self.parts[number], block)
        return self.gates.after(number, block)

    def run_through(self, first: int, last: int, block: Block) -> Block:
        """Runs components from `first` to before `last` over a block, one after the other."""
        for number in range(first, last):
            block = self.run(number, block)
        return block

    def run_all(
        self, first: int, last: int, new: int, counts: Sequence[int] | None = None
    ) -> Array:
        """Runs components from `first` to before `last` over tokens behind the prompt.

        With a component's weights just passed through the processor's caches, every line of Python
        starts cold; so, where it can be, everything is written before the first of them.

        Args:
            first, last: Which components.
            new, counts: As in `Block`; None: all of them count.

        Returns:
            Boundary `last`, ``[batch, new, width]``.
        """
        parts = self.parts[first:last]
        added = [new] * self.batch if counts is None else counts
        calls = None if self.gates.pending else self._calls_alike(parts, new)
        if calls is None:
            self.run_through(first, last, Block(new, added))
            return self.boundary(last, new)
        states = parts[0].states
        states.check_room(new, parts[0].name)
        self.places.write(new, states.lengths, states.positions if self.ragged else None)
        done = 0
        try:
            for call in calls:
                call()
                done += 1
        except Exception as error:
            raise parts[done].failure(error) from error
        states.advance(added)
        lengths = states.lengths  # a new list, which no part changes
        for part in parts:
            part.states.lengths = lengths
        return self.boundary(last, new)

    def _calls_alike(self, parts: Sequence[Part], new: int) -> list[Callable[[], object]] | None:
        """The calls that are all there is to run; None where there is more to do, or where the
        parts do not stand at the same places."""
        lengths, gaps = parts[0].states.lengths, parts[0].states.gaps
        calls = []
        for part in parts:
            call, own = part.only_call(new), part.states
            if call is None or own.lengths != lengths or (self.ragged and own.gaps != gaps):
                return None
            calls.append(call)
        return calls

    def adapt(self, number: int, block: Block) -> Array:
        """Lets the exit behind a component take what the component's run has just made. Call it for
        every token, in order; otherwise the states of the exit's own components have gaps.

        Returns:
            What the head looks at, ``[batch, new, width]``: what the path gives, or without one the
            boundary itself.
        """
        for part in self._paths[number]:
            self._advance(part, block)
        path = self._paths[number]
        return self.tensor(path[-1].state if path else self.boundaries[number + 1], block.new)

    def _advance(self, part: Part, block: Block) -> None:
        states = part.states
        states.check_room(block.new, part.name)
        positions = block.positions
        if positions is None and any(states.gaps):
            positions = states.positions
        self.places.write(block.new, states.lengths, positions)
        if self.gates.pending and part.reads_prompt:
            self.gates.write(block, standing(block, states.positions))
            part.make_prompt_states(block.new)
        part.run(block.new)
        states.advance(block.counts)
        if block.positions is not None:
            for row, (count, place) in enumerate(zip(block.counts, block.positions, strict=True)):
                if count:
                    end = place + count if isinstance(place, int) else place[count - 1] + 1
                    states.gaps[row] = end - states.lengths[row]

    def project(self, number: int, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Lets one token per row skip a component: what its boundary holds for these rows leaves
        its mark in the component's states (`Component.projection`), and is not changed.

        Args:
            rows: Which rows.
            positions: Where each row's token stands, ``[batch]``.
        """
        part = self.parts[number]
        self.places.write(1, part.states.lengths, positions)
        made = part.project()
        if made is not None:
            part.states.append(made, rows)
        part.states.advance([int(row in rows) for row in range(self.batch)])

    def crop(self, positions: Sequence[int]) -> None:
        """Takes back, everywhere, tokens that stand at these positions ``[batch]`` or behind."""
        for part in self.stateful:
            part.states.crop(positions)

    def empty(self) -> None:
        """Forgets the texts."""
        for part in self.stateful:
            part.states.clear()
        for ring in self.rings:
            ring.clear()
        self.prompts, self._prefix = [0] * self.batch, []
        self.gates.begin({})

    def portions(
        self, ring: Ring, part: Part, boundary: str
    ) -> Iterator[tuple[Block, list[tuple[int, int]]]]:
        """Empties a ring into the tensor that a part reads, as much at a time as one run takes.

        Yields:
            The block, and for every row whose newest state is in it, the row and its place.
        """
        waiting, start = ring.counts, 0
        while start < max(waiting):
            # Rows with fewer states are padded, and padding must not run over the end of states.
            new = min(self.chunk, max(waiting) - start, self.capacity - part.states.longest())
            self.tensor(boundary, new)[...] = ring.states(start, start + new)
            counts = [min(max(count - start, 0), new) for count in waiting]
            ends = [(n, c - start - 1) for n, c in enumerate(waiting) if start < c <= start + new]
            positions = None
            if ring.positions is not None:
                positions = [
                    own[start : start + count]
                    for own, count in zip(ring.positions, counts, strict=True)
                ]
            yield Block(new, counts, positions), ends
            start += new
        ring.clear()

    def positions_of(self, number: int, block: Block) -> list[list[int]]:
        """Where the tokens of a block that a component has just run over stand, per row."""
        ends = self.parts[number].states.positions
        return standing(block, [end - n for end, n in zip(ends, block.counts, strict=True)])

    def inputs_of(
        self, inputs: Sequence[Tensor], renamed: Mapping[str, str], new: int
    ) -> dict[str, Bound]:
        """What a component's inputs are bound to, by name, for that many new tokens."""
        sizes = {"batch": self.batch, "new": new}
        found: dict[str, Bound] = {}
        for tensor in inputs:
            name = renamed.get(tensor.name, tensor.name)
            if name == self.decoding.positions.name:
                found[tensor.name] = self.places.positions(new)
            elif name in self._masks:
                found[tensor.name] = self.places.mask(name, new)
            elif name in self.handed.bound:
                found[tensor.name] = self.handed.bound[name]
            else:
                found[tensor.name] = self.bindings.bound(name, sizes)
        return found

    def _ring(self, boundary: str) -> Ring:
        tensor = self.bindings.tensors[boundary]
        _, dtype, shape = self.bindings.bound(boundary, self._sizes)
        assert "new" in tensor.axes
        return Ring(self.batch, self.capacity, shape[-1], dtype, self.engine, positions=self.ragged)

    def _path_parts(self, exit_: Exit | None) -> list[Part]:
        """What stands between a component and the head of its exit, run for every token."""
        if exit_ is None:
            return []
        parts = [Part(self, call.component, call) for call in exit_.path[:-1]]
        for part in parts:
            self.bindings.bound(part.state, self._sizes)
        return parts


__all__ = ["CHUNK", "Session"]
