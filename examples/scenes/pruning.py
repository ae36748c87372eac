"""Other ways to save image tokens, beside gates: the share of questions answered right when they
leave out as much.

    python examples/scenes/pruning.py -m local/scenes/exits --mean-layer 5.1 -o pruning.json

`--mean-layer` is that behind which gates let image tokens leave (benchmarks/scenes.py); the others
process as many pairs of image token and layer:

- ``fastv`` (FastV, ECCV 2024): behind layer 2, the tokens that get least attention there from the
  end of the prompt;
- ``cdpruner`` (CDPruner, NeurIPS 2025): in front of the language model, all but a diverse set of
  relevant tokens: greedy MAP of a determinantal point process over their similarity, conditioned on
  their similarity to the question;
- ``pooled``: four neighbours become one token, whatever that saves.

None of them is trained, here as there. Answers are judged as in `accuracy`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from accuracy import ASKED, batches  # noqa: E402
from conversations import IDS, IGNORED  # noqa: E402
from model import IMAGE, LAYERS, PATCHES  # noqa: E402

LAYER = 2
SIDE = int(PATCHES**0.5)
Way = Callable[[Any, dict[str, torch.Tensor], int], torch.Tensor]


def fastv(model: Any, batch: dict[str, torch.Tensor], kept: int) -> torch.Tensor:
    """Logits with `kept` image tokens behind layer 2."""
    ids, ends = batch["input_ids"], first_answers(batch) - 1
    model.model.set_attn_implementation({"text_config": "eager"})
    seen = model.model(
        input_ids=ids, pixel_values=batch["pixel_values"], output_attentions=True, use_cache=False
    )
    shares = seen.attentions[LAYER - 1].mean(1)[torch.arange(len(ids)), ends]
    return model.logits_without(
        ids, LAYER, all_but(shares, ids, kept), pixel_values=batch["pixel_values"]
    )


def cdpruner(model: Any, batch: dict[str, torch.Tensor], kept: int) -> torch.Tensor:
    """Logits with `kept` image tokens in front of the language model."""
    ids = batch["input_ids"]
    features = model.tower(batch["pixel_values"])
    embedded = model.embed(ids, image_features=features)
    places = torch.arange(ids.shape[1]) < first_answers(batch)[:, None]
    asks = ((ids != IDS[IMAGE]) & places)[..., None]
    question = functional.normalize((embedded * asks).sum(1) / asks.sum(1), dim=-1)
    tokens = functional.normalize(features, dim=-1)
    relevance = (tokens @ question[..., None])[..., 0]
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    relevance = (relevance - low) / (high - low).clamp(min=1e-6) + 1e-3
    kernel = relevance[:, :, None] * (tokens @ tokens.mT) * relevance[:, None]
    ranks = torch.full(ids.shape, -torch.inf)
    ranks[:, 1 : 1 + PATCHES] = torch.stack([greedy(one, kept) for one in kernel])
    return model.logits_without(ids, 0, all_but(ranks, ids, kept), image_features=features)


def greedy(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy MAP of a determinantal point process (Chen et al. 2018): ``[tokens]``, the later a
    token was chosen, the lower; 0 for those that were not.

    Args:
        kernel: ``[tokens, tokens]``.
    """
    gains, basis = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel))
    ranks = kernel.new_zeros(len(kernel))
    for number in range(count):
        best = int(gains.argmax())
        row = kernel[best] - basis[:number, best] @ basis[:number]
        basis[number] = row / gains[best].clamp(min=1e-9).sqrt()
        gains = gains - basis[number] ** 2
        gains[best] = -torch.inf
        ranks[best] = count - number
    return ranks


def pooled(model: Any, batch: dict[str, torch.Tensor], kept: int) -> torch.Tensor:
    """Logits with means of 2 x 2 image tokens."""
    ids = batch["input_ids"]
    features = model.tower(batch["pixel_values"]).mT.unflatten(2, (SIDE, SIDE))
    means = functional.avg_pool2d(features, 2).flatten(2).mT
    fewer = torch.cat([ids[:, :1], ids[:, 1 : 1 + PATCHES // 4], ids[:, 1 + PATCHES :]], 1)
    [logits] = model(fewer, exits=[model.depth], image_features=means).values()
    left = logits.new_zeros(*ids.shape, logits.shape[2])
    left[:, :1], left[:, 1 + PATCHES :] = logits[:, :1], logits[:, 1 + PATCHES // 4 :]
    left[:, PATCHES] = logits[:, PATCHES // 4]
    return left


WAYS: dict[str, Way] = {"fastv": fastv, "cdpruner": cdpruner, "pooled": pooled}


def first_answers(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[batch]``, the place of the first token of the answer."""
    return (batch["labels"] != IGNORED).int().argmax(1)


def all_but(values: torch.Tensor, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """The image tokens ``[batch, seq]`` without those of the largest values."""
    image = ids == IDS[IMAGE]
    best = values.masked_fill(~image, -torch.inf).topk(kept, 1).indices
    return image.scatter(1, best, False)


def tokens_kept(way: str, mean_layer: float) -> int:
    """How many image tokens process as many layers as all of them up to a mean layer."""
    if way == "pooled":
        return PATCHES // 4
    first = LAYER if way == "fastv" else 0
    return max(1, round(PATCHES * (mean_layer - first) / (LAYERS - first)))


@torch.no_grad()
def shares(model: Any, way: str, kept: int, split: str, count: int) -> dict[str, float]:
    """Share of right answers by ``kind steps``."""
    found = {}
    for asked, (kind, steps) in ASKED.items():
        right: list[bool] = []
        for batch in batches(split, kind, steps, count):
            logits, targets = WAYS[way](model, batch, kept), batch["labels"][:, 1:]
            same = (logits[:, :-1].argmax(-1) == targets) | (targets == IGNORED)
            right += same.all(-1).tolist()
        found[asked] = float(np.mean(right))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--mean-layer", type=float, required=True)
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--questions", type=int, default=200, help="of each kind and steps")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    model: Any = from_pretrained(options.model, exits=None).float().eval()
    found: dict[str, Any] = {"mean_layer": options.mean_layer, "split": options.split, "ways": {}}
    for way in WAYS:
        kept = tokens_kept(way, options.mean_layer)
        own = shares(model, way, kept, options.split, options.questions)
        found["ways"][way] = {"tokens": kept, "right": own}
        print(f"{way:10} {kept:3} tokens " + "".join(f"{kind} {own[kind]:.1%}  " for kind in own))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
