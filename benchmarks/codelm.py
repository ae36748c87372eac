"""Measures the gain of exits in a language model: the codelm example on prompts from unseen files.

    python benchmarks/codelm.py            # the trained checkpoint of examples/codelm
    python benchmarks/codelm.py --quick    # few prompts
    python benchmarks/codelm.py --checkpoint local/codelm/free --name free    # with adapters (FREE)
    python benchmarks/codelm.py --keep --only quality    # after training more truncated-N models

All modes continue the same 50 prompts, in turns. benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from results import HERE, RESULTS, ROOT, SCRATCH, save, say, verdict

from edgeexit import runtime
from edgeexit.bundle.policy import ALWAYS, OUT_OF_REACH, decide
from edgeexit.bundle.policy_file import rules_to_json
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, differences, summary, take_turns
from edgeexit.runtime.engines.onnxruntime import available_cores
from edgeexit.runtime.executor.blocks import Block
from edgeexit.runtime.executor.head import Head
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.programs.modes.early import Approximate, Fast
from edgeexit.runtime.programs.modes.full import Full, Mode

EXAMPLE = ROOT / "examples" / "codelm"
sys.path.insert(0, str(EXAMPLE))
import data  # noqa: E402
from alternatives import Copied, Missing, Random, exit_chances  # noqa: E402
from placement import asking_costs  # noqa: E402

PARTS = ("speeds", "quality", "exactness")
PROMPTS, NEW_TOKENS, CAPACITY = 50, 128, 512
ROUNDS = 3
"""Turns per mode and prompt; the turn with the median time is used."""

PEER_DRAFTS = [2, 4, 6, 8, 12]
"""Draft lengths to try with transformers, besides its default, at its fastest exit."""
PEER_PROMPTS = 6

CHOOSING_PROMPTS, ASKING_PROMPTS = 40, 6
AGREEMENT, AIMED_AGREEMENT = 0.95, 0.96
"""Agreement of early exits' tokens with the last exit: the required value, and the value for which
thresholds are chosen on other prompts."""

INEXACT = ("approximate", "copied", "missing")
"""Modes whose deeper layers lack the tokens that left earlier. They need exits without adapters,
whose states would lack these tokens, too."""
PASSAGES, PASSAGE_TOKENS, LEAD_TOKENS = 40, 160, 32


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=EXAMPLE / "checkpoint")
    parser.add_argument("--exits", help="default: those of the checkpoint")
    parser.add_argument("--name", default="", help="of the result: codelm-NAME")
    parser.add_argument(
        "--truncated", type=Path, default=ROOT / "local/codelm", help="folder with truncated-N"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", action="store_true", help="reuse the bundle of the last run")
    parser.add_argument("--turns", type=int, default=ROUNDS, help="turns per prompt")
    parser.add_argument(
        "--only", choices=[*PARTS, "smaller"], help="measure only this part, keep the others"
    )
    given = parser.parse_args()
    if given.quick and given.only:
        parser.error("--only needs a complete earlier result, so it excludes --quick")
    count = 4 if given.quick else PROMPTS
    result_name = f"codelm-{given.name}" if given.name else "codelm"
    folder = SCRATCH / result_name
    folder.mkdir(parents=True, exist_ok=True)
    bundle, tokenizer = folder / "bundle", given.checkpoint / "tokenizer.json"
    if not (given.keep and bundle.is_dir()):
        command = ["export", "-m", str(given.checkpoint), "-o", str(bundle), "--overwrite"]
        command += ["--exits", given.exits] if given.exits else []
        subprocess.run([sys.executable, "-m", "edgeexit", *command], check=True)
    rows = data.prompts("test", tokenizer, count)
    write_inputs(folder / "prompts.npz", [{"tokens": np.array(row)} for row in rows])
    training = json.loads((given.checkpoint / "training.json").read_text())
    if given.only:
        result = json.loads((RESULTS / f"{result_name}.json").read_text())
        if result["training"] != training:
            sys.exit("the last result is of another checkpoint: measure all parts")
        result.pop("verdicts", None)
        chosen = result["chosen"]
    else:
        chosen, asking = choose(
            bundle, data.prompts("train", tokenizer, 4 if given.quick else CHOOSING_PROMPTS, seed=1)
        )
        result = {
            "prompts": count,
            "prompt_tokens": [min(map(len, rows)), max(map(len, rows))],
            "new_tokens": NEW_TOKENS,
            "training": training,
            "chosen": chosen,
            "asking_costs": asking,
        }
    say(f"  chosen: {chosen}")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "speeds": lambda: speeds(
            folder, given.checkpoint, given.truncated, count, chosen, given.turns
        ),
        "smaller": lambda: smaller(folder, given.truncated, count, chosen, given.turns),
        "quality": lambda: quality(bundle, given.truncated, tokenizer, chosen, given.quick),
        "exactness": lambda: exactness(bundle, rows),
    }
    for name in [given.only] if given.only else PARTS:
        watch = environment.Watch()
        found = parts[name]()
        machine = watch.stop(0.0)
        machine.pop("other_load_cores")
        result[name] = found | {"environment": environment.describe() | {"machine": machine}}
        if set(PARTS) <= result.keys():
            result["verdicts"] = judge(result)
        save(result_name, result, quick=given.quick)


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The required figures."""
    modes, peers = result["speeds"]["modes"], result["speeds"]["transformers"]
    exact, early = modes["exact"]["total_tokens_per_s"], peers["early_exit"]["total_tokens_per_s"]
    ours = exact / modes["full"]["total_tokens_per_s"]
    theirs = early / peers["plain"]["total_tokens_per_s"]
    of_all = modes["audit_loose"]["agreement_of_all_tokens"]
    own = modes["audit"].get("agreement")  # missing: no token left early
    of_early = [] if own is None else [own]
    return verdict(
        [
            ("exact ÷ full", modes["exact"]["of_full"], ">=", 1.4, 1.7),
            ("exact ÷ full, prompts included", ours, ">=", 1.4, 1.7),
            ("exact ÷ transformers' early exit", exact / early, ">=", 3, 3),
            ("gain of self-speculation ÷ transformers'", ours / theirs, ">=", 1, 1),
            ("fast ÷ full", modes["fast"]["of_full"], ">=", 1.5, 2.2),
            *(("agreement of fast", one, ">=", AGREEMENT, AGREEMENT) for one in of_early),
            ("fast ÷ full, 95 % of all tokens", modes["fast_loose"]["of_full"], ">=", 1.5, 2.2),
            ("agreement of all its tokens", of_all, ">=", AGREEMENT, AGREEMENT),
            ("texts that exact changed", result["exactness"]["wrong"], "<=", 0, 0),
        ]
    )


