"""Measures the exits of the scenes example on engines: adapters (FREE), gates (DyVTE), exits of the
tower, and all of them on one bundle, against the same model unsplit.

    python benchmarks/scenes.py -m local/scenes/exits
    python benchmarks/scenes.py -m local/scenes/exits --name seed-1
    python benchmarks/scenes.py -m local/scenes/exits --quick

Thresholds are chosen on scenes of the validation split, figures are of the test split. Every case
answers the same questions, taking turns with all others. benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from alternatives import exit_chances
from numpy.typing import NDArray
from placement import TOKEN_RISKS, asking_costs, placements
from results import HERE, ROOT, SCRATCH, save, say, verdict

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS
from edgeexit.bundle.policy_file import rules_to_json
from edgeexit.errors import CheckError
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, take_turns
from edgeexit.measure.bench.vision_cases import layer_of
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.texts import Text, as_data
from edgeexit.measure.trace import Trace, record, replay
from edgeexit.measure.trace_answers import record_answers
from edgeexit.runtime.engines.onnxruntime import available_cores

EXAMPLE = ROOT / "examples" / "scenes"
sys.path.insert(0, str(EXAMPLE))
import data  # noqa: E402

QUESTIONS = {"validation": 600, "test": 600}
QUICK = 24
NEW_TOKENS, CAPACITY = 48, 192
KEPT = {"free": 0.99, "gates": 0.99, "tower_gates": 0.98, "all": 0.98}
"""Share of the right answers that a case must keep."""
CHANGED = {"free": 0.005, "tower": 0.007, "gates": 0.007}
"""Share of answers that thresholds may change on the validation split."""
SCORES = ("max_prob", "margin", "entropy")
MAIN, TOWER = "main", "vision"
Rules = dict[str, runtime.Rule]


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="from examples/scenes")
    parser.add_argument("--name", default="", help="of the result: scenes-NAME")
    parser.add_argument("--drops", default="2,3,4,5,6,8", help="layers of static cuts")
    parser.add_argument("--exits", help="default: all that the checkpoint has")
    parser.add_argument("--place", action="store_true", help="only compare sets of exits")
    parser.add_argument("--keep", action="store_true", help="reuse the bundle of the last run")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    folder = SCRATCH / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "edgeexit", "export", "-m", str(given.model)]
    command += ["--drop-image-tokens", given.drops, "--overwrite", "-o", str(folder / "bundle")]
    if given.exits:
        command += ["--exits", given.exits]
    if not (given.keep and (folder / "bundle").is_dir()):
        subprocess.run(command, check=True)
    count = {split: QUICK if given.quick else most for split, most in QUESTIONS.items()}
    with runtime.load(
        folder / "bundle", threads="process", capacity=CAPACITY, all_scores=True
    ) as model:
        questions = Questions(model, "validation", count["validation"], 11)
        if given.place:
            return place(model, questions, quick=given.quick)
        chosen = Thresholds(model, questions)
        asked = Questions(model, "test", count["test"], 12)
        floor = floor_of(model, asked.texts[:QUICK])
        early = [exit_.name for exit_ in model.exits[:-1]]
    write_inputs(folder / "test.npz", [dict(text.row("tokens")) for text in asked.texts])
    watch = environment.Watch()
    result = {"questions": count, "chosen": chosen.facts(), "floor": floor}
    result |= measure(folder, asked, chosen, [int(n) for n in given.drops.split(",")], early)
    result["verdicts"] = judge(result["cases"], result["floor"])
    machine = watch.stop(0.0)
    machine.pop("other_load_cores")
    result["environment"] = environment.describe() | {"machine": machine}
    save(f"scenes-{given.name}" if given.name else "scenes", result, quick=given.quick)


def place(model: runtime.Model, questions: Questions, *, quick: bool) -> None:
    """Compares sets of exits and writes a result."""
    watch = environment.Watch()
    trace = trace_of_answers(model, questions)
    prompts = [row[-8:] for row in (text.tokens for text in questions.texts[:6])]
    asking = asking_costs(model, prompts, NEW_TOKENS // 2)
    say(f"  evaluating an exit costs, in tokens through all layers: {asking}")
    found = placements(trace, asking, score="max_prob", changed=CHANGED["free"])
    for one in found[:5]:
        say(f"  {one}")
    machine = watch.stop(0.0)
    machine.pop("other_load_cores")
    result = {
        "questions": len(questions.items),
        "asking_costs": asking,
        "most_answers_changed": CHANGED["free"],
        "agreement": dict(
            zip(
                trace.exits,
                (trace.predictions == trace.predictions[-1]).mean(1).round(4).tolist(),
                strict=True,
            )
        ),
        "sets": found,
        "environment": environment.describe() | {"machine": machine},
    }
    save("scenes-placement", result, quick=quick)


def trace_of_answers(model: runtime.Model, questions: Questions) -> Trace:
    """What every exit says in the model's own answers, under its policy."""
    texts = []
    for text in questions.texts:
        made = model.generate(
            text.tokens, inputs=text.inputs, max_new_tokens=NEW_TOKENS, text=False
        )
        [written] = made.finish().tokens
        texts.append(Text([*text.tokens, *written], text.inputs, len(text.tokens)))
    return record(model, as_data(texts, model.bundle, "answers"), 1)


