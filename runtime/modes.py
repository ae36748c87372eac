"""How the next tokens come about: ``full``, ``exact``, ``fast`` and ``approximate``, on one set of
engines.

Each mode is a class with `prefill` (a prompt in, the first token out) and `step` (one round: one
token or several per row). All of them keep to four rules. A state that passed a boundary without
the segments behind it waits in that boundary's ring; running a segment drains its ring first; an
exit that is asked now and then is given every state that passes it (`Session.adapt`), for its
adapter's caches; and what a cache holds beyond its length does not count.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.drafter import Answers, Drafter
from edgeexit.runtime.parts import Floats, Session
from edgeexit.runtime.sampling import Floats64, Sampler

Ints = NDArray[np.int64]


@dataclass
class Statistics:
    """What happened while a text was written.

    Attributes:
        tokens: Tokens made, over all rows.
        exits: Exit name -> tokens that were answered there (for ``exact``: drafted there and
            accepted; the last exit made the others).
        drafted: Tokens drafted (``exact``).
        accepted: How many of them the full model confirmed.
        tested: Drafts that were compared at all: those before and at the first refusal.
        catch_ups: Calls in which later segments caught up with states that waited (``fast``).
        audited: Tokens of early exits that the full model's answer was computed for, too.
        agreed: How many of those have the greedy token that the full model has.
    """

    tokens: int = 0
    exits: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    tested: int = 0
    catch_ups: int = 0
    audited: int = 0
    agreed: int = 0

    def count(self, exit_name: str, tokens: int) -> None:
        """Counts tokens answered at an exit."""
        self.tokens += tokens
        if tokens:
            self.exits[exit_name] = self.exits.get(exit_name, 0) + tokens

    @property
    def acceptance(self) -> float | None:
        """Accepted ÷ drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def alpha(self) -> float | None:
        """Chance that a draft is accepted when all before it were: accepted ÷ tested."""
        return self.accepted / self.tested if self.tested else None

    @property
    def agreement(self) -> float | None:
        """Share of early exits' tokens that are those of the full model."""
        return self.agreed / self.audited if self.audited else None


class Mode(Protocol):
    """A way to decode."""

    statistics: Statistics
    sampler: Sampler | None

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        """Takes prompts, one per row. Returns the first token of every row, ``[batch]``."""

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        """One round. Returns the new tokens of every row; those that are not active get none."""

    def force(self, tokens: Ints) -> None:
        """Goes on with these tokens ``[batch]`` in place of the last ones made."""


