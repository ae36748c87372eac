"""Mode ``exact``: an early exit, or the text itself, drafts tokens and the last exit verifies them.
The text is the full model's.

`Exact` runs the rounds; `edgeexit.runtime.programs.modes.pace` measures them, to choose the exit
and the length of the next draft.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.executor.head import Answers, Floats
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.drafter import Drafter
from edgeexit.runtime.programs.modes.full import Full, Ints, Statistics
from edgeexit.runtime.programs.modes.lookup import Lookup
from edgeexit.runtime.programs.modes.pace import Pace
from edgeexit.runtime.programs.sampling import Floats64, Sampler

LOOKUP = -1
"""Key of the measurements of drafts from texts, beside those of exits."""


class Exact:
    """Self-speculation: the first components draft, the others verify (LayerSkip,
    arXiv:2404.16710).

    Where the text repeats tokens, those that followed them before are a draft, too (`Lookup`),
    which all components verify. In every round the source with the best measured speed is asked.

    A round of an exit drafts up to `drafts` tokens with the components before the exit, then runs
    the components behind it once over all drafts. Drafts that agree with the last exit's greedy
    tokens are kept, followed by one more token of the last exit. The first components compute
    nothing twice.

    Args:
        exit_number: Index of the component whose exit drafts; None: in every round the exit with
            the best measured speed (`Pace`); the earliest exits are tried first. With an exit or a
            number of drafts given, the text is not looked up.
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
        self._timed = sampler is None or sampler.greedy
        known = paces if paces is not None and self._timed else {}
        early = [number for number, exit_ in enumerate(session.exits[:-1]) if exit_ is not None]
        for number in early:
            known.setdefault(number, Pace(shares[number], timed=self._timed)).next_text()
        looks_up = exit_number is None and drafts is None and sampler is None and threshold == 0
        self._lookup = known.setdefault(LOOKUP, Pace(0.0, timed=True)) if looks_up else None
        self._texts: list[Lookup] = []
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

    @property
    def asked(self) -> Collection[int]:
        return self._full.asked

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        first = self._full.prefill(prompts)
        self._current = first.copy()
        self.statistics.count(self.exits[-1], len(first))
        if self._lookup is not None:
            pairs = zip(prompts, first.tolist(), strict=True)
            self._texts = [Lookup([*prompt.tolist(), token]) for prompt, token in pairs]
            self._lookup.next_text()
        return first

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        if not all(active):  # finished rows still run, but need no room
            kept_rows = [session.capacity if on else 0 for on in active]
            session.crop(kept_rows)
            for drafter in self._drafters.values():
                drafter.crop(kept_rows)
        exit_number, drafts_wanted = self._plan()
        room = self._room(self.session.chunk, max(session.parts[0].states.positions), most)
        rows = self._look_up(active, room, self._paces[exit_number].best[1])
        if rows is not None:
            new = self._verify_whole(rows, active)
        else:
            new = self._round(exit_number, min(drafts_wanted, room), active)
        for text, tokens in zip(self._texts, new, strict=False):
            text.extend(tokens)
        return new

    def _look_up(self, active: Sequence[bool], room: int, other: float) -> NDArray[np.int64] | None:
        """Drafts ``[batch, drafts]`` from the texts, if they are expected to be faster than
        `other`, in tokens per second; where a text has none, they are wrong."""
        if self._lookup is None:
            return None
        pace = self._lookup
        if not pace.full_s:
            pace.guess(next((p.full_s for p in self._paces.values() if p.full_s), 1.0))
        wanted, rate = pace.best
        wanted = min(wanted, room)
        if not wanted or rate <= other:
            return None
        found = [
            text.following(wanted) if on else []
            for text, on in zip(self._texts, active, strict=True)
        ]
        if not any(found):
            return None
        return np.array([row or [0] * wanted for row in found], np.int64)

    def _verify_whole(self, drafts: NDArray[np.int64], active: Sequence[bool]) -> list[list[int]]:
        """A round of drafts ``[batch, drafts]`` from the texts: all components run over them."""
        session, batch, rows = self.session, self.session.batch, drafts.shape[1] + 1
        lengths = session.parts[0].states.positions
        started = time.perf_counter()
        session.embed(np.concatenate([self._current[:, None], drafts], axis=1))
        start = 0
        for number, drafter in self._drafters.items():
            if session.adapters[number] is not None:
                drafter.pass_by(session.run_all(start, number + 1, rows), rows)
                start = number + 1
        states = session.run_all(start, len(session.parts), rows)
        answers = self._head(states.reshape(batch * rows, -1))
        kept, self._current = self._verify(answers, drafts, [])
        self._crop(lengths, kept, active)
        took_s = time.perf_counter() - started
        tested = sum(min(count + 1, rows - 1) for count, on in zip(kept, active, strict=True) if on)
        accepted = sum(count for count, on in zip(kept, active, strict=True) if on)
        assert self._lookup is not None
        self._lookup.tell(rows - 1, tested, accepted, sum(active), took_s)
        self.statistics.proposed += (rows - 1) * sum(active)
        self.statistics.looked_up += accepted
        self.statistics.count(self.exits[-1], accepted + sum(active))
        return self._new_tokens(drafts, kept, active)

    def _crop(self, lengths: Sequence[int], kept: Sequence[int], active: Sequence[bool]) -> None:
        """Removes rejected drafts from all states."""
        length = [a + b + 1 if on else a for a, b, on in zip(lengths, kept, active, strict=True)]
        self.session.crop(length)
        for drafter in self._drafters.values():
            drafter.crop(length)

    def _new_tokens(
        self, drafts: NDArray[np.int64], kept: Sequence[int], active: Sequence[bool]
    ) -> list[list[int]]:
        return [
            [*drafts[row, :count].tolist(), int(self._current[row])] if on else []
            for row, (count, on) in enumerate(zip(kept, active, strict=True))
        ]

    def _round(self, exit_number: int, wanted: int, active: Sequence[bool]) -> list[list[int]]:
        """A round of up to `wanted` drafts of an exit."""
        session, batch = self.session, self.session.batch
        behind, drafter = exit_number + 1, self._drafters[exit_number]
        start = session.parts[0].states.positions
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
        rows = drafted + 1
        session.boundary(behind, rows)[...] = ring.states(0, rows)
        ring.clear()
        states = session.run_all(behind, len(session.parts), rows)
        answers = self._head(states.reshape(batch * rows, -1))
        kept, self._current = self._verify(answers, drafts[:, :drafted], chances)
        self._crop(start, kept, active)
        took_s = time.perf_counter() - started
        tested = accepted = 0
        for count in itertools.compress(kept, active):
            tested += min(count + 1, drafted)
            accepted += count
            self.statistics.count(self.exits[exit_number], count)
            self.statistics.count(self.exits[-1], 1)
            self.statistics.drafted += drafted
        self.statistics.tested += tested
        self.statistics.accepted += accepted
        times = took_s if self._timed else None
        self._paces[exit_number].tell(drafted, tested, accepted, sum(active), times)
        if not drafted and times is not None:
            for pace in (*self._paces.values(), *([self._lookup] if self._lookup else [])):
                pace.tell_full(took_s)
        return self._new_tokens(drafts, kept, active)

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
            if self.sampler.greedy:
                tokens[row] = self.sampler.likeliest(row, logits, drafted[row].tolist())
                continue
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
            if self.sampler.greedy:
                kept[row], after[row] = self._agreeing(row, drafted, logits[row])
                continue
            p = [self.sampler.chances(row, logits[row, n], drafted[:n]) for n in range(count + 1)]
            kept[row], after[row] = self.sampler.verify(row, drafted, chances[row], p)
        return kept, after

    def _agreeing(self, row: int, drafted: list[int], logits: Floats) -> tuple[int, int]:
        """Drafts that are the likeliest tokens left, and the likeliest after them."""
        assert self.sampler is not None
        for place, token in enumerate(drafted):
            own = self.sampler.likeliest(row, logits[place], drafted[:place])
            if own != token:
                return place, own
        return len(drafted), self.sampler.likeliest(row, logits[len(drafted)], drafted)

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


__all__ = ["Exact"]
