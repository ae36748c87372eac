"""Modes ``fast`` and ``approximate``: a token stops at the first exit whose score is high enough.

They differ in what the components behind that exit do. In `Fast` they catch up later, in one run
for many tokens, so their states stay exact. In `Approximate` their projections compute keys and
values from the exit's hidden state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.policy import Decision
from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.blocks import CHUNK, Block
from edgeexit.runtime.executor.exits import leaving
from edgeexit.runtime.executor.head import Answers, Head
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.full import Full, Ints, Statistics, last_states, pick
from edgeexit.runtime.programs.sampling import Sampler

_ONE = Block(1, [1])
"""A run of one token."""


class Fast:
    """Mode ``fast``. Tokens that stopped at an exit wait there; later components catch up in one
    run.

    Args:
        exits: Name of the exit behind each component; empty: no exit.
        decisions: Per component, the policy's decision at the exit behind it.
        pending: Most tokens that may wait at a boundary; then all components catch up. A text that
            ends before never pays for them, not even for its prompt.
        audit: Also compute the last exit's token for every token of an early exit, when the
            components catch up.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        decisions: Sequence[Decision],
        *,
        pending: int = CHUNK,
        audit: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        self.session, self.exits, self.sampler = session, exits, sampler
        self.statistics = Statistics()
        self._decisions = list(decisions)
        self._heads = heads_of(session, decisions, logits=sampler is not None)
        # Scores of each row's newest token that are known before the head runs.
        self._known = [
            np.full(session.batch, np.nan, np.float32) if known else None
            for known in known_scores(session, decisions)
        ]
        self._pending, self.audit, self._token = pending, audit, 0
        self._current: Ints = np.zeros((session.batch, 1), np.int64)
        # Per row, for every token that has not reached the last boundary: the early exit's answer,
        # or -1 if no early exit answered.
        self._emitted: list[list[int]] = [[] for _ in range(session.batch)]
        self._newest = [
            session.row_states(f"newest behind {number}", session.boundary(number + 1, 1))
            for number in range(len(session.parts))
        ]

    @property
    def asked(self) -> Collection[int]:
        return [number for number, head in enumerate(self._heads[:-1]) if head is not None]

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        self._token = 1
        first, last_part = self.session.parts[0].states, self.session.parts[-1].states
        waiting = zip(first.lengths, last_part.lengths, strict=True)  # of a text that goes on
        self._emitted = [[-1] * (before - after) for before, after in waiting]
        last = last_states(self.session, prompts, self._enter_prompt)
        return self._decide(last, [True] * self.session.batch).copy()

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        self._token += 1
        session.embed(self._current)
        counts = [int(on) for on in active]
        for row, on in enumerate(active):
            if on:
                self._emitted[row].append(-1)
        seen, _ = self._enter(Block(1, counts))
        tokens = self._decide(seen, active).tolist()
        new_tokens = [[token] if on else [] for token, on in zip(tokens, active, strict=True)]
        if any(ring.most() >= self._pending for ring in session.rings[1:]):
            self.flush()
        return new_tokens

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def flush(self) -> None:
        """Lets every component process all waiting tokens."""
        for number in range(1, len(self.session.parts)):
            self._drain(number)

    def _look(self, number: int, block: Block) -> Array:
        """The head's input for the newest token of each row ``[batch, width]`` of a block that a
        component has just run over; undefined for rows without tokens. Runs the exit's adapter, if
        it has one and the policy uses the exit."""
        session = self.session
        if self._heads[number] is None:  # its adapter, if it has one, is not asked
            return session.newest(session.boundary(number + 1, block.new), block)
        return session.adapters.run_newest(number, block)

    def _decide(self, states: Array, active: Sequence[bool]) -> Ints:
        """Answers for the newest token of every active row; these tokens wait behind the first
        component. `states` is the input of the first exit's head."""
        undecided = [row for row, on in enumerate(active) if on]
        last = len(self.session.parts) - 1
        for number in range(last + 1):
            if number:
                states = self._drain(number)
            if number < last and not self._decisions[number].consult:
                continue
            head = self._heads[number]
            assert head is not None
            known, decision = self._known[number], self._decisions[number]
            if known is not None and not leaving(known, decision, undecided, self._token):
                continue
            answers = head(states)
            gone = undecided if number == last else self._leaving(number, answers, undecided)
            for row in gone:
                if number < last:
                    self._emitted[row][-1] = int(answers["token"][row])
                self._current[row, 0] = pick(answers, row, self.sampler)
            self.statistics.count(self.exits[number], len(gone))
            if len(gone) == len(undecided):
                break
            undecided = [row for row in undecided if row not in gone]
        return self._current[:, 0]

    def _leaving(self, number: int, answers: Answers, rows: list[int]) -> list[int]:
        """The rows that stop at an exit."""
        decision, known = self._decisions[number], self._known[number]
        scores = answers[decision.score] if known is None else known
        return leaving(scores, decision, rows, self._token)

    def _run(self, number: int, block: Block) -> Block:
        """Runs a component over a block, and notes the newest scores. Returns the block behind."""
        after = self.session.run(number, block)
        if (known := self._known[number]) is not None:
            score = self._decisions[number].score
            newest = self.session.token_scores.newest(number, score, block)
            for row, count in enumerate(block.counts):
                if count:
                    known[row] = newest[row]
        return after

    def _enter(self, block: Block) -> tuple[Array, Sequence[int]]:
        """Runs the first component; its tokens then wait behind it. Returns its exit's input
        ``[batch, width]``, and the number of real tokens per row."""
        block = self._run(0, block)
        self._wait(1, block)
        return self._look(0, block), block.counts

    def _enter_prompt(self, block: Block) -> tuple[Array, Sequence[int]]:
        newest, counts = self._enter(block)
        for row, count in enumerate(counts):
            self._emitted[row] += [-1] * count
        return newest.reshape(len(counts), 1, -1), [1] * len(counts)

    def _wait(self, number: int, block: Block) -> None:
        session = self.session
        if number < len(session.parts):
            ring = session.rings[number]
            positions = None
            if ring.positions is not None:
                positions = session.positions_of(number - 1, block)
            ring.push(session.boundary(number, block.new), block.counts, positions)

    def _drain(self, number: int) -> Array:
        """Runs a component over all tokens that wait for it. Returns the head's input for the last
        token of every row; for rows without waiting tokens it is undefined."""
        session, ring = self.session, self.session.rings[number]
        newest = self._newest[number]
        if ring.most() > 1:
            self.statistics.catch_ups += 1
        part = session.parts[number]
        for block, ends in session.portions(ring, part, session.boundaries[number]):
            before, block = block, self._run(number, block)
            seen = self._look(number, block)
            gone = [a - b for a, b in zip(before.counts, block.counts, strict=True)]
            for row in ends:
                newest[row] = seen[row]
            for row, count in enumerate(gone):  # prompt tokens that a gate dropped
                del self._emitted[row][:count]
            if number + 1 < len(session.parts):
                self._wait(number + 1, block)
            else:
                self._audit(block)
        return newest

    def _audit(self, block: Block) -> None:
        """Records that tokens have reached the last boundary, and audits their early answers."""
        session, last = self.session, len(self.session.parts) - 1
        states = session.boundary(last + 1, block.new)
        head = self._heads[last]
        assert head is not None
        for row, count in enumerate(block.counts):
            emitted = self._emitted[row][:count]
            del self._emitted[row][:count]
            places = [place for place, token in enumerate(emitted) if token >= 0]
            if self.audit and places:
                tokens = head.of([states[row, place] for place in places])["token"].tolist()
                self.statistics.audited += len(places)
                pairs = zip(places, tokens, strict=True)
                self.statistics.agreed += sum(emitted[place] == token for place, token in pairs)


