"""Measures MuE's exits on the entailment example: both encoders hand over early, and the decoder
stops early, against the same model unsplit.

    python benchmarks/entailment.py --task check -m CHECKPOINT --beside plain=CHECKPOINT ...
    python benchmarks/entailment.py --task read -m CHECKPOINT
    python benchmarks/entailment.py --task words -m CHECKPOINT    # the form that reads words
    python benchmarks/entailment.py --task check -m CHECKPOINT --quick

Tasks: statements that a picture entails or contradicts, captions of pictures, and questions about
scenes in words. Thresholds are chosen on the validation split for each task, figures are of the
test split. Every case answers the same questions, taking turns with all others. `--published` is a
checkpoint of MuE's published training; `-m` is trained with sampled hand-over. `--beside` are plain
models, trained the same way. benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from alternatives import exit_chances
from placement import oracle
from results import HERE, ROOT, SCRATCH, save, say, verdict
from scenefigures import Answered, figures_of, gain_interval, totals
from thresholds import (
    MAIN,
    SCORES,
    Asked,
    Rules,
    Thresholds,
    digest,
    exported,
    kept_choice,
    opened,
    trace_of_answers,
)  # fmt: skip

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS
from edgeexit.bundle.policy_file import rules_from_json, rules_to_json
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, take_turns
from edgeexit.measure.texts import Text
from edgeexit.runtime.engines.onnxruntime import available_cores
from edgeexit.runtime.text.tokenizer import encode_batch


def _example() -> Any:
    """The module examples/entailment/data.py; ``data`` is that of the scenes example here."""
    path = ROOT / "examples" / "entailment" / "data.py"
    found = importlib.util.spec_from_file_location("entailment_data", path)
    assert found is not None and found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


data = _example()

TASKS = {"check": ("check",), "read": ("read",), "words": ("walk", "go", "check", "rings")}
"""Task -> its kinds of questions."""
LOST = {"check": 0.005, "read": 0.03, "words": 0.005}
"""Task -> the share of answers that thresholds of one chain may lose on the validation split."""
FURTHER = 0.06
"""The same for the point where the paper stands in captions: 93.4 % kept."""
GOALS = {"check": (0.99, 0.75, 0.5), "read": (0.96, 0.7, 0.6), "words": (0.99, 0.75, 0.6)}
"""Task -> what must be kept, and must and aim of the time behind the tower."""
QUESTIONS = {"validation": 600, "test": 200}
QUICK, CAPACITY = 16, 64
SATURATION = "saturation"


class Statements(Asked):
    """Questions about scenes, in pictures or in words."""

    new_tokens = 40

    def __init__(self, model: runtime.Model, task: str, split: str, count: int, seed: int) -> None:
        self.kinds = TASKS[task]
        made = data.items(split, count, seed, self.kinds)
        decoding = model.bundle.manifest.decoding
        assert decoding is not None
        start = list(decoding.start_tokens)
        texts = []
        for item in made:
            if task == "words":
                said = f"{data.scenes.listing(item.scene)} : {item.question.text}"
                inputs = encode_batch(model.bundle, [said])
            else:
                _, inputs = model.prompts_with_images([item.question.text], [[item.picture]])
            texts.append(Text(start, inputs, len(start)))
        answers = [model.encode(item.question.answer, special_tokens=False) for item in made]
        super().__init__([item.question for item in made], texts, answers)


def main() -> None:
    """Measures a task and writes its result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("-m", "--model", required=True, help="trained with sampled hand-over")
    parser.add_argument("--published", help="a checkpoint of MuE's published training")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--exits", default="1,2,3,4", help="layers of the decoder")
    parser.add_argument("--encoder-exits", default="2,4", help="layers of each encoder")
    parser.add_argument("--questions", type=int, nargs=2, metavar=("VALIDATION", "TEST"))
    parser.add_argument("--choose", action="store_true", help="only export and choose thresholds")
    parser.add_argument(
        "--keep", action="store_true", help="reuse the bundles and thresholds of the last run"
    )
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    count = dict(zip(QUESTIONS, given.questions or QUESTIONS.values(), strict=True))
    if given.quick:
        count = dict.fromkeys(count, QUICK)
    folder = SCRATCH / (f"entailment-{given.task}" + "-quick" * given.quick)
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--exits", given.exits, "--encoder-exits", given.encoder_exits]
    if given.task != "words":
        options += ["--image-encoder-exits", given.encoder_exits]
    bundles = {"mue": given.model} | ({"published": given.published} if given.published else {})
    for name, checkpoint in bundles.items():
        exported(checkpoint, folder / name, options, keep=given.keep)
    beside = dict(one.split("=", 1) for one in given.beside)
    for name, checkpoint in beside.items():
        depth = json.loads((Path(checkpoint) / "config.json").read_text())
        layers = depth.get("text_config", depth)["decoder_layers"]
        exported(checkpoint, folder / name, ["--exits", str(layers - 1)], keep=given.keep)
    key = {"count": count, "weights": {name: digest(c) for name, c in bundles.items()}}
    choice = chosen(folder, given.task, key, keep=given.keep)
    if given.choose:
        return
    rules = {
        bundle: {name: rules_from_json(one) for name, one in own.items()}
        for bundle, own in choice["rules"].items()
    }
    watch = environment.Watch()
    result: dict[str, Any] = {
        "task": given.task,
        "kinds": TASKS[given.task],
        "questions": count | {"validation, right": choice["known"]},
        "bundles": dict.fromkeys(bundles, options),
        "beside": list(beside),
        "checkpoints": {name: digest(c) for name, c in {**bundles, **beside}.items()},
        "lost": LOST[given.task],
        "rules": {b: {n: rules_to_json(r) for n, r in own.items()} for b, own in rules.items()},
        "oracle": choice["oracle"],
        "floor": choice["floor"],
    }
    asked = {}
    for name in (*bundles, *beside):  # each encodes questions its own way
        with opened(folder / name, CAPACITY) as model:
            asked[name] = Statements(model, given.task, "test", count["test"], 26)
        rows = [dict(text.row("tokens")) for text in asked[name].texts]
        write_inputs(prompts_of(folder, name), rows)
    early = choice["early"]
    result |= measure(folder, asked["mue"], cases_of(rules, early), early, list(beside))
    kept, must, aim = GOALS[given.task]
    mue = result["cases"]["mue"]
    behind_tower = mue["all"]["behind_tower"]
    result["verdicts"] = verdict(
        [
            ("mue: kept", mue["kept"], ">=", kept, 1.0),
            ("mue: time of whole answers behind the tower", behind_tower, "<=", must, aim),
        ]
    )
    machine = watch.stop(0.0)
    machine.pop("other_load_cores")
    result["environment"] = environment.describe() | {"machine": machine}
    save(f"entailment-{given.task}", result, quick=given.quick)


