"""Questions about scenes as token ids with targets, and how hard they are by now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
from model import END, IDS, PAD

IGNORED = -100
EASY = 5
"""Cards of the first scenes, at most."""
FIRST_STEP = 2
"""The decoder layer that should have followed a card; the one behind it has followed two."""
PARTS = ("copied", "read", "walked", "answer", "verdict", "end")
"""What a word of an answer is: the question again, a card, one card further, where several steps
lead, right or wrong, or the end."""


@dataclass
class Level:
    """How hard questions are by now: cards in a scene, and steps at once. Both rise when the last
    questions were answered right."""

    cards: int = EASY
    steps: int = 1
    most: int = data.MOST_STEPS
    shares: dict[str, float] = field(default_factory=dict)

    RISES = 0.9

    def note(self, shares: dict[str, float], cards: int) -> None:
        """Takes the share of right words of a training step, by what they are."""
        if cards < self.cards:
            return
        for name, share in shares.items():
            self.shares[name] = 0.95 * self.shares.get(name, 0.0) + 0.05 * share
        known = [self.shares.get(f"answer {n}", 0.0) for n in range(1, self.steps + 1)]
        if min(known) < self.RISES:
            return
        if self.cards < data.CARDS:
            self.cards += 1
            self.shares = {name: 0.5 * share for name, share in self.shares.items()}
        else:
            self.steps = min(self.steps + 1, self.most)

    def draw_steps(self, rng: np.random.Generator) -> int:
        """More of those that are answered worse."""
        known = np.array([self.shares.get(f"answer {n}", 0.0) for n in range(1, self.steps + 1)])
        weights = 1.15 - known.clip(0, 1)
        return 1 + int(rng.choice(self.steps, p=weights / weights.sum()))

    def draw_scenes(self, rng: np.random.Generator, count: int) -> list[Any]:
        """Scenes with the same number of cards."""
        fewest = data.scenes.FEWEST
        cards = self.cards if rng.random() < 0.5 else int(rng.integers(fewest, self.cards + 1))
        return [data.make_scene(rng, cards) for _ in range(count)]


class Asked:
    """The same number of questions about each of some scenes. Rows are padded on the right.

    Attributes:
        ids, mask: The texts that the model reads ``[rows, text]``, and 0 at padding.
        tokens: What the decoder reads ``[rows, seq]``.
        targets: What it writes ``[rows, seq]``; `IGNORED` at padding.
        parts: Number in `PARTS` of each target; -1 at padding.
        steps: Steps of each target that is an answer or a verdict, else 0.
        paths: ``[rows, seq, MOST_STEPS]``: where 1, 2, ... of an answer's steps lead; other targets
            repeat themselves.
    """

    def __init__(
        self,
        scenes: Sequence[Any],
        questions: Sequence[data.Question],
        in_words: bool = False,
    ) -> None:
        self.questions = list(questions)
        each = len(questions) // len(scenes)
        of = [scenes[n // each] for n in range(len(questions))]
        texts = [text_ids(s, q, in_words) for s, q in zip(of, questions, strict=True)]
        self.ids, self.mask = padded(texts)
        answers = [[IDS[word] for word in q.answer.split()] + [END] for q in questions]
        self.targets = padded(answers, IGNORED)[0]
        self.tokens = shifted(self.targets)
        self.parts = torch.full_like(self.targets, -1)
        self.steps = torch.zeros_like(self.targets)
        self.paths = self.targets[..., None].expand(-1, -1, data.MOST_STEPS).clone()
        for row, (scene, question) in enumerate(zip(of, questions, strict=True)):
            parts = parts_of(question)
            self.parts[row, : len(parts)] = torch.tensor([PARTS.index(one) for one in parts])
            if question.hard >= 0:
                ways = [
                    scene.go(question.start, min(question.steps, n))
                    for n in range(1, data.MOST_STEPS + 1)
                ]
                self.paths[row, question.hard] = torch.tensor([IDS[str(way)] for way in ways])
                self.steps[row, question.hard :] = question.steps


class HopsAsked:
    """The digits of some scenes with the same number of cards, each in random order.

    Attributes:
        ids, mask, tokens: As for `Asked`.
        leads: ``[scenes, cards, LONGEST]``: where 1, 2, ... steps lead from each digit.
    """

    LONGEST = 5

    def __init__(self, scenes: Sequence[Any], rng: np.random.Generator, *, in_words: bool) -> None:
        listed = [listed_ids(scene) if in_words else [] for scene in scenes]
        self.ids, self.mask = padded([[*one, IDS["go"]] for one in listed])
        digits = [rng.permutation(scene.cards[:, 0]).tolist() for scene in scenes]
        self.tokens = torch.tensor([[END, *(IDS[str(one)] for one in row)] for row in digits])
        steps = range(1, self.LONGEST + 1)
        self.leads = torch.tensor(
            [
                [[IDS[str(scene.go(one, n))] for n in steps] for one in row]
                for scene, row in zip(scenes, digits, strict=True)
            ]
        )


def parts_of(question: data.Question) -> list[str]:
    """What each word of an answer and its end is."""
    words = question.answer.split()
    if question.kind == "read":
        return ["read"] * len(words) + ["end"]
    if question.kind == "rings":
        return ["walked"] * len(words) + ["end"]
    border = words.index(":") + 1
    behind = {"walk": ["walked"] * (len(words) - border), "go": ["answer"]}
    behind["check"] = ["answer", "verdict"]
    return ["copied"] * border + behind[question.kind] + ["end"]


def text_ids(scene: Any, question: data.Question, in_words: bool) -> list[int]:
    """What the model reads; without a picture the scene in words comes first."""
    text = question.text
    if in_words:
        text = f"{data.scenes.listing(scene)} : {text}"
    return [IDS[word] for word in text.split()]


def padded(rows: Sequence[Sequence[int]], fill: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[rows, longest]`` and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads when it writes these labels, as transformers shifts them."""
    before = torch.cat([torch.full_like(labels[:, :1], END), labels[:, :-1]], 1)
    return before.masked_fill(before == IGNORED, PAD)


