"""Modes ``fast`` and ``approximate``: a token is answered by the exit whose score is good enough.

They differ in what the layers behind that exit get. `Fast` lets them catch up later, in one run for
many tokens, so that caches stay exact; `Approximate` gives them what their projections to keys and
values make of the state that left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeexit.runtime.engines.base import Array
from edgeexit.runtime.executor.head import Answers, Floats
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.full import Full, Ints, Statistics, last_states, pick
from edgeexit.runtime.programs.sampling import Sampler


class Fast:
    """Exits by score. States of rows that left wait; later segments catch up in one call.

    Args:
        thresholds: Per exit but the last; a token leaves where its score reaches it. +inf: never.
        pending: The most states that may wait at a boundary before all of them are caught up.
        audit: Also compute what the last exit says to every token that left early, once the
            segments have caught up with it.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        thresholds: Sequence[float],
        *,
        score: str = "max_prob",
        pending: int = 64,
        audit: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        self.session, self.exits, self.sampler = session, exits, sampler
        self.statistics = Statistics()
        self._head = session.head([score])
        self._thresholds, self._score = list(thresholds), score
        self._pending, self.audit = pending, audit
        self._current: Ints = np.zeros((session.batch, 1), np.int64)
        # Per row, for every state that has not yet reached the last boundary: the token emitted for
        # it by an early exit, or -1 where nothing was or the last exit answered itself.
        self._emitted: list[list[int]] = [[] for _ in range(session.batch)]
        self._newest = [
            session.row_states(f"newest behind {number}", session.boundary(number + 1, 1))
            for number in range(len(session.parts))
        ]

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        last = last_states(self.session, prompts, self._enter)
        for row, prompt in enumerate(prompts):
            self._emitted[row] += [-1] * len(prompt)
        return self._decide(last, [True] * self.session.batch).copy()

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        session.embed(self._current)
        counts = [int(on) for on in active]
        for row, on in enumerate(active):
            if on:
                self._emitted[row].append(-1)
        seen = self._enter(1, counts)
        tokens = self._decide(seen[:, 0], active).tolist()
        found = [[token] if on else [] for token, on in zip(tokens, active, strict=True)]
        if any(ring.most() >= self._pending for ring in session.rings[1:]):
            self.flush()
        return found

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def flush(self) -> None:
        """Lets every segment catch up with all states that wait."""
        for number in range(1, len(self.session.parts)):
            self._drain(number)

    def _look(self, number: int, states: Array, counts: Sequence[int]) -> Array:
        """What the head looks at of states that a segment's run has just made. They enter the
        exit's own caches, where it has any and will be asked."""
        final = number == len(self.session.parts) - 1
        if final or self._thresholds[number] == np.inf:
            return states
        return self.session.adapt(number, states.shape[1], counts)

    def _decide(self, states: Array, active: Sequence[bool]) -> Ints:
        """Answers for the newest state of every active row, which waits at the first boundary.
        `states` is what the first exit's head looks at."""
        undecided = [row for row, on in enumerate(active) if on]
        last = len(self.session.parts) - 1
        for number in range(last + 1):
            if number:
                states = self._drain(number)
            if number < last and self._thresholds[number] == np.inf:
                continue
            answers = self._head(states)
            leaving = undecided if number == last else self._leaving(number, answers, undecided)
            for row in leaving:
                if number < last:
                    self._emitted[row][-1] = int(answers["token"][row])
                self._current[row, 0] = pick(answers, row, self.sampler)
            self.statistics.count(self.exits[number], len(leaving))
            if len(leaving) == len(undecided):
                break
            undecided = [row for row in undecided if row not in leaving]
        return self._current[:, 0]

    def _leaving(self, number: int, answers: Answers, rows: list[int]) -> list[int]:
        """Those of the rows that leave at an exit."""
        return _good_enough(answers[self._score], self._thresholds[number], rows)

    def _enter(self, new: int, counts: Sequence[int]) -> Array:
        """Runs the first segment, behind which states wait. Returns what its exit looks at."""
        states = self.session.run(0, new, counts)
        self._wait(1, states, counts)
        return self._look(0, states, counts)

    def _wait(self, number: int, states: Array, counts: Sequence[int]) -> None:
        if number < len(self.session.parts):
            self.session.rings[number].push(states, counts)

    def _drain(self, number: int) -> Array:
        """Runs a segment over all that waits for it. Returns what the head looks at of the last
        state of every row; that of a row of which none waited means nothing."""
        session, ring = self.session, self.session.rings[number]
        newest = self._newest[number]
        if ring.most() > 1:
            self.statistics.catch_ups += 1
        for new, counts, ends in session.portions(ring, session.parts[number], number):
            states = session.run(number, new, counts)
            seen = self._look(number, states, counts)
            for row, place in ends:
                newest[row] = seen[row, place]
            if number + 1 < len(session.parts):
                self._wait(number + 1, states, counts)
            else:
                self._leave(states, counts)
        return newest

    def _leave(self, states: Array, counts: Sequence[int]) -> None:
        """Takes note of states that reached the last boundary; audits what exits said of them."""
        for row, count in enumerate(counts):
            told = self._emitted[row][:count]
            del self._emitted[row][:count]
            places = [place for place, token in enumerate(told) if token >= 0]
            if self.audit and places:
                asked = [states[row, place] for place in places]
                tokens = self._head.of(asked)["token"].tolist()
                self.statistics.audited += len(places)
                agreed = [told[place] == token for place, token in zip(places, tokens, strict=True)]
                self.statistics.agreed += sum(agreed)


