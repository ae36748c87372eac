"""Conversations about scenes as token ids with labels, and how hard their questions are by now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
from model import ASSISTANT, END, IMAGE, PATCHES, USER, WORDS

IGNORED = -100
EASY = 5
"""Cards of the first scenes, at most."""
WALKS = (0.5, 0.1)
"""The share of questions that are walks, at first and when walks are known."""
FIRST_STEP, READING = 3, 4
"""The layer that should have followed a card (the one behind it has followed two), and that which
should have read the next digit of a description."""
HIDDEN, NEVER = 0.5, 1000
"""The share of turns whose deeper layers see no image, and behind which layer the others see
none."""
READS = 0.3
"""The share of descriptions that no question follows."""
IDS = {word: number for number, word in enumerate(WORDS)}
KINDS = ("read", "walk", "go", "follow", "after")
"""What a token of an answer belongs to: the cards, a walk, an answer at once, behind a description,
or in a turn after a description."""


@dataclass
class Level:
    """How hard questions are by now: cards in a scene, steps at once, steps behind a description.
    Each rises when the last questions were answered right, steps up to `most`."""

    cards: int = EASY
    go: int = 1
    after: int = 1
    most: int = data.MOST_STEPS
    shares: dict[str, float] = field(default_factory=dict)

    RISES = 0.9

    def note(self, shares: dict[str, float], cards: int) -> None:
        """Takes the share of right answers of a step by ``kind steps``, on scenes of so many
        cards; only those of the hardest scenes count."""
        if cards < self.cards:
            return
        for name, share in shares.items():
            self.shares[name] = 0.9 * self.shares.get(name, 0.0) + 0.1 * share
        known = self._known()
        if not known or min(self._least(kind) for kind in known) < self.RISES:
            return
        if self.cards < data.CARDS:
            self.cards += 1
            self.shares = {name: 0.5 * share for name, share in self.shares.items()}
            return
        for kind in known:
            setattr(self, kind, min(getattr(self, kind) + 1, self.most))

    def walks(self) -> float:
        """The share of questions that are walks."""
        return WALKS[self.shares.get("walk 1", 0.0) > 0.97]

    def chances(self, kind: str) -> NDArray[np.float64]:
        """Probabilities of one, two, ... steps in questions of a kind: more of those that are
        answered worse."""
        most = getattr(self, kind)
        known = np.array([self.shares.get(f"{kind} {n}", 0.0) for n in range(1, most + 1)])
        weights = 1.15 - known.clip(0, 1)
        return np.asarray(weights / weights.sum())

    def passed(self) -> bool:
        """Whether the hardest questions are answered right."""
        known = self._known()
        hardest = all(getattr(self, kind) == self.most for kind in known)
        least = min((self._least(kind) for kind in known), default=0.0)
        return self.cards == data.CARDS and hardest and least >= self.RISES

    def _known(self) -> set[str]:
        return {kind for kind in ("go", "after") if f"{kind} 1" in self.shares}

    def _least(self, kind: str) -> float:
        """The share of right answers to the questions of a kind that are answered worst."""
        most = getattr(self, kind)
        return min(self.shares.get(f"{kind} {steps}", 0.0) for steps in range(1, most + 1))


class Turns:
    """Conversations about scenes as token ids: questions at once, then one that describes the scene
    first, then more. Rows are padded on the right.

    Attributes:
        ids: ``[batch, seq]``; image tokens behind the first token or, as BLIP-2 has them
            (`in_front`), before it.
        labels: ``[batch, seq]``, `IGNORED` but for answers.
        kinds: ``[batch, seq]``, 1 + the number in `KINDS` of an answer's token; else 0.
        steps: ``[batch, seq]``, the steps of the question that a token answers.
        paths: ``[batch, seq, MOST_STEPS]``, where 1, 2, ... of these steps lead, for a token that
            names where all of them lead; other tokens of answers repeat themselves; else
            `IGNORED`.
        preceding: ``[batch, seq]``, what a card's right digit is led to from (in a description and
            in the image), what is read before a left one (in the image; `END` before the first),
            and what the question starts from that is answered next; else `IGNORED`.
        leaves: ``[batch, seq]``, the layer behind which a token sees no image: that which should
            have found out what its turn asks, or a random one behind it; or `NEVER`.
    """

    def __init__(
        self,
        scenes: Sequence[data.Scene],
        rng: np.random.Generator,
        level: Level,
        before: int,
        after: int,
        image: bool = True,
        of: str = "digits",
        in_front: bool = False,
    ) -> None:
        rows = [_Row(rng, data.WORDS[of], image, in_front) for _ in scenes]
        for row, scene in zip(rows, scenes, strict=True):
            row.converse(scene, level, before, after)
        length = max(len(row.ids) for row in rows)
        nowhere = [IGNORED] * data.MOST_STEPS
        self.ids = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in rows])
        shape = (len(rows), length)
        self.labels, self.preceding = (torch.full(shape, IGNORED) for _ in range(2))
        self.kinds, self.steps = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
        self.leaves = torch.full(shape, NEVER)
        self.paths = torch.tensor(nowhere).expand(*shape, -1).clone()
        for number, row in enumerate(rows):
            for place, (kind, steps) in row.said.items():
                self.kinds[number, place], self.steps[number, place] = 1 + KINDS.index(kind), steps
                self.labels[number, place] = row.ids[place]
            for place, left in row.preceding.items():
                self.preceding[number, place] = left
            for place, path in row.paths.items():
                self.paths[number, place] = torch.tensor(path)
            self.leaves[number, : len(row.ids)] = torch.tensor(row.leaves)
            if image:
                seen = preceding_in_image(scenes[number], data.WORDS[of])
                first = 0 if in_front else 1
                self.preceding[number, first : first + PATCHES] = seen


def preceding_in_image(scene: data.Scene, words: Sequence[str]) -> torch.Tensor:
    """What is read before the digit at each patch ``[patches]``; a cell has 2 x 2 patches."""
    cells = torch.full((data.CARDS, 2), IGNORED)
    before = IDS[END]
    for place, (left, right) in zip(scene.places, scene.cards, strict=True):
        cells[place] = torch.tensor([before, IDS[words[left]]])
        before = IDS[words[right]]
    grid = cells.view(data.ROWS, 2 * data.COLUMNS)
    return grid.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()


class _Row:
    """A conversation while it is written; places are counted in tokens."""

    def __init__(
        self, rng: np.random.Generator, words: Sequence[str], image: bool, in_front: bool
    ) -> None:
        self.rng, self.words, self.image = rng, words, image
        seen = [IDS[IMAGE]] * PATCHES if image else []
        self.ids = [*seen, IDS[USER]] if in_front else [IDS[USER], *seen]
        self.said: dict[int, tuple[str, int]] = {}
        self.preceding: dict[int, int] = {}
        self.paths: dict[int, list[int]] = {}
        self.leaves = [NEVER] * len(self.ids)

    def converse(self, scene: data.Scene, level: Level, before: int, after: int) -> None:
        """Questions before a description, with it, and after it; without an image a description
        stands first."""
        if not self.image:
            self._add(f"read the cards {ASSISTANT}")
            self._describe(scene, learn=False)
            self._add(f"{END} {USER}")
        for turn in range(before + 1 + after):
            if turn:
                self._add(USER)
            late = turn >= before
            if turn == before and self.image and self.rng.random() < READS:
                self._add(f"{data.ask(scene, 'read', 0, 0, self.words)[0]} {ASSISTANT}")
                self._describe(scene, learn=True)
                self._add(END, "read")
                self._leave(READING)
            elif turn != before and self.rng.random() < level.walks():
                self._walk(scene, int(self.rng.choice(scene.cards[:, 0])))
                self._leave(FIRST_STEP)
            else:
                kind = "follow" if turn == before else "after" if late else "go"
                chances = level.chances("after" if late else "go")
                drawn = 1 + int(self.rng.choice(len(chances), p=chances))
                start, steps = scene.draw_question(self.rng, drawn)
                self._go(scene, start, steps, kind)
                self._leave(FIRST_STEP + steps - 1 if kind == "go" else READING)

    def _leave(self, earliest: int) -> None:
        """Ends a turn: draws the layer behind which it sees no image."""
        last = FIRST_STEP + data.MOST_STEPS
        layer = NEVER
        if self.rng.random() < HIDDEN:
            later = self.rng.random() < 0.5
            layer = int(self.rng.integers(earliest, last)) if later else earliest
        self.leaves += [layer] * (len(self.ids) - len(self.leaves))

    def _add(self, text: str, kind: str = "", steps: int = 0) -> int:
        """Appends text, as part of an answer of a kind. Returns its place."""
        first = len(self.ids)
        self.ids += [IDS[word] for word in text.split()]
        if kind:
            self.said |= dict.fromkeys(range(first, len(self.ids)), (kind, steps))
        for place in range(first, len(self.ids)):
            if kind == "read" or (kind and self.ids[place] == IDS[END]):
                self.paths[place] = [self.ids[place]] * data.MOST_STEPS
        return first

    def _describe(self, scene: data.Scene, *, learn: bool) -> None:
        first = self._add(data.listing(scene, self.words), "read" if learn else "")
        for number, left in enumerate(scene.cards[:, 0]):
            self.preceding[first + 3 * number + 1] = IDS[self.words[left]]

    def _walk(self, scene: data.Scene, start: int) -> None:
        question, answer = data.ask(scene, "walk", start, 1, self.words)
        self._add(f"{question} {ASSISTANT}")
        self.preceding[len(self.ids) - 1] = IDS[self.words[start]]
        first = self._add(f"{answer} {END}", "walk", 1)
        for number, word in enumerate(answer.split()):
            self.paths[first + number] = [IDS[word]] * data.MOST_STEPS

    def _go(self, scene: data.Scene, start: int, steps: int, kind: str) -> None:
        asked = "follow" if kind == "follow" else "go"
        question, answer = data.ask(scene, asked, start, steps, self.words)
        self._add(f"{question} {ASSISTANT}")
        if asked == "follow":
            _, again, answer = answer.split(" : ")
            self._describe(scene, learn=self.image)
            self._add(f": {again} :", "read")
        self.preceding[len(self.ids) - 1] = IDS[self.words[start]]
        place = self._add(f"{answer} {END}", kind, steps)
        ways = [scene.go(start, min(steps, n)) for n in range(1, data.MOST_STEPS + 1)]
        self.paths[place] = [IDS[self.words[way]] for way in ways]


def make_scenes(rng: np.random.Generator, count: int, level: Level) -> list[data.Scene]:
    """Scenes with the same number of cards."""
    cards = level.cards if rng.random() < 0.5 else int(rng.integers(data.FEWEST, level.cards + 1))
    return [data.make_scene(rng, cards) for _ in range(count)]


def cover_of(scenes: Sequence[data.Scene]) -> torch.Tensor:
    """The class at each patch ``[batch, patches]``; a cell has 2 x 2 patches."""
    cells = np.stack([scene.cover() for scene in scenes])
    return torch.from_numpy(cells.repeat(2, 1).repeat(2, 2).reshape(len(scenes), PATCHES))
