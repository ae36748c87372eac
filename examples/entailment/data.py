"""Questions and statements about scenes, for a model that reads an image, and for one that reads
the scene in words.

The scenes are those of the scenes example: pictures of cards with two handwritten digits, where a
card leads from its left digit to its right one. The model reads a text, and writes another one,
which repeats the question before the answer:

- ``read``: "read the cards", answered by every card in reading order, ``4 7 2 8 8 4 7 2``;
- ``walk``: "walk from 8", answered by the way back to it, ``walk from 8 : 4 7 2 8``;
- ``go``: "from 8 go two", answered by where two steps lead, ``from 8 go two : 7``;
- ``check``: "from 8 go two is 4", a statement that the scene entails or contradicts,
  ``from 8 go two is 4 : 7 no``. Half of them are right. The picture is the only premise: right and
  wrong statements name every digit alike, and never the one that they start from;
- ``rings``: "name the rings", each ring from its smallest digit on, ``0 1 , 2 8 4 7``.

`Item.steps` and the number of cards are an item's difficulty. Needs numpy, Pillow and scikit-learn,
not torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
KINDS = ("read", "walk", "go", "check", "rings")
MOST_STEPS = 4
YES, NO = "yes", "no"


def _scenes() -> Any:
    """The module examples/scenes/data.py."""
    path = HERE.parent / "scenes" / "data.py"
    found = importlib.util.spec_from_file_location("scenes_data", path)
    assert found is not None and found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


scenes = _scenes()
Scene, DIGITS, STEPS = scenes.Scene, scenes.DIGITS, scenes.STEPS
CARDS, CELLS, SIZE, BLANK = scenes.CARDS, 2 * scenes.CARDS, scenes.SIZE, scenes.BLANK


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: One of `KINDS`.
        steps: How many cards must be followed for a token; 0 for ``read``.
        text: What the model reads.
        answer: What it writes.
        hard: Place in `answer` of the word where all steps lead; -1: none.
        start: What is followed from; -1: nothing.
    """

    kind: str
    steps: int
    text: str
    answer: str
    hard: int = -1
    start: int = -1


@dataclass(frozen=True)
class Item:
    """A picture with a question about it."""

    picture: Image.Image
    scene: Any
    question: Question


def ask(scene: Any, kind: str, steps: int, rng: np.random.Generator) -> Question:
    """A random question of a kind."""
    if kind == "read":
        digits = " ".join(map(str, scene.cards.flatten()))
        return Question(kind, 0, "read the cards", digits)
    if kind == "rings":
        named = " , ".join(" ".join(map(str, ring)) for ring in rings_of(scene))
        return Question(kind, 1, "name the rings", named)
    if kind == "walk":
        start = int(rng.choice(scene.cards[:, 0]))
        text, answer = scenes.ask(scene, "walk", start, 1)
        return Question(kind, 1, text, f"{text} : {answer}", start=start)
    start, steps = scene.draw_question(rng, steps)
    text, answer = scenes.ask(scene, "go", start, steps)
    if kind == "go":
        return Question(kind, steps, text, f"{text} : {answer}", 5, start)
    right = bool(rng.random() < 0.5)
    stated = int(answer) if right else wrong_answer(scene, start, int(answer), rng)
    text = f"{text} is {stated}"
    return Question(kind, steps, text, f"{text} : {answer} {YES if right else NO}", 7, start)


def wrong_answer(scene: Any, start: int, answer: int, rng: np.random.Generator) -> int:
    """A digit of the scene other than these two, half of the time one that another number of steps
    leads to."""
    others = [int(one) for one in scene.cards[:, 0] if one not in (start, answer)]
    near = [scene.go(start, n) for n in range(1, MOST_STEPS + 2)]
    near = [int(one) for one in near if one in others]
    return int(rng.choice(near if near and rng.random() < 0.5 else others))


def rings_of(scene: Any) -> list[list[int]]:
    """The rings of a scene, each from its smallest digit on, in the order of these."""
    left = sorted(scene.cards[:, 0].tolist())
    found: list[list[int]] = []
    for one in left:
        if any(one in ring for ring in found):
            continue
        ring = [one]
        while (following := int(scene.go(ring[-1], 1))) != one:
            ring.append(following)
        found.append(ring)
    return found


def make_scene(rng: np.random.Generator, cards: int | None = None) -> Any:
    """A random scene; without a number of cards, of any."""
    count = int(rng.integers(scenes.FEWEST, CARDS + 1)) if cards is None else cards
    return scenes.make_scene(rng, count)


def items(
    split: str, count: int, seed: int | Sequence[int], kinds: Sequence[str] = KINDS
) -> list[Item]:
    """Random scenes of a split, each with a question; kinds take turns."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        scene = make_scene(rng)
        steps = int(rng.integers(1, MOST_STEPS + 1))
        question = ask(scene, kinds[number % len(kinds)], steps, rng)
        made.append(Item(scenes.draw(scene, split, rng), scene, question))
    return made


def validation() -> list[dict[str, object]]:
    """400 questions of the validation split with their pictures and answers, for ``edgeexit
    trace``."""
    return _rows("validation", 400, 2)


def test() -> list[dict[str, object]]:
    """200 questions of the test split."""
    return _rows("test", 200, 3)


def validation_in_words() -> list[dict[str, object]]:
    """400 questions about scenes in words, with their answers."""
    return _rows_in_words(400, 2)


def test_in_words() -> list[dict[str, object]]:
    """200 other questions about scenes in words."""
    return _rows_in_words(200, 3)


def _rows(split: str, count: int, seed: int) -> list[dict[str, object]]:
    return [
        {
            "prompt": item.question.text,
            "target": f"{item.question.answer} </s>",
            "images": [item.picture],
        }
        for item in items(split, count, seed, KINDS[:4])
    ]


def _rows_in_words(count: int, seed: int) -> list[dict[str, object]]:
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        scene = make_scene(rng)
        steps = int(rng.integers(1, MOST_STEPS + 1))
        question = ask(scene, KINDS[1 + number % 4], steps, rng)
        text = f"{scenes.listing(scene)} : {question.text}"
        rows.append({"text": text, "target": f"{question.answer} </s>"})
    return rows
