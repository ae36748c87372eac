"""Trains adapters (FREE) on the codelm example's checkpoint, whose own weights do not change: they
learn from the last layer's predictions, without labels.

    python examples/codelm/free.py -o local/codelm/free     # goes on where it was interrupted
    python examples/codelm/free.py -o DIR --adversary 0     # without the discriminators
    python benchmarks/codelm.py --checkpoint local/codelm/free --name free

Needs ``edgeexit[export]``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from edgeexit.export.methods.free import Free
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from train import EXITS, SMOKE_STEPS, Passages, perplexities, train  # noqa: E402

STEPS, RATE, WARMUP = 600, 1e-3, 50


def layers(text: str) -> list[int]:
    """``"2,4"`` -> layers."""
    return [int(layer) for layer in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--exits", type=layers, default=EXITS, help="with an adapter each")
    parser.add_argument("--adversary", type=float, default=0.1, help="its weight; 0: none")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps")
    given = parser.parse_args()
    checkpoint = HERE / "checkpoint"
    text, test = (data.tokens(split, checkpoint / "tokenizer.json") for split in ("train", "test"))
    torch.manual_seed(1)
    decoder = from_pretrained(
        checkpoint, exits=given.exits, adapters=given.exits, untrained=True
    ).float()
    train(
        decoder,
        Free(supervision="distillation", adversary=given.adversary),
        Passages(text, seed=3),
        given.output / "state",
        resume=True,
        steps=SMOKE_STEPS if given.smoke else given.steps,
        learning_rate=RATE,
        warmup=WARMUP,
    )
    decoder.half().float()
    facts = {"test_perplexity": perplexities(decoder, test)}
    decoder.half().save_pretrained(given.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, given.output / name)
    (given.output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
