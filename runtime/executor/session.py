"""`Session`: a chain that runs token by token, with the states of one batch of texts.

A session holds the states, the rings of tokens that wait between components, and the tensors of
earlier steps. The modes decide what runs when (`edgeexit.runtime.programs.modes`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.blocks import Table
from edgeexit.bundle.manifest import Chain, Decoding, Exit, Gather, Tensor
from edgeexit.runtime.engines.base import Array, Bound
from edgeexit.runtime.executor.adapters import Adapters
from edgeexit.runtime.executor.bindings import Bindings
from edgeexit.runtime.executor.blocks import Block, even_chunk, have_gaps, standing
from edgeexit.runtime.executor.components import (
    Components,
    has_own_head,
    inputs_taken,
    opened_early,
    outputs_asked,
)
from edgeexit.runtime.executor.gates import Gates
from edgeexit.runtime.executor.handed import Handed
from edgeexit.runtime.executor.head import Head
from edgeexit.runtime.executor.held_texts import HeldTexts
from edgeexit.runtime.executor.parts import Part, only_calls, run_calls
from edgeexit.runtime.executor.places import Places
from edgeexit.runtime.executor.states import Ring
from edgeexit.runtime.executor.token_scores import TokenScores


class Session:
    """States, boundaries and waiting tokens of one batch.

    Args:
        components: The bundle's components on an engine.
        chain: The chain that runs for every token.
        embedded: The step that looks up the embeddings of tokens.
        table: Its table of embeddings.
        decoding: How the program writes text.
        batch: Rows.
        capacity: Tokens that each row can hold, prompt included.
        chunk: Most new tokens of a row in one run.

    Attributes:
        parts: The chain's components; `parts[k]` reads boundary k and writes boundary k + 1.
        exits: Per component, the exit behind it with the action ``stop``; None: no exit.
        rings: ``rings[k]`` holds the tokens that wait for `parts[k]`; the first stays empty.
        takes: Tensors of earlier steps that components and makers read.
        prompts: Per row, the number of tokens in its prompt.
        prefix: As for `begin`.
        group_masks: Mask -> per row, which tokens of the prompt belong to the group.
        texts: The tokens that the states are of.
        ragged: Whether gates may drop tokens of these texts, so that positions have gaps.
    """

    def __init__(
        self,
        components: Components,
        chain: Chain,
        embedded: Gather,
        table: Table,
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
        components.open(outputs_asked(manifest, chain, opened_early(chain)))
        self.engine = components.engine
        self._masks = masks = [g.mask for g in decoding.groups.values() if g.mask is not None]
        self.gates = Gates(self, chain)
        self.chunk = chunk = capacity if self.gates.may_read_whole else chunk
        self.places = Places(batch, chunk, self.engine, masks)
        self.token_scores = TokenScores(self)
        known, scores = manifest.components, self.token_scores.tensors
        self.bindings = Bindings(chain, known, [embedded.output], scores, self.engine)
        self.handed = Handed()
        self.ragged = False
        self._sizes = {"batch": batch, "new": chunk}
        self.parts = [Part(self, name) for name in chain.components]
        self.boundaries = [self._embedded, *(part.state for part in self.parts)]
        for name in [*self.boundaries, *scores]:
            if "new" in self.bindings.tensors[name].axes:
                self.bindings.bound(name, self._sizes)  # allocates the largest size
        self.rings = [self._ring(name) for name in self.boundaries[:-1]]
        self._views: dict[tuple[str, int], Array] = {}
        self._rows: dict[str, Array] = {}
        self._heads: dict[tuple[object, ...], Head] = {}
        self._late: dict[int, Ring] = {}
        self.adapters = Adapters(self)
        self.takes = inputs_taken(manifest, chain)
        self.texts = HeldTexts(self)
        self.prompts: list[int] = [0] * batch
        self.prefix: list[tuple[NDArray[np.int64], NDArray]] = []
        self.group_masks: dict[str, list[NDArray[np.bool_]]] = {}

    @property
    def stateful(self) -> list[Part]:
        """All parts with token states: the components, and the adapters of exits."""
        return [*self.parts, *self.adapters.parts]

    @property
    def answers_itself(self) -> bool:
        """Whether the last component outputs tokens itself, without a head (the unsplit graph)."""
        exit_ = self.exits[-1]
        assert exit_ is not None
        return not exit_.path

    def head(self, number: int, scores: Collection[str] = (), *, logits: bool = False) -> Head:
        """The head of the exit behind a component, with at least these scores, as far as it is the
        head that computes them (`TokenScores`). With logits, if they are asked or the last exit has
        the same head."""
        exit_ = self.exits[number]
        assert exit_ is not None and exit_.path
        own = {n: t for n, t in exit_.scores.items() if n not in self.token_scores.of(number)}
        scores = set(scores) - self.token_scores.of(number)
        key = (exit_.path[-1].component, *sorted((exit_.outputs | own).items()))
        head = self._heads.get(key)
        logits = logits or not has_own_head(self.chain, exit_) or bool(head and head.logits)
        names = frozenset(scores) | (head.scores if head else frozenset())
        if head is None or (head.scores, head.logits) != (names, logits):
            head = self._heads[key] = Head(self.components, exit_, names, logits=logits)
        return head

    def boundary(self, number: int, new: int) -> Array:
        """A boundary's buffer for that many new tokens, ``[batch, new, width]``."""
        return self.tensor(self.boundaries[number], new)

    def tensor(self, name: str, new: int) -> Array:
        """A tensor of the chain for that many new tokens."""
        view = self._views.get((name, new))
        if view is None:
            view = self.bindings.view(name, {"batch": self.batch, "new": new})
            self._views[name, new] = view
        return view

    def row_states(self, name: str, like: Array) -> Array:
        """Memory for a state per row ``[batch, width]``, like `like`; the same for a name."""
        states = self._rows.get(name)
        if states is None:
            shape = (self.batch, like.shape[-1])
            slot = self.engine.allocate(shape[0] * shape[1] * like.dtype.itemsize)
            states = self._rows[name] = slot.array(like.dtype, shape)
        return states

    def newest(self, states: Array, block: Block) -> Array:
        """The last real token of each row ``[batch, width]`` of a block's states ``[batch, new,
        width]``; undefined for rows without tokens. The next call overwrites it."""
        newest: Array = states[:, 0]
        if block.new == 1:
            return newest
        newest = self.row_states("newest of a block", newest)
        for row, count in enumerate(block.counts):
            if count:
                newest[row] = states[row, count - 1]
        return newest

    def late(self, number: int) -> Ring:
        """The ring of tokens that wait for an exit's adapter, emptied."""
        waiting = self.boundaries[number + 1]
        ring = self._late[number] = self._late.get(number) or self._ring(waiting)
        ring.clear(positions=self.ragged)
        return ring

    def begin(
        self,
        prompts: Sequence[int],
        prefix: Sequence[tuple[NDArray[np.int64], NDArray]] = (),
        groups: Mapping[str, Sequence[NDArray[np.bool_]]] | None = None,
        handed: Mapping[str, NDArray] | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        """Starts new texts.

        Args:
            prompts: Per row, the number of tokens in its prompt.
            prefix: Per row, the positions of prompt tokens whose embeddings come from another
                chain, and those embeddings ``[positions, width]``; empty: there are none.
            groups: Token group -> per row, which tokens of the prompt belong to it.
            handed: Tensors of earlier steps, by name.
            kept: Per row, how many of the first tokens in its states stay; empty: none.
        """
        if any(kept):
            self.texts.keep(kept)
        else:
            self.empty()
        self.prompts, self.prefix = list(prompts), list(prefix)
        self.group_masks = {
            group.mask: list((groups or {})[name])
            for name, group in self.decoding.groups.items()
            if group.mask is not None
        }
        for name, value in (handed or {}).items():
            self.handed.put(name, value, self.engine)
        self.gates.begin(groups or {})

    def embed(self, tokens: NDArray[np.int64], start: int | None = None) -> None:
        """Writes the embeddings of tokens ``[batch, new]`` to the first boundary.

        Args:
            start: Position of the first token in the prompt; None: not prompt tokens.
        """
        self.engine.settle()
        self.texts.note(tokens)
        first = self.boundary(0, tokens.shape[1])
        self._table.take(tokens, first)
        if start is None:
            return
        for row, (places, rows) in enumerate(self.prefix):
            chosen = (places >= start) & (places < start + tokens.shape[1])
            if chosen.any():
                first[row, places[chosen] - start] = rows[chosen]

    def run(self, number: int, block: Block) -> Block:
        """Runs a component over the block at its boundary.

        Returns:
            The block at the next boundary; it has fewer tokens if a gate dropped a group.

        Raises:
            InputError: A row's states have no room for the tokens, or no tokens remain.
        """
        if block.positions is not None and not any(block.counts):
            return block  # a gate dropped all of its tokens
        self.advance(self.parts[number], block)
        return self.gates.after(number, block) if self.ragged else block

    def run_through(self, first: int, last: int, block: Block) -> Block:
        """Runs components `first` to `last` - 1 over a block.

        A component's weights evict Python's code from the CPU caches. So, where no gate can change
        the block, everything is written before the first component runs.

        Returns:
            The block at boundary `last`.
        """
        for number in range(first, last):
            parts = self.parts[number:last]
            apart = block.positions is not None and self.batch > 1  # a gate let some rows go on
            wait = self.gates.pending or apart or not any(block.counts)
            calls = [] if wait else only_calls(parts, block.new)
            if calls:
                run_calls(self, parts, calls, block)
                break
            block = self.run(number, block)
        return block

    def run_all(
        self, first: int, last: int, new: int, counts: Sequence[int] | None = None
    ) -> Array:
        """As `run_through`, over tokens behind those in the states.

        Args:
            first, last: Range of components.
            new, counts: As in `Block`; None: all tokens are real.

        Returns:
            Boundary `last`, ``[batch, new, width]``.
        """
        self.run_through(first, last, Block(new, counts or [new] * self.batch))
        return self.boundary(last, new)

    def advance(self, part: Part, block: Block) -> None:
        """Runs a part over the block at its boundary."""
        states, positions = part.states, self.place(part, block)
        rows: list[int] = []
        if self.gates.pending and part.reads_prompt:
            rows = self.gates.write(block, standing(block, states.positions))
            part.make_prompt_states(block.new)
        ragged = None if positions is None or block.new == 1 else block.counts
        part.run(block.new, gaps=have_gaps(block), counts=ragged)
        self.gates.ran(part, rows)
        states.advance(block.counts)
        if block.positions is not None:
            states.find_gaps(block.counts, block.positions)

    def place(self, part: Part, block: Block) -> Sequence[int | Sequence[int]] | None:
        """Writes lengths and positions for a run of a part. Returns the positions; None: they
        follow the tokens in its states."""
        states, positions = part.states, block.positions
        states.check_room(block.new, part.name)
        if positions is None and any(states.gaps):
            positions = states.positions
        self.places.write(block.new, states.lengths, positions)
        return positions

    def add_projected(self, part: Part, block: Block, counts: Sequence[int]) -> None:
        """Adds the first ``counts[row]`` tokens of a block to the states of a part, by its
        projection."""
        states = part.states
        if (projected := part.project(block.new)) is not None:
            states.append(projected, [row for row, count in enumerate(block.counts) if count])
        states.advance(counts)
        if block.positions is not None:
            states.find_gaps(counts, block.positions)

    def project(self, number: int, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Lets one token per row skip a component. The component's projection computes its keys and
        values from the boundary (`Component.projections`); the boundary does not change.

        Args:
            rows: Rows with such a token.
            positions: Position of each row's token, ``[batch]``.
        """
        part = self.parts[number]
        self.places.write(1, part.states.lengths, positions)
        own = [int(row in rows) for row in range(self.batch)]
        self.add_projected(part, Block(1, own), own)

    def crop(self, positions: Sequence[int]) -> None:
        """Removes tokens from these positions ``[batch]`` on, in all states."""
        for part in self.stateful:
            part.states.crop(positions)

    def empty(self) -> None:
        """Removes all texts."""
        self.texts.clear()
        self.ragged = bool(self.gates.thresholds)
        for part in self.stateful:
            part.states.clear()
        for ring in self.rings:
            ring.clear(positions=self.ragged)
        self.prompts, self.prefix = [0] * self.batch, []
        self.gates.begin({})

    def portions(self, ring: Ring, part: Part, boundary: str) -> Iterator[tuple[Block, list[int]]]:
        """Moves the tokens of a ring to the tensor that a part reads, in blocks of the size of one
        run.

        Yields:
            The block, and the rows whose newest token is in it.
        """
        waiting, start = ring.counts, 0
        chunk = even_chunk(max(waiting), self.chunk)
        while start < max(waiting):
            # Rows with fewer tokens are padded; padding must not exceed the capacity.
            new = min(chunk, max(waiting) - start, self.capacity - part.states.longest())
            self.tensor(boundary, new)[...] = ring.states(start, start + new)
            counts = [min(max(count - start, 0), new) for count in waiting]
            ends = [row for row, count in enumerate(waiting) if start < count <= start + new]
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
        """Per row, the positions of the tokens of a block that a component has just run over."""
        ends = self.parts[number].states.positions
        return standing(block, [end - n for end, n in zip(ends, block.counts, strict=True)])

    def inputs_of(
        self, inputs: Sequence[Tensor], renamed: Mapping[str, str], new: int
    ) -> dict[str, Bound]:
        """Input name -> its memory, for that many new tokens."""
        sizes = {"batch": self.batch, "new": new}
        bound: dict[str, Bound] = {}
        for tensor in inputs:
            name = renamed.get(tensor.name, tensor.name)
            if name == self.decoding.positions.name:
                bound[tensor.name] = self.places.positions(new)
            elif name in self._masks:
                bound[tensor.name] = self.places.mask(name, new)
            elif name in self.handed.bound:
                bound[tensor.name] = self.handed.bound[name]
            else:
                bound[tensor.name] = self.bindings.bound(name, sizes)
        return bound

    def _ring(self, boundary: str) -> Ring:
        _, dtype, shape = self.bindings.bound(boundary, self._sizes)
        assert "new" in self.bindings.tensors[boundary].axes
        return Ring(self.batch, self.capacity, shape[-1], dtype, self.engine)


__all__ = ["Session"]
