"""The exit that drafts: what its head says of one state per row after another.

Its adapter, where it has one, must see every state that passes, each once and in order. The last
draft's state passes, but its answer is not needed: it waits, and enters the adapter's states with
the next state that is asked about, in one run. If the draft is refused, there is no run at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session


class Drafter:
    """Asks one early exit of a session.

    Args:
        number: Index of the exit.
        head: The shared head, with the scores that are looked at.
    """

    def __init__(self, session: Session, number: int, head: Head) -> None:
        self._session, self._number, self._head = session, number, head
        self._adapter = session.adapter(number)
        # Where several new tokens are run row by row (see `Part.run`), waiting costs more than it
        # saves.
        self._waits = session.batch == 1 or (
            self._adapter is not None and self._adapter.variant.states != "in-place"
        )
        self._late = session.late(number)
        self._one = [1] * session.batch
        self._block = Block(1, self._one)

    def ask(self, states: Array) -> Answers:
        """Answers for what the segment before the exit has just made, ``[batch, 1, width]``."""
        if self._adapter is None or not self._late.most():
            return self._head(self._session.adapt(self._number, self._block)[:, 0])
        self._push(states)
        return self._head(self._catch_up())

    def pass_by(self, states: Array) -> None:
        """Takes what the segment before the exit has just made, ``[batch, 1, width]``, when no
        answer is needed."""
        if self._adapter is None:
            return
        if self._waits:
            self._push(states)
        else:
            self._session.adapt(self._number, self._block)

    def crop(self, positions: Sequence[int]) -> None:
        """Forgets what waits and stands at these positions ``[batch]`` or behind, which were taken
        back everywhere else."""
        if self._adapter is not None:
            held = self._adapter.states.positions
            self._late.crop([max(a - b, 0) for a, b in zip(positions, held, strict=True)])

    def _push(self, states: Array) -> None:
        positions = None
        if self._late.positions is not None:
            positions = self._session.positions_of(self._number, self._block)
        self._late.push(states, self._one, positions)

    def _catch_up(self) -> Array:
        """Runs the adapter over all that waits. Returns each row's newest state ``[batch,
        width]``; every row has one."""
        session, late, adapter = self._session, self._late, self._adapter
        assert adapter is not None
        newest = session.row_states("newest draft", late.states(0, 1))
        waiting = session.boundaries[self._number + 1]
        for block, ends in session.portions(late, adapter, waiting):
            made = session.adapt(self._number, block)
            for row, place in ends:
                newest[row] = made[row, place]
        return newest
