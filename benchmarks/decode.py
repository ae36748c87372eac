"""Decoding at full depth: speed against onnxruntime-genai and the unsplit graph, and memory.

    python benchmarks/decode.py            # 12 layers, width 512, random weights
    python benchmarks/decode.py --quick    # a tiny model: does the script run?

Needs ``pip install onnxruntime-genai``; its model builder converts the same checkpoint.
benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from results import HERE, SCRATCH, save, say, verdict

from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, compare, differences, summary, take_turns
from edgeexit.runtime.engines.onnxruntime import available_cores

LAYERS, EXITS = 12, [3, 6, 9]
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
QUICK_SHAPE = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
POSITIONS = 4096
CAPACITY = 2176
PROMPTS, NEW_TOKENS = 8, 96
LENGTHS = (64, 600)
GROWTH = (64, 512, 2048)
TURNS = {"full": 16, "quick": 2}
PEER_SETTINGS: list[Any] = ["default", "blocking", *range(1, available_cores() + 1)]


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", action="store_true", help="reuse the models of the last run")
    parser.add_argument("--turns", type=int)
    given = parser.parse_args()
    watch = environment.Watch()
    folder = SCRATCH / ("decode-quick" if given.quick else "decode")
    if not (given.keep and (folder / "bundle").is_dir()):
        make_models(folder, QUICK_SHAPE if given.quick else SHAPE)
    turns = given.turns or TURNS["quick" if given.quick else "full"]
    vocabulary = (QUICK_SHAPE if given.quick else SHAPE)["vocab_size"]
    for length in {*LENGTHS, *GROWTH}:
        rng = np.random.default_rng(length)
        rows = [{"tokens": rng.integers(1, vocabulary, length)} for _ in range(PROMPTS)]
        write_inputs(folder / f"prompts-{length}.npz", rows)
    result: dict[str, Any] = {"shape": (QUICK_SHAPE if given.quick else SHAPE) | {"layers": LAYERS}}
    chosen, result["threads_tried"] = search(folder)
    result["threads"] = chosen
    result["prompts"] = {
        str(length): against_peers(folder, length, chosen, turns) for length in LENGTHS
    }
    result["growth"] = growth(folder, chosen, turns)
    result["memory"] = memory(folder, chosen)
    prompts = result["prompts"]
    figures = []
    for length, found in prompts.items():
        chain = found["chain"]
        figures += [
            (f"decode ÷ genai, {length} tokens", chain["against_genai"]["decode"], ">=", 1.15, 1.4),
            (f"prefill ÷ genai, {length} tokens", chain["against_genai"]["prefill"], ">=", 1, 1.5),
            (f"split tax, {length} tokens", chain["split_tax"], "<=", 1.05, 1.01),
        ]
    figures.append(("memory ÷ unsplit", result["memory"]["ratio"], "<=", 1.1, 1.0))
    steepness = result["growth"]["steepness_ratio"]
    figures.append(("steepness ÷ genai's", steepness, "<=", 1.0, 1.0))
    result["verdicts"] = verdict(figures)
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    save("decode", result, quick=given.quick)


def make_models(folder: Path, shape: dict[str, int]) -> None:
    """Creates a checkpoint with random weights, the bundle, and the onnxruntime-genai model, each
    in its own process."""
    import shutil

    say("  models")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = HERE / "decodermodels.py"
    config = shape | {"num_hidden_layers": LAYERS, "max_position_embeddings": POSITIONS}
    run([sys.executable, str(script), str(folder / "checkpoint"), json.dumps(config)])
    exits = ",".join(map(str, EXITS))
    export = ["export", "-m", str(folder / "checkpoint"), "--exits", exits]
    run([sys.executable, "-m", "edgeexit", *export, "-o", str(folder / "bundle")])
    build_genai(folder / "checkpoint", folder / "genai")


def build_genai(checkpoint: Path, folder: Path, precision: str = "fp32") -> None:
    """Converts a checkpoint with onnxruntime-genai's own builder."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    builder += ["-p", precision, "-e", "cpu"]
    places = ["-m", str(checkpoint), "-o", str(folder), "-c", str(folder.parent / "cache")]
    # Logits of the last token only, as ours.
    run([*builder, *places, "--extra_options", "prune_lm_head=true"])


def run(command: list[str]) -> None:
    """Runs a command; shows its output if it fails."""
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{made.stdout[-2000:]}\n{made.stderr[-4000:]}")


