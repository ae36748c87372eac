"""Measures exits of a Whisper checkpoint's decoder (examples/whisper) against the same model
unsplit, transformers, and CTranslate2, the engine of faster-whisper.

    python benchmarks/whisper.py -m local/whisper/exits/checkpoint --original tiny-en
    python benchmarks/whisper.py -m CHECKPOINT --original CHECKPOINT --ctranslate2 FOLDER
    python benchmarks/whisper.py -m CHECKPOINT --original CHECKPOINT --quick

`-m` is a checkpoint with trained adapters, `--original` the one without, `--ctranslate2` the folder
that it was converted from. Figures are of the time behind the encoder, per word that is written;
all sides read the same features and take turns. The threshold of mode ``fast`` is chosen on other
sounds: the fewest layers with at most `MORE_ERRORS` more word errors. Speech is that of
examples/whisper/speech.py. Needs ``edgeexit[export]``, ctranslate2 and what that file needs.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from placement import oracle
from results import HERE, ROOT, SCRATCH, save, say, verdict
from thresholds import MAIN, Asked, digest, exported, opened, trace_of_answers

from edgeexit import runtime
from edgeexit.bundle.policy_file import rules_to_json
from edgeexit.errors import CheckError
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, take_turns, whole_s
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.texts import Text
from edgeexit.runtime.engines.onnxruntime import available_cores
from edgeexit.runtime.programs.sounds import audio_input, features_of, read_sounds

sys.path.insert(0, str(ROOT / "examples" / "whisper"))
from speech import RATE, Speech, read_aloud, spoken, word_errors, words

SOUNDS = {"validation": 24, "test": 24}
QUICK, CAPACITY = 4, 224
MORE_ERRORS = 0.003
"""Word error rate that mode ``fast`` may add."""
SEARCH_S = 4.0
"""Seconds for each thread setting; a sound takes up to two."""
RISKS = (0.05, 0.03, 0.02, 0.01, 0.005, 0.002)


class Sounds(Asked):
    """Sounds, as a bundle's inputs."""

    kinds, new_tokens = ("reader", "voices"), 200

    def __init__(self, model: runtime.Model, speech: Sequence[Speech]) -> None:
        preprocessing = audio_input(model.bundle)
        decoding = model.bundle.manifest.decoding
        assert decoding is not None
        start = [*decoding.start_tokens]
        texts = []
        for one in speech:
            [samples] = read_sounds(model.bundle, (one.samples, RATE))
            texts.append(Text(start, features_of(preprocessing, [samples]), len(start)))
        super().__init__(list(speech), texts, [[] for _ in speech])


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", required=True, help="with trained adapters")
    parser.add_argument("--original", required=True, help="the checkpoint without exits")
    parser.add_argument("--ctranslate2", help="the folder that it was converted from")
    parser.add_argument("--keep", action="store_true", help="reuse the bundle of the last run")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    folder = SCRATCH / "whisper"
    folder.mkdir(parents=True, exist_ok=True)
    exported(given.model, folder / "exits", [], keep=given.keep)
    count = dict.fromkeys(SOUNDS, QUICK) if given.quick else SOUNDS
    with opened(folder / "exits", CAPACITY) as model:
        known = Sounds(model, list(spoken(count["validation"], 1001)))
        asked = Sounds(model, [*read_aloud(), *spoken(count["test"], 2002)])
        rule, tried, earliest = choose(model, known)
        decode = functools.partial(_text, model)
        write_inputs(folder / "test.npz", [dict(text.row("tokens")) for text in asked.texts])
        watch = environment.Watch()
        result: dict[str, Any] = {
            "sounds": {"validation": len(known.texts), "test": len(asked.texts)},
            "checkpoints": {"exits": digest(given.model), "original": digest(given.original)},
            "rule": rules_to_json({MAIN: rule}),
            "thresholds_tried": tried,
            "oracle": earliest,
        }
        result |= measure(folder, asked, rule, given, decode)
    cases = result["cases"]
    result["verdicts"] = verdict(
        [
            ("exact: time behind the encoder", cases["exact"]["per_word"], "<=", 0.85, 0.65),
            ("exact: same tokens", cases["exact"]["same_tokens"], ">=", 1.0, 1.0),
            ("fast: time behind the encoder", cases["fast"]["per_word"], "<=", 0.75, 0.55),
            ("fast: word errors added", cases["fast"]["errors_added"], "<=", MORE_ERRORS, 0.0),
        ]
    )
    machine = watch.stop(0.0)
    machine.pop("other_load_cores")
    result["environment"] = environment.describe() | {"machine": machine}
    save("whisper", result, quick=given.quick)


def choose(
    model: runtime.Model, known: Sounds
) -> tuple[runtime.Rule, list[dict[str, float]], dict[str, Any]]:
    """The rule of mode ``fast`` that asks for the fewest layers with at most `MORE_ERRORS`."""
    trace = trace_of_answers(model, known)
    whole = errors_of(model, known, None)
    best, tried = runtime.Rule(), []
    for risk in RISKS:
        try:
            policy, _, _ = calibrate(trace, max_risk=risk, score="max_prob", per_exit=True)
        except CheckError:
            continue
        rule = policy.rules[MAIN]
        added = errors_of(model, known, rule) - whole
        tried.append({"risk": risk, "errors_added": round(added, 5)})
        say(f"  risk {risk}: {added:+.4f} word errors")
        if added <= MORE_ERRORS:
            best = rule
            break
    return best, tried, oracle(trace)


