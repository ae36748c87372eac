"""Alternative decoding modes on the same graphs, to compare with
`edgeexit.runtime.programs.modes`.

`Lookup` drafts tokens from earlier occurrences of the last tokens (prompt lookup). `Copied` and
`Missing` are alternatives to `Approximate` for tokens that skip layers: copy the keys and values of
the last layer that ran, or add none. `Random` stops at random exits, `Patience` where exits agree
(PABEE).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.components import token_states
from edgeexit.runtime.executor.head import Answers
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.early import Approximate, Fast
from edgeexit.runtime.programs.modes.full import Full, Ints, Statistics


class Lookup:
    """Drafts the tokens that followed the same last tokens earlier in the text; all components
    verify them.

    Single rows only. Drafts up to `most` tokens after the longest match of up to `longest` tokens.
    """

    def __init__(
        self, session: Session, exits: Sequence[str], *, most: int = 8, longest: int = 3
    ) -> None:
        assert session.batch == 1
        self.session, self.exits, self.sampler = session, exits, None
        self.statistics = Statistics()
        self._head = session.head(len(session.parts) - 1)
        self._full = Full(session, exits)
        self._most, self._longest = most, longest
        self._text: list[int] = []

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        first = self._full.prefill(prompts)
        self._text = [*prompts[0].tolist(), int(first[0])]
        self.statistics.count(self.exits[-1], 1)
        return first

    def step(self, active: Sequence[bool], most: int | None = None) -> list[list[int]]:
        session = self.session
        start = session.parts[0].states.lengths[0]
        room = session.capacity - start - 1
        if most is not None:
            room = min(room, most - 1)
        drafts = self._find()[: max(0, min(room, session.chunk - 1))]
        rows = np.array([[self._text[-1], *drafts]])
        session.embed(rows)
        new, last = rows.shape[1], len(session.parts)
        session.run_through(0, last, Block(new, [new]))
        states = session.boundary(last, new)
        own = self._head(states[0])["token"].tolist()
        kept = 0
        while kept < len(drafts) and drafts[kept] == own[kept]:
            kept += 1
        session.crop([start + kept + 1])
        made = [*drafts[:kept], own[kept]]
        self._text += made
        counts = self.statistics
        counts.count(self.exits[-1], len(made))
        counts.drafted += len(drafts)
        counts.accepted += kept
        counts.tested += min(kept + 1, len(drafts))
        return [made]

    def force(self, tokens: Ints) -> None:
        self._text[-1] = int(tokens[0])

    def _find(self) -> list[int]:
        text = np.array(self._text)
        for length in range(self._longest, 0, -1):
            if len(text) <= length:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
            hits = np.flatnonzero((windows == text[-length:]).all(1))
            if hits.size:
                after = int(hits[-1]) + length
                return text[after : after + self._most].tolist()  # type: ignore[no-any-return]
        return []


class Copied(Approximate):
    """Skipped layers get a copy of the keys and values of the last layer that ran."""

    def _skip(self, number: int, rows: Sequence[int], places: Sequence[int]) -> None:
        target = self.session.parts[number]
        for row in rows:
            source = self.session.parts[self._left_behind[row]]
            key, value = (state.name for state in token_states(source.component)[-2:])
            at, to = source.states.lengths[row] - 1, target.states.lengths[row]
            for n, state in enumerate(token_states(target.component)):
                made = source.states.rows(value if n % 2 else key)[row, :, at]
                target.states.rows(state.name)[row, :, to] = made
        target.states.advance([int(row in rows) for row in range(self.session.batch)])

    def _decide(self, number: int, states: Any, undecided: list[int]) -> list[int]:
        leaving = super()._decide(number, states, undecided)
        if number == 0:
            self._left_behind = [0] * self.session.batch
        for row in leaving:
            self._left_behind[row] = number
        return leaving


class Missing(Approximate):
    """Skipped layers get no keys and values: later tokens cannot attend to the token there."""

    def _skip(self, number: int, rows: Sequence[int], places: Sequence[int]) -> None:
        pass


class Random(Fast):
    """Stops at each exit with a given probability, independent of the score."""

    def __init__(self, *arguments: Any, chances: Mapping[str, float], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._chances = chances
        self._rng = np.random.default_rng()

    def prefill(self, prompts: Sequence[Ints]) -> Ints:
        # Each prompt with its pictures has its own seed, so repetitions draw the same numbers.
        seen = [zlib.crc32(np.ascontiguousarray(rows)) for _, rows in self.session.prefix]
        self._rng = np.random.default_rng([int(token) for token in prompts[0]] + seen)
        return super().prefill(prompts)

    def _leaving(self, number: int, answers: Answers, rows: list[int]) -> list[int]:
        return [row for row in rows if self._rng.random() < self._chances[self.exits[number]]]


class Patience(Fast):
    """Stops at the first exit that says what so many exits before it say, whatever the score
    (PABEE, Zhou et al. 2020)."""

    def __init__(self, *arguments: Any, patience: int = 1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience = patience
        self._said: dict[int, list[int]] = {}
        self._first = next(n for n, one in enumerate(self._decisions) if one.consult)

    def _leaving(self, number: int, answers: Answers, rows: list[int]) -> list[int]:
        gone = []
        for row in rows:
            said = [] if number == self._first else self._said[row]
            self._said[row] = [*said, int(answers["token"][row])]
            last = self._said[row][-self._patience - 1 :]
            if len(last) > self._patience and len(set(last)) == 1:
                gone.append(row)
        return gone


def exit_chances(exits: Mapping[str, int], early: Sequence[str]) -> dict[str, float]:
    """Probability of stopping at each early exit, given that the token reached it.

    Args:
        exits: Tokens by exit.
    """
    left, found = sum(exits.values()), {}
    for name in early:
        found[name] = round(exits.get(name, 0) / left, 4) if left else 0.0
        left -= exits.get(name, 0)
    return found


MODES: dict[str, Callable[..., Any]] = {
    "lookup": lambda session, exits, _: Lookup(session, exits),
    "copied": Copied,
    "missing": Missing,
    "random": Random,
    "patience": Patience,
}
"""Name -> mode of a session, exits and decisions."""


__all__ = ["MODES", "Copied", "Lookup", "Missing", "Patience", "Random", "exit_chances"]