def prompts_of(folder: Path, bundle: str) -> Path:
    """Where the test split's questions are, as a bundle takes them."""
    return folder / f"test-{bundle}.npz"


def chosen(folder: Path, task: str, key: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """The rules of every bundle, as JSON, and what was seen on the way; chosen, or those of the
    last run where they are to be kept and are of the same weights and questions."""

    def make() -> dict[str, Any]:
        made: dict[str, Any] = {"rules": {}}
        count = key["count"]
        for bundle in key["weights"]:
            with opened(folder / bundle, CAPACITY) as model:
                asked = Statements(model, task, "test", count["test"], 26)
                every = bundle == "mue"
                known, rules, earliest, floor = choose(
                    model, task, count["validation"], asked, every=every
                )
                early = [exit_.name for exit_ in model.exits[:-1]]
            if bundle == "mue":
                made |= {"known": known, "oracle": earliest, "floor": floor, "early": early}
            else:
                rules = {bundle: rules["mue"]}
            made["rules"][bundle] = {name: rules_to_json(own) for name, own in rules.items()}
        return made

    return kept_choice(folder / "choice.json", key, make, keep=keep)


def choose(
    model: runtime.Model, task: str, validation: int, asked: Statements, *, every: bool
) -> tuple[int, dict[str, Rules], dict[str, Any], float]:
    """Chooses rules: MuE's, by saturation alone; by whatever score needs the fewest layers; further
    on in captions; and DeeBERT's, by entropy. Without `every`, MuE's alone.

    Returns:
        How many questions the whole model answers right, name -> rules, the oracle of tokens, and
        the floor: the tower's share of the time of whole answers.
    """
    everything = Statements(model, task, "validation", validation, 25)
    known = everything.answered_right(model)
    say(f"  {len(known.items)} of {validation} right")
    encoders = [name for name in model.chains if name.endswith("encoder")]
    earliest = oracle(trace_of_answers(model, known.first(200)))
    found: dict[str, Rules] = {}
    points = {"mue": LOST[task]} | ({"further": FURTHER} if task == "read" and every else {})
    for name, lost in points.items():
        chooser = Thresholds(model, everything, known, lost=lost)
        handed: Rules = {}
        for chain in encoders:
            handed = chooser.of_answers(handed, chain)
        found[name] = chooser.of_tokens(handed, (SATURATION,))
        if name == "mue" and every:
            found["encoders"] = handed
            found["best"] = chooser.of_tokens(handed, (SATURATION, *SCORES))
            found["entropy"] = chooser.of_tokens({}, ("entropy",))
    chooser.use({})
    shares = []
    for text in asked.texts[:QUICK]:
        made = model.generate(
            text.tokens, inputs=text.inputs, max_new_tokens=asked.new_tokens, text=False
        ).finish()
        whole = made.first_token_s + made.decode_s
        shares.append(made.chains_s.get("vision", 0.0) / whole)
        model.features.clear()
    return len(known.items), found, earliest, round(float(np.median(shares)), 4)


def cases_of(
    rules: dict[str, dict[str, Rules]], early: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Bundle -> name -> case of `peers.alternatives`."""

    def case(mode: str, rules: Rules, **more: Any) -> dict[str, Any]:
        return {"mode": mode, "rules": rules_to_json(rules), **more}

    own = rules["mue"]
    handed = own["encoders"]
    always = {MAIN: runtime.Rule(thresholds=ALWAYS)}
    steps = runtime.Schedule(length=Statements.new_tokens + 1, temperature=1, warm_up=1 / 3)
    paper = own["mue"] | {MAIN: msgspec.structs.replace(own["mue"][MAIN], schedule=steps)}
    cases = {
        "mue": {
            "full": case("full", {}),
            "exact": case("exact", {}),
            "encoders": case("full", handed),
            "decoder": case("fast", {MAIN: own["mue"][MAIN]}),
            "mue": case("fast", own["mue"]),
            "schedule": case("fast", paper),
            "best": case("fast", own["best"]),
            "entropy": case("fast", own["entropy"]),
            "patience": case("patience", always, patience=1),
            "random": case("random", handed | always, chances=dict.fromkeys(early, 0.0)),
            "project": case("approximate", own["mue"]),
            "copied": case("copied", own["mue"]),
            "missing": case("missing", own["mue"]),
        }
    }
    if "further" in own:
        cases["mue"]["further"] = case("fast", own["further"])
    if "published" in rules:
        cases["published"] = {"published": case("fast", rules["published"]["published"])}
    return cases


def measure(
    folder: Path,
    asked: Statements,
    cases: dict[str, dict[str, dict[str, Any]]],
    early: Sequence[str],
    beside: Sequence[str],
) -> dict[str, Any]:
    """Every case answers every question, taking turns."""
    own = {"new_tokens": Statements.new_tokens, "capacity": CAPACITY}

    def chain(bundle: str, threads: Any) -> Side:
        options = own | {"bundle": str(folder / bundle), "threads": threads}
        options |= {"prompts": str(prompts_of(folder, bundle)), "cases": cases[bundle]}
        return Side("peers:alternatives", options, folder=str(HERE), name=bundle)

    def unsplit(bundle: str, threads: Any) -> Side:
        options = own | {"bundle": str(folder / bundle), "threads": threads}
        options["inputs"] = str(prompts_of(folder, bundle))
        return Side("edgeexit.measure.bench.cases:unsplit", options, name=bundle)

    def fastest(open_side: Callable[[Any], Side], case: str) -> Any:
        side, best, _ = best_setting(open_side, case, settings("cpu", available_cores()))
        side.close()
        return best

    plain = {"unsplit": "mue"} | {name: name for name in beside}
    threads = {n: fastest(functools.partial(unsplit, b), "unsplit") for n, b in plain.items()}
    of_chain = fastest(functools.partial(chain, "mue"), "full")
    say(f"  threads: chain {of_chain}, {threads}")
    numbers = list(range(len(asked.items)))
    with chain("mue", of_chain) as first:
        stopping = Writer("mue", first, "mue")
        take_turns([stopping], numbers[:60])
    chances = exit_chances(totals(stopping.records, "exits"), early)
    cases["mue"]["random"]["chances"] = chances
    with ExitStack() as stack:
        writers = [
            Writer(name, stack.enter_context(unsplit(bundle, threads[name])), "unsplit", lead=True)
            for name, bundle in plain.items()
        ]
        for bundle, of_bundle in cases.items():
            side = stack.enter_context(chain(bundle, of_chain))
            writers += [Writer(name, side, name, lead=True) for name in of_bundle]
        take_turns(writers, numbers)
    found = {writer.name: Answered(writer, asked) for writer in writers}
    best = max((found[name] for name in plain), key=lambda one: float(one.right.mean()))
    figures = {n: figures_of(one, [found["unsplit"]], best, asked) for n, one in found.items()}
    for name, own_figures in figures.items():
        say(f"  {name}: {json.dumps(own_figures)}")
    rights = {name: one.right.astype(float) for name, one in found.items()}
    return {
        "threads": {"chain": of_chain} | threads,
        "random_chances": chances,
        "kept_of": best.name,
        "wrong": {name: np.flatnonzero(~one.right).tolist() for name, one in found.items()},
        "truncate_instead": [
            name
            for name in (*beside, "random")
            if figures[name]["all"]["whole"] <= 1.02 * figures["mue"]["all"]["whole"]
            and gain_interval(rights["mue"], rights[name])[0] <= 0
        ],
        "cases": figures,
    }


if __name__ == "__main__":
    main()
