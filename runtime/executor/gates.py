"""Work that is done once per prompt: prompt states are computed, and gates drop token groups.

A component may read a prompt state (`PromptState`). The state's maker runs before the component's
first run; or the component makes it itself, in its run over the prompt. A component may have a gate
behind it (an exit with the action ``drop``): it scores the prompt once, and if its score reaches
the threshold, the tokens of its group are dropped. A gate without a score drops them always, chunk
by chunk. The positions of the other tokens do not change, so states behind the gate hold fewer
tokens than the text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Component, Exit, PromptState, Tensor
from edgeexit.errors import InputError
from edgeexit.runtime.engines.base import Array, Bound
from edgeexit.runtime.executor.blocks import Block, keep_tokens
from edgeexit.runtime.executor.components import made_by_others, prompt_states
from edgeexit.runtime.executor.head import BINDINGS_KEPT
from edgeexit.runtime.executor.slots import dtype_of, shape_of

if TYPE_CHECKING:
    from edgeexit.runtime.executor.parts import Part
    from edgeexit.runtime.executor.session import Session

logger = logging.getLogger(__name__)

_Run = tuple[list[Callable[[], object]], NDArray[np.float32]]
"""Calls that score a prompt, and the scores."""


class WholeReaders(NamedTuple):
    """What reads all states of a prompt, which may then have to pass in one run, by name.

    Attributes:
        makers: Makers of prompt states that other components read.
        own: Components that make prompt states in their own run.
        gates: Exits with the action ``drop``.
    """

    makers: Set[str]
    own: Sequence[str]
    gates: Set[str]

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self.makers or self.own or self.gates)


def makers_of(chain: Chain, components: Mapping[str, Component]) -> set[str]:
    """Components that make the prompt states of a chain's components, except for themselves."""
    return {state.maker for name in chain.components for state in made_by_others(components[name])}


def whole_readers(chain: Chain, components: Mapping[str, Component]) -> WholeReaders:
    """What reads all states of a prompt in a chain."""
    makers = makers_of(chain, components)
    own = [
        name
        for name in chain.components
        if any(state.made for state in prompt_states(components[name]))
    ]
    whole = {
        name
        for name in [*makers, *(call.component for e in chain.exits for call in e.path)]
        if any("new" in tensor.axes for tensor in components[name].inputs)
    }
    gates = {
        e.name
        for e in chain.exits
        if e.action == "drop" and whole & {call.component for call in e.path}
    }
    return WholeReaders(whole & makers, own, gates)