def side(folder: Path, what: str, length: int, threads: Any, new: int = NEW_TOKENS) -> Side:
    """One way to decode, in its own process."""
    prompts = str(folder / f"prompts-{length}.npz")
    common = {"new_tokens": new, "threads": threads, "capacity": CAPACITY}
    if what == "genai":
        arguments = {"folder": str(folder / "genai"), "prompts": prompts, **common}
        return Side("peers:genai", arguments, folder=str(HERE), name=what)
    arguments = {"bundle": str(folder / "bundle"), "inputs": prompts, **common}
    return Side(f"edgeexit.measure.bench.cases:{what}", arguments, name=what)


CASES = {"chain": "full", "unsplit": "unsplit", "genai": "genai"}


def search(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Every side's best thread setting, on the shorter prompts, and the times of the others."""
    found, others = {}, {}
    for what, case in CASES.items():
        tried = PEER_SETTINGS if what == "genai" else settings("cpu", available_cores())

        def make(setting: Any, what: str = what) -> Side:
            return side(folder, what, LENGTHS[0], setting, new=32)

        best, chosen, relative = best_setting(make, case, tried, seconds=2.0)
        best.close()
        found[what], others[what] = chosen, relative
        say(f"  {what}: threads {chosen} {relative}")
    return found, others


def against_peers(folder: Path, length: int, chosen: dict[str, Any], turns: int) -> dict[str, Any]:
    """Measures prompts of one length, continued by all sides in turns."""
    with ExitStack() as stack:
        writers = {
            what: Writer(what, stack.enter_context(side(folder, what, length, chosen[what])), case)
            for what, case in CASES.items()
        }
        for writer in writers.values():
            writer.side.run(writer.case, [0, 1], lead=False)
        take_turns(list(writers.values()), [turn % PROMPTS for turn in range(turns)])
    found = {what: summary(writer) for what, writer in writers.items()}
    for what in ("chain", "unsplit"):
        found[what]["against_genai"] = compare(writers[what], writers["genai"])
        found[what]["texts_that_differ_from_genai"] = differences(writers[what], writers["genai"])
    tax = compare(writers["unsplit"], writers["chain"])
    found["chain"]["split_tax"] = tax["decode"]
    found["chain"]["split_tax_prefill"] = tax["prefill"]
    say(f"  {length} tokens: {found['chain']}")
    return found


def growth(folder: Path, chosen: dict[str, Any], turns: int) -> dict[str, Any]:
    """Tokens per second after prompts of growing length. Steepness: time of a token after the
    longest prompt ÷ after the shortest. The ratio of the chain's steepness to genai's is computed
    from ratios within turns at both lengths, because the machine's speed changes between them."""
    found: dict[str, Any] = {"chain": {}, "genai": {}, "against_genai": {}, "spread": {}}
    for length in GROWTH:
        with ExitStack() as stack:
            chain, genai = writers = [
                Writer(
                    what,
                    stack.enter_context(side(folder, what, length, chosen[what], new=33)),
                    CASES[what],
                )
                for what in ("chain", "genai")
            ]
            for writer in writers:
                writer.side.run(writer.case, [0], lead=False)
            take_turns(writers, [turn % PROMPTS for turn in range(turns)])
        for writer in writers:
            found[writer.name][str(length)] = summary(writer)["tokens_per_s"]
        against = compare(chain, genai)
        found["against_genai"][str(length)] = against["decode"]
        found["spread"][str(length)] = against["decode_spread"]
    first, last = str(GROWTH[0]), str(GROWTH[-1])
    found["steepness"] = {
        what: round(found[what][first] / found[what][last], 4) for what in ("chain", "genai")
    }
    found["steepness_ratio"] = round(
        found["against_genai"][first] / found["against_genai"][last], 4
    )
    say(f"  growth: {found}")
    return found


def memory(folder: Path, chosen: dict[str, Any], rounds: int = 3) -> dict[str, Any]:
    """Peak resident memory after generating from a long prompt, above the memory of imports."""
    from statistics import median

    peaks: dict[str, list[float]] = {"chain": [], "unsplit": []}
    for done in range(rounds):
        for what in ("chain", "unsplit") if done % 2 else ("unsplit", "chain"):
            command = [sys.executable, str(HERE / "peers.py"), "--peak", what]
            places = [str(folder / "bundle"), str(folder / f"prompts-{LENGTHS[-1]}.npz")]
            made = subprocess.run(
                [*command, *places, str(chosen[what]), str(CAPACITY)],
                check=True,
                capture_output=True,
                text=True,
            )
            peaks[what].append(float(made.stdout.splitlines()[-1]))
    pairs = zip(peaks["chain"], peaks["unsplit"], strict=True)
    found: dict[str, Any] = {f"{what}_bytes": median(values) for what, values in peaks.items()}
    found["ratio"] = round(median(a / b for a, b in pairs), 4)
    say(f"  memory: {found}")
    return found


if __name__ == "__main__":
    main()
