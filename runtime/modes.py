"""How the next tokens come about: ``full``, ``exact`` and ``fast``, on one set of engines.

Each mode is a class with `prefill` (a prompt in, the first token out) and `step` (one round: one
token or several per row). All of them keep to three rules. A state that passed a boundary without
the segments behind it waits in that boundary's ring; running a segment drains its ring first; and
what a cache holds beyond its length does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.parts import Floats, Session
from edgeexit.runtime.sampling import Floats64, Sampler

Ints = NDArray[np.int64]
Answers = Mapping[str, NDArray[Any]]
"""What the head says of states ``[rows, width]``: token and scores ``[rows]``, logits."""


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


class Full:
    """Every segment for every token; also the unsplit graph, whose one segment answers itself."""

    def __init__(
        self, session: Session, exits: Sequence[str], sampler: Sampler | None = None
    ) -> None:
        self.session, self.exits, self.sampler = session, exits, sampler
        self.statistics = Statistics()
        self._current: Ints = np.zeros((session.batch, 1), np.int64)

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        session = self.session
        last: Floats | None = None
        lengths = np.array([len(prompt) for prompt in prompts])
        if session.head is None:
            # The unsplit graph answers for the last place of a run: rows of unlike length cannot
            # share one.
            assert (lengths == lengths[0]).all(), "unsplit takes prompts of one length"
        for start in range(0, int(lengths.max()), session.chunk):
            tokens, counts = _chunk(prompts, start, session.chunk)
            session.embed(tokens)
            for number in range(len(session.parts)):
                states = session.run(number, tokens.shape[1], counts)
            ends = (start < lengths) & (lengths <= start + session.chunk)
            if ends.any():
                made = states[np.arange(session.batch), np.maximum(counts - 1, 0)]
                last = made.copy() if last is None else np.where(ends[:, None], made, last)
        assert last is not None
        self._current[:, 0] = self._answer(last[:, None])
        self._count(np.ones(session.batch, bool))
        return self._current[:, 0].copy()

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session = self.session
        session.embed(self._current)
        for number in range(len(session.parts)):
            states = session.run(number, 1)
        self._current[:, 0] = self._answer(states)
        self._count(active)
        return [[int(t)] if on else [] for t, on in zip(self._current[:, 0], active, strict=True)]

    def _answer(self, states: Floats) -> Ints:
        """Tokens for states ``[batch, 1, width]``; the unsplit graph has answered already."""
        head = self.session.head
        answers = self.session.parts[-1].answers if head is None else head(states[:, 0])
        return choose(answers, self.sampler)

    def _count(self, active: NDArray[np.bool_]) -> None:
        made = int(active.sum())
        self.statistics.tokens += made
        name = self.exits[-1]
        self.statistics.exits[name] = self.statistics.exits.get(name, 0) + made


class Exact:
    """Self-speculation: the first segments draft, the others verify (LayerSkip, arXiv:2404.16710).

    A round drafts up to `drafts` tokens with the segments before the exit, then runs those behind
    it once over all of them. What agrees with the last exit's own greedy tokens is kept, with one
    more token of the last exit. Nothing of the first segments is computed twice.

    Args:
        exit_number: Index of the exit that drafts.
        drafts: The most tokens of a draft; None: adapted to the acceptance seen.
        threshold: Drafting stops early when the drafting exit's score is below.
    """

    MOST_DRAFTS = 8

    def __init__(
        self,
        session: Session,
        exits: Sequence[str],
        exit_number: int,
        *,
        drafts: int | None = None,
        threshold: float = 0.0,
        score: str = "max_prob",
        sampler: Sampler | None = None,
    ) -> None:
        assert session.head is not None
        self.session, self.exits, self.exit_number = session, exits, exit_number
        self.sampler = sampler
        self.statistics = Statistics()
        self._head = session.head
        self._fixed, self._threshold, self._score = drafts, threshold, score
        self._full = Full(session, exits, sampler)
        # Drafts tested and accepted, fading, so that the chance of acceptance starts at 0.75.
        self._seen, self._kept = 4.0, 3.0

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        first = self._full.prefill(prompts)
        self._current = first.copy()
        self.statistics.tokens += len(first)
        self._count(self.exits[-1], len(first))
        return first

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session, batch = self.session, self.session.batch
        behind = self.exit_number + 1
        for part in session.parts:
            part.caches.lengths[~active] = 0  # rows that ended need no room, and go on in vain
        start = session.parts[0].caches.lengths.copy()
        room = session.capacity - int(start.max()) - 1
        wanted = max(0, min(self._wanted(), room, session.chunk - 1))
        tokens = self._current[:, None].copy()
        drafts = np.empty((batch, wanted), np.int64)
        chances: list[list[Floats64]] = [[] for _ in range(batch)]
        ring = session.rings[behind]
        one = np.ones(batch, np.int64)
        made = 0
        while True:
            session.embed(tokens)
            for number in range(behind):
                states = session.run(number, 1)
            ring.push(states, one)
            if made == wanted:
                break
            answers = self._head(states[:, 0])
            # Decided before anything is drawn: leaving out tokens once drawn would bias the rest.
            if self._threshold > 0 and (answers[self._score][active] < self._threshold).all():
                break
            tokens[:, 0] = self._draft(answers, drafts[:, :made], chances)
            drafts[:, made] = tokens[:, 0]
            made += 1
        rows = made + 1
        session.boundary(behind, rows)[...] = ring.states(0, rows)
        ring.clear()
        for number in range(behind, len(session.parts)):
            states = session.run(number, rows)
        answers = self._head(states.reshape(batch * rows, -1))
        kept, self._current = self._verify(answers, drafts[:, :made], chances)
        session.crop(np.where(active, start + kept + 1, start))
        found: list[list[int]] = []
        for row, count in enumerate(kept.tolist()):
            if not active[row]:
                found.append([])
                continue
            found.append([*drafts[row, :count].tolist(), int(self._current[row])])
            self._tally(made, count)
        return found

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

    def _tally(self, made: int, kept: int) -> None:
        tested = min(kept + 1, made)
        statistics = self.statistics
        statistics.tokens += kept + 1
        statistics.drafted += made
        statistics.accepted += kept
        statistics.tested += tested
        self._count(self.exits[self.exit_number], kept)
        self._count(self.exits[-1], 1)
        self._seen = 0.9 * self._seen + tested
        self._kept = 0.9 * self._kept + kept

    def _count(self, name: str, tokens: int) -> None:
        self.statistics.exits[name] = self.statistics.exits.get(name, 0) + tokens

    def _wanted(self) -> int:
        """Drafts that pay: tokens per round over cost per round.

        With f the share of layers that draft, a the chance of acceptance, h the head's cost and s
        the slope of verification, d drafts give (1 - a^(d+1)) / (1 - a) tokens and cost
        d (f + h) + f + (1 - f) (1 + s d) + h.
        """
        if self._fixed is not None:
            return self._fixed
        alpha = min(self._kept / self._seen, 0.99)
        layers = [len(part.segment.caches) for part in self.session.parts]
        share = sum(layers[: self.exit_number + 1]) / sum(layers)

        def rate(drafts: int) -> float:
            tokens = (1 - alpha ** (drafts + 1)) / (1 - alpha)
            behind = (1 - share) * (1 + VERIFY_SLOPE * drafts)
            return tokens / (drafts * (share + HEAD_SHARE) + share + behind + HEAD_SHARE)

        return max(range(1, self.MOST_DRAFTS + 1), key=rate)


HEAD_SHARE, VERIFY_SLOPE = 0.08, 0.05
"""What the head costs beside all layers, and by how much each further row slows a verification.
Assumed, not measured on the model at hand: they only choose the length of drafts."""


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
        assert session.head is not None
        self.session, self.exits, self.sampler = session, exits, sampler
        self.statistics = Statistics()
        self._head = session.head
        self._thresholds, self._score = list(thresholds), score
        self._pending, self.audit = pending, audit
        self._current: Ints = np.zeros((session.batch, 1), np.int64)
        # Per row, for every state that has not yet reached the last boundary: the token emitted for
        # it by an early exit, or -1 where nothing was or the last exit answered itself.
        self._emitted: list[list[int]] = [[] for _ in range(session.batch)]

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        session = self.session
        lengths = np.array([len(prompt) for prompt in prompts])
        last: Floats | None = None
        for start in range(0, int(lengths.max()), session.chunk):
            tokens, counts = _chunk(prompts, start, session.chunk)
            session.embed(tokens)
            states = session.run(0, tokens.shape[1], counts)
            self._wait(1, states, counts)
            ends = (start < lengths) & (lengths <= start + session.chunk)
            if ends.any():
                made = states[np.arange(session.batch), np.maximum(counts - 1, 0)]
                last = made.copy() if last is None else np.where(ends[:, None], made, last)
        for row, length in enumerate(lengths.tolist()):
            self._emitted[row] += [-1] * length
        assert last is not None
        return self._decide(last, np.ones(session.batch, bool))

    def step(self, active: NDArray[np.bool_]) -> list[list[int]]:
        session = self.session
        session.embed(self._current)
        states = session.run(0, 1, active.astype(np.int64))
        for row in np.flatnonzero(active):
            self._emitted[row].append(-1)
        self._wait(1, states, active.astype(np.int64))
        tokens = self._decide(states[:, 0].copy(), active)
        found = [[int(t)] if on else [] for t, on in zip(tokens, active, strict=True)]
        if any(int(ring.counts.max()) >= self._pending for ring in session.rings[1:]):
            self.flush()
        return found

    def flush(self) -> None:
        """Lets every segment catch up with all states that wait."""
        for number in range(1, len(self.session.parts)):
            self._drain(number)

    def _decide(self, states: Floats, active: NDArray[np.bool_]) -> Ints:
        """Answers for the newest state of every active row, which waits at the first boundary."""
        session = self.session
        undecided = active.copy()
        for number in range(len(session.parts)):
            if number:
                states = self._drain(number)
            final = number == len(session.parts) - 1
            threshold = -np.inf if final else self._thresholds[number]
            if threshold == np.inf:
                continue
            answers = self._head(states)
            fires = undecided if final else undecided & (answers[self._score] >= threshold)
            for row in np.flatnonzero(fires).tolist():
                token = int(answers["token"][row])
                if not final:
                    self._emitted[row][-1] = token
                if self.sampler is not None:
                    p = self.sampler.chances(row, answers["logits"][row])
                    token = self.sampler.draw(row, p)
                self._current[row, 0] = token
            self._count(self.exits[number], int(fires.sum()))
            undecided &= ~fires
            if not undecided.any():
                break
        return self._current[:, 0].copy()

    def _wait(self, number: int, states: Floats, counts: Ints) -> None:
        if number < len(self.session.parts):
            self.session.rings[number].push(states, counts)

    def _drain(self, number: int) -> Floats:
        """Runs a segment over all that waits for it. Returns the last state of every row; that of a
        row of which none waited means nothing."""
        session, ring = self.session, self.session.rings[number]
        counts = ring.counts.copy()
        most = int(counts.max())
        newest = np.zeros(
            (session.batch, self.session.boundary(number + 1, 1).shape[-1]), np.float32
        )
        if most > 1:
            self.statistics.catch_ups += 1
        start = 0
        while start < most:
            # Rows with fewer states are padded, and padding must not run over the end of a cache.
            room = session.capacity - int(session.parts[number].caches.lengths.max())
            new = min(session.chunk, most - start, room)
            some = np.clip(counts - start, 0, new)
            session.boundary(number, new)[...] = ring.states(start, start + new)
            states = session.run(number, new, some)
            ended = (counts > start) & (counts <= start + new)
            for row in np.flatnonzero(ended):
                newest[row] = states[row, counts[row] - start - 1]
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
                tokens = self._head(states[row, places])["token"]
                self.statistics.audited += len(places)
                agreed = [told[place] == token for place, token in zip(places, tokens, strict=True)]
                self.statistics.agreed += sum(agreed)

    def _count(self, name: str, tokens: int) -> None:
        self.statistics.tokens += tokens
        if tokens:
            self.statistics.exits[name] = self.statistics.exits.get(name, 0) + tokens


def choose(answers: Answers, sampler: Sampler | None) -> Ints:
    """One token per row of a head's answers: the greedy one, or a drawn one."""
    if sampler is None:
        return answers["token"]
    return np.array(
        [
            sampler.draw(row, sampler.chances(row, logits))
            for row, logits in enumerate(answers["logits"])
        ]
    )


def _chunk(prompts: Sequence[Ints], start: int, size: int) -> tuple[Ints, Ints]:
    """Part of every prompt, padded to the longest: tokens ``[batch, new]``, counts ``[batch]``."""
    parts = [prompt[start : start + size] for prompt in prompts]
    counts = np.array([len(part) for part in parts])
    tokens = np.zeros((len(parts), int(counts.max())), np.int64)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
    return tokens, counts