class Approximate:
    """Mode ``approximate``, as in CALM (arXiv:2207.07061): components behind the exit compute a
    token's keys and values from the exit's hidden state, through their projections.

    They never catch up, so their states differ from the full model's. Prompts run through all
    layers: the first token is the full model's.

    Args:
        exits, decisions: As for `Fast`.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        decisions: Sequence[Decision],
        *,
        sampler: Sampler | None = None,
    ) -> None:
        self.session, self.exits, self.sampler = session, exits, sampler
        self._decisions = list(decisions)
        self._heads = heads_of(session, decisions, logits=sampler is not None)
        self._known, self._token = known_scores(session, decisions), 0
        self._full = Full(session, exits, sampler)
        self.statistics = self._full.statistics
        self._current: Ints = np.zeros((session.batch, 1), np.int64)

    @property
    def asked(self) -> Collection[int]:
        return ()

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        self._token = 1
        self._current[:, 0] = self._full.prefill(prompts)
        return self._current[:, 0].copy()

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        self._token += 1
        places = session.parts[0].states.positions
        undecided = [row for row, on in enumerate(active) if on]
        gone: list[int] = []
        left = session.row_states("left", session.boundary(1, 1))
        session.embed(self._current)
        for number in range(len(session.parts)):
            for row in gone:
                session.boundary(number, 1)[row, 0] = left[row]
            now: list[int] = []
            if undecided:
                counts = [int(row in undecided) for row in range(session.batch)]
                session.run(number, Block(1, counts, places))
                states = session.boundary(number + 1, 1)[:, 0]
                now = self._decide(number, states, undecided)
                for row in now:
                    left[row] = states[row]
            if gone:
                self._skip(number, gone, places)
            gone += now
            undecided = [row for row in undecided if row not in now]
        tokens = self._current[:, 0].tolist()
        return [[token] if on else [] for token, on in zip(tokens, active, strict=True)]

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def _skip(self, number: int, rows: Sequence[int], places: Sequence[int]) -> None:
        """Adds tokens that stopped before a component to its states."""
        self.session.project(number, rows, places)

    def _decide(self, number: int, states: Array, undecided: list[int]) -> list[int]:
        """The rows that stop behind a component. Their tokens become the current tokens."""
        final = number == len(self.session.parts) - 1
        decision, head = self._decisions[number], self._heads[number]
        if not final and not decision.consult:
            return []
        assert head is not None
        known: NDArray[Any] | None = None
        if self._known[number]:
            known = self.session.token_scores.newest(number, decision.score, _ONE)
            if not leaving(known, decision, undecided, self._token):
                return []
        answers, gone = head(states), undecided
        if not final:
            scores = answers[decision.score] if known is None else known
            gone = leaving(scores, decision, undecided, self._token)
        for row in gone:
            self._current[row, 0] = pick(answers, row, self.sampler)
        self.statistics.count(self.exits[number], len(gone))
        return gone


def heads_of(session: Session, decisions: Sequence[Decision], *, logits: bool) -> list[Head | None]:
    """The head of every exit that is used, with the scores that decide, and with logits if they are
    asked. The last exit is always used and needs no score."""
    last = len(decisions) - 1
    scores = {d.score for d in decisions[:-1] if d.consult}
    return [
        session.head(number, scores, logits=logits) if decision.consult or number == last else None
        for number, decision in enumerate(decisions)
    ]


def known_scores(session: Session, decisions: Sequence[Decision]) -> list[bool]:
    """Per exit, whether its score is known before its head runs. Opens those scores."""
    last = len(decisions) - 1
    return [
        number < last and decision.consult and session.token_scores.open(number, [decision.score])
        for number, decision in enumerate(decisions)
    ]


__all__ = ["Approximate", "Fast", "heads_of", "known_scores"]
