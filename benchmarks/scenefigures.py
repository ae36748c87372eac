"""Questions of `scenes.py`, and its figures: what a case answers right, how long it takes beside
the same model unsplit, and what is required."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import ROOT, verdict
from thresholds import Asked

from edgeexit import runtime
from edgeexit.measure.bench.texts import Writer, whole_s
from edgeexit.measure.bench.vision_cases import layer_of
from edgeexit.measure.texts import Text
from edgeexit.runtime.programs.images import image_input

EXAMPLE = ROOT / "examples" / "scenes"
sys.path.insert(0, str(EXAMPLE))
import data  # noqa: E402

KEPT = {"free": 0.99, "gates": 0.99, "tower_gates": 0.98, "all": 0.98}
"""Share of the right answers that a case must keep."""


class Questions(Asked):
    """Questions about scenes of a split; all kinds take turns. `items` have their pictures."""

    kinds, new_tokens = data.KINDS, 48

    def __init__(
        self, model: runtime.Model, split: str, count: int, seed: int, most_steps: int
    ) -> None:
        items = data.items(split, count, seed, most_steps=most_steps)
        written, _ = image_input(model.bundle)
        marker = "" if written is None or written.in_front else written.placeholder
        chats = [
            model.chat_prompt([{"role": "user", "content": f"{marker}{item.question}"}])
            for item in items
        ]
        rows = [
            model.prompts_with_images([chat], [[item.picture]])
            for chat, item in zip(chats, items, strict=True)
        ]
        texts = [Text(list(tokens), inputs) for [tokens], inputs in rows]
        answers = [model.encode(item.answer, special_tokens=False) for item in items]
        super().__init__(items, texts, answers)


Records = list[dict[str, Any]]


class Answered:
    """What a case answered, question by question.

    Attributes:
        records: One per question, in order (`edgeexit.measure.bench.cases.read_generation`).
        right: ``[question]``, which answers are right.
    """

    def __init__(self, writer: Writer, asked: Asked) -> None:
        self.name, self.case = writer.name, writer.case
        self.records: Records = sorted(writer.usual(), key=lambda one: int(one["prompt"]))
        assert [one["prompt"] for one in self.records] == list(range(len(asked.items)))
        self.right = asked.right([one["tokens"] for one in self.records])

    def seconds(self, read: Callable[[dict[str, Any]], float]) -> float:
        """A time of all questions together."""
        return sum(map(read, self.records))


def figures_of(
    case: Answered, plain: Sequence[Answered], best: Answered, asked: Asked
) -> dict[str, Any]:
    """Quality and times of a case. Times are ratios to those of the unsplit model: of the time to
    the first token, per token behind it, and of whole answers, each over all answers of a kind.

    Args:
        plain: The unsplit model in several thread settings; the fastest counts, figure by figure.
        best: What answers most questions right: the unsplit model, or a smaller plain one.
    """
    pairs = zip(case.records, plain[0].records, strict=True)
    same = [ours["tokens"] == theirs["tokens"] for ours, theirs in pairs]
    found: dict[str, Any] = {
        "right": round(float(case.right.mean()), 4),
        "kept": round(kept(case.right, best.right), 4),
        "kept_interval": interval(case.right, best.right),
        "same_answers": round(float(np.mean(same)), 4),
    }
    for kind in ("all", *asked.kinds):
        of_kind = asked.of_kind(kind)
        chosen = np.flatnonzero(of_kind)
        ours, *theirs = ([one.records[n] for n in chosen] for one in (case, *plain))
        found[kind] = {"right": round(float(case.right[of_kind].mean()), 4)} | times(ours, theirs)
    if case.case == "unsplit":
        return found
    found |= {key: totals(case.records, key) for key in ("exits", "earlier")}
    found |= {"dropped": drops(case.records)}
    return found | {"mean_layer": depths(case.records, asked)}


def kept(right: NDArray[Any], best: NDArray[Any]) -> float:
    """The share of right answers that is kept."""
    return float(right.mean() / max(best.mean(), 1e-9))


def times(ours: Records, baselines: Sequence[Records]) -> dict[str, float]:
    """Ratios of summed times, a case's over the fastest baseline's. Times per token are of answers
    with more than one, behind the first; ``behind_tower`` are whole answers without the tower."""

    def ratio(read: Callable[[dict[str, Any]], float], chosen: Sequence[int] | range) -> float:
        totals = [sum(read(one[n]) for n in chosen) for one in (ours, *baselines)]
        return round(totals[0] / min(totals[1:]), 4)

    every = range(len(ours))
    found = {
        "first_token": ratio(_first_token, every),
        "prefill": ratio(_prefill, every),
        "whole": ratio(whole_s, every),
        "behind_tower": ratio(_behind_tower, every),
    }
    several = [n for n in every if min(len(one[n]["tokens"]) for one in (ours, *baselines)) > 1]
    if several:
        decoded = [sum(len(one[n]["tokens"]) - 1 for n in several) for one in (ours, baselines[0])]
        whole = ratio(lambda record: float(record["decode_s"]), several)
        found["per_token"] = round(whole * decoded[1] / decoded[0], 4)
    return found


def _prefill(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] - record["earlier_s"])


def _behind_tower(record: dict[str, Any]) -> float:
    return whole_s(record) - float(record["chains_s"].get("vision", 0.0))


def _first_token(record: dict[str, Any]) -> float:
    return float(record["first_token_s"])


TIMED = {
    "free": ("follow", "whole"),
    "exact": ("follow", "whole"),
    "gates": ("all", "prefill"),
    "tower_gates": ("all", "first_token"),
    "all": ("all", "whole"),
}
"""Case -> the questions that it is about, and which time of theirs."""


def interval(right: NDArray[Any], best: NDArray[Any]) -> list[float]:
    """95 % interval of the share of right answers that is kept, over resampled questions."""
    draws = _draws(len(right))
    shares = right[draws].mean(1) / np.maximum(best[draws].mean(1), 1e-9)
    return [round(float(edge), 4) for edge in np.quantile(shares, [0.025, 0.975])]


def _draws(count: int) -> NDArray[np.int64]:
    """Questions of 2000 resamplings, ``[draw, question]``."""
    return np.random.default_rng(0).integers(count, size=(2000, count))


def depths(records: list[dict[str, Any]], asked: Asked) -> dict[str, float]:
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
    # A chain whose only exit is its last one may be named otherwise.
    ordered = sorted(counts, key=lambda name: layer_of(name) if name[-1].isdigit() else 0)
    return {name: counts[name] for name in ordered}


def drops(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Layer behind which image tokens left -> share of prompts; ``never``: they did not leave."""
    left = Counter(
        str(layer_of(one["dropped"][0])) if one["dropped"] else "never" for one in records
    )
    return {layer: round(left[layer] / len(records), 4) for layer in sorted(left)}