class Full:
    """Every segment for every token; also the unsplit graph, whose one segment answers itself.

    Args:
        asked: Indices of early exits that take the prompt, for a mode that asks them later.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        sampler: Sampler | None = None,
        *,
        asked: Collection[int] = (),
    ) -> None:
        self.session, self.exits, self.sampler, self._asked = session, exits, sampler, asked
        self.statistics = Statistics()
        self._current: Ints = np.zeros((session.batch, 1), np.int64)

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        session = self.session
        last: Floats | None = None
        lengths = np.array([len(prompt) for prompt in prompts])
        for start in range(0, int(lengths.max()), session.chunk):
            tokens, counts = _chunk(prompts, start, session.chunk)
            session.embed(tokens)
            for number in range(len(session.parts)):
                states = session.run(number, tokens.shape[1], counts)
                if number in self._asked:
                    session.adapt(number, tokens.shape[1], counts)
            ends = (start < lengths) & (lengths <= start + session.chunk)
            if ends.any():
                made = states[np.arange(session.batch), np.maximum(counts - 1, 0)]
                last = made.copy() if last is None else np.where(ends[:, None], made, last)
        assert last is not None
        self._current[:, 0] = self._answer(last[:, None])
        self.statistics.count(self.exits[-1], session.batch)
        return self._current[:, 0].copy()

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session = self.session
        session.embed(self._current)
        for number in range(len(session.parts)):
            states = session.run(number, 1)
        self._current[:, 0] = self._answer(states)
        going, tokens = active.tolist(), self._current[:, 0].tolist()
        self.statistics.count(self.exits[-1], sum(going))
        return [[token] if on else [] for token, on in zip(tokens, going, strict=True)]

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def _answer(self, states: Floats) -> Ints:
        """Tokens for states ``[batch, 1, width]``; the unsplit graph has answered already."""
        session = self.session
        unsplit = session.opened.head is None
        answers = session.parts[-1].answers if unsplit else session.head()(states[:, 0])
        return choose(answers, self.sampler)


class Exact:
    """Self-speculation: the first segments draft, the others verify (LayerSkip, arXiv:2404.16710).

    A round drafts up to `drafts` tokens with the segments before the exit, then runs those behind
    it once over all of them. What agrees with the last exit's own greedy tokens is kept, with one
    more token of the last exit. Nothing of the first segments is computed twice.

    Args:
        exit_number: Index of the exit that drafts; None: of every round the one that pays most by
            what was measured so far (`Pace`), the earliest ones being tried first.
        drafts: The most tokens of a draft; None: as many as pay, none included.
        threshold: Drafting stops early when the drafting exit's score is below.
        paces: What earlier texts told of the exits, for batches of the same size; kept up.
    """

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        exit_number: int | None = None,
        *,
        drafts: int | None = None,
        threshold: float = 0.0,
        score: str = "max_prob",
        sampler: Sampler | None = None,
        paces: dict[int, Pace] | None = None,
    ) -> None:
        self.session, self.exits = session, exits
        self.sampler = sampler
        self.statistics = Statistics()
        self._head = session.head([score] if threshold > 0 else [])
        self._fixed, self._threshold, self._score = drafts, threshold, score
        layers = [len(part.segment.caches) for part in session.parts]
        shares = [sum(layers[: n + 1]) / sum(layers) for n in range(len(layers) - 1)]
        # A seed shall give the same text again, so what is drawn must not depend on times.
        self._timed = sampler is None
        known = paces if paces is not None and self._timed else {}
        for number, share in enumerate(shares):
            known.setdefault(number, Pace(share)).next_text()
        # An adapter must see every state that passes: exits with adapters do not take turns.
        if exit_number is None and session.adapters:
            exit_number = 0
        chosen = list(range(len(shares))) if exit_number is None else [exit_number]
        self._paces = {number: known[number] for number in chosen}
        self._drafters = {number: Drafter(session, number, self._head) for number in chosen}
        self._full = Full(session, exits, sampler, asked=chosen)

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        first = self._full.prefill(prompts)
        self._current = first.copy()
        self.statistics.count(self.exits[-1], len(first))
        return first

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session, batch = self.session, self.session.batch
        exit_number, drafts_wanted = self._plan()
        behind, drafter = exit_number + 1, self._drafters[exit_number]
        going = active.tolist()
        if not all(going):
            for part in session.cached:
                part.caches.lengths[~active] = 0  # rows that ended need no room, and go on in vain
            drafter.forget(~active)
        start = session.parts[0].caches.lengths.copy()
        room = session.capacity - session.parts[0].caches.longest() - 1
        wanted = max(0, min(drafts_wanted, room, session.chunk - 1))
        tokens = self._current[:, None].copy()
        drafts = np.empty((batch, wanted), np.int64)
        chances: list[list[Floats64]] = [[] for _ in range(batch)]
        ring = session.rings[behind]
        one = np.ones(batch, np.int64)
        made = 0
        started = time.perf_counter()
        while True:
            session.embed(tokens)
            for number in range(behind):
                states = session.run(number, 1)
            ring.push(states, one)
            if made == wanted:
                drafter.pass_by(states)
                break
            answers = drafter.ask(states)
            # Decided before anything is drawn: leaving out tokens once drawn would bias the rest.
            if self._threshold > 0 and (answers[self._score][active] < self._threshold).all():
                break
            tokens[:, 0] = self._draft(answers, drafts[:, :made], chances)
            drafts[:, made] = tokens[:, 0]
            made += 1
        drafted = time.perf_counter()
        rows = made + 1
        session.boundary(behind, rows)[...] = ring.states(0, rows)
        ring.clear()
        for number in range(behind, len(session.parts)):
            states = session.run(number, rows)
        answers = self._head(states.reshape(batch * rows, -1))
        kept, self._current = self._verify(answers, drafts[:, :made], chances)
        length = np.where(active, start + kept + 1, start)
        session.crop(length)
        drafter.crop(length)
        verified = time.perf_counter()
        found: list[list[int]] = []
        tested = accepted = 0
        for row, count in enumerate(kept.tolist()):
            if not going[row]:
                found.append([])
                continue
            found.append([*drafts[row, :count].tolist(), int(self._current[row])])
            tested += min(count + 1, made)
            accepted += count
            self.statistics.count(self.exits[exit_number], count)
            self.statistics.count(self.exits[-1], 1)
            self.statistics.drafted += made
        self.statistics.tested += tested
        self.statistics.accepted += accepted
        times = (drafted - started, verified - drafted) if self._timed else None
        self._paces[exit_number].tell(made, tested, accepted, times)
        return found

    def force(self, tokens: Ints) -> None:
        self._current = tokens.copy()

    def _draft(
        self, answers: Answers, drafted: Ints, chances: list[list[Floats64]]
    ) -> NDArray[np.int64]:
        """The drafting exit's tokens, and when they are drawn their chances."""
        if self.sampler is None:
            return answers["token"]
        found = np.empty(len(drafted), np.int64)
        for row, logits in enumerate(answers["logits"]):
            q = self.sampler.chances(row, logits, drafted[row].tolist())
            chances[row].append(q)
            found[row] = self.sampler.draw(row, q)
        return found

    def _verify(
        self, answers: Answers, drafts: Ints, chances: list[list[Floats64]]
    ) -> tuple[Ints, Ints]:
        """Per row, how many drafts the last exit confirms, and its own token behind them."""
        batch, made = drafts.shape
        if self.sampler is None:
            own = answers["token"].reshape(batch, made + 1)
            agree = drafts == own[:, :made]
            kept = np.where(agree.all(1), made, agree.argmin(1) if made else 0)
            return kept, own[np.arange(batch), kept].copy()
        logits = answers["logits"].reshape(batch, made + 1, -1)
        kept, after = np.empty(batch, np.int64), np.empty(batch, np.int64)
        for row in range(batch):
            told = drafts[row].tolist()
            p = [self.sampler.chances(row, logits[row, n], told[:n]) for n in range(made + 1)]
            kept[row], after[row] = self.sampler.verify(row, told, chances[row], p)
        return kept, after

    def _plan(self) -> tuple[int, int]:
        """The exit that drafts next, and how many tokens."""
        known = next((pace.full_s for pace in self._paces.values() if pace.full_s), None)
        for pace in self._paces.values():
            if not pace.full_s:
                pace.guess(known or 1.0)
        number = max(self._paces, key=lambda number: self._paces[number].best[1])
        return number, self._paces[number].best[0] if self._fixed is None else self._fixed


