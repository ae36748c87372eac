"""Mode ``exact``: an early exit drafts tokens and the layers behind it verify them. The text is the
full model's.

`Exact` runs the rounds. `Pace` measures them, to choose the exit and the length of the next draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.executor.head import Answers
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.drafter import Drafter
from edgeexit.runtime.programs.modes.full import Full, Ints, Statistics
from edgeexit.runtime.programs.sampling import Floats64, Sampler


class Exact:
    """Self-speculation: the first components draft, the others verify (LayerSkip,
    arXiv:2404.16710).

    A round drafts up to `drafts` tokens with the components before the exit, then runs the
    components behind it once over all drafts. Drafts that agree with the last exit's greedy tokens
    are kept, followed by one more token of the last exit. The first components compute nothing
    twice.

    Args:
        exit_number: Index of the component whose exit drafts; None: in every round the exit with
            the best measured speed (`Pace`); the earliest exits are tried first.
        drafts: Most tokens of a draft; None: the fastest measured number, which may be 0.
        threshold: Drafting stops when the drafting exit's score is below this.
        paces: Measurements per exit from earlier texts in batches of the same size; updated.
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
        shares = _shares(session)
        # The same seed must give the same text, so sampling must not depend on times.
        self._timed = sampler is None or sampler.sampling.temperature == 0
        known = paces if paces is not None and self._timed else {}
        early = [number for number, exit_ in enumerate(session.exits[:-1]) if exit_ is not None]
        for number in early:
            known.setdefault(number, Pace(shares[number])).next_text()
        # An adapter must process every token, so exits with adapters cannot alternate.
        if exit_number is None and any(session.adapters[number] for number in early):
            exit_number = early[0]
        chosen = early if exit_number is None else [exit_number]
        scores = [score] if threshold > 0 else []
        self._paces = {number: known[number] for number in chosen}
        heads = {n: session.head(n, scores, logits=sampler is not None) for n in chosen}
        self._drafters = {n: Drafter(session, n, heads[n]) for n in chosen}
        self._known = {n for n in chosen if session.token_scores.open(n, scores)}
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
        if not all(active):  # finished rows still run, but need no room
            kept_rows = [session.capacity if on else 0 for on in active]
            session.crop(kept_rows)
            drafter.crop(kept_rows)
        start = session.parts[0].states.positions
        wanted = self._room(drafts_wanted, max(start), most)
        tokens = self._current[:, None].copy()
        drafts = np.empty((batch, wanted), np.int64)
        chances: list[list[Floats64]] = [[] for _ in range(batch)]
        ring = session.rings[behind]
        single = [1] * batch
        drafted = 0
        started = time.perf_counter()
        while True:
            session.embed(tokens)
            states = session.run_all(0, behind, 1)
            ring.push(states, single)
            if drafted == wanted:
                drafter.pass_by(states)
                break
            answers = drafter.ask(states)
            # Decided before sampling: discarding tokens after they were drawn would bias the text.
            if self._unsure(exit_number, answers, active):
                break
            tokens[:, 0] = self._draft(answers, drafts[:, :drafted], chances)
            drafts[:, drafted] = tokens[:, 0]
            drafted += 1
        draft_end = time.perf_counter()
        rows = drafted + 1
        session.boundary(behind, rows)[...] = ring.states(0, rows)
        ring.clear()
        states = session.run_all(behind, len(session.parts), rows)
        answers = self._head(states.reshape(batch * rows, -1))
        kept, self._current = self._verify(answers, drafts[:, :drafted], chances)
        length = [a + b + 1 if on else a for a, b, on in zip(start, kept, active, strict=True)]
        session.crop(length)
        drafter.crop(length)
        verify_end = time.perf_counter()
        new_tokens: list[list[int]] = []
        tested = accepted = 0
        for row, count in enumerate(kept):
            if not active[row]:
                new_tokens.append([])
                continue
            new_tokens.append([*drafts[row, :count].tolist(), int(self._current[row])])
            tested += min(count + 1, drafted)
            accepted += count
            self.statistics.count(self.exits[exit_number], count)
            self.statistics.count(self.exits[-1], 1)
            self.statistics.drafted += drafted
        self.statistics.tested += tested
        self.statistics.accepted += accepted
        times = (draft_end - started, verify_end - draft_end) if self._timed else None
        self._paces[exit_number].tell(drafted, tested, accepted, times)
        return new_tokens

    def _room(self, wanted: int, longest: int, most: int | None) -> int:
        """Limits the number of drafts to the room that is left; a round adds one more token."""
        room = self.session.capacity - longest - 1
        if most is not None:
            room = min(room, most - 1)
        return max(0, min(wanted, room, self.session.chunk - 1))

    def force(self, tokens: Ints) -> None:
        self._current = tokens.copy()

    def _unsure(self, number: int, answers: Answers, active: Sequence[bool]) -> bool:
        """Whether drafting must stop: the score of every active row is below the threshold."""
        if self._threshold <= 0:
            return False
        if number in self._known:
            newest = self.session.token_scores.newest(number, self._score, Block(1, [1]))
            scores = newest.tolist()
        else:
            scores = answers[self._score].tolist()
        pairs = zip(scores, active, strict=True)
        return all(score < self._threshold for score, on in pairs if on)

    def _draft(
        self, answers: Answers, drafted: Ints, chances: list[list[Floats64]]
    ) -> NDArray[np.int64]:
        """The drafting exit's tokens. When sampling, appends their probabilities to `chances`."""
        if self.sampler is None:
            return answers["token"]
        tokens = np.empty(len(drafted), np.int64)
        for row, logits in enumerate(answers["logits"]):
            q = self.sampler.chances(row, logits, drafted[row].tolist())
            chances[row].append(q)
            tokens[row] = self.sampler.draw(row, q)
        return tokens

    def _verify(
        self, answers: Answers, drafts: Ints, chances: list[list[Floats64]]
    ) -> tuple[list[int], Ints]:
        """Per row, the number of drafts that the last exit accepts, and its token after them."""
        batch, count = drafts.shape
        if self.sampler is None:
            own = answers["token"].reshape(batch, count + 1)
            agree = drafts == own[:, :count]
            kept = [row.index(False) if False in row else count for row in agree.tolist()]
            return kept, own[np.arange(batch), kept].copy()
        logits = answers["logits"].reshape(batch, count + 1, -1)
        kept, after = [0] * batch, np.empty(batch, np.int64)
        for row in range(batch):
            drafted = drafts[row].tolist()
            p = [self.sampler.chances(row, logits[row, n], drafted[:n]) for n in range(count + 1)]
            kept[row], after[row] = self.sampler.verify(row, drafted, chances[row], p)
        return kept, after

    def _plan(self) -> tuple[int, int]:
        """The exit that drafts next, and how many tokens."""
        known = next((pace.full_s for pace in self._paces.values() if pace.full_s), None)
        for pace in self._paces.values():
            if not pace.full_s:
                pace.guess(known or 1.0)
        number = max(self._paces, key=lambda number: self._paces[number].best[1])
        return number, self._paces[number].best[0] if self._fixed is None else self._fixed