class Gates:
    """Makers and gates of a session's chain.

    Attributes:
        any: Whether the chain has gates.
        may_read_whole: Whether a maker, a gate or a component that makes states of its own reads
            all states of a prompt.
        pending: Whether one of these has yet to run for this prompt.
        thresholds: Gate -> threshold of its score; missing: it never drops.
        scores: Gate -> per row, its score.
        dropped: Gate -> per row, whether it dropped the group. Gates that were not asked, because
            no row had tokens of the group there, are missing.
    """

    def __init__(self, session: Session, chain: Chain) -> None:
        self._session = session
        components = session.components.bundle.manifest.components
        numbers = {name: number for number, name in enumerate(chain.components)}
        self._gates: dict[int, list[Exit]] = {}
        for exit_ in chain.exits:
            if exit_.action == "drop":
                self._gates.setdefault(numbers[exit_.behind], []).append(exit_)
        self._all = [gate for behind in self._gates.values() for gate in behind]
        self.any = bool(self._gates)
        self._whole = whole = whole_readers(chain, components)
        self._own_makers = whole.own
        self.may_read_whole = whole.any
        self._makers = makers_of(chain, components)
        self.pending = False
        self.thresholds: dict[str, float] = {}
        self.dropped: dict[str, list[bool]] = {}
        self.scores: dict[str, list[float]] = {}
        self._made: set[str] = set()
        self._left: dict[
            str, set[int]
        ] = {}  # component -> rows whose own states it has yet to make
        self._groups: Mapping[str, Sequence[NDArray[np.bool_]]] = {}
        self._over: set[str] = set()  # gates without a score whose prompts have passed
        self._holding: dict[str, list[bool]] = {}  # group -> per row, whether it has such tokens
        self._scratch: Array | None = None
        self._bindings: dict[tuple[str, int, int], _Run] = {}
        self._written: Block | None = None  # whose masks are in the session's places

    @property
    def whole_prompts(self) -> bool:
        """Whether a maker, a component that makes states of its own, or a gate that is in use reads
        all states of a prompt, which must then pass in one run."""
        always = bool(self._whole.makers or self._whole.own)
        return always or not self._whole.gates.isdisjoint(self.thresholds)

    def begin(self, groups: Mapping[str, Sequence[NDArray[np.bool_]]]) -> None:
        """Starts a new prompt.

        Raises:
            InputError: A prompt ends with tokens that a gate in use may drop.
        """
        self._made.clear()
        rows = {row for row, length in enumerate(self._session.prompts) if length}
        self._left = {name: set(rows) for name in self._own_makers if rows}
        self._written = None
        self.dropped, self.scores = {}, {}  # a generation may hold the ones before
        self._groups = groups
        self._holding = {name: [bool(own.any()) for own in rows] for name, rows in groups.items()}
        for gate in self._all:
            if gate.name in self.thresholds:
                self._check_ends(gate)
        self._over = {gate.name for gate in self._all if not self._has_tokens(gate)}
        self.pending = self._open()

    def _check_ends(self, gate: Exit) -> None:
        """Refuses prompts whose last token, which is answered, a gate may drop."""
        for row, own in enumerate(self._groups.get(gate.tokens or "", ())):
            if _within(own, self._session.prompts[row] - 1):
                raise InputError(
                    f"{gate.name}: cannot drop the group {gate.tokens}: prompt {row + 1} ends with "
                    "tokens of that group",
                    fix="Put text after them, or use a policy that does not drop this group.",
                )

    def _open(self) -> bool:
        if self._left or not self._makers <= self._made:
            return True
        for gate in self._all if self.thresholds else ():
            if gate.name not in self.thresholds:
                continue
            if not gate.path:
                if gate.name not in self._over:
                    return True
            elif gate.name not in self.dropped and self._has_tokens(gate):
                return True
        return False

    def _has_tokens(self, gate: Exit) -> bool:
        """Whether any row still has tokens that a gate could drop."""
        return any(self._holding.get(gate.tokens or "", ()))

    def write(self, block: Block, positions: Sequence[Sequence[int]]) -> list[int]:
        """Writes which of a block's tokens belong to the prompt and to its groups. Returns the rows
        that have any."""
        session, self._written = self._session, block
        return session.places.write_prompt(
            block.new, positions, session.prompts, session.group_masks
        )

    def ran(self, part: Part, rows: Sequence[int]) -> None:
        """Keeps the states that a part has made itself in a run over the prompts of these rows."""
        if rows:
            self._end_prompt()
        if not rows or part.name not in self._left:
            return
        part.made.keep(rows)
        self._left[part.name].difference_update(rows)
        if not self._left[part.name]:
            del self._left[part.name]
            self.pending = self._open()

    def _end_prompt(self) -> None:
        """Later runs belong to no prompt, unless `write` says so: nothing is written when no prompt
        is pending."""
        if self._own_makers:
            self._session.places.end_prompt()
            self._written = None

    def make(self, maker: str, wanted: Sequence[PromptState], new: int) -> None:
        """Runs a maker, if it has not run for this prompt, over the block at the boundary before
        the component that reads its states."""
        if maker in self._made:
            return
        session = self._session
        component = session.components.bundle.manifest.components[maker]
        inputs = session.inputs_of(component.inputs, {}, new)
        inputs |= session.places.lengths(session.components[maker].variant.lengths)
        sizes = {"batch": session.batch, "new": new} | _sizes(component.inputs, inputs)
        outputs: dict[str, Bound] = {}
        for tensor in component.outputs:
            shape = shape_of(tensor, sizes)
            assert shape is not None
            session.handed.room(tensor.name, dtype_of(tensor), shape, session.engine)
            outputs[tensor.name] = session.handed.bound[tensor.name]
        session.components.graph(maker).bind(inputs, outputs)()
        self._made.add(maker)
        self.pending = self._open()

    def after(self, number: int, block: Block) -> Block:
        """Runs the gates behind a component that has just run over a prompt. Returns the block that
        remains at the next boundary."""
        for gate in self._gates.get(number, ()):
            if gate.name not in self.thresholds:
                continue
            if not gate.path and gate.name not in self._over:
                block = self._drop(number, gate, block, [True] * self._session.batch)
                ends, prompts = self._session.parts[number].states.positions, self._session.prompts
                if all(end >= length for end, length in zip(ends, prompts, strict=True)):
                    self._over.add(gate.name)
                    self._holding[gate.tokens or ""] = [False] * self._session.batch
                    self.pending = self._open()
            elif gate.path and gate.name not in self.dropped and self._has_tokens(gate):
                block = self._ask(number, gate, block)
        return block

    def _ask(self, number: int, gate: Exit, block: Block) -> Block:
        """Scores a prompt, and drops the group where the score reaches the threshold."""
        session = self._session
        if block is not self._written:
            self.write(block, session.positions_of(number, block))
        scores = self.scores[gate.name] = self._scores(gate, block.new).tolist()
        self._end_prompt()
        if any(map(math.isnan, scores)):
            logger.warning(
                "%s: a score is NaN, so it drops nothing; run `edgeexit check` on the bundle",
                gate.name,
            )
        threshold = self.thresholds[gate.name]
        holding = self._holding[gate.tokens or ""]
        fired = [
            bool(score >= threshold) and holds  # a score that is NaN does not fire
            for score, holds in zip(scores, holding, strict=True)
        ]
        block = self._drop(number, gate, block, fired)
        self._holding[gate.tokens or ""] = [
            holds and not fires for holds, fires in zip(holding, fired, strict=True)
        ]
        self.pending = self._open()
        return block

    def _drop(self, number: int, gate: Exit, block: Block, fired: Sequence[bool]) -> Block:
        """Drops a gate's group from rows of a block."""
        session = self._session
        own = self._groups.get(gate.tokens or "", [np.zeros(0, np.bool_)] * session.batch)
        fired = [fires and bool(own[row].any()) for row, fires in enumerate(fired)]
        self.dropped[gate.name] = fired
        if not any(fired):
            return block
        # From here on the block states its positions, even if this chunk loses no token: behind a
        # chunk that lost all of its tokens they could not be told from the states.
        positions = session.positions_of(number, block)
        kept = [
            [n for n, place in enumerate(places) if not (fires and _within(own[row], place))]
            for row, (places, fires) in enumerate(zip(positions, fired, strict=True))
        ]
        counts = [len(left) for left in kept]
        states = session.boundary(number + 1, block.new)
        if self._scratch is None:
            shape = (session.batch, session.chunk, states.shape[2])
            size_bytes = int(np.prod(shape)) * states.dtype.itemsize
            self._scratch = session.engine.allocate(size_bytes).array(states.dtype, shape)
        new = max(1, *counts)  # a block needs a size, even if no token is left
        keep_tokens(states, self._scratch, kept)
        session.boundary(number + 1, new)[...] = self._scratch[:, :new]
        standing = [[places[n] for n in left] for places, left in zip(positions, kept, strict=True)]
        return Block(new, counts, standing)

    def _scores(self, gate: Exit, new: int) -> NDArray[np.float32]:
        """A gate's score of every row, ``[batch]``; its next run overwrites them."""
        key = gate.name, new, self._session.handed.epoch
        runs, scores = self._bindings.get(key) or self._bind(gate, new)
        for run in runs:
            run()
        return scores

    def _bind(self, gate: Exit, new: int) -> _Run:
        """Binds the components that score a prompt of so many tokens."""
        session = self._session
        [tensor] = gate.scores.values()
        host = session.engine.allocate_host(session.batch * 4)
        dtype, shape = np.dtype(np.float32), (session.batch,)
        runs = []
        for call in gate.path:
            component = session.components.bundle.manifest.components[call.component]
            inputs = session.inputs_of(component.inputs, call.inputs, new)
            inputs |= session.places.lengths(session.components[call.component].variant.lengths)
            outputs: dict[str, Bound] = {
                output.name: (host, dtype, shape)
                if output.name == tensor
                else session.bindings.bound(output.name, {"batch": session.batch, "new": new})
                for output in component.outputs
            }
            runs.append(session.components.graph(call.component).bind(inputs, outputs))
        while len(self._bindings) >= BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        key = gate.name, new, session.handed.epoch
        bound = self._bindings[key] = runs, host.array(dtype, shape)
        return bound


def _within(own: NDArray[np.bool_], place: int) -> bool:
    """Whether the token at a position of the text belongs to a group."""
    return place < len(own) and bool(own[place])


def _sizes(inputs: Sequence[Tensor], bound: Mapping[str, Bound]) -> dict[str, int]:
    """Sizes of named axes in the bound inputs."""
    return {
        axis: size
        for tensor in inputs
        for axis, size in zip(tensor.axes, bound[tensor.name][2], strict=True)
        if isinstance(axis, str)
    }


__all__ = ["Gates", "WholeReaders", "makers_of", "whole_readers"]
