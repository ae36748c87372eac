"""Vision-language bundles beside other software with the same weights, for ``vlm.py --peers``:
`transformers.exporters` with images, and onnxruntime-genai with text alone.

    python benchmarks/visionpeers.py exporters FOLDER     # FOLDER/checkpoint -> FOLDER/exporters
    python benchmarks/visionpeers.py language FOLDER      # FOLDER/checkpoint -> FOLDER/language
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from decode import PEER_SETTINGS, build_genai, run
from decodermodels import write_tokenizer
from results import HERE, say

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.measure.bench.cases import settings, write_inputs
from edgeexit.measure.bench.inputs import image_texts, prepare_texts
from edgeexit.measure.bench.paired import Side, best_setting
from edgeexit.measure.bench.texts import Writer, compare, differences, summary, take_turns
from edgeexit.runtime.engines.onnxruntime import available_cores

PEERS = ("exporters", "genai")
CASES = {"bundle": "full", "exporters": "exporters", "genai": "genai"}
LAUNCHES = 4
"""Times that both sides are started anew, each first in half of them: a process keeps its speed for
as long as it lives, and the side that is started second is the faster one."""

SEARCH_TOKENS, SEARCH_NEW_TOKENS = 32, 8
"""Text in the search for thread settings."""

PARTS = {
    "tower": lambda record: record["earlier_s"],
    "prefill_without_tower": lambda record: record["first_token_s"] - record["earlier_s"],
}
"""Parts of the time to the first token."""


def made_peers(folder: Path, *, keep: bool) -> dict[str, float]:
    """Converts FOLDER/checkpoint for each peer, in processes of their own, or keeps the models of
    the last run. Returns the seconds that each took."""
    facts = folder / "peers.json"
    if keep and facts.is_file():
        return dict(json.loads(facts.read_text()))
    took = {}
    for peer, job in zip(PEERS, ("exporters", "language"), strict=True):
        shutil.rmtree(folder / peer, ignore_errors=True)
        started = time.perf_counter()
        run([sys.executable, str(HERE / "visionpeers.py"), job, str(folder)])
        if peer == "genai":
            build_genai(folder / "language", folder / "genai")
        took[peer] = round(time.perf_counter() - started, 1)
    say(f"  peers: converted in {took} s")
    facts.write_text(json.dumps(took))
    return took


def compare_peers(folder: Path, words: int, new_tokens: int, turns: int) -> dict[str, Any]:
    """Compares FOLDER/bundle with each peer: prompts with an image, or of as many random tokens."""
    bundle = open_bundle(folder / "bundle")
    images = prepare_texts(bundle, None, words, new_tokens, str(folder), seed=0)
    [length] = set(images.lengths)
    prompts = {"exporters": images.path}
    for name, tokens in (("genai", length), ("search", SEARCH_TOKENS)):
        prompts[name] = str(folder / f"{name}.npz")
        write_inputs(Path(prompts[name]), random_rows(bundle, images.count, tokens))
    sides = Sides(folder, image_token(bundle), length + new_tokens, new_tokens)
    threads, tried = search(sides, prompts["search"])
    found: dict[str, Any] = {"prompt_tokens": length, "threads": threads, "threads_tried": tried}
    for peer in PEERS:
        found[peer] = against(sides, peer, prompts[peer], threads, turns)
        say(f"  {peer}: {found[peer]}")
    sizes = {name: bytes_of(folder / name) for name in ("bundle", "exporters")}
    found["bytes"] = sizes | {"ratio": round(sizes["bundle"] / sizes["exporters"], 4)}
    return found


def peer_figures(name: str, found: dict[str, Any]) -> list[tuple[str, float, str, float, float]]:
    """Figures and their goals: ratios of speeds, ours to theirs."""
    rows = []
    for peer, must in (("exporters", 1.0), ("genai", 0.95)):
        ratios = found[peer]["against"]
        for part in ("prefill", "decode"):
            rows.append((f"{name}: {part} ÷ {peer}", ratios[part], ">=", must, 1.0))
        differ = found[peer]["texts_that_differ"]
        rows.append((f"{name}: texts that differ from {peer}", differ, "<=", 0, 0))
    rows.append((f"{name}: bytes ÷ exporters", found["bytes"]["ratio"], "<=", 1.0, 1.0))
    return rows


@dataclass(frozen=True)
class Sides:
    """Opens the sides of a comparison, each in its own process.

    Attributes:
        folder: Folder with ``bundle`` and the peers' models.
        image_token: The token that image features replace.
        capacity: Largest number of tokens of a text, prompt included.
        new_tokens: New tokens per prompt.
    """

    folder: Path
    image_token: int
    capacity: int
    new_tokens: int

    def open(
        self, what: str, prompts: str, threads: Any, *, new_tokens: int, ignore_eos: bool
    ) -> Side:
        """Opens ``bundle`` or one of `PEERS`. `ignore_eos`: no token ends the bundle's texts."""
        arguments = {"new_tokens": new_tokens, "threads": threads}
        place = str(self.folder / what)
        if what == "bundle":
            arguments |= {"bundle": place, "inputs": prompts}
            arguments |= {"capacity": self.capacity, "ignore_eos": ignore_eos}
            return Side("edgeexit.measure.bench.cases:chain", arguments, name=what)
        arguments |= {"folder": place, "prompts": prompts}
        arguments |= (
            {"image_token": self.image_token}
            if what == "exporters"
            else {"capacity": self.capacity}
        )
        return Side(f"peers:{what}", arguments, folder=str(HERE), name=what)