def errors_of(model: runtime.Model, asked: Sounds, rule: runtime.Rule | None) -> float:
    """Word error rate in mode ``full``, or in mode ``fast`` under a rule."""
    never = {name: runtime.Rule() for name in model.chains}
    model.policy = runtime.Policy(rules=never if rule is None else never | {MAIN: rule})
    wrong = said = 0
    for one, text in zip(asked.items, asked.texts, strict=True):
        made = model.generate(
            text.tokens,
            inputs=text.inputs,
            max_new_tokens=asked.new_tokens,
            mode="full" if rule is None else "fast",
        ).finish()
        errors, count = word_errors(one.text, made.texts[0])
        wrong, said = wrong + errors, said + count
    return wrong / said


def measure(
    folder: Path,
    asked: Sounds,
    rule: runtime.Rule,
    given: argparse.Namespace,
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """Every side transcribes every sound, taking turns."""
    own: dict[str, Any] = {"prompts": str(folder / "test.npz"), "new_tokens": asked.new_tokens}
    ours = own | {"bundle": str(folder / "exits"), "capacity": CAPACITY}
    cases = {
        "full": {"mode": "full"},
        "exact": {"mode": "exact"},
        "fast": {"mode": "fast", "rules": rules_to_json({MAIN: rule})},
    }

    def chain(threads: Any) -> Side:
        more = {"threads": threads, "cases": cases, "own_sampling": True}
        return Side("peers:alternatives", ours | more, folder=str(HERE), name="exits")

    def unsplit(threads: Any) -> Side:
        return Side("speechpeers:unsplit", ours | {"threads": threads}, folder=str(HERE))

    def peer(name: str, source: str, threads: Any) -> Side:
        options = own | {"folder": str(source), "threads": threads}
        return Side(f"speechpeers:{name}", options, folder=str(HERE), name=name)

    cores = available_cores()
    of_engine, counts = settings("cpu", cores), list(range(1, cores + 1))
    tried: dict[str, tuple[Callable[[Any], Side], list[Any]]] = {
        "unsplit": (unsplit, of_engine),
        "full": (chain, of_engine),
        "transformers": (functools.partial(peer, "transformers", given.original), counts),
    }
    if given.ctranslate2:
        tried["ctranslate2"] = functools.partial(peer, "ctranslate2", given.ctranslate2), counts
    threads = {}
    for case, (make, choices) in tried.items():
        side, threads[case], _ = best_setting(make, case, choices, seconds=SEARCH_S)
        side.close()
    say(f"  threads: {threads}")
    with ExitStack() as stack:
        writers = []
        for case, (make, _) in tried.items():
            side = stack.enter_context(make(threads[case]))
            names = list(cases) if case == "full" else [case]
            writers += [Writer(name, side, name, lead=True) for name in names]
        take_turns(writers, list(range(len(asked.texts))))
    found = {w.name: sorted(w.usual(), key=lambda record: int(record["prompt"])) for w in writers}
    figures = {
        name: figures_of(own_records, found["unsplit"], asked, decode)
        for name, own_records in found.items()
    }
    for name, one in figures.items():
        say(f"  {name}: {one}")
    return {"threads": threads, "cases": figures}


def figures_of(
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    asked: Sounds,
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """A case beside the unsplit model: time behind the encoder per written word, tokens that are
    the same, and word error rates by kind of sound."""

    def per_word(records: list[dict[str, Any]]) -> float:
        count = sum(len(words(decode(record["tokens"]))) for record in records)
        return sum(whole_s(record) - record["earlier_s"] for record in records) / count

    same = [one["tokens"] == other["tokens"] for one, other in zip(ours, theirs, strict=True)]
    found: dict[str, Any] = {
        "per_word": round(per_word(ours) / per_word(theirs), 4),
        "words_per_s": round(1 / per_word(ours), 2),
        "same_tokens": round(float(np.mean(same)), 4),
    }
    errors = {
        kind: (_errors(ours, asked, decode, kind), _errors(theirs, asked, decode, kind))
        for kind in ("all", *asked.kinds)
    }
    found["word_errors"] = {kind: round(one, 4) for kind, (one, _) in errors.items()}
    found["errors_added"] = round(errors["all"][0] - errors["all"][1], 5)
    if "exits" in ours[0]:
        totals: dict[str, int] = {}
        for record in ours:
            for name, number in record["exits"].items():
                totals[name] = totals.get(name, 0) + number
        found["exits"] = totals
        drafted = sum(record["drafted"] for record in ours)
        if drafted:
            accepted = sum(record["accepted"] for record in ours)
            found["accepted"] = round(accepted / drafted, 4)
    return found


def _errors(
    records: list[dict[str, Any]], asked: Sounds, decode: Callable[[list[int]], str], kind: str
) -> float:
    wrong = said = 0
    for record, one in zip(records, asked.items, strict=True):
        of = "reader" if one.kind == "reader" else "voices"
        if kind in ("all", of):
            errors, count = word_errors(one.text, decode(record["tokens"]))
            wrong, said = wrong + errors, said + count
    return wrong / max(said, 1)


def _text(model: runtime.Model, tokens: list[int]) -> str:
    return str(model._tokenizers().decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
