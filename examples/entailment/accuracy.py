"""The share of questions that the entailment example answers right, by kind and steps: behind each
layer of the decoder (``exit``), and when the encoder hands over behind one of its layers, for the
image (``image``), the text (``text``), or both (``encoder``).

    python examples/entailment/accuracy.py -m local/entailment/florence-96/sampled

A question is answered right if each token of its answer is the likeliest behind the right ones
before it, which is when greedy decoding writes it. Needs ``edgeexit[export]`` and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.vision_encoder_decoder import ExitVisionEncoderDecoder
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from batches import IGNORED, PARTS, Asked  # noqa: E402
from model import IMAGE, TOKENS  # noqa: E402
from train import Pictures  # noqa: E402
from variants import KINDS  # noqa: E402

ROWS = 50
ASKED = {kind: (kind, 1) for kind in ("read", "walk", "rings")} | {
    f"{kind} {steps}": (kind, steps)
    for kind in ("go", "check")
    for steps in range(1, data.MOST_STEPS + 1)
}
"""Name of a column -> kind and steps."""
Source = tuple[torch.Tensor, torch.Tensor]


def sources(
    split: ExitEncoderDecoder, asked: Asked, pixels: torch.Tensor | None
) -> Iterator[tuple[str, Source]]:
    """What the decoder reads when the encoder hands over behind each of its layers, by its name;
    first, without a name, behind the last ones."""
    ids, mask, depth = asked.ids, asked.mask, split.encoder.depth
    images: dict[str, Any] = {}
    if isinstance(split, ExitVisionEncoderDecoder):
        assert pixels is not None
        images["images"] = [split.tower(pixels)]
        if not isinstance(split, ExitDecomposed):
            ids = torch.cat([torch.full((len(ids), TOKENS), IMAGE), ids], 1)
            mask = torch.cat([torch.ones(len(ids), TOKENS, dtype=torch.long), mask], 1)
    yield "", split.encode(ids, mask, **images)
    for layer in range(1, depth):
        if isinstance(split, ExitDecomposed):
            yield f"image {layer}", split.encode(ids, mask, image_layers=layer, **images)
            yield f"text {layer}", split.encode(ids, mask, layers=layer, **images)
            both = split.encode(ids, mask, layers=layer, image_layers=layer, **images)
            yield f"encoder {layer}", both
        else:
            yield f"encoder {layer}", split.encode(ids, mask, layers=layer, **images)


@torch.no_grad()
def right(
    split: ExitEncoderDecoder, asked: Asked, pixels: torch.Tensor | None, *, early: bool = True
) -> dict[str, list[bool]]:
    """Which rows are answered right; with `early` also behind early layers. ``verdict ...``: of
    statements, whether the verdict is, whatever the model says where the steps lead."""
    found: dict[str, list[bool]] = {}
    for behind, source in sources(split, asked, pixels):
        layers = range(1, split.depth + 1) if early and not behind else [split.depth]
        for layer, logits in split(asked.tokens, exits=layers, source=source).items():
            same = (logits.argmax(-1) == asked.targets) | (asked.targets == IGNORED)
            name = behind or ("" if layer == split.depth else f"exit {layer}")
            found[name] = same.all(-1).tolist()
            if (asked.parts == PARTS.index("verdict")).any():
                own = verdicts(split, asked, source, layer, logits)
                found[f"verdict {name}".strip()] = own.tolist()
        if not early:
            break
    return found


def verdicts(
    split: ExitEncoderDecoder, asked: Asked, source: Source, layer: int, logits: torch.Tensor
) -> torch.Tensor:
    """Which statements a layer judges right behind what itself says where their steps lead."""
    row, place = (asked.parts == PARTS.index("answer")).nonzero(as_tuple=True)
    tokens = asked.tokens.clone()
    tokens[row, place + 1] = logits[row, place].argmax(-1)
    again = split(tokens, exits=[layer], source=source)[layer]
    return again[row, place + 1].argmax(-1) == asked.targets[row, place + 1]


def asked_of(
    split: str, kind: str, steps: int, count: int, *, in_words: bool
) -> Iterator[tuple[Asked, torch.Tensor | None]]:
    """Questions of a kind about scenes of any size, with their pictures."""
    pictures = Pictures(split)
    rng = np.random.default_rng([5, steps, len(kind), {"validation": 0, "test": 1}[split]])
    for start in range(0, count, ROWS):
        scenes = [data.make_scene(rng) for _ in range(min(ROWS, count - start))]
        questions = [data.ask(scene, kind, steps, rng) for scene in scenes]
        pixels = None if in_words else pictures(scenes, rng)
        yield Asked(scenes, questions, in_words=in_words), pixels


def table(
    model: ExitEncoderDecoder, split: str, count: int, *, early: bool = True
) -> dict[str, dict[str, float]]:
    """Name of a row -> kind and steps -> share of right answers."""
    shares: dict[str, dict[str, float]] = {}
    in_words = not isinstance(model, ExitVisionEncoderDecoder)
    kinds = KINDS["bart" if in_words else "florence"]
    for column, (kind, steps) in ASKED.items():
        if kind not in kinds:
            continue
        hits: dict[str, list[bool]] = {}
        for asked, pixels in asked_of(split, kind, steps, count, in_words=in_words):
            for name, rows in right(model, asked, pixels, early=early).items():
                hits.setdefault(name, []).extend(rows)
        for name, rows in hits.items():
            shares.setdefault(name or "model", {})[column] = float(np.mean(rows))
    return shares


def show(shares: dict[str, dict[str, float]]) -> None:
    columns = list(shares["model"])
    print(f"{'':16}" + "".join(f"{column:>9}" for column in columns))
    order = ("model", "exit", "image", "text", "encoder", "verdict")
    for name in sorted(shares, key=lambda name: (order.index(name.split()[0]), name)):
        own = shares[name]
        print(f"{name:16}" + "".join(f"{own[c]:9.1%}" if c in own else " " * 9 for c in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--questions", type=int, default=200, help="of each kind and steps")
    parser.add_argument("--last", action="store_true", help="no early layers")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = from_pretrained(options.model, exits=None).float().eval()
    shares = table(model, options.split, options.questions, early=not options.last)
    show(shares)
    if options.output is not None:
        found = {"split": options.split, "questions": options.questions, "right": shares}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