class Pace:
    """What drafting at one exit was seen to bring and to cost.

    A round of d drafts gives (1 - a^(d+1)) / (1 - a) tokens, a being the chance that a draft is
    accepted when all before it were. It costs d + 1 runs of the layers before the exit and one of
    those behind it, whose time grows with its d + 1 rows. What has not been measured is guessed
    from the share of layers, so that exits are tried from the cheapest on.

    Attributes:
        full_s: Seconds of a round without drafts; 0 until something was measured.
        best: The number of drafts that pays most, and its tokens per second.
    """

    MOST_DRAFTS = 8
    ACCEPTANCE = 0.75
    """Assumed until drafts were tested, and slowly again while there are none."""

    HEAD_SHARE, SLOPE = 0.08, 0.05
    """Guesses: what the head costs beside all layers, and by how much each further row slows the
    layers behind the exit."""

    FADING, RETURN = 0.9, 0.005

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen, self._kept = 4.0, 4.0 * self.ACCEPTANCE
        self._draft_s = self._behind_s = 0.0
        self.full_s = 0.0
        self.best = (0, 0.0)

    def guess(self, full_s: float) -> None:
        """Assumes costs by the share of layers, a whole step taking `full_s`."""
        self._draft_s = full_s * (self._share + self.HEAD_SHARE)
        self._behind_s = full_s * (1 - self._share + self.HEAD_SHARE)
        self._choose()

    def tell(self, drafts: int, tested: int, kept: int, times: tuple[float, float] | None) -> None:
        """Takes in a round: drafts tested and kept over all rows, and the seconds of the layers
        before the exit and of those behind it (None: guesses stay)."""
        if tested:
            self._seen = self.FADING * self._seen + tested
            self._kept = self.FADING * self._kept + kept
        else:
            self._kept += self.RETURN * (self.ACCEPTANCE * self._seen - self._kept)
        if times is not None:
            draft_s, behind_s = times[0] / (drafts + 1), times[1] / (1 + self.SLOPE * drafts)
            if self.full_s:
                draft_s = _smooth(self._draft_s, draft_s)
                behind_s = _smooth(self._behind_s, behind_s)
            self._draft_s, self._behind_s = draft_s, behind_s
            self.full_s = draft_s + behind_s
        self._choose()

    def next_text(self) -> None:
        """Keeps what was learnt of times, and less of what was accepted: texts differ."""
        fewer = min(1.0, 4.0 / self._seen)
        self._seen, self._kept = self._seen * fewer, self._kept * fewer
        if self.full_s:
            self._choose()

    def _choose(self) -> None:
        alpha = min(self._kept / self._seen, 0.99)
        self.best = (0, 0.0)
        tokens, power = 0.0, 1.0
        for drafts in range(self.MOST_DRAFTS + 1):
            tokens += power
            power *= alpha
            took = (drafts + 1) * self._draft_s + self._behind_s * (1 + self.SLOPE * drafts)
            if tokens / took > self.best[1]:
                self.best = (drafts, tokens / took)


