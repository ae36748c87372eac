"""Mode ``exact``: an early exit drafts, the layers behind it verify; the text is the full model's.

`Exact` runs the rounds; `Pace` learns from them which exit shall draft next, and how far.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.executor.head import Answers
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.drafter import Drafter
from edgeexit.runtime.programs.modes.full import Full, Ints, Statistics
from edgeexit.runtime.programs.sampling import Floats64, Sampler


class Exact:
    """Self-speculation: the first segments draft, the others verify (LayerSkip, arXiv:2404.16710).

    A round drafts up to `drafts` tokens with the segments before the exit, then runs those behind
    it once over all of them. What agrees with the last exit's own greedy tokens is kept, with one
    more token of the last exit. Nothing of the first segments is computed twice.

    Args:
        exit_number: Number of the component whose exit drafts; None: of every round the one that
            pays most by what was measured so far (`Pace`), the earliest ones being tried first.
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
        last = len(session.parts) - 1
        self._head = session.head(last)
        self._fixed, self._threshold, self._score = drafts, threshold, score
        shares = session.shares()
        # A seed shall give the same text again, so what is drawn must not depend on times.
        self._timed = sampler is None
        known = paces if paces is not None and self._timed else {}
        early = [number for number, exit_ in enumerate(session.exits[:-1]) if exit_ is not None]
        for number in early:
            known.setdefault(number, Pace(shares[number])).next_text()
        # An adapter must see every token that passes: exits with adapters do not take turns.
        if exit_number is None and any(session.adapter(number) for number in early):
            exit_number = early[0]
        chosen = early if exit_number is None else [exit_number]
        scores = [score] if threshold > 0 else []
        self._paces = {number: known[number] for number in chosen}
        self._drafters = {n: Drafter(session, n, session.head(n, scores)) for n in chosen}
        self._full = Full(session, exits, sampler, asked=chosen)

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        first = self._full.prefill(prompts)
        self._current = first.copy()
        self.statistics.count(self.exits[-1], len(first))
        return first

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session, batch = self.session, self.session.batch
        exit_number, drafts_wanted = self._plan()
        behind, drafter = exit_number + 1, self._drafters[exit_number]
        if not all(active):  # rows that ended need no room, and go on in vain
            kept_rows = [session.capacity if on else 0 for on in active]
            session.crop(kept_rows)
            drafter.crop(kept_rows)
        start = session.parts[0].states.positions
        wanted = self._room(drafts_wanted, max(start), most)
        tokens = self._current[:, None].copy()
        drafts = np.empty((batch, wanted), np.int64)
        chances: list[list[Floats64]] = [[] for _ in range(batch)]
        ring = session.rings[behind]
        one = [1] * batch
        made = 0
        started = time.perf_counter()
        while True:
            session.embed(tokens)
            states = session.run_all(0, behind, 1)
            ring.push(states, one)
            if made == wanted:
                drafter.pass_by(states)
                break
            answers = drafter.ask(states)
            # Decided before anything is drawn: leaving out tokens once drawn would bias the rest.
            if self._unsure(answers, active):
                break
            tokens[:, 0] = self._draft(answers, drafts[:, :made], chances)
            drafts[:, made] = tokens[:, 0]
            made += 1
        drafted = time.perf_counter()
        rows = made + 1
        session.boundary(behind, rows)[...] = ring.states(0, rows)
        ring.clear()
        states = session.run_all(behind, len(session.parts), rows)
        answers = self._head(states.reshape(batch * rows, -1))
        kept, self._current = self._verify(answers, drafts[:, :made], chances)
        length = [a + b + 1 if on else a for a, b, on in zip(start, kept, active, strict=True)]
        session.crop(length)
        drafter.crop(length)
        verified = time.perf_counter()
        found: list[list[int]] = []
        tested = accepted = 0
        for row, count in enumerate(kept):
            if not active[row]:
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

    def _room(self, wanted: int, longest: int, most: int | None) -> int:
        """How many of the drafts wanted there is room for; a round gives one token more."""
        room = self.session.capacity - longest - 1
        if most is not None:
            room = min(room, most - 1)
        return max(0, min(wanted, room, self.session.chunk - 1))

    def force(self, tokens: Ints) -> None:
        self._current = tokens.copy()

    def _unsure(self, answers: Answers, active: Sequence[bool]) -> bool:
        """Whether drafting shall stop: no row that is active has a score that is good enough."""
        if self._threshold <= 0:
            return False
        scores = answers[self._score].tolist()
        pairs = zip(scores, active, strict=True)
        return all(score < self._threshold for score, on in pairs if on)

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
    ) -> tuple[list[int], Ints]:
        """Per row, how many drafts the last exit confirms, and its own token behind them."""
        batch, made = drafts.shape
        if self.sampler is None:
            own = answers["token"].reshape(batch, made + 1)
            agree = drafts == own[:, :made]
            kept = [row.index(False) if False in row else made for row in agree.tolist()]
            return kept, own[np.arange(batch), kept].copy()
        logits = answers["logits"].reshape(batch, made + 1, -1)
        kept, after = [0] * batch, np.empty(batch, np.int64)
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


__all__ = ["Exact", "Pace"]
