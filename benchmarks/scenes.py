"""Measures the exits of the scenes example on engines: adapters (FREE), gates (DyVTE), exits of the
tower, and all of them on one bundle, against the same model unsplit.

    python benchmarks/scenes.py -m local/scenes/exits
    python benchmarks/scenes.py -m local/scenes/exits --name seed-1
    python benchmarks/scenes.py -m local/scenes/exits --beside layers-8=local/scenes/8
    python benchmarks/scenes.py --summary seed-0 seed-1 seed-2
    python benchmarks/scenes.py -m local/scenes/exits --quick

Thresholds are chosen on scenes of the validation split, figures are of the test split. Every case
answers the same questions, taking turns with all others. `--beside` adds plain models, such as one
of fewer layers, that was trained the same way. benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from alternatives import exit_chances
from placement import asking_costs, oracle, placements
from results import HERE, RESULTS, SCRATCH, save, say
from scenefigures import (
    Answered,
    Questions,
    beside_cuts,
    data,
    figures_of,
    judge,
    means,
    totals,
    truncate_instead,
)
from thresholds import (
    LOST,
    MAIN,
    Rules,
    Thresholds,
    always_left,
    digest,
    exported,
    kept_choice,
    opened,
    trace_of_answers,
)

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS
from edgeexit.bundle.policy_file import rules_from_json, rules_to_json
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, take_turns
from edgeexit.measure.bench.vision_cases import layer_of
from edgeexit.measure.texts import Text
from edgeexit.runtime.engines.onnxruntime import available_cores

QUESTIONS = {"validation": 1600, "test": 360}
TOKEN_QUESTIONS = 800
"""Of the validation split, for thresholds of token exits: each question has many tokens."""
QUICK = 24
NEW_TOKENS, CAPACITY = Questions.new_tokens, 192
CLOSE = 1.1
"""A plain model takes part in its fastest thread setting and in those that take up to so many times
as long; the fastest in turns counts."""
TOWER = "vision"
Cases = dict[str, dict[str, dict[str, Any]]]


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, help="from examples/scenes")
    parser.add_argument("--name", default="", help="of the result: scenes-NAME")
    parser.add_argument("--exits", help="default: those of the checkpoint, as for the next")
    parser.add_argument("--gates", help="measured without exits of the language model")
    parser.add_argument("--both", metavar="GATES", help="measured with them; default: as --gates")
    parser.add_argument("--drops", default="4,5,6,7", help="layers of static cuts")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument(
        "--against", default="unsplit", help="the plain model of --beside that times refer to"
    )
    parser.add_argument(
        "--questions",
        type=lambda text: dict(zip(QUESTIONS, map(int, text.split(",")), strict=True)),
        default=QUESTIONS,
        metavar="VALIDATION,TEST",
    )
    parser.add_argument(
        "--test-seed", type=int, default=26, help="another one asks other questions of the test"
    )
    parser.add_argument("--most-steps", type=int, default=data.MOST_STEPS, help="that are asked")
    parser.add_argument("--summary", nargs="+", metavar="NAME", help="of results: their means")
    parser.add_argument("--place", action="store_true", help="only compare sets of exits")
    parser.add_argument("--choose", action="store_true", help="only export and choose thresholds")
    parser.add_argument(
        "--keep", action="store_true", help="reuse the bundles and thresholds of the last run"
    )
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.summary:
        return summarise(given.summary)
    if given.model is None:
        parser.error("give -m, a checkpoint, or --summary")
    folder = SCRATCH / ("scenes" + "-quick" * given.quick)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((given.model / "config.json").read_text())
    last = ["--exits", str(config["text_config"]["num_hidden_layers"])]
    exits = ["--exits", given.exits] if given.exits else []
    gates = ["--gates", given.gates] if given.gates else []
    bundles = {
        "tokens": [*exits, "--gates", "none"],
        "images": [*last, *gates],
        "both": [*exits, *(["--gates", given.both] if given.both else gates)],
    }
    drops = [int(layer) for layer in given.drops.split(",")]
    for layer in drops:  # each in a bundle of its own, since splits cost time
        bundles[f"cut_{layer}"] = [*last, "--gates", "none", "--drop-image-tokens", str(layer)]
    for name, options in bundles.items():
        exported(given.model, folder / name, options, keep=given.keep)
    beside = dict(one.split("=", 1) for one in given.beside)
    if given.against not in {"unsplit", *beside}:
        parser.error(f"--against {given.against}: --beside does not name it")
    for name, checkpoint in beside.items():
        exported(checkpoint, folder / name, [], keep=given.keep)
    count = {split: QUICK if given.quick else most for split, most in given.questions.items()}

    def questions(model: runtime.Model, split: str) -> Questions:
        seed = {"validation": 25, "test": given.test_seed}[split]
        return Questions(model, split, count[split], seed, given.most_steps)

    if given.place:
        with opened(folder / "tokens", CAPACITY) as model:
            known = questions(model, "validation").first(TOKEN_QUESTIONS).answered_right(model)
            return place(model, known, quick=given.quick)
    key = {"bundles": bundles, "weights": digest(given.model), "count": count}
    key |= {"seed": given.test_seed, "most_steps": given.most_steps}
    make = functools.partial(choose, folder, questions, other_gates=bool(given.both))
    choice = kept_choice(folder / "choice.json", key, make, keep=given.keep)
    if lacking := set(choice["gated"]) - set(drops):
        parser.error(f"--drops lacks layers of gates: {sorted(lacking)}")
    if given.choose:
        return
    rules = {name: rules_from_json(own) for name, own in choice["rules"].items()}
    with opened(folder / "tokens", CAPACITY) as model:
        asked = questions(model, "test")
    write_inputs(folder / "test.npz", [dict(text.row("tokens")) for text in asked.texts])
    watch = environment.Watch()
    result = {
        "questions": count | {"validation, right": choice["known"]},
        "test_seed": given.test_seed,
        "most_steps": given.most_steps,
        "beside": list(beside),
        "against": given.against,
        "checkpoints": {n: digest(c) for n, c in {"exits": given.model, **beside}.items()},
        "bundles": bundles,
        "lost": LOST,
        **{name: choice[name] for name in ("rules", "exits", "floor", "oracle")},
    }
    result |= measure(
        folder,
        asked,
        cases_of(rules, drops, choice["early"], list(choice["exits"]["tower"])),
        choice["early"],
        list(beside),
        given.against,
    )
    result["truncate_instead"] = truncate_instead([result])
    say(f"  truncate instead: {result['truncate_instead']}")
    result["verdicts"] = judge([result])
    machine = watch.stop(0.0)
    machine.pop("other_load_cores")
    result["environment"] = environment.describe() | {"machine": machine}
    save(f"scenes-{given.name}" if given.name else "scenes", result, quick=given.quick)


def choose(
    folder: Path, questions: Callable[[runtime.Model, str], Questions], *, other_gates: bool
) -> dict[str, Any]:
    """Rules of every case, and what was seen on the way; as JSON. With `other_gates` the bundle of
    everything has gates of its own."""
    with opened(folder / "tokens", CAPACITY) as model:
        everything = questions(model, "validation")
        known = everything.first(TOKEN_QUESTIONS).answered_right(model)
        tokens = Thresholds(model, everything, known)
        rules = {"free": tokens.of_tokens({}), "entropy": tokens.of_tokens({}, ("entropy",))}
        tokens.use({})
        asked = questions(model, "test")
        earliest = oracle(trace_of_answers(model, asked))
        early = [exit_.name for exit_ in model.exits[:-1]]
    with opened(folder / "images", CAPACITY) as model:
        images = Thresholds(model, everything, known)
        rules["tower"], rules["gates"] = images.of_answers({}, TOWER), images.of_answers({}, None)
        rules["tower_gates"] = images.of_answers(rules["tower"], None)
        floor = floor_of(model, asked.texts[:QUICK])
        gated = {layer_of(e.name) for e in model.chain.exits if e.path and e.action == "drop"}
    with opened(folder / "both", CAPACITY) as model:
        both = Thresholds(model, everything, known)
        before = {"gates_tokens": rules["gates"], "all": rules["tower_gates"]}
        if other_gates:
            before["gates_tokens"] = both.of_answers({}, None)
            before["all"] = both.of_answers(rules["tower"], None)
        rules |= {name: both.of_tokens(own) for name, own in before.items()}
    return {
        "rules": {name: rules_to_json(own) for name, own in rules.items()},
        "known": len(known.items),
        "exits": images.exits,
        "floor": floor,
        "oracle": earliest,
        "early": early,
        "gated": sorted(gated),
    }


def summarise(names: Sequence[str]) -> None:
    """Writes the means of results of several trainings, each of which answered other questions."""
    known = [json.loads((RESULTS / f"scenes-{name}.json").read_text()) for name in names]
    same = ("most_steps", "beside", "bundles", "lost")
    for key in same:
        assert all(own[key] == known[0][key] for own in known), f"results differ in {key}"
    assert len({own["test_seed"] for own in known}) == len(known), "the same questions"
    result = {"results": list(names)} | {key: known[0][key] for key in same}
    result |= {"cases": means(known), "truncate_instead": truncate_instead(known)}
    result["verdicts"] = judge(known)
    save("scenes", result, quick=False)


def place(model: runtime.Model, questions: Questions, *, quick: bool) -> None:
    """Compares sets of exits and writes a result."""
    watch = environment.Watch()
    trace = trace_of_answers(model, questions)
    prompts = [row[-8:] for row in (text.tokens for text in questions.texts[:6])]
    asking = asking_costs(model, prompts, NEW_TOKENS // 2)
    say(f"  evaluating an exit costs, in tokens through all layers: {asking}")
    found = placements(trace, asking, score="max_prob", changed=LOST)
    for one in found[:5]:
        say(f"  {one}")
    machine = watch.stop(0.0)
    machine.pop("other_load_cores")
    result = {
        "questions": len(questions.items),
        "asking_costs": asking,
        "most_answers_changed": LOST,
        "oracle": oracle(trace),
        "sets": found,
        "environment": environment.describe() | {"machine": machine},
    }
    save("scenes-placement", result, quick=quick)


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


def cases_of(
    rules: Mapping[str, Rules], drops: Sequence[int], early: Sequence[str], towers: Sequence[str]
) -> Cases:
    """Bundle -> name -> case of `peers.alternatives`."""

    def case(mode: str, rules: Rules, **more: Any) -> dict[str, Any]:
        return {"mode": mode, "rules": rules_to_json(rules), **more}

    always = {MAIN: runtime.Rule(thresholds=ALWAYS)}
    return {
        "tokens": {
            "full": case("full", {}),
            "free": case("fast", rules["free"]),
            "exact": case("exact", rules["free"]),
            "entropy": case("fast", rules["entropy"]),
            "patience": case("patience", always, patience=1),
            "random": case("random", always, chances=dict.fromkeys(early, 0.0)),
            "lookup": case("lookup", {}),
        },
        "images": {name: case("full", rules[name]) for name in ("tower", "gates", "tower_gates")}
        | {"whole": case("full", {})}
        | {f"tower_{layer_of(name)}": case("full", {TOWER: always_left(name)}) for name in towers},
        "both": {name: case("fast", rules[name]) for name in ("gates_tokens", "all")},
    } | {
        f"cut_{layer}": {
            f"static_{layer}": case(
                "full", {MAIN: runtime.Rule(thresholds={f"drop_{layer}": ALWAYS})}
            )
        }
        for layer in drops
    }


def measure(
    folder: Path,
    asked: Questions,
    cases: Cases,
    early: Sequence[str],
    beside: Sequence[str],
    against: str,
) -> dict[str, Any]:
    """Every case answers every question, taking turns; times refer to those of the plain model
    `against`."""
    own = {"new_tokens": NEW_TOKENS, "capacity": CAPACITY}
    prompts = str(folder / "test.npz")

    def chain(bundle: str, threads: Any) -> Side:
        options = own | {"bundle": str(folder / bundle), "prompts": prompts, "threads": threads}
        options["cases"] = cases[bundle]
        return Side("peers:alternatives", options, folder=str(HERE), name=bundle)

    def unsplit(bundle: str, threads: Any) -> Side:
        options = own | {"bundle": str(folder / bundle), "inputs": prompts, "threads": threads}
        return Side("edgeexit.measure.bench.cases:unsplit", options, name=bundle)

    if clash := {name for own in cases.values() for name in own} & {*beside}:
        raise SystemExit(f"--beside {min(clash)}: a case has that name; give the model another one")
    plain = {"unsplit": "tokens"} | {name: name for name in beside}
    searched: dict[str, Any] = {}

    def search(name: str, open_side: Callable[[Any], Side], case: str) -> list[Any]:
        """The fastest thread setting of a side alone, and those almost as fast."""
        tried = settings("cpu", available_cores())
        side, best, searched[name] = best_setting(open_side, case, tried)
        side.close()
        most = CLOSE * searched[name][str(best)]
        return [best, *(one for one in tried if one != best and searched[name][str(one)] <= most)]

    [of_chain, *_] = search("chain", functools.partial(chain, "tokens"), "full")
    threads = {n: search(n, functools.partial(unsplit, own), "unsplit") for n, own in plain.items()}
    say(f"  threads: chain {of_chain}, {threads}")
    numbers = list(range(len(asked.items)))
    with chain("tokens", of_chain) as first:
        free = Writer("free", first, "free")
        take_turns([free], numbers[:100])
    chances = exit_chances(totals(free.records, "exits"), early)
    cases["tokens"]["random"]["chances"] = chances
    with ExitStack() as stack:
        rivals: dict[str, list[Writer]] = {}
        for name, bundle in plain.items():
            for setting in threads[name]:
                side = stack.enter_context(unsplit(bundle, setting))
                rivals.setdefault(name, []).append(Writer(name, side, "unsplit", lead=True))
        writers = []
        for bundle, of_bundle in cases.items():
            side = stack.enter_context(chain(bundle, of_chain))
            writers += [Writer(name, side, name, lead=True) for name in of_bundle]
        take_turns([*(one for own in rivals.values() for one in own), *writers], numbers)
    settings_of_plain = [Answered(writer, asked) for writer in rivals[against]]
    for name, own in rivals.items():  # what is fastest alone need not be so in turns
        number = min(range(len(own)), key=lambda number: own[number].seconds())
        threads[name], rivals[name] = threads[name][number], [own[number]]
    found = {
        writer.name: Answered(writer, asked)
        for writer in (*(own for [own] in rivals.values()), *writers)
    }
    best = max((found[name] for name in plain), key=lambda one: float(one.right.mean()))
    figures = {n: figures_of(one, settings_of_plain, best, asked) for n, one in found.items()}
    for name, own_figures in figures.items():
        say(f"  {name}: {json.dumps(own_figures)}")
    statics = {layer_of(name): one for name, one in found.items() if name.startswith("static_")}
    compared = {
        "kept_of": best.name,
        "cuts": beside_cuts(found["gates"], statics, found["whole"]),
    }
    say(f"  {compared}")
    return {
        "threads": {"chain": of_chain} | threads,
        "threads_tried": searched,
        "random_chances": chances,
        "wrong": {name: np.flatnonzero(~one.right).tolist() for name, one in found.items()},
        "cases": figures,
    } | compared


if __name__ == "__main__":
    main()
