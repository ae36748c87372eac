"""The entailment example: questions have the answers that the cards give, and statements cannot be
judged without the picture."""

from __future__ import annotations

import collections
import itertools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parents[2] / "examples" / "entailment"


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return runpy.run_path(str(HERE / "data.py"))


def lead(cards: dict[int, int], start: int, steps: int) -> int:
    for _ in range(steps):
        start = cards[start]
    return start


def test_answers_are_those_that_the_cards_give(data: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for number in range(400):
        scene = data["make_scene"](rng)
        cards = dict(scene.cards.tolist())
        kind = data["KINDS"][number % len(data["KINDS"])]
        question = data["ask"](scene, kind, 1 + number % 4, rng)
        words = question.answer.split()
        if kind == "read":
            assert words == " ".join(f"{a} {b}" for a, b in scene.cards).split()
        elif kind == "rings":
            rings = [ring.split() for ring in question.answer.split(" , ")]
            assert sorted(itertools.chain(*rings)) == sorted(map(str, cards))
            for ring in rings:
                assert ring[0] == min(ring)
                assert all(
                    cards[int(a)] == int(b) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)
                )
        elif kind == "walk":
            way = [int(word) for word in words[4:]]
            assert way[-1] == question.start and len(set(way)) == len(way)
            assert way == [lead(cards, question.start, n + 1) for n in range(len(way))]
        else:
            true = lead(cards, question.start, question.steps)
            assert int(words[question.hard]) == true
            assert question.answer.startswith(f"{question.text} : ")
            if kind == "check":
                stated = int(question.text.split()[-1])
                assert words[-1] == ("yes" if stated == true else "no")


def test_statements_say_nothing_about_their_truth(data: dict[str, Any]) -> None:
    """Right and wrong ones are as many, and name each distance from the start and each digit as
    often (within five standard deviations)."""
    rng, count = np.random.default_rng(1), 6000
    stated: dict[bool, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for _ in range(count):
        question = data["ask"](data["make_scene"](rng), "check", int(rng.integers(1, 5)), rng)
        digit = int(question.text.split()[-1])
        assert digit != question.start
        stated[question.answer.endswith("yes")][digit] += 1
    assert abs(sum(stated[True].values()) - count / 2) < 5 * (count / 4) ** 0.5
    for counter in stated.values():
        total = sum(counter.values())
        for digit in range(10):
            assert abs(counter[digit] - total / 10) < 5 * (total * 0.09) ** 0.5
