"""Pictures of handwritten digits, and questions about them with their answers in words.

The digits are scikit-learn's, split as in the digits example, so a picture of ``validation`` or
``test`` shows only handwriting that no training picture shows. Needs numpy, Pillow and
scikit-learn, not torch.

    python examples/vlm/data.py      # the pictures beside this file, of digits of the test split
"""

from __future__ import annotations

import functools
import itertools
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).resolve().parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = {1: "One digit.", 2: "Two digits.", 3: "Three digits."}
SIZE, MOST = 48, 3
"""Edge of a picture as the model sees it, and the most digits in one."""

QUESTIONS = {
    "what": ("What digit is it?", "Which digit is this?", "What is it?", "What number is it?"),
    "which": ("Which digits are there?", "Which digits do you see?", "Read the digits."),
    "count": ("How many digits are there?", "How many digits do you see?"),
    "larger": (
        "Which is larger, the left or the right?",
        "Which digit is larger?",
        "Which one is larger?",
    ),
}
PICTURES = {"seven.png": (7,), "three_and_eight.png": (3, 8), "five_zero_two.png": (5, 0, 2)}
EDGE = 128
"""Edge of the pictures beside this file."""


@dataclass(frozen=True)
class Example:
    """A picture, a question about it and its answer, and which digit covers each of its pixels:
    from 1 (a zero) to 10 (a nine), or 0."""

    picture: Image.Image
    kind: str
    question: str
    answer: str
    cover: NDArray[np.int64]


@functools.cache
def handwriting(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``[n, 8, 8]`` of single digits in a split, and what they show."""
    return runpy.run_path(str(HERE.parent / "digits" / "data.py"))["images"](split)


def draw(
    digits: Sequence[NDArray[np.uint8]], rng: np.random.Generator, edge: int = SIZE
) -> tuple[Image.Image, NDArray[np.int64]]:
    """A square picture of one to three digits from left to right, dark on light paper; each turned,
    moved and zoomed a little. With it, which of them covers a pixel, from 1 on; 0: none does."""
    ink = np.zeros((edge, edge), np.uint8)
    cover = np.zeros((edge, edge), np.int64)
    column = edge / len(digits)
    for number, digit in enumerate(digits):
        side = int(min(column * rng.uniform(0.8, 1.0), edge * rng.uniform(0.35, 0.7)))
        framed = Image.fromarray(np.pad(digit, 1))
        glyph = framed.resize((side, side), Image.Resampling.BICUBIC)
        turned = np.asarray(glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC))
        left = int(column * number + rng.uniform(0, column - side))
        top = int(rng.uniform(0.05, 0.95) * (edge - side))
        place = slice(top, top + side), slice(left, left + side)
        ink[place] = np.maximum(ink[place], turned)
        cover[place] = number + 1
    paper, dark = rng.uniform(200, 255), rng.uniform(0, 90)
    shade = paper + (dark - paper) * (ink / 255)
    return Image.fromarray(shade.round().astype(np.uint8)), cover


def answers(numbers: Sequence[int]) -> dict[str, str]:
    """Answers to the kinds of questions that fit the digits of a picture."""
    found = {"which": read(numbers), "count": COUNTS[len(numbers)]}
    if len(numbers) == 1:
        found["what"] = f"It is {'an' if numbers[0] == 8 else 'a'} {WORDS[numbers[0]]}."
    if len(numbers) == 2:
        found["larger"] = larger(*numbers)
    return found


def read(numbers: Sequence[int]) -> str:
    """The digits in words.

    >>> read([7]), read([5, 0, 2])
    ('Seven.', 'Five, zero and two.')
    """
    words = [WORDS[number] for number in numbers]
    said = " and ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])
    return f"{said.capitalize()}."


def larger(left: int, right: int) -> str:
    """Which of two digits is larger.

    >>> larger(3, 8), larger(4, 4)
    ('The right: eight is larger than three.', 'Neither: both are four.')
    """
    if left == right:
        return f"Neither: both are {WORDS[left]}."
    side = "left" if left > right else "right"
    return f"The {side}: {WORDS[max(left, right)]} is larger than {WORDS[min(left, right)]}."


def examples(split: str, count: int, seed: int | Sequence[int]) -> list[Example]:
    """Random pictures of a split, with a question about each."""
    rng = np.random.default_rng(seed)
    images, labels = handwriting(split)
    made = []
    for _ in range(count):
        rows = rng.integers(len(images), size=rng.integers(1, MOST + 1))
        picture, cover = draw([images[row] for row in rows], rng)
        shown, fitting = np.array([0, *labels[rows] + 1]), answers(labels[rows].tolist())
        kind = [*fitting][rng.integers(len(fitting))]
        question = str(rng.choice(QUESTIONS[kind]))
        made.append(Example(picture, kind, question, fitting[kind], shown[cover]))
    return made


def texts() -> list[str]:
    """Every question and every answer, for the tokenizer to learn from."""
    asked = list(itertools.chain(*QUESTIONS.values()))
    pairs = list(itertools.product(range(10), repeat=2))
    said = [
        *(text for digit in range(10) for text in answers([digit]).values()),
        *(text for pair in pairs for text in (larger(*pair), read(pair), read([*pair, pair[0]]))),
        *COUNTS.values(),
    ]
    return [*asked * 20, *said]


def main(folder: Path = HERE) -> None:
    """Draws the pictures beside this file."""
    images, labels = handwriting("test")
    rng = np.random.default_rng(0)
    for name, numbers in PICTURES.items():
        rows = [int(rng.choice(np.flatnonzero(labels == number))) for number in numbers]
        draw([images[row] for row in rows], rng, EDGE)[0].save(folder / name)


if __name__ == "__main__":
    main()