def choose(
    bundle: Path, prompts: list[list[int]]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Score, exits and thresholds with which `fast` should be fastest, if its early tokens
    (``strict``) or all its tokens (``loose``) agree with the last exit often enough. Chosen on
    prompts of the training split.

    Caches are exact in this mode, so an exit's answer does not depend on earlier exits. The model's
    continuations are therefore written once, with every exit evaluated at every token, and every
    choice of thresholds is replayed on this data. Its cost is the layers that a token needs plus
    the measured cost of evaluating exits; catching up costs a tenth per row.

    Returns:
        The choices, and the cost of evaluating each early exit (`asking_costs`), by its name.
    """
    with runtime.load(bundle, threads="process", capacity=CAPACITY) as model:
        names = [exit_.name for exit_ in model.exits]
        layers = [int(name.rpartition("_")[2]) for name in names]
        said, scores = ask_everywhere(model, prompts)
        asked = asking_costs(model, prompts[:ASKING_PROMPTS], NEW_TOKENS // 2)
    best: dict[str, dict[str, Any]] = {
        kind: {"cost": np.inf} for kind in ("agreement", "agreement_of_all_tokens")
    }
    for score, values in scores.items():
        quantiles = np.quantile(values, np.linspace(0.05, 0.95, 16), axis=1).T
        limits = [[np.inf, *row] for row in quantiles[:-1]]
        for thresholds in itertools.product(*limits):
            found = replay(said, values, thresholds, layers, list(asked.values()))
            for kind, known in best.items():
                if found[kind] < AIMED_AGREEMENT or found["cost"] >= known["cost"]:
                    continue
                chosen = {
                    name: round(float(limit), 6)
                    for name, limit in zip(names, thresholds, strict=False)
                    if limit != np.inf
                }
                rounded = {key: round(value, 4) for key, value in found.items()}
                best[kind] = {"score": score, "thresholds": chosen, **rounded}
    chosen = {"strict": best["agreement"], "loose": best["agreement_of_all_tokens"]}
    return chosen, asked


def ask_everywhere(
    model: runtime.Model, prompts: list[list[int]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every exit's answer at every token of the model's own continuations.

    Returns:
        Tokens ``[exits, places]`` and scores ``[exits, places]`` by name.
    """
    said: list[list[np.ndarray]] = [[] for _ in model.exits]
    scores: dict[str, list[list[np.ndarray]]] = {
        name: [[] for _ in model.exits] for name in ("max_prob", "margin", "entropy")
    }
    for prompt in prompts:
        made = model.generate(prompt, max_new_tokens=NEW_TOKENS, text=False, reuse=False).finish()
        session = model.session(1)
        for number, states in enumerate(all_states(session, [*prompt, *made.tokens[0]])):
            answers = session.head(number, scores)(states[len(prompt) - 1 : -1])
            said[number].append(answers["token"].copy())
            for name, found in scores.items():
                found[number].append(answers[name].copy())
    tokens = np.array([np.concatenate(one) for one in said])
    return tokens, {
        name: np.array([np.concatenate(one) for one in found]) for name, found in scores.items()
    }


def replay(
    said: np.ndarray,
    values: np.ndarray,
    thresholds: tuple[float, ...],
    layers: list[int],
    asking: list[float],
) -> dict[str, float]:
    """Agreement of early tokens with the last exit, the share of early tokens, and the mean cost of
    a token relative to all layers and the last exit's head."""
    places = said.shape[1]
    undecided = np.ones(places, bool)
    agreed = early = 0
    cost = 0.0
    before = 0
    for number, layer in enumerate(layers):
        share = (layer - before) / layers[-1]
        before = layer
        cost += share * (undecided.sum() + 0.1 * (places - undecided.sum()))
        final = number == len(layers) - 1
        if not final and thresholds[number] == np.inf:
            continue
        if not final:
            cost += asking[number] * undecided.sum()
            fires = undecided & (values[number] >= thresholds[number])
            early += int(fires.sum())
            agreed += int((said[number] == said[-1])[fires].sum())
            undecided &= ~fires
    return {
        "agreement": agreed / early if early else 1.0,
        "agreement_of_all_tokens": 1 - (early - agreed) / places,
        "early": early / places,
        "cost": float(cost / places),
    }


def speeds(
    folder: Path,
    checkpoint: Path,
    truncated: Path,
    count: int,
    chosen: dict[str, Any],
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Measures all modes, on all prompts in turns; models with fewer layers are plain graphs."""
    common = {"prompts": str(folder / "prompts.npz"), "new_tokens": NEW_TOKENS}
    early = early_exits(folder)
    layers = [int(name.removeprefix("exit_")) for name in early]
    chain = functools.partial(chain_side, folder, chosen)

    def peer(threads: int) -> Side:
        own = {"checkpoint": str(checkpoint), "threads": threads}
        own |= {"early_exits": layers, "drafts": PEER_DRAFTS}
        subject = "peers:transformers_generate"
        return Side(subject, common | own, folder=str(HERE), name="transformers")

    side, setting, tried = best_setting(chain, "full", settings("cpu", available_cores()))
    side.close()
    say(f"  chain: threads {setting} {tried}")
    side, peer_setting, peer_tried = best_setting(peer, "plain", [1, available_cores()])
    side.close()
    say(f"  transformers: threads {peer_setting} {peer_tried}")
    numbers = list(range(count))
    with ExitStack() as stack:
        # The measured exit rates give the probabilities of random exits.
        first = stack.enter_context(chain(setting))
        audit = Writer("audit", first, "audit")
        loose = Writer("audit_loose", first, "audit_loose")
        take_turns([audit, loose], numbers)
        chances = exit_chances(summary(audit)["exits"], early)
        ours = stack.enter_context(chain(setting, chances))
        theirs = stack.enter_context(peer(peer_setting))
        names = [
            "full",
            "exact",
            "fast",
            "fast_loose",
            "lookup",
            *inexact(open_bundle(folder / "bundle")),
            "random",
        ]
        writers = [Writer(name, ours, name) for name in names]
        writers += truncated_writers(stack, truncated, folder, setting)
        drafts, drafts_tried = best_drafts(theirs, layers, numbers[:PEER_PROMPTS])
        say(f"  transformers: {drafts} {drafts_tried}")
        peers = [
            Writer("plain", theirs, "plain"),
            Writer("early_exit", theirs, drafts),
            Writer("early_exit as set up", theirs, f"early_exit_{layers[0]}"),
        ]
        for writer in [*writers, *peers]:
            writer.side.run(writer.case, [0], lead=False)
        take_turns([*writers, *peers], numbers)
        for _ in range(1, rounds):
            take_turns([*writers, *peers[:2]], numbers)
    full = writers[0]
    rate = full.total_tokens_per_s()
    modes = {}
    for writer in writers:
        modes[writer.name] = {
            **summary(writer),
            "of_full": round(writer.total_tokens_per_s() / rate, 4),
            "total_tokens_per_s": whole_rate(writer),
            "texts_that_differ_from_full": differences(writer, full),
        }
        say(f"  {writer.name}: {modes[writer.name]}")
    modes["audit"], modes["audit_loose"] = summary(audit), summary(loose)
    found: dict[str, Any] = {
        "turns_on_every_prompt": rounds,
        "threads": {"chain": setting, "transformers": peer_setting},
        "threads_tried": {"chain": tried, "transformers": peer_tried},
        "modes": modes,
        "random_chances": chances,
        "transformers": {"drafts": drafts, "drafts_tried": drafts_tried},
    }
    for writer in peers:
        found["transformers"][writer.name] = {
            "total_tokens_per_s": whole_rate(writer),
            "texts_that_differ_from_full": differences(writer, full),
        }
        say(f"  transformers {writer.name}: {found['transformers'][writer.name]}")
    return found


def inexact(bundle: Bundle) -> Sequence[str]:
    """The modes of `INEXACT`, if the bundle can run them."""
    adapters = any(len(exit_.path) > 1 for exit_ in bundle.manifest.last_chain.stops)
    return () if adapters else INEXACT


def early_exits(folder: Path) -> list[str]:
    """Names of the bundle's exits except the last."""
    return [exit_.name for exit_ in open_bundle(folder / "bundle").manifest.last_chain.stops[:-1]]


def chain_side(
    folder: Path, chosen: dict[str, Any], threads: Any, chances: dict[str, float] | None = None
) -> Side:
    """The bundle in its own process, with all modes and alternatives. ``random`` uses `chances`;
    ``audit`` and ``audit_loose`` also count agreement."""
    names = early_exits(folder)

    def rules(kind: str) -> dict[str, Any]:
        found = chosen[kind]
        own = {name: found["thresholds"].get(name, OUT_OF_REACH) for name in names}
        return rules_to_json({"main": runtime.Rule(thresholds=own, score=found["score"])})

    strict, loose = rules("strict"), rules("loose")
    cases = {
        mode: {"mode": mode, "rules": strict}
        for mode in ("full", "exact", "fast", *inexact(open_bundle(folder / "bundle")))
    }
    always = rules_to_json({"main": runtime.Rule(thresholds=ALWAYS)})
    cases["lookup"] = {"mode": "lookup"}
    cases["random"] = {
        "mode": "random",
        "rules": always,
        "chances": chances or dict.fromkeys(names, 0.0),
    }
    cases["fast_loose"] = {"mode": "fast", "rules": loose}
    cases["audit"] = {"mode": "fast", "rules": strict, "audit": True}
    cases["audit_loose"] = {"mode": "fast", "rules": loose, "audit": True}
    own = {
        "bundle": str(folder / "bundle"),
        "prompts": str(folder / "prompts.npz"),
        "new_tokens": NEW_TOKENS,
        "capacity": CAPACITY,
        "cases": cases,
        "threads": threads,
    }
    return Side("peers:alternatives", own, folder=str(HERE), name="chain")


def truncated_writers(
    stack: ExitStack, truncated: Path, folder: Path, threads: Any
) -> list[Writer]:
    """Models with fewer layers, each as a plain graph in its own process."""
    writers = []
    for depth, plain in truncated_bundles(truncated, folder).items():
        own = {
            "bundle": str(plain),
            "inputs": str(folder / "prompts.npz"),
            "new_tokens": NEW_TOKENS,
            "capacity": CAPACITY,
            "threads": threads,
        }
        made = Side("edgeexit.measure.bench.cases:unsplit", own, name="truncated")
        writers.append(Writer(f"truncated_{depth}", stack.enter_context(made), "unsplit"))
    return writers


def smaller(
    folder: Path, truncated: Path, count: int, chosen: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Measures only the models with fewer layers against the chain, as `speeds` does."""
    chain = functools.partial(chain_side, folder, chosen)
    side, setting, tried = best_setting(chain, "full", settings("cpu", available_cores()))
    side.close()
    say(f"  chain: threads {setting} {tried}")
    with ExitStack() as stack:
        ours = stack.enter_context(chain(setting))
        writers = [Writer(name, ours, name) for name in ("full", "exact", "fast")]
        writers += truncated_writers(stack, truncated, folder, setting)
        for writer in writers:
            writer.side.run(writer.case, [0], lead=False)
        for _ in range(rounds):
            take_turns(writers, list(range(count)))
    rate = writers[0].total_tokens_per_s()
    modes = {}
    for writer in writers:
        ratio = round(writer.total_tokens_per_s() / rate, 4)
        modes[writer.name] = {**summary(writer), "of_full": ratio}
        say(f"  {writer.name}: {modes[writer.name]}")
    return {"turns_on_every_prompt": rounds, "threads": setting, "modes": modes}


def truncated_models(where: Path) -> dict[int, Path]:
    """Models with fewer layers: number of layers -> checkpoint."""
    found = {}
    for facts in sorted(where.glob("truncated-*/training.json")):
        found[json.loads(facts.read_text())["layers"]] = facts.parent
    return found


def truncated_bundles(where: Path, folder: Path) -> dict[int, Path]:
    """The same models as bundles, whose unsplit graph is used."""
    found = {}
    for layers, checkpoint in truncated_models(where).items():
        found[layers] = folder / f"truncated-{layers}"
        command = ["export", "-m", str(checkpoint), "--exits", "1", "--overwrite", "-q"]
        command += ["-o", str(found[layers])]
        subprocess.run([sys.executable, "-m", "edgeexit", *command], check=True)
    return found


def best_drafts(side: Side, layers: list[int], numbers: list[int]) -> tuple[str, dict[str, float]]:
    """The exit and then the draft length with which transformers' self-speculation is fastest; and
    the time of each, relative to the first exit with the default length."""
    took: dict[str, float] = {}

    def fastest(cases: list[str]) -> str:
        for case in cases:
            took[case] = sum(side.run(case, numbers)["times_ms"])
        return min(took, key=took.__getitem__)

    best = fastest([f"early_exit_{layer}" for layer in layers])
    best = fastest([f"{best}_{length}" for length in PEER_DRAFTS])
    first = took[f"early_exit_{layers[0]}"]
    return best, {case: round(time / first, 4) for case, time in took.items()}


def whole_rate(writer: Writer) -> float:
    """Tokens per second of whole texts, prompts included."""
    records = writer.usual()
    took = sum(record["first_token_s"] + record["decode_s"] for record in records)
    return round(sum(len(record["tokens"]) for record in records) / took, 2)


def quality(
    bundle: Path, truncated: Path, tokenizer: Path, chosen: dict[str, Any], quick: bool
) -> dict[str, Any]:
    """How often each mode predicts the next token of test passages (teacher forcing), how often it
    predicts the last exit's token, and the mean exit layer.
    """
    tokens = data.tokens("test", tokenizer).astype(np.int64)
    count = 4 if quick else PASSAGES
    starts = np.random.default_rng(2).integers(len(tokens) - PASSAGE_TOKENS - 1, size=count)
    passages = [tokens[start : start + PASSAGE_TOKENS + 1] for start in starts]
    found: dict[str, Any] = {}
    with runtime.load(bundle, threads="process", capacity=CAPACITY) as model:
        names = [exit_.name for exit_ in model.exits]
        strict = chosen["strict"]
        rule = runtime.Rule(thresholds=strict["thresholds"], score=strict["score"])
        decisions = decide(rule, model.exits)
        asked = decide(runtime.Rule(thresholds=ALWAYS), model.exits)

        def run(make: Any) -> tuple[np.ndarray, dict[str, int]]:
            said, exits = [], {}
            for passage in passages:
                mode: Mode = make(model.session(1))
                said.append(forced(mode, passage))
                for name, number in mode.statistics.exits.items():
                    exits[name] = exits.get(name, 0) + number
            return np.array(said), exits

        full, exits = run(lambda session: Full(session, names))
        ways: dict[str, Any] = {
            "fast": lambda s: Fast(s, names, decisions),
            "approximate": lambda s: Approximate(s, names, decisions),
            "copied": lambda s: Copied(s, names, decisions),
            "missing": lambda s: Missing(s, names, decisions),
        }
        answers = {"full": (full, exits)}
        for way in ("fast", *inexact(model.bundle)):
            answers[way] = run(ways[way])
        chances = exit_chances(answers["fast"][1], names[:-1])
        answers["random"] = run(lambda s: Random(s, names, asked, chances=chances))
    true = np.array([passage[LEAD_TOKENS:] for passage in passages])
    for way, (said, exits) in answers.items():
        found[way] = {
            "right": round(float((said == true).mean()), 4),
            "as_last_exit": round(float((said == full).mean()), 4),
            "mean_exit_layer": round(mean_layer(exits), 3),
        }
    for layers, folder in truncated_models(truncated).items():
        said = torch_answers(folder, passages)
        found[f"truncated_{layers}"] = {
            "right": round(float((said == true).mean()), 4),
            "mean_exit_layer": float(layers),
        }
    for way, facts in found.items():
        say(f"  quality of {way}: {facts}")
    return found


def mean_layer(exits: dict[str, int]) -> float:
    """Mean layer of the exits that answered."""
    layers = [(int(name.rpartition("_")[2]), count) for name, count in exits.items()]
    return sum(n * count for n, count in layers) / sum(count for _, count in layers)


def forced(mode: Mode, passage: np.ndarray) -> list[int]:
    """A mode's predictions for every token of a passage after its lead (teacher forcing)."""
    said = [int(mode.prefill([passage[:LEAD_TOKENS]])[0])]
    active = [True]
    for token in passage[LEAD_TOKENS:-1]:
        mode.force(np.array([token]))
        said.append(mode.step(active)[0][0])
    return said


def torch_answers(checkpoint: Path, passages: list[np.ndarray]) -> np.ndarray:
    """A plain checkpoint's predictions for the same tokens, in PyTorch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.from_numpy(np.array(passages))[:, :-1]
        return model(ids).logits[:, LEAD_TOKENS - 1 :].argmax(-1).numpy()


def exactness(bundle: Path, rows: list[list[int]]) -> dict[str, Any]:
    """Compares `exact` with `full`, token by token: drafts of 1 to 8 tokens and of adapted length,
    single texts and batches of four. A difference is excused if the two largest logits differ by
    less than the largest difference seen here between kernels for one token and for several."""
    found: dict[str, Any] = {"texts": 0, "equal": 0, "excused": 0, "wrong": 0}
    with runtime.load(bundle, threads="process", capacity=CAPACITY) as model:
        expected = [
            model.generate(row, max_new_tokens=NEW_TOKENS, text=False, reuse=False)
            .finish()
            .tokens[0]
            for row in rows
        ]
        rounding = max(kernel_rounding(model.session(1), row) for row in rows[:10])
        found["rounding"] = rounding
        groups = [[n] for n in range(len(rows))]
        groups += [list(range(n, min(n + 4, len(rows)))) for n in range(0, len(rows), 4)]
        for drafts, group in itertools.product([*range(1, 9), None], groups):
            made = model.generate(
                [rows[n] for n in group],
                max_new_tokens=NEW_TOKENS,
                mode="exact",
                drafts=drafts,
                text=False,
                reuse=False,
            ).finish()
            for number, tokens in zip(group, made.tokens, strict=True):
                found["texts"] += 1
                came = compare_texts(model, rows[number], expected[number], tokens, rounding)
                found[came] += 1
    say(f"  exactness: {found}")
    return found


def compare_texts(
    model: runtime.Model, prompt: list[int], expected: list[int], made: list[int], rounding: float
) -> str:
    """``equal``, ``excused`` or ``wrong``, judged at the first difference."""
    if made == expected:
        return "equal"
    pairs = itertools.zip_longest(expected, made)
    place = next(n for n, (right, found) in enumerate(pairs) if right != found)
    logits = np.sort(last_logits(model.session(1), [*prompt, *expected[:place]]))
    return "excused" if logits[-1] - logits[-2] <= 2 * rounding else "wrong"


def last_logits(session: Session, text: list[int]) -> np.ndarray:
    """The last exit's logits after a text."""
    states = last_states(session, text, session.chunk)[-1:]
    return np.array(last_head(session)(states)["logits"][0])


def last_head(session: Session) -> Head:
    """The last exit's head."""
    return session.head(len(session.parts) - 1)


def kernel_rounding(session: Session, text: list[int]) -> float:
    """Largest difference of logits between a text in one run and token by token."""
    head = last_head(session)
    at_once = last_states(session, text, session.chunk)
    one_by_one = last_states(session, text, 1)
    a = np.array(head(at_once)["logits"])
    b = np.concatenate([head(state[None])["logits"].copy() for state in one_by_one])
    return float(np.abs(a - b).max())


def last_states(session: Session, text: list[int], step: int) -> np.ndarray:
    """States of the last boundary ``[seq, width]``, computed in steps of several tokens."""
    return all_states(session, text, step)[-1]


def all_states(session: Session, text: list[int], step: int | None = None) -> list[np.ndarray]:
    """States behind every component, ``[seq, width]`` each."""
    session.empty()
    made: list[list[np.ndarray]] = [[] for _ in session.parts]
    size = step or session.chunk
    for start in range(0, len(text), size):
        new = np.array([text[start : start + size]])
        session.embed(new)
        block = Block(new.shape[1], [new.shape[1]])
        for number in range(len(session.parts)):
            block = session.run(number, block)
            made[number].append(session.boundary(number + 1, block.new)[0].copy())
    return [np.concatenate(states) for states in made]


if __name__ == "__main__":
    main()
