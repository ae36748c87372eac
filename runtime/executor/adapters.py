"""`Adapters`: components between a boundary and the head of its exit that have states of their own
(FREE's layer in front of a shared head).

An adapter must process every token that passes its exit, in order; otherwise its KV cache has gaps.
But few of a prompt's tokens are asked: of the others, an adapter of one layer needs only the keys
and values, which its projection computes in a fraction of the time.

Prompt states that an adapter reads, such as the cross keys and values of an encoder's output, are
made when it is first asked for a prompt: the adapters of exits that nobody asks cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgeexit.bundle.manifest import Exit
from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.blocks import Block, last_of
from edgeexit.runtime.executor.parts import Part

if TYPE_CHECKING:
    from edgeexit.runtime.executor.session import Session

FEW = 4
"""Blocks of fewer tokens run whole: two runs would take more time than they save."""


class Adapters:
    """The adapters of a session's exits. Exits are counted by the component in front of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._paths = [self._open(exit_) for exit_ in session.exits]

    @property
    def parts(self) -> list[Part]:
        """All of them."""
        return [part for path in self._paths for part in path]

    def __iter__(self) -> Iterator[Part | None]:
        return (self[number] for number in range(len(self._paths)))

    def path(self, number: int) -> list[Part]:
        """What stands between a boundary and the head of its exit."""
        return self._paths[number]

    def __getitem__(self, number: int) -> Part | None:
        """The last component of an exit's path in front of its head; None: there is none."""
        path = self._paths[number]
        return path[-1] if path else None

    def run(self, number: int, block: Block) -> Array:
        """Runs the adapter of an exit over the last output of the component in front of it.

        Returns:
            The input of the head, ``[batch, new, width]``: the adapter's output or, without an
            adapter, the boundary.
        """
        session, path = self._session, self._paths[number]
        for part in path:
            self._advance(part, block)
        name = path[-1].state if path else session.boundaries[number + 1]
        return session.tensor(name, block.new)

    def pass_by(self, number: int, block: Block) -> None:
        """As `run`, for tokens whose answers are not needed."""
        part = self._projecting(number)
        if part is None:
            self.run(number, block)
        else:
            self._session.place(part, block)
            self._session.add_projected(part, block, block.counts)

    def run_newest(self, number: int, block: Block) -> Array:
        """As `run`, for the newest token of each row.

        Returns:
            ``[batch, width]``; undefined for rows without tokens. The next call overwrites it.
        """
        session, part = self._session, self._projecting(number)
        if part is None or block.new < FEW:
            return session.newest(self.run(number, block), block)
        positions = session.place(part, block)
        newest = session.newest(session.boundary(number + 1, block.new), block)
        session.add_projected(part, block, [max(count - 1, 0) for count in block.counts])
        # The newest tokens stand in front of the buffer for a moment; the block is still read.
        one = session.boundary(number + 1, 1)[:, 0]
        first = session.row_states("first of a block", one)
        first[...], one[...] = one, newest
        last = None if positions is None else last_of(positions, block.counts)
        self._advance(part, Block(1, [min(count, 1) for count in block.counts], last))
        one[...] = first
        asked: Array = session.tensor(part.state, 1)[:, 0]
        return asked

    def _open(self, exit_: Exit | None) -> list[Part]:
        session = self._session
        parts = [] if exit_ is None else [Part(session, c.component, c) for c in exit_.path[:-1]]
        for part in parts:
            session.tensor(part.state, session.chunk)
        return parts

    def _advance(self, part: Part, block: Block) -> None:
        if part.reads_prompt:
            part.make_prompt_states(block.new)
        self._session.advance(part, block)

    def _projecting(self, number: int) -> Part | None:
        """The adapter of an exit, if it is a single component with a projection."""
        path: Sequence[Part] = self._paths[number]
        projects = len(path) == 1 and path[0].component.projections
        return path[0] if projects else None


__all__ = ["Adapters"]