def _shares(session: Session) -> list[float]:
    """Per component, the share of the chain's layers up to and including it; layers are counted by
    their states."""
    layers = [max(1, len(token_states(part.component))) for part in session.parts]
    return [sum(layers[: n + 1]) / sum(layers) for n in range(len(layers))]


class Pace:
    """Measured benefit and cost of drafting at one exit.

    A round of d drafts gives (1 - a^(d+1)) / (1 - a) tokens; a is the probability that a draft is
    accepted if all drafts before it were. A round takes d + 1 runs of the layers before the exit
    and one run of the layers behind it, whose time grows with its d + 1 rows. Until times are
    measured, they are estimated from the share of layers, so the cheapest exits are tried first.

    Attributes:
        full_s: Seconds of a round without drafts; 0 until the first measurement.
        best: The fastest number of drafts, and its tokens per second.
    """

    MOST_DRAFTS = 8
    ACCEPTANCE = 0.75
    """Initial estimate of a. While no drafts are tested, a slowly returns to it."""

    HEAD_SHARE, SLOPE = 0.08, 0.05
    """Estimates: the time of the head as a share of all layers, and the slowdown of the layers
    behind the exit per additional row."""

    FADING, RETURN = 0.9, 0.005

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen, self._kept = 4.0, 4.0 * self.ACCEPTANCE
        self._draft_s = self._behind_s = 0.0
        self.full_s = 0.0
        self.best = (0, 0.0)

    def guess(self, full_s: float) -> None:
        """Estimates times from the share of layers; `full_s` is the time of a full step."""
        self._draft_s = full_s * (self._share + self.HEAD_SHARE)
        self._behind_s = full_s * (1 - self._share + self.HEAD_SHARE)
        self._choose()

    def tell(self, drafts: int, tested: int, kept: int, times: tuple[float, float] | None) -> None:
        """Adds a round: drafts tested and kept over all rows, and the seconds of the layers before
        and behind the exit (None: keep the estimates)."""
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
        """Keeps the times, but reduces the weight of the acceptance, because texts differ."""
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
    """A smoothed time that decreases faster than it increases: a single slow run was probably
    disturbed."""
    return known_s + (0.5 if seen_s < known_s else 0.1) * (seen_s - known_s)


__all__ = ["Exact", "Pace"]
