"""Questions of `scenes.py`, and its figures: what a case answers right, how long it takes beside
the same model unsplit, and what is required."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import ROOT, verdict

from edgeexit import runtime
from edgeexit.measure.bench.texts import Writer
from edgeexit.measure.bench.vision_cases import layer_of
from edgeexit.measure.texts import Text
from edgeexit.runtime.programs.images import image_input

EXAMPLE = ROOT / "examples" / "scenes"
sys.path.insert(0, str(EXAMPLE))
import data  # noqa: E402

KEPT = {"free": 0.99, "gates": 0.99, "tower_gates": 0.98, "all": 0.98}
"""Share of the right answers that a case must keep."""


class Questions:
    """Questions about scenes of a split, as a bundle's inputs.

    Attributes:
        items: Questions with their pictures and answers; all kinds take turns.
        texts: Prompts.
        answers: Token ids of the right answers, without the token that ends them.
    """

    def __init__(
        self, model: runtime.Model, split: str, count: int, seed: int, most_steps: int
    ) -> None:
        self.items = data.items(split, count, seed, most_steps=most_steps)
        written, _ = image_input(model.bundle)
        marker = "" if written is None or written.in_front else written.placeholder
        chats = [
            model.chat_prompt([{"role": "user", "content": f"{marker}{item.question}"}])
            for item in self.items
        ]
        pictures = [[item.picture] for item in self.items]
        rows = [
            model.prompts_with_images([chat], [own])
            for chat, own in zip(chats, pictures, strict=True)
        ]
        self.texts = [Text(list(tokens), inputs) for [tokens], inputs in rows]
        self.answers = [model.encode(item.answer, special_tokens=False) for item in self.items]

    def answered_right(self, model: runtime.Model, new_tokens: int) -> Questions:
        """Those that the model answers right at full depth. Of these, answers that an exit changes
        are right answers that it loses."""
        written = [
            model.generate(t.tokens, inputs=t.inputs, max_new_tokens=new_tokens, text=False)
            .finish()
            .tokens[0]
            for t in self.texts
        ]
        kept = np.flatnonzero(self.right(written))
        found = copy.copy(self)
        for name in ("items", "texts", "answers"):
            setattr(found, name, [getattr(self, name)[number] for number in kept])
        return found

    def with_targets(self) -> list[Text]:
        """The prompts with their right answers."""
        return [
            Text([*text.tokens, *answer], text.inputs, len(text.tokens))
            for text, answer in zip(self.texts, self.answers, strict=True)
        ]

    def right(self, written: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Which answers are right, word for word."""
        pairs = zip(written, self.answers, strict=True)
        return np.array([list(made) == answer for made, answer in pairs])

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        return np.array([item.kind == kind for item in self.items])


def figures_of(writer: Writer, plain: Writer, asked: Questions) -> dict[str, Any]:
    """Quality and times of a case. Times are ratios to the unsplit model's: of the time to the
    first token, per token behind it, and of whole answers, each over all answers of a kind."""
    records, plain_records = writer.usual(), plain.usual()
    order = [record["prompt"] for record in records]
    assert order == [record["prompt"] for record in plain_records]
    right = asked.right([record["tokens"] for record in records])
    right_of_plain = asked.right([record["tokens"] for record in plain_records])
    pairs = zip(records, plain_records, strict=True)
    same = [ours["tokens"] == theirs["tokens"] for ours, theirs in pairs]
    found: dict[str, Any] = {
        "right": round(float(right.mean()), 4),
        "kept": round(float(right.mean() / max(right_of_plain.mean(), 1e-9)), 4),
        "kept_interval": interval(right, right_of_plain),
        "same_answers": round(float(np.mean(same)), 4),
    }
    for kind in ("all", *data.KINDS):
        of_kind = np.ones(len(records), bool) if kind == "all" else asked.of_kind(kind)
        chosen = [(records[n], plain_records[n]) for n in np.flatnonzero(of_kind)]
        found[kind] = {"right": round(float(right[of_kind].mean()), 4)} | times(chosen)
    if writer.case == "unsplit":
        return found
    found |= {key: totals(records, key) for key in ("exits", "earlier")}
    found |= {"dropped": drops(records)}
    return found | {"mean_layer": depths(records, asked)}