def beside_cuts(gates: Answered, cuts: Mapping[int, Answered], whole: Answered) -> dict[str, Any]:
    """Gates beside cuts behind one layer for every prompt.

    ``over_static``: how many more questions they answer right (a share of all, with its 95 %
    interval over resampled questions) than the best mixture of two cuts with the same prefill time.
    ``random``: what dropping behind random layers gives, as often behind each as gates do: the mean
    over cuts.

    Args:
        cuts: Layer -> that cut, in a bundle of its own.
        whole: The bundle of gates, when none is asked.
    """
    points = [(one.seconds(_prefill), one.right.astype(float)) for one in [*cuts.values(), whole]]
    mixed = mixture(sorted(points, key=lambda point: point[0]), gates.seconds(_prefill))
    right = gates.right.astype(float)
    of_layer = {str(layer): one for layer, one in cuts.items()} | {"never": whole}
    shares = drops(gates.records)
    chances = [(share, of_layer[layer]) for layer, share in shares.items()]
    return {
        "over_static": round(float((right - mixed).mean()), 4),
        "over_static_interval": gain_interval(right, mixed),
        "random": {
            "right": round(sum(share * float(one.right.mean()) for share, one in chances), 4),
            "prefill_over_gates": round(
                sum(share * one.seconds(_prefill) for share, one in chances)
                / gates.seconds(_prefill),
                4,
            ),
        },
    }