def _smooth(known_s: float, seen_s: float) -> float:
    """A running time that follows faster down than up: what is slow once was disturbed."""
    return known_s + (0.5 if seen_s < known_s else 0.1) * (seen_s - known_s)


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
            np.zeros_like(session.boundary(number + 1, 1)[:, 0])
            for number in range(len(session.parts))
        ]

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        session = self.session
        lengths = np.array([len(prompt) for prompt in prompts])
        last: Floats | None = None
        for start in range(0, int(lengths.max()), session.chunk):
            tokens, counts = _chunk(prompts, start, session.chunk)
            session.embed(tokens)
            states = session.run(0, tokens.shape[1], counts)
            self._wait(1, states, counts)
            seen = self._look(0, states, counts)
            ends = (start < lengths) & (lengths <= start + session.chunk)
            if ends.any():
                made = seen[np.arange(session.batch), np.maximum(counts - 1, 0)]
                last = made.copy() if last is None else np.where(ends[:, None], made, last)
        for row, length in enumerate(lengths.tolist()):
            self._emitted[row] += [-1] * length
        assert last is not None
        return self._decide(last, np.ones(session.batch, bool)).copy()

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session = self.session
        session.embed(self._current)
        counts = active.astype(np.int64)
        states = session.run(0, 1, counts)
        going = active.tolist()
        for row, on in enumerate(going):
            if on:
                self._emitted[row].append(-1)
        self._wait(1, states, counts)
        seen = self._look(0, states, counts)
        tokens = self._decide(seen[:, 0], active).tolist()
        found = [[token] if on else [] for token, on in zip(tokens, going, strict=True)]
        if any(ring.most() >= self._pending for ring in session.rings[1:]):
            self.flush()
        return found

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def flush(self) -> None:
        """Lets every segment catch up with all states that wait."""
        for number in range(1, len(self.session.parts)):
            self._drain(number)

    def _look(self, number: int, states: Floats, counts: Ints) -> Floats:
        """What the head looks at of states that a segment's run has just made. They enter the
        exit's own caches, where it has any and will be asked."""
        final = number == len(self.session.parts) - 1
        if final or self._thresholds[number] == np.inf:
            return states
        return self.session.adapt(number, states.shape[1], counts)

    def _decide(self, states: Floats, active: NDArray[np.bool_]) -> Ints:
        """Answers for the newest state of every active row, which waits at the first boundary.
        `states` is what the first exit's head looks at."""
        undecided = [row for row, on in enumerate(active.tolist()) if on]
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
        """Those of the rows that an exit's answers are good enough for."""
        scores, threshold = answers[self._score].tolist(), self._thresholds[number]
        return [row for row in rows if scores[row] >= threshold]

    def _wait(self, number: int, states: Floats, counts: Ints) -> None:
        if number < len(self.session.parts):
            self.session.rings[number].push(states, counts)

    def _drain(self, number: int) -> Floats:
        """Runs a segment over all that waits for it. Returns what the head looks at of the last
        state of every row; that of a row of which none waited means nothing."""
        session, ring = self.session, self.session.rings[number]
        waiting = ring.counts.tolist()
        most, start = max(waiting), 0
        newest = self._newest[number]
        if most > 1:
            self.statistics.catch_ups += 1
        while start < most:
            # Rows with fewer states are padded, and padding must not run over the end of a cache.
            room = session.capacity - session.parts[number].caches.longest()
            new = min(session.chunk, most - start, room)
            some = np.array([min(max(count - start, 0), new) for count in waiting])
            session.boundary(number, new)[...] = ring.states(start, start + new)
            states = session.run(number, new, some)
            seen = self._look(number, states, some)
            for row, count in enumerate(waiting):
                if start < count <= start + new:
                    newest[row] = seen[row, count - start - 1]
            if number + 1 < len(session.parts):
                self._wait(number + 1, states, some)
            else:
                self._leave(states, some)
            start += new
        ring.clear()
        return newest

    def _leave(self, states: Floats, counts: Ints) -> None:
        """Takes note of states that reached the last boundary; audits what exits said of them."""
        for row, count in enumerate(counts.tolist()):
            told = self._emitted[row][:count]
            del self._emitted[row][:count]
            places = [place for place, token in enumerate(told) if token >= 0]
            if self.audit and places:
                tokens = self._head(states[row, places])["token"].tolist()
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

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session = self.session
        places = session.parts[0].caches.lengths.copy()
        undecided = active.copy()
        left = np.zeros_like(session.boundary(1, 1)[:, 0])
        session.embed(self._current)
        for number in range(len(session.parts)):
            gone = active & ~undecided
            if gone.any():
                session.boundary(number, 1)[gone, 0] = left[gone]
            if undecided.any():
                counts = undecided.astype(np.int64)
                states = session.run(number, 1, counts, places=places)[:, 0]
                fires = self._decide(number, states, undecided)
                left[fires] = states[fires]
                undecided &= ~fires
            if gone.any():
                self._skip(number, gone, places)
        tokens = self._current[:, 0].tolist()
        return [[token] if on else [] for token, on in zip(tokens, active, strict=True)]

    def force(self, tokens: Ints) -> None:
        self._current[:, 0] = tokens

    def _skip(self, number: int, rows: NDArray[np.bool_], places: Ints) -> None:
        """What a segment keeps of tokens that left before it."""
        self.session.project(number, rows, places)

    def _decide(
        self, number: int, states: Floats, undecided: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which rows are answered behind a segment; their tokens become the current ones."""
        final = number == len(self.session.parts) - 1
        if not final and self._thresholds[number] == np.inf:
            return np.zeros_like(undecided)
        answers = self._head(states)
        fires = undecided
        if not final:
            fires = undecided & (answers[self._score] >= self._thresholds[number])
        for row in np.flatnonzero(fires).tolist():
            self._current[row, 0] = pick(answers, row, self.sampler)
        self.statistics.count(self.exits[number], int(fires.sum()))
        return fires.copy()


def choose(answers: Answers, sampler: Sampler | None) -> Ints:
    """One token per row of a head's answers: the greedy one, or a drawn one."""
    if sampler is None:
        return answers["token"]
    return np.array([pick(answers, row, sampler) for row in range(len(answers["token"]))])


def pick(answers: Answers, row: int, sampler: Sampler | None) -> int:
    """The token of one row of a head's answers."""
    if sampler is None:
        return int(answers["token"][row])
    return int(sampler.draw(row, sampler.chances(row, answers["logits"][row])))


def _chunk(prompts: Sequence[Ints], start: int, size: int) -> tuple[Ints, Ints]:
    """Part of every prompt, padded to the longest: tokens ``[batch, new]``, counts ``[batch]``."""
    parts = [prompt[start : start + size] for prompt in prompts]
    counts = np.array([len(part) for part in parts])
    tokens = np.zeros((len(parts), int(counts.max())), np.int64)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
    return tokens, counts
