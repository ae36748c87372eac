"""Scenes: pictures of cards with two handwritten digits each, and questions that follow the cards.

A card leads from its left digit to its right one, where another card starts: cards form rings. How
many steps lead back is not known before they are followed. Four kinds of questions are asked about
a scene:

- ``read``: "read the cards", answered by every card in reading order, ``3 5 , 7 1 , 5 7``;
- ``follow``: "read the cards , from 3 go two", answered by the cards, the question and where two
  steps from 3 lead, ``3 5 , 7 1 , 5 7 : from 3 go two : 7``. The model describes the scene and then
  works on its own text;
- ``go``: "from 3 go two", answered at once, ``7``. The model must follow the cards in its layers;
- ``walk``: "walk from 3", answered by the way back to it, ``5 7 1 3``. Each token follows one card.

So most tokens of an answer are easy (they are read off the picture), and few are hard, the more so
the more steps they take (`Item.steps`). The digits are scikit-learn's, split as in the digits
example: a scene of ``validation`` or ``test`` shows only handwriting that no training scene shows.
With ``garments``, cards show Fashion-MNIST's ten garments instead, if Debian's package
``dataset-fashion-mnist`` is installed. Needs numpy, Pillow and scikit-learn, not torch.

    python examples/scenes/data.py      # preview.png: scenes of the test split with their texts
    edgeexit trace scenes --data examples/scenes/data.py:validation -o trace.npz
"""

from __future__ import annotations

import functools
import gzip
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package has its files: ``train-images-idx3-ubyte.gz`` and three more."""

DIGITS = tuple("0123456789")
GARMENTS = [
    "shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "blouse",
    "sneaker",
    "bag",
    "boot",
]  # by label
STEPS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
"""Steps in words: as digits they would be taken for cards. Many go round a ring, and further."""
WORDS = {"digits": DIGITS, "garments": tuple(GARMENTS)}

CELL, COLUMNS, ROWS = 16, 2, 4
SIZE = CELL * ROWS
"""Edge of a picture in pixels: four rows of two cards, each of two cells."""

CARDS = COLUMNS * ROWS
FEWEST, MOST_STEPS = 4, len(STEPS)
KINDS = ("read", "follow", "go", "walk")
BLANK = 10
"""What `Scene.cover` has where no card lies."""


@dataclass(frozen=True)
class Scene:
    """Cards in a picture.

    Attributes:
        cards: ``[cards, 2]``, each card's left and right class, in reading order.
        places: ``[cards]``, where each lies: 0 (upper left) to 7 (lower right).
    """

    cards: NDArray[np.int64]
    places: NDArray[np.int64]

    def cover(self) -> NDArray[np.int64]:
        """The class in each cell ``[rows, cells of a row]``, or `BLANK`."""
        cells = np.full((CARDS, 2), BLANK)
        cells[self.places] = self.cards
        return cells.reshape(ROWS, 2 * COLUMNS)

    def draw_question(self, rng: np.random.Generator, steps: int) -> tuple[int, int]:
        """A random start from which so many steps don't lead back to it, which is easily guessed.
        If all do, one step less does not. Returns it and the steps."""
        starts = [one for one in self.cards[:, 0] if self.go(one, steps) != one]
        if not starts:
            return self.draw_question(rng, steps - 1)
        return int(rng.choice(starts)), steps

    def go(self, start: int, steps: int) -> int:
        """The class that so many steps lead to."""
        leads = dict(self.cards.tolist())
        for _ in range(steps):
            start = leads[start]
        return start


@dataclass(frozen=True)
class Item:
    """A picture with a question about it and its answer.

    Attributes:
        kind: One of `KINDS`.
        steps: How many cards must be followed for a token; 0 for ``read``, 1 for ``walk``. With the
            number of cards, the item's difficulty.
    """

    picture: Image.Image
    scene: Scene
    kind: str
    steps: int
    question: str
    answer: str


def make_scene(rng: np.random.Generator, cards: int) -> Scene:
    """Random cards at random places; none leads to itself."""
    left = rng.permutation(10)[:cards]
    right = rng.permutation(left)
    while (left == right).any():
        right = rng.permutation(left)
    return Scene(np.stack([left, right], 1), np.sort(rng.permutation(CARDS)[:cards]))


def listing(scene: Scene, words: Sequence[str] = DIGITS) -> str:
    """The cards in reading order.

    >>> listing(Scene(np.array([[3, 5], [5, 3]]), np.array([0, 1])))
    '3 5 , 5 3'
    """
    return " , ".join(f"{words[a]} {words[b]}" for a, b in scene.cards)


def ask(
    scene: Scene, kind: str, start: int, steps: int, words: Sequence[str] = DIGITS
) -> tuple[str, str]:
    """A question of a kind and its answer.

    >>> ask(Scene(np.array([[3, 5], [5, 3]]), np.array([0, 1])), "follow", 3, 1)
    ('read the cards , from 3 go one', '3 5 , 5 3 : from 3 go one : 5')
    >>> ask(Scene(np.array([[3, 5], [5, 3]]), np.array([0, 1])), "walk", 3, 1)
    ('walk from 3', '5 3')
    """
    if kind == "read":
        return "read the cards", listing(scene, words)
    if kind == "walk":
        ring = [scene.go(start, 1)]
        while ring[-1] != start:
            ring.append(scene.go(ring[-1], 1))
        return f"walk from {words[start]}", " ".join(words[one] for one in ring)
    question, answer = f"from {words[start]} go {STEPS[steps - 1]}", words[scene.go(start, steps)]
    if kind == "go":
        return question, answer
    return f"read the cards , {question}", f"{listing(scene, words)} : {question} : {answer}"


@functools.cache
def pictures(split: str, of: str = "digits") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Source pictures ``[n, height, width]`` of a split (``train``, ``validation``, ``test``), ink
    as 255, and what they show. Raises `FileNotFoundError` for garments without their package."""
    if of == "digits":
        return runpy.run_path(str(HERE.parent / "digits" / "data.py"))["images"](split)
    kind = "t10k" if split == "test" else "train"
    images = _idx(f"{kind}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = _idx(f"{kind}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    chosen = {"train": slice(5000, None), "validation": slice(5000), "test": slice(None)}[split]
    return images[chosen], labels[chosen]


def _idx(name: str, header: int) -> NDArray[np.uint8]:
    if not (path := FASHION / name).is_file():
        raise FileNotFoundError(f"{path}: install Debian's package dataset-fashion-mnist")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


@functools.cache
def _by_class(split: str, of: str) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(pictures(split, of)[1] == label) for label in range(10)]