class Approximate:
    """Exits by score, as CALM does it (arXiv:2207.07061): the state that a token leaves with is all
    that the layers behind ever see of it, through their projections to keys and values.

    Nothing is caught up, so caches are not those of the full model. Prompts are not approximated:
    their first token is the full model's.

    Args:
        thresholds: As for `Fast`.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        thresholds: Sequence[float],
        *,
        score: str = "max_prob",
        sampler: Sampler | None = None,
    ) -> None:
        self.session, self.exits, self.sampler = session, exits, sampler
        self._head = session.head([score])
        self._thresholds, self._score = list(thresholds), score
        self._full = Full(session, exits, sampler)
        self.statistics = self._full.statistics
        self._current: Ints = np.zeros((session.batch, 1), np.int64)

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        self._current[:, 0] = self._full.prefill(prompts)
        return self._current[:, 0].copy()

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        places = session.parts[0].caches.lengths
        undecided = [row for row, on in enumerate(active) if on]
        gone: list[int] = []
        left = session.row_states("left", session.boundary(1, 1))
        session.embed(self._current)
        for number in range(len(session.parts)):
            for row in gone:
                session.boundary(number, 1)[row, 0] = left[row]
            leaving: list[int] = []
            if undecided:
                counts = [int(row in undecided) for row in range(session.batch)]
                states = session.run(number, 1, counts, places=places)[:, 0]
                leaving = self._decide(number, states, undecided)
                for row in leaving:
                    left[row] = states[row]
            if gone:
                self._skip(number, gone, places)
            gone += leaving
            undecided = [row for row in undecided if row not in leaving]
        tokens = self._current[:, 0].tolist()
        return [[token] if on else [] for token, on in zip(tokens, active, strict=True)]

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def _skip(self, number: int, rows: Sequence[int], places: Sequence[int]) -> None:
        """What a segment keeps of tokens that left before it."""
        self.session.project(number, rows, places)

    def _decide(self, number: int, states: Array, undecided: list[int]) -> list[int]:
        """Those of the rows that are answered behind a segment; their tokens become the current
        ones."""
        final = number == len(self.session.parts) - 1
        if not final and self._thresholds[number] == np.inf:
            return []
        answers = self._head(states)
        leaving = undecided
        if not final:
            leaving = _good_enough(answers[self._score], self._thresholds[number], undecided)
        for row in leaving:
            self._current[row, 0] = pick(answers, row, self.sampler)
        self.statistics.count(self.exits[number], len(leaving))
        return leaving


def _good_enough(scores: Floats, threshold: float, rows: list[int]) -> list[int]:
    """Those of the rows whose score ``[batch]`` reaches the threshold."""
    found = scores.tolist()
    return [row for row in rows if found[row] >= threshold]


__all__ = ["Approximate", "Fast"]