def mixture(
    points: Sequence[tuple[float, NDArray[np.float64]]], seconds: float
) -> NDArray[np.float64]:
    """Right answers ``[question]`` of the best mixture of two points ``(time, right answers)``
    that takes so long: on the upper hull of shares of right answers over times.

    >>> [float(right[0]) for right in [mixture([(1, np.zeros(1)), (3, np.ones(1))], 2)]]
    [0.5]
    """
    hull: list[tuple[float, NDArray[np.float64]]] = []
    for time_s, right in points:
        if hull and right.mean() <= hull[-1][1].mean():
            continue
        while len(hull) > 1:
            (first_s, first), (middle_s, middle) = hull[-2:]
            share = (middle_s - first_s) / (time_s - first_s)
            if middle.mean() > (1 - share) * first.mean() + share * right.mean():
                break
            hull.pop()
        hull.append((time_s, right))
    for (first_s, first), (second_s, second) in itertools.pairwise(hull):
        if seconds < second_s:
            share = max(0.0, (seconds - first_s) / (second_s - first_s))
            return (1 - share) * first + share * second
    return hull[-1][1]


def truncate_instead(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Case with exits -> what takes as little time (up to 2 % more) and is not surpassed by it:
    plain models, and random exits. The time is the one that the case is about (`TIMED`), the mean
    over results. A case surpasses another if the 95 % interval of the difference between their
    shares of right answers, over resampled questions of all results, is above 0."""
    rights = pooled(results)
    found: dict[str, list[str]] = {}
    for name, (kind, figure) in TIMED.items():
        rivals = [*results[0]["beside"], *(["random"] if name == "free" else [])]
        ratios = {
            one: np.mean([own["cases"][one][kind][figure] for own in results])
            for one in (name, *rivals)
        }
        found[name] = [
            rival
            for rival in rivals
            if ratios[rival] <= 1.02 * ratios[name]
            and gain_interval(rights[name], rights[rival])[0] <= 0
        ]
    return found


def pooled(results: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Case -> which answers are right, 1 or 0, ``[question]``: questions of all results."""
    found = {}
    for name in results[0]["wrong"]:
        of_each = [np.ones(own["questions"]["test"]) for own in results]
        for right, own in zip(of_each, results, strict=True):
            right[own["wrong"][name]] = 0
        found[name] = np.concatenate(of_each)
    return found


def gain_interval(right: NDArray[np.float64], other: NDArray[np.float64]) -> list[float]:
    """95 % interval of a difference between shares of right answers, over resampled questions."""
    shares = (right - other)[_draws(len(right))].mean(1)
    return [round(float(edge), 4) for edge in np.quantile(shares, [0.025, 0.975])]


def means(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Case -> its figures over results of several trainings: shares over all questions, and the
    means of times."""
    rights = pooled(results)
    best = max(("unsplit", *results[0]["beside"]), key=lambda name: float(rights[name].mean()))
    found: dict[str, dict[str, Any]] = {}
    for name, right in rights.items():
        own = [result["cases"][name] for result in results]
        found[name] = {
            "right": round(float(right.mean()), 4),
            "kept": round(kept(right, rights[best]), 4),
            "kept_interval": interval(right, rights[best]),
        }
        for kind in ("all", *data.KINDS):
            found[name][kind] = {
                figure: round(float(np.mean([one[kind][figure] for one in own])), 4)
                for figure in own[0][kind]
            }
    return found


def judge(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The required figures: means over results of several trainings, with each one's value."""
    of_each = [required(own["cases"], own["floor"], own["cuts"]) for own in results]
    found = []
    for rows in zip(*of_each, strict=True):
        (name, _, sign, _, _), *_ = rows
        value, must, aim = (float(np.mean([row[n] for row in rows])) for n in (1, 3, 4))
        found.append((name, value, sign, round(must, 4), round(aim, 4)))
    verdicts = verdict(found)
    if len(results) > 1:
        for one, rows in zip(verdicts, zip(*of_each, strict=True), strict=True):
            one["each"] = [round(row[1], 4) for row in rows]
    return verdicts


def required(
    cases: Mapping[str, Any], floor: float, cuts: Mapping[str, Any]
) -> list[tuple[str, float, str, float, float]]:
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
            "gates: right, less what static cuts answer in the same prefill time",
            cuts["over_static"],
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