def draw_questions(
    scenes: Sequence[Any], kinds: Sequence[str], level: Level, rng: np.random.Generator
) -> list[data.Question]:
    """A question of each of these kinds about every scene."""
    return [data.ask(s, kind, level.draw_steps(rng), rng) for s in scenes for kind in kinds]


def cover_of(scenes: Sequence[Any]) -> torch.Tensor:
    """The class in each cell ``[scenes, cells]``."""
    return torch.from_numpy(np.stack([scene.cover().flatten() for scene in scenes]))


def following_of(scenes: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The digit in each cell, and that which is read behind it, both ``[scenes, cells]``: a card's
    right digit behind its left one, the next card's left one behind that (`data.BLANK` behind the
    last); `IGNORED` where no digit is."""
    own, found = (torch.full((len(scenes), data.CARDS, 2), IGNORED) for _ in range(2))
    for row, scene in enumerate(scenes):
        own[row, scene.places] = torch.from_numpy(scene.cards)
        found[row, scene.places] = torch.from_numpy(_following(scene))
    return own.flatten(1), found.flatten(1)


def _following(scene: Any) -> np.ndarray:
    digits = [*scene.cards.flatten().tolist(), data.BLANK]
    return np.array(digits[1:]).reshape(-1, 2)


def listed_ids(scene: Any) -> list[int]:
    """The scene in words."""
    return [IDS[word] for word in data.scenes.listing(scene).split()]


def following_in_words(scenes: Sequence[Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for each word of the scenes' listings ``[scenes, length]``."""
    own, found = (torch.full((len(scenes), length), IGNORED) for _ in range(2))
    for row, scene in enumerate(scenes):
        digits = [3 * card + side for card in range(len(scene.cards)) for side in (0, 1)]
        own[row, digits] = torch.from_numpy(scene.cards.flatten())
        found[row, digits] = torch.from_numpy(_following(scene).flatten())
    return own, found
