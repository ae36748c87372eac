"""What removing attentions saves at most, and how much of that its deployed forms keep (EAS).

    python benchmarks/attention.py                    # all shapes; the large ones take long
    python benchmarks/attention.py --shape scenes     # one; the others' results stay

Random weights: latency only. A Llama of each shape, unsplit, without the attentions of its last
half, or of all layers but the first; the prompt has 600 tokens. `lost`: the attention is gone and
nothing stands in its place, which is the reachable saving. `folded`: an adapter folded into the
layer's weights. `adapted`: the adapter itself, of rank 32. Cases take turns with the whole model;
figures are ratios to it. Needs ``edgeexit[export]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from results import RESULTS, SCRATCH, save, say, verdict

from edgeexit.measure import environment
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, take_turns, time_against
from edgeexit.runtime.engines.onnxruntime import available_cores

SHAPES: dict[str, dict[str, int]] = {
    "scenes": {
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 16,
        "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 48,
    },
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""Of the scenes example, Qwen2.5-0.5B and Llama-3.2-1B."""
FORMS = ("lost", "folded", "adapted")
TOGETHER = {
    "scenes": [[f"{share}, {form}" for share in ("half", "all") for form in FORMS]],
    "0.5B": [[f"{share}, {form}" for form in FORMS] for share in ("half", "all")],
    "1B": [
        [f"{share}, lost", f"{share}, {form}"] for share in ("half", "all") for form in FORMS[1:]
    ],
}
"""Cases that take turns with each other and the whole model, as many as fit into memory. Shares of
the reachable saving are of the same turns."""
TURNS = {"scenes": 40, "0.5B": 8, "1B": 4}
TOKENS = {"scenes": 65, "0.5B": 49, "1B": 33}
PROMPT, CAPACITY, PROMPTS = 600, 704, 4
RANK = 32
LEAST = 0.03
"""A smaller saving is not told from noise."""
MUST = 0.8
"""Of the reachable saving of time per token, at 0.5 B and 1 B."""


def main() -> None:
    """Measures and writes one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="default: all")
    parser.add_argument("--share", choices=["half", "all"], help="of the attentions; default: both")
    parser.add_argument("--export", nargs=3, metavar=("SHAPE", "CASE", "FOLDER"))
    given = parser.parse_args()
    if given.export is not None:
        return export_case(given.export[0], given.export[1], Path(given.export[2]))
    for name in SHAPES if given.shape is None else [given.shape]:
        watch = environment.Watch()
        own = measure(name, given.share or "")
        own["environment"] = environment.describe() | {"machine": watch.stop(0.0)}
        own["environment"]["machine"].pop("other_load_cores")
        path = RESULTS / "attention.json"
        result = json.loads(path.read_text()) if path.exists() else {"shapes": {}}
        result["shapes"][name] = own
        result["verdicts"] = judge(result["shapes"])
        save("attention", result, quick=False)
    return None


def measure(name: str, share: str) -> dict[str, Any]:
    """All cases of a shape, or those without one share of the attentions."""
    folder = SCRATCH / "attention" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(1, SHAPES[name]["vocab_size"], PROMPT)} for _ in range(PROMPTS)]
    write_inputs(folder / "prompts.npz", rows)
    whole = exported(name, "whole", folder)

    def side(bundle: Path, threads: Any) -> Side:
        options = {"bundle": str(bundle), "inputs": str(folder / "prompts.npz"), "threads": threads}
        options |= {"new_tokens": TOKENS[name], "capacity": CAPACITY, "ignore_eos": True}
        return Side("edgeexit.measure.bench.cases:unsplit", options, name=bundle.name)

    tried = settings("cpu", available_cores())
    first, threads, others = best_setting(lambda one: side(whole, one), "search", tried, seconds=2)
    found: dict[str, Any] = {"shape": SHAPES[name], "threads": threads, "threads_tried": others}
    whole_model = Writer("whole", first, "unsplit")
    found["groups"] = []
    for cases in ([case for case in own if case.startswith(share)] for own in TOGETHER[name]):
        if not cases:
            continue
        bundles = [exported(name, case, folder) for case in cases]
        with ExitStack() as stack:
            sides = [stack.enter_context(side(bundle, threads)) for bundle in bundles]
            writers = [Writer(case, one, "unsplit") for case, one in zip(cases, sides, strict=True)]
            whole_model.records.clear()
            for writer in (whole_model, *writers):
                writer.side.run(writer.case, [0], lead=False)
            numbers = [turn % PROMPTS for turn in range(TURNS[name])]
            take_turns([whole_model, *writers], numbers)
        times = {writer.name: time_against(writer, whole_model) for writer in writers}
        found["groups"].append({"times": times, "share_of_saving": shares(times)})
        say(f"  {name}: {json.dumps(found['groups'][-1])}")
    found["ms_per_token"] = round(1e3 / whole_model.total_tokens_per_s(), 3)
    found["prefill_ms"] = round(float(np.median(whole_model.prefill_ms())), 2)
    first.close()
    return found


def shares(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """How much of the saving of the same attentions lost a form keeps; None: there is less than
    `LEAST` to save."""
    found: dict[str, dict[str, float | None]] = {}
    for case, own in times.items():
        lost = times[f"{case.split(',')[0]}, lost"]
        if own is not lost:
            found[case] = {
                part: round((1 - own[part]) / (1 - lost[part]), 3)
                if 1 - lost[part] >= LEAST
                else None
                for part in ("decode", "prefill")
            }
    return found


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals: of the saving of time per token, at the sizes of real models."""
    return verdict(
        [
            (
                f"{name}, {case}: share of the reachable saving per token",
                own["decode"],
                ">=",
                MUST,
                1.0,
            )
            for name, shape in found.items()
            for group in shape["groups"]
            for case, own in group["share_of_saving"].items()
            if name != "scenes" and own["decode"] is not None
        ]
    )


def exported(name: str, case: str, folder: Path) -> Path:
    """The bundle of a case, exported by a process of its own."""
    bundle = folder / case.replace(", ", "-")
    if not (bundle / "manifest.json").exists():
        command = [sys.executable, __file__, "--export", name, case, str(bundle)]
        subprocess.run(command, check=True)
    return bundle


def export_case(name: str, case: str, folder: Path) -> None:
    """Makes the model of a case and exports it, in the form that ONNX Runtime takes."""
    import torch
    import transformers

    from edgeexit.export import export
    from edgeexit.export.exits.decoder import ExitDecoder
    from edgeexit.export.families.llama import trunk
    from edgeexit.export.methods.eas import rewrite

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    depth = SHAPES[name]["num_hidden_layers"]
    decoder = ExitDecoder(model, trunk(model), [depth // 2])
    if case != "whole":
        share, form = case.split(", ")
        first = depth // 2 if share == "half" else 1
        rewrite(decoder, range(first + 1, depth + 1), None if form == "lost" else RANK)
        with torch.no_grad():
            for pia in decoder.skipped.pia.values():
                pia.leave.normal_(std=0.02)  # type: ignore[union-attr,operator]
                if form == "folded":
                    pia.fixed.normal_()  # type: ignore[union-attr,operator]
    split = decoder.eval().split_model()
    first_forms = [dataclasses.replace(one, forms=one.forms[:1]) for one in split.components]
    export(dataclasses.replace(split, components=first_forms), folder, overwrite=True)


if __name__ == "__main__":
    main()
