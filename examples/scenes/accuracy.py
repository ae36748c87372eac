"""The share of questions that the scenes example answers right, by kind and steps: at each exit of
the language model (``exit``) and of the tower, by each layer with the head of the last (``layer``),
and when image tokens leave behind a layer (``drop``).

    python examples/scenes/accuracy.py -m local/scenes/exits -o accuracy.json

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

from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from conversations import IDS, IGNORED  # noqa: E402
from exits import collate, question  # noqa: E402
from model import IMAGE, language_of, make_processor  # noqa: E402
from train import Pixels  # noqa: E402

ROWS = 50
ASKED = {"read": ("read", 0), "walk": ("walk", 0)} | {
    f"{kind} {steps}": (kind, steps)
    for kind in ("follow", "go")
    for steps in range(1, data.MOST_STEPS + 1)
}
"""Name of a row of questions -> kind and steps."""
Shares = dict[str, dict[str, float]]


def batches(
    split: str, kind: str, steps: int, count: int, *, in_front: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Questions of one kind and so many steps, about scenes of any size."""
    pixels = Pixels(make_processor())
    rng = np.random.default_rng([5, steps, len(kind)])
    for start in range(0, count, ROWS):
        rows = []
        for _ in range(min(ROWS, count - start)):
            scene = data.make_scene(rng, int(rng.integers(data.FEWEST, data.CARDS + 1)))
            ids, labels = question(scene, rng, steps or 1, kind, in_front=in_front)
            [picture] = pixels([scene], rng, split)
            rows.append({"input_ids": ids, "labels": labels, "pixel_values": picture})
        yield collate(rows)


@torch.no_grad()
def right(
    model: Any, batch: dict[str, torch.Tensor], *, layers: bool = True
) -> dict[str, list[bool]]:
    """Which rows of a batch each exit answers right; with `layers` also each layer with the last
    head, and the model when image tokens leave behind a layer."""
    ids, pixels, targets = batch["input_ids"], batch["pixel_values"], batch["labels"][:, 1:]
    found = {}

    def note(name: str, logits: torch.Tensor) -> None:
        same = (logits[:, :-1].argmax(-1) == targets) | (targets == IGNORED)
        found[name] = same.all(-1).tolist()

    features = model.tower.each_exit(pixels)
    for layer, logits in model(ids, image_features=features[model.tower.depth]).items():
        note(f"exit_{layer}", logits)
    for layer in model.tower.exit_layers:
        logits = model(ids, exits=[model.depth], image_features=features[layer])
        note(f"tower_exit_{layer}", logits[model.depth])
    if not layers:
        return found
    image, whole = ids == IDS[IMAGE], features[model.tower.depth]
    language, norm, head = language_of(model.model)
    embedded = model.embed(ids, image_features=whole)
    states = language(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
    for layer in range(1, model.depth):
        note(f"layer_{layer}", head(norm(states.hidden_states[layer])))
        note(f"drop_{layer}", model.logits_without(ids, layer, image, image_features=whole))
    return found


def table(model: Any, split: str, count: int, *, layers: bool = True) -> Shares:
    """Exit -> ``kind steps`` -> share of right answers; `layers`: as for `right`."""
    shares: Shares = {}
    in_front = model.whole.prompt.in_front
    for asked, (kind, steps) in ASKED.items():
        hits: dict[str, list[bool]] = {}
        for batch in batches(split, kind, steps, count, in_front=in_front):
            for name, rows in right(model, batch, layers=layers).items():
                hits.setdefault(name, []).extend(rows)
        for name, rows in hits.items():
            shares.setdefault(name, {})[asked] = float(np.mean(rows))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--questions", type=int, default=200, help="of each kind and steps")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    model: Any = from_pretrained(options.model, exits=None).float().eval()
    shares = table(model, options.split, options.questions)
    kinds = list(next(iter(shares.values())))
    print(f"{'':14}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, own in sorted(shares.items(), key=lambda one: one[0].split("_")[0]):
        print(f"{name:14}" + "".join(f"{own[kind]:10.1%}" for kind in kinds))
    if options.output is not None:
        found = {"split": options.split, "questions": options.questions, "right": shares}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