def times(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Ratios of summed times, a case's over the unsplit model's. Times per token are of answers
    that both wrote with more than one."""

    def ratio(values: list[tuple[float, float]]) -> float:
        ours, theirs = (sum(column) for column in zip(*values, strict=True))
        return round(ours / theirs, 4)

    long = [(a, b) for a, b in pairs if min(len(a["tokens"]), len(b["tokens"])) > 1]
    found = {
        "first_token": ratio([(_first_token(a), _first_token(b)) for a, b in pairs]),
        "prefill": ratio([(_prefill(a), _prefill(b)) for a, b in pairs]),
        "whole": ratio([(_whole(a), _whole(b)) for a, b in pairs]),
    }
    if long:
        ours, theirs = (
            sum(pair[side]["decode_s"] for pair in long)
            / sum(len(pair[side]["tokens"]) - 1 for pair in long)
            for side in (0, 1)
        )
        found["per_token"] = round(ours / theirs, 4)
    return found


def _prefill(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] - record["earlier_s"])


def _first_token(record: dict[str, Any]) -> float:
    return float(record["first_token_s"])


def _whole(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] + record["decode_s"])


TIMED = {
    "free": _whole,
    "exact": _whole,
    "gates": _prefill,
    "tower_gates": _first_token,
    "all": _whole,
}


def interval(right: NDArray[np.bool_], plain: NDArray[np.bool_]) -> list[float]:
    """95 % interval of the share of right answers that is kept, over resampled questions."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(right), size=(2000, len(right)))
    shares = right[draws].mean(1) / np.maximum(plain[draws].mean(1), 1e-9)
    return [round(float(edge), 4) for edge in np.quantile(shares, [0.025, 0.975])]


def depths(records: list[dict[str, Any]], asked: Questions) -> dict[str, float]:
    """Mean layer of a token's exit by ``kind steps``, and of ``all``."""
    of_kind: dict[str, list[dict[str, Any]]] = {"all": records}
    for one in records:
        item = asked.items[one["prompt"]]
        of_kind.setdefault(f"{item.kind} {item.steps}", []).append(one)
    found = {}
    for kind in sorted(of_kind):
        taken = totals(of_kind[kind], "exits")
        layers = sum(layer_of(name) * number for name, number in taken.items())
        found[kind] = round(layers / max(sum(taken.values()), 1), 3)
    return found


def totals(records: list[dict[str, Any]], key: str) -> dict[str, int]:
    """Tokens by exit (``exits``), or prompts by exit of the tower (``earlier``)."""
    counts: dict[str, int] = {}
    for one in records:
        taken = one[key] if key == "exits" else Counter(one[key].values())
        for name, number in taken.items():
            counts[name] = counts.get(name, 0) + number
    return {name: counts[name] for name in sorted(counts, key=layer_of)}


def drops(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Layer behind which image tokens left -> share of prompts; ``never``: they did not leave."""
    left = Counter(
        str(layer_of(one["dropped"][0])) if one["dropped"] else "never" for one in records
    )
    return {layer: round(left[layer] / len(records), 4) for layer in sorted(left)}


def random_cut(cases: Mapping[str, Any]) -> dict[str, float] | None:
    """What dropping image tokens behind random layers, as often behind each as gates do, keeps, and
    its prefill: the mean over static cuts. None: a layer has no static cut."""
    of_layer = {name.removeprefix("static_"): own for name, own in cases.items()}
    of_layer["never"] = cases["full"]
    shares = cases["gates"]["dropped"]
    if not shares.keys() <= of_layer.keys():
        return None

    def mean(read: Callable[[Any], float]) -> float:
        return round(sum(share * read(of_layer[layer]) for layer, share in shares.items()), 4)

    return {
        "kept": mean(lambda own: own["kept"]),
        "prefill": mean(lambda own: own["all"]["prefill"]),
    }


def truncate_instead(
    writers: Mapping[str, Writer], smaller: Sequence[str], asked: Questions
) -> dict[str, list[str]]:
    """Case with exits -> what takes as little time (up to 2 % more) and is not surpassed by it:
    plain models of `smaller`, and random exits. The time is the one that the case is about: of
    whole answers, prefill for gates, or to the first token where the tower has exits, too. A case
    surpasses another if the 95 % interval of the difference between their shares of right answers,
    over resampled questions, is above 0."""
    rng = np.random.default_rng(1)
    draws = rng.integers(len(asked.items), size=(2000, len(asked.items)))
    records = {
        name: sorted(writer.usual(), key=lambda record: int(record["prompt"]))
        for name, writer in writers.items()
    }
    right = {
        name: asked.right([one["tokens"] for one in own]).astype(float)
        for name, own in records.items()
    }
    found = {}
    for case, seconds in TIMED.items():
        times = {name: sum(map(seconds, own)) for name, own in records.items()}
        rivals = [*smaller, *(["random"] if case == "free" else [])]
        found[case] = [
            name
            for name in rivals
            if times[name] <= 1.02 * times[case]
            and np.quantile((right[case] - right[name])[draws].mean(1), 0.025) <= 0
        ]
    return found


def kept_by_static_cuts(cases: Mapping[str, Any], prefill: float) -> float:
    """The share of right answers that dropping image tokens behind one layer for every prompt keeps
    at this prefill time, interpolated between layers."""
    static = [case for name, case in cases.items() if name.startswith("static_")]
    points = sorted((case["all"]["prefill"], case["kept"]) for case in static)
    times, kept = zip(*points, (1.0, 1.0), strict=True)
    return float(np.interp(prefill, times, kept))


def judge(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The required figures: means over results (``cases`` and ``floor``) of several trainings, with
    each one's value."""
    of_each = [required(own["cases"], own["floor"]) for own in results]
    means = []
    for rows in zip(*of_each, strict=True):
        (name, _, sign, _, _), *_ = rows
        value, must, aim = (float(np.mean([row[n] for row in rows])) for n in (1, 3, 4))
        means.append((name, value, sign, round(must, 4), round(aim, 4)))
    verdicts = verdict(means)
    if len(results) > 1:
        for found, rows in zip(verdicts, zip(*of_each, strict=True), strict=True):
            found["each"] = [round(row[1], 4) for row in rows]
    return verdicts


def required(cases: Mapping[str, Any], floor: float) -> list[tuple[str, float, str, float, float]]:
    """The required figures of one training, as `results.verdict` takes them."""
    return [
        (
            "free: time of whole descriptions with answers",
            cases["free"]["follow"]["whole"],
            "<=",
            0.66,
            0.5,
        ),
        ("free: kept", cases["free"]["kept"], ">=", KEPT["free"], 1.0),
        (
            "exact: time of whole descriptions with answers",
            cases["exact"]["follow"]["whole"],
            "<=",
            0.75,
            0.55,
        ),
        ("exact: same answers", cases["exact"]["same_answers"], ">=", 1.0, 1.0),
        ("gates: prefill", cases["gates"]["all"]["prefill"], "<=", 0.6, 0.45),
        ("gates: kept", cases["gates"]["kept"], ">=", KEPT["gates"], 1.0),
        (
            "gates: kept, less what a static cut keeps in the same prefill time",
            cases["gates"]["kept"] - kept_by_static_cuts(cases, cases["gates"]["all"]["prefill"]),
            ">=",
            0.0,
            0.05,
        ),
        (
            "tower and gates: time to the first token",
            cases["tower_gates"]["all"]["first_token"],
            "<=",
            round(floor + 0.4 * (1 - floor), 4),
            floor,
        ),
        ("tower and gates: kept", cases["tower_gates"]["kept"], ">=", KEPT["tower_gates"], 1.0),
        ("all: time of whole answers", cases["all"]["all"]["whole"], "<=", 0.55, 0.4),
        ("all: kept", cases["all"]["kept"], ">=", KEPT["all"], 1.0),
    ]
