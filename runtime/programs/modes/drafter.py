"""`Drafter`: the early exit that drafts tokens in mode ``exact``.

If the exit has an adapter, the adapter must process every token, in order; otherwise its KV cache
has gaps. The answer for the last draft is not needed, so its state waits and is processed together
with the next state in one run. If the draft is rejected, it is not processed at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session


class Drafter:
    """Evaluates one early exit of a session.

    Args:
        number: Index of the component in front of the exit.
        head: The exit's head, with the scores that are needed.
    """

    def __init__(self, session: Session, number: int, head: Head) -> None:
        self._session, self._number, self._head = session, number, head
        self._adapter = session.adapters[number]
        # If several new tokens run row by row (see `Part.run`), waiting takes more time than it
        # saves.
        self._waits = session.batch == 1 or (
            self._adapter is not None and self._adapter.variant.states != "in-place"
        )
        self._late = session.late(number)
        self._one = [1] * session.batch
        self._block = Block(1, self._one)

    def ask(self, states: Array) -> Answers:
        """Answers for the last output of the component in front of the exit,
        ``[batch, 1, width]``."""
        if self._adapter is None or not self._late.most():
            return self._head(self._session.adapters.run(self._number, self._block)[:, 0])
        self._push(states, self._block)
        return self._head(self._catch_up())

    def pass_by(self, states: Array, new: int = 1) -> None:
        """Processes the last output of the component in front of the exit, ``[batch, new, width]``,
        when no answer is needed."""
        if self._adapter is None:
            return
        block = self._block if new == 1 else Block(new, [new] * self._session.batch)
        if self._waits:
            self._push(states, block)
        else:
            self._session.adapters.run(self._number, block)

    def crop(self, positions: Sequence[int]) -> None:
        """Removes waiting states from these positions ``[batch]`` on. Call it after cropping all
        other states."""
        if self._adapter is not None:
            held = self._adapter.states.positions
            self._late.crop([max(a - b, 0) for a, b in zip(positions, held, strict=True)])

    def _push(self, states: Array, block: Block) -> None:
        positions = None
        if self._late.positions is not None:
            positions = self._session.positions_of(self._number, block)
        self._late.push(states, block.counts, positions)

    def _catch_up(self) -> Array:
        """Runs the adapter over all waiting states. Returns the newest state of every row,
        ``[batch, width]``; every row has one."""
        session, late, adapter = self._session, self._late, self._adapter
        assert adapter is not None
        newest = session.row_states("newest draft", late.states(0, 1))
        waiting = session.boundaries[self._number + 1]
        for block, ends in session.portions(late, adapter, waiting):
            adapted = session.adapters.run_newest(self._number, block)
            for row in ends:
                newest[row] = adapted[row]
        return newest