def search(sides: Sides, prompts: str) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Every side's best thread setting, on short texts, and the times of the others."""
    found, others = {}, {}
    for what, case in CASES.items():
        tried = PEER_SETTINGS if what == "genai" else settings("cpu", available_cores())

        def make(setting: Any, what: str = what) -> Side:
            return sides.open(what, prompts, setting, new_tokens=SEARCH_NEW_TOKENS, ignore_eos=True)

        best, found[what], others[what] = best_setting(make, case, tried, seconds=2.0)
        best.close()
        say(f"  {what}: threads {found[what]} {others[what]}")
    return found, others


def against(
    sides: Sides, peer: str, prompts: str, threads: dict[str, Any], turns: int
) -> dict[str, Any]:
    """Lets the bundle and a peer continue the same prompts in turns, in `LAUNCHES` of both."""
    ignore_eos = peer != "genai"  # its texts end at the checkpoint's last token
    launches = []
    for launch in range(LAUNCHES):
        with ExitStack() as stack:
            own = []
            for what in ("bundle", peer)[:: -1 if launch % 2 else 1]:
                side = sides.open(
                    what, prompts, threads[what], new_tokens=sides.new_tokens, ignore_eos=ignore_eos
                )
                own.append(Writer(what, stack.enter_context(side), CASES[what]))
                side.run(CASES[what], [0], lead=False)
            take_turns(own, [turn % own[0].side.inputs for turn in range(turns)])
            launches.append(sorted(own, key=lambda writer: writer.name != "bundle"))
    ours, theirs = (
        Writer(same[0].name, same[0].side, same[0].case, [r for one in same for r in one.records])
        for same in zip(*launches, strict=True)
    )
    ratios = compare(ours, theirs) | {"launches": [compare(*pair) for pair in launches]}
    if "earlier_s" in theirs.records[0]:
        ratios |= {part: ratio_of(ours, theirs, part) for part in PARTS}
    return {
        **{writer.name: summary(writer) for writer in (ours, theirs)},
        "library": theirs.side.facts,
        "against": ratios,
        "texts_that_differ": differences(ours, theirs),
    }


def ratio_of(ours: Writer, theirs: Writer, part: str) -> float:
    """Median over turns of the speed of a part, ours to theirs."""
    pairs = zip(ours.records, theirs.records, strict=True)
    return round(statistics.median(PARTS[part](b) / PARTS[part](a) for a, b in pairs), 4)


def random_rows(bundle: Bundle, count: int, length: int) -> list[dict[str, Any]]:
    """Prompts of random tokens, none of which stands for an image or ends a text."""
    rng = np.random.default_rng(length)
    return [{"tokens": rng.integers(1, image_token(bundle), length)} for _ in range(count)]


def image_token(bundle: Bundle) -> int:
    """The token that image features replace: here the vocabulary's last."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    [group] = decoding.groups.values()
    return group.token


def bytes_of(folder: Path) -> int:
    """Size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def export_with_transformers(folder: Path) -> None:
    """Exports the checkpoint with `transformers.exporters`, for single texts of any length.

    ``export_for_generation`` returns the language model and its head, but not the tower: it records
    inputs from ``generate``, which has run the tower before. So what makes image features is
    exported alone, with the same options, as a fixed graph.
    """
    import torch
    import transformers
    from torch import nn
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "checkpoint", dtype=torch.float32
    ).eval()

    class ImageFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            base = self.model.model
            if not hasattr(base, "vision_model"):
                return base.get_image_features(pixel_values).pooler_output
            # SmolVLM's own function looks for empty images, which depends on the data.
            patches = pixel_values.shape[-1] // base.config.vision_config.patch_size
            whole = torch.ones(1, patches, patches, dtype=torch.bool)
            seen = base.vision_model(pixel_values=pixel_values, patch_attention_mask=whole)
            return base.connector(seen.last_hidden_state)

    text = image_texts(open_bundle(folder / "bundle"), SEARCH_TOKENS, seed=0)[0]
    [pixels] = map(torch.from_numpy, text.inputs.values())
    tokens = torch.tensor([text.tokens])
    shown = pixels if model.config.model_type == "internvl" else pixels[:, None]
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": shown,
    }
    exporter = OnnxExporter()
    written = exporter.export_for_generation(
        model, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu")
    )
    assert "image_encoder" not in written.components, "it has a tower now: use that"
    tower = exporter.export(
        ImageFeatures().eval(), {"pixel_values": pixels}, OnnxConfig(ort_fusions="cpu")
    )
    written.components["image_features"] = tower.components["model"]
    written.save_pretrained(folder / "exporters")


def save_language_model(folder: Path) -> None:
    """Saves the language model of the checkpoint as a checkpoint of its own, with a tokenizer,
    which onnxruntime-genai's builder requires."""
    import torch
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "checkpoint", dtype=torch.float32
    )
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    config = model.config.text_config
    config.tie_word_embeddings = head.weight is decoder.embed_tokens.weight
    with torch.device("meta"):
        alone = transformers.AutoModelForCausalLM.from_config(config)
    alone.model, alone.lm_head = decoder, head
    alone.save_pretrained(folder / "language")
    write_tokenizer(folder / "language")


def main() -> None:
    """Command line of the child process."""
    job, folder = sys.argv[1], Path(sys.argv[2])
    (export_with_transformers if job == "exporters" else save_language_model)(folder)


if __name__ == "__main__":
    main()