def draw(
    scene: Scene, split: str, rng: np.random.Generator, of: str = "digits", noise: float = 0.1
) -> Image.Image:
    """A picture of a scene: each class by a random source picture of the split, turned, zoomed and
    moved a little, dark on light cards with a frame; then noise and blots."""
    images = pictures(split, of)[0]
    table = rng.uniform(150, 215)
    scenery = np.full((SIZE, SIZE), table)
    for card, place in zip(scene.cards, scene.places, strict=True):
        top, left = CELL * (place // COLUMNS), 2 * CELL * (place % COLUMNS)
        paper, ink = rng.uniform(225, 255), rng.uniform(0, 80)
        scenery[top + 1 : top + CELL - 1, left + 1 : left + 2 * CELL - 1] = paper
        for side, label in enumerate(card):
            source = images[rng.choice(_by_class(split, of)[label])]
            edge = int(rng.integers(11, 15))
            glyph = Image.fromarray(np.pad(source, source.shape[0] // 8))
            glyph = glyph.resize((edge, edge), Image.Resampling.BICUBIC)
            glyph = glyph.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
            y = top + 1 + int(rng.integers(0, CELL - 1 - edge))
            x = left + CELL * side + 1 + int(rng.integers(0, CELL - 1 - edge))
            share = np.asarray(glyph, np.float64) / 255
            under = scenery[y : y + edge, x : x + edge]
            scenery[y : y + edge, x : x + edge] = under + (ink - paper) * share
    for _ in range(rng.poisson(20 * noise)):
        y, x = rng.integers(0, SIZE - 2, 2)
        scenery[y : y + 2, x : x + 2] = rng.uniform(0, 255)
    scenery += rng.normal(0, 255 * noise * rng.uniform(0, 0.5), scenery.shape)
    return Image.fromarray(scenery.clip(0, 255).astype(np.uint8))


def items(
    split: str,
    count: int,
    seed: int | Sequence[int],
    *,
    kinds: Sequence[str] = KINDS,
    most_steps: int = MOST_STEPS,
    of: str = "digits",
) -> list[Item]:
    """Random scenes of a split, each with a question; kinds take turns."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        scene = make_scene(rng, int(rng.integers(FEWEST, CARDS + 1)))
        kind = kinds[number % len(kinds)]
        start, steps = scene.draw_question(rng, int(rng.integers(1, most_steps + 1)))
        question, answer = ask(scene, kind, start, steps, WORDS[of])
        steps = {"read": 0, "walk": 1}.get(kind, steps)
        made.append(Item(draw(scene, split, rng, of), scene, kind, steps, question, answer))
    return made


def validation() -> list[dict[str, object]]:
    """400 questions of the validation split with their answers, for ``edgeexit trace``."""
    return _rows(items("validation", 400, 2))


def test() -> list[dict[str, object]]:
    """100 questions of the test split."""
    return _rows(items("test", 100, 3))


def _rows(asked: Sequence[Item]) -> list[dict[str, object]]:
    return [
        {
            "prompt": f"USER: <image> {item.question} ASSISTANT:",
            "target": f"{item.answer} <|end|>",
            "images": [item.picture],
        }
        for item in asked
    ]


def preview(path: Path, rows: int = 2, columns: int = 4, zoom: int = 3) -> None:
    """A sheet of scenes of the test split, each with its question and answer."""
    edge, margin, text = SIZE * zoom, 12, 44
    width, height = 350, edge + text + margin
    sheet = Image.new("RGB", (width * columns, height * rows + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for number, item in enumerate(items("test", rows * columns, 1)):
        x, y = width * (number % columns) + margin, height * (number // columns) + margin
        large = item.picture.resize((edge, edge), Image.Resampling.NEAREST)
        sheet.paste(large.convert("RGB"), (x, y))
        pen.text((x, y + edge + 4), item.question, "black", font_size=13)
        pen.text((x, y + edge + 22), item.answer, "navy", font_size=13)
    sheet.save(path)


if __name__ == "__main__":
    preview(HERE / "preview.png")
    items("test", 1, 1)[0].picture.save(HERE / "scene.png")