class Questions:
    """Questions about scenes of a split, as a bundle's inputs.

    Attributes:
        items: Questions with their pictures and answers; all kinds take turns.
        texts: Prompts.
        answers: Token ids of the right answers, the end included.
    """

    def __init__(self, model: runtime.Model, split: str, count: int, seed: int) -> None:
        self.items = data.items(split, count, seed)
        chats = [
            model.chat_prompt([{"role": "user", "content": f"<image>{item.question}"}])
            for item in self.items
        ]
        pictures = [[item.picture] for item in self.items]
        rows = [
            model.prompts_with_images([chat], [own])
            for chat, own in zip(chats, pictures, strict=True)
        ]
        self.texts = [Text(list(tokens), inputs) for [tokens], inputs in rows]
        self.answers = [
            model.encode(f"{item.answer} <|end|>", special_tokens=False) for item in self.items
        ]

    def right(self, written: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Which answers are right, word for word."""
        pairs = zip(written, self.answers, strict=True)
        return np.array([list(made) == answer for made, answer in pairs])

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        return np.array([item.kind == kind for item in self.items])


class Thresholds:
    """Rules for every case, chosen on the validation split by `trace` and `calibrate`."""

    def __init__(self, model: runtime.Model, questions: Questions) -> None:
        self._model, self._questions = model, questions
        model.policy = self._policy({})
        self.free = self._tokens({})
        self.entropy = self._tokens({}, scores=("entropy",))
        self.tower = self._answers({}, TOWER)
        self.gates = self._answers({}, None)
        self.tower_gates = self._answers(self.tower, None)
        self.all = self._tokens(self.tower_gates)

    def facts(self) -> dict[str, Any]:
        names = ("free", "entropy", "tower", "gates", "tower_gates", "all")
        return {name: rules_to_json(getattr(self, name)) for name in names}

    def _policy(self, rules: Rules) -> runtime.Policy:
        never = {name: runtime.Rule() for name in self._model.chains}
        return runtime.Policy(rules=never | rules)

    def _tokens(self, before: Rules, scores: Sequence[str] = SCORES) -> Rules:
        """Token exits behind the rules `before`: the fewest layers with which at most
        ``CHANGED["free"]`` of the answers change."""
        model = self._model
        model.policy = self._policy(before)
        trace = trace_of_answers(model, self._questions)
        best: tuple[float, Rules] = (np.inf, before)
        for score in scores:
            for risk in TOKEN_RISKS:
                try:
                    policy, _, _ = calibrate(trace, max_risk=risk, score=score, per_exit=True)
                except CheckError:
                    continue
                changed, layers = effect(trace, policy.rules[MAIN])
                if changed <= CHANGED["free"] and layers < best[0]:
                    best = (layers, before | policy.rules)
        say(f"  token exits: {best}")
        return best[1]

    def _answers(self, before: Rules, chain: str | None) -> Rules:
        """Exits of the tower, or gates (None), behind the rules `before`."""
        kind = "gates" if chain is None else "tower"
        self._model.policy = self._policy(before)
        trace = record_answers(
            self._model,
            self._questions.texts,
            name="questions",
            chain=chain,
            max_new_tokens=NEW_TOKENS,
        )
        [score] = trace.scores
        try:
            policy, _, _ = calibrate(trace, max_risk=CHANGED[kind], score=score, per_exit=True)
        except CheckError as error:
            say(f"  {kind}: {error}")
            return before
        shares = np.bincount(replay(trace, policy), minlength=len(trace.exits)) / trace.rows
        say(f"  {kind}: {dict(zip(trace.exits, shares.round(3).tolist(), strict=True))}")
        return before | policy.rules


def effect(trace: Trace, rule: runtime.Rule) -> tuple[float, float]:
    """The share of texts that a rule changes, and the mean layer of a token."""
    taken = replay(trace, rule)
    said = trace.predictions[taken, np.arange(trace.rows)]
    assert trace.groups is not None
    wrong = said != trace.predictions[-1]
    changed = len(np.unique(trace.groups[wrong])) / len(np.unique(trace.groups))
    layers = np.array([layer_of(name) for name in trace.exits])
    return changed, float(layers[taken].mean())


def floor_of(model: runtime.Model, texts: Sequence[Text]) -> float:
    """The share of the time to the first token that exits of the tower and gates cannot touch: all
    but the tower and what stands behind the first gate."""
    shares = []
    gates = [exit_.behind for exit_ in model.chain.exits if exit_.action == "drop" and exit_.path]
    first = 1 + min(model.chain.components.index(name) for name in gates)
    for text in texts:
        parts = model.segment_times(text.tokens, text.inputs)
        tower = sum(model.trace(text.inputs, chain=TOWER).times_ms)
        head, segments = parts[-1], parts[:-1]
        shares.append((sum(segments[:first]) + head) / (sum(parts) + tower))
    return round(float(np.median(shares)), 4)


def cases_of(chosen: Thresholds, drops: Sequence[int], chances: dict[str, float]) -> dict[str, Any]:
    """Name -> case of `peers.alternatives`."""

    def case(mode: str, rules: Rules, **more: Any) -> dict[str, Any]:
        return {"mode": mode, "rules": rules_to_json(rules), **more}

    always = {MAIN: runtime.Rule(thresholds=ALWAYS)}
    found = {
        "full": case("full", {}),
        "free": case("fast", chosen.free),
        "exact": case("exact", chosen.free),
        "entropy": case("fast", chosen.entropy),
        "patience": case("patience", always, patience=1),
        "random": case("random", always, chances=chances),
        "lookup": case("lookup", {}),
        "tower": case("full", chosen.tower),
        "gates": case("full", chosen.gates),
        "tower_gates": case("full", chosen.tower_gates),
        "all": case("fast", chosen.all),
    }
    for layer in drops:
        found[f"static_{layer}"] = case(
            "full", {MAIN: runtime.Rule(thresholds={f"drop_{layer}": ALWAYS})}
        )
    return found


def measure(
    folder: Path, asked: Questions, chosen: Thresholds, drops: Sequence[int], early: Sequence[str]
) -> dict[str, Any]:
    """Every case answers every question, taking turns."""
    own = {"prompts": str(folder / "test.npz"), "new_tokens": NEW_TOKENS, "capacity": CAPACITY}
    bundle = {"bundle": str(folder / "bundle")}

    def chain(threads: Any, chances: dict[str, float] | None = None) -> Side:
        cases = cases_of(chosen, drops, chances or dict.fromkeys(early, 0.0))
        options = own | bundle | {"cases": cases, "threads": threads}
        return Side("peers:alternatives", options, folder=str(HERE), name="chain")

    def unsplit(threads: Any) -> Side:
        options = bundle | {"inputs": own["prompts"], "threads": threads}
        options |= {"new_tokens": NEW_TOKENS, "capacity": CAPACITY}
        return Side("edgeexit.measure.bench.cases:unsplit", options, name="unsplit")

    tried = settings("cpu", available_cores())
    side, setting, chain_tried = best_setting(chain, "full", tried)
    side.close()
    side, plain_setting, plain_tried = best_setting(unsplit, "unsplit", tried)
    side.close()
    say(f"  threads: chain {setting}, unsplit {plain_setting}")
    numbers = list(range(len(asked.items)))
    with ExitStack() as stack:
        first = stack.enter_context(chain(setting))
        free = Writer("free", first, "free")
        take_turns([free], numbers[:100])
        chances = exit_chances(totals(free.records, "exits"), early)
        ours = stack.enter_context(chain(setting, chances))
        plain = stack.enter_context(unsplit(plain_setting))
        writers = [Writer("unsplit", plain, "unsplit")]
        writers += [Writer(name, ours, name) for name in cases_of(chosen, drops, chances)]
        for writer in writers:
            writer.side.run(writer.case, [0, 1], lead=False)
        take_turns(writers, numbers)
    figures = {writer.name: figures_of(writer, writers[0], asked) for writer in writers}
    for name, found in figures.items():
        say(f"  {name}: {json.dumps(found)}")
    return {
        "threads": {"chain": setting, "unsplit": plain_setting},
        "threads_tried": {"chain": chain_tried, "unsplit": plain_tried},
        "random_chances": chances,
        "cases": figures,
    }


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
    if writer is not plain:
        found |= {key: totals(records, key) for key in ("exits", "earlier")}
        found["mean_layer"] = depths(records, asked)
    return found


def times(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Ratios of summed times, a case's over the unsplit model's. Times per token are of answers
    that both wrote with more than one."""

    def ratio(values: list[tuple[float, float]]) -> float:
        ours, theirs = (sum(column) for column in zip(*values, strict=True))
        return round(ours / theirs, 4)

    long = [(a, b) for a, b in pairs if min(len(a["tokens"]), len(b["tokens"])) > 1]
    found = {
        "first_token": ratio([(a["first_token_s"], b["first_token_s"]) for a, b in pairs]),
        "prefill": ratio([(_prefill(a), _prefill(b)) for a, b in pairs]),
        "whole": ratio([tuple(r["first_token_s"] + r["decode_s"] for r in pair) for pair in pairs]),
    }
    if long:
        found["per_token"] = ratio(
            [tuple(r["decode_s"] / (len(r["tokens"]) - 1) for r in pair) for pair in long]
        )
    return found


def _prefill(record: dict[str, Any]) -> float:
    return float(record["first_token_s"] - record["earlier_s"])


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


def judge(cases: dict[str, Any], floor: float) -> list[dict[str, Any]]:
    """The required figures."""
    found = [
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
    return verdict(found)


if __name__ == "__main__":
    main()
