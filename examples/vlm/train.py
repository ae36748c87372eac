"""Trains the vlm example: a small LLaVA that reads handwritten digits, with exits in tower and
decoder.

    python examples/vlm/train.py                  # checkpoint/, as it is in the repository
    python examples/vlm/train.py --smoke -o DIR   # a few steps, to see that it works

Needs ``edgeexit[export]`` and scikit-learn. It trains on pictures of the training digits alone, a
new one each time; accuracy on pictures of the validation digits is printed and written to
training.json. The test split is not looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from transformers import LlavaProcessor

from edgeexit.export.exits.origins import note_origins
from edgeexit.export.exits.tower import exit_name
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.families.llava import trunk
from edgeexit.export.methods.layerskip import IGNORED, token_loss

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from model import END, IMAGE, LAYERS, PATCH, TOWER_WIDTH, make_model, make_processor  # noqa: E402
from small_llava import save  # noqa: E402

EXITS, TOWER_EXITS = [2], [2, 3]
"""Layers with an exit: of the decoder, and of the tower."""

TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 1500, 64, 8e-3
STEPS, BATCH, RATE, LATER_TOWER_RATE = 1500, 32, 2e-3, 2e-4
SMOKE_STEPS, WEIGHT_DECAY = 4, 0.05
EXIT_WEIGHT = 0.5
"""Of the decoder's exit, beside 1 of the last layer."""

VALIDATION = 500


class Batches:
    """Batches of pictures of a split, and of conversations about them as token ids."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.tokenizer = processor.tokenizer
        self.images = processor.image_processor
        self.image = [self.tokenizer.convert_tokens_to_ids(IMAGE)] * (data.SIZE // PATCH) ** 2

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and the labels for the loss: only the answer has some."""
        asked = [*self.tokenizer("USER: ").input_ids, *self.image]
        asked += self.tokenizer(f"\n{question}\nASSISTANT:\n").input_ids
        said = self.tokenizer(answer + END).input_ids
        return asked + said, [IGNORED] * len(asked) + said

    def pictures(self, examples: Sequence[data.Example]) -> dict[str, torch.Tensor]:
        """Pictures, and which digit covers each patch."""
        given = [one.picture for one in examples]
        middle = slice(PATCH // 2, None, PATCH)
        cover = np.stack([one.cover[middle, middle] for one in examples])
        pixels = self.images(given, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "cover": torch.from_numpy(cover).flatten(1)}

    def conversations(self, examples: Sequence[data.Example]) -> dict[str, torch.Tensor]:
        """Pictures, and the conversations as rows of one length, padded on the right."""
        rows = [self.encode(one.question, one.answer) for one in examples]
        longest = max(len(ids) for ids, _ in rows)
        made = {
            name: torch.tensor([row + [fill] * (longest - len(row)) for row in column])
            for name, column, fill in zip(
                ("input_ids", "labels"), zip(*rows, strict=True), (0, IGNORED), strict=True
            )
        }
        return made | self.pictures(examples)


class Optimizer:
    """AdamW with one cycle of learning rates; only matrices decay.

    Args:
        rates: Parts of a model with the highest learning rate of each.
    """

    def __init__(self, rates: Sequence[tuple[list[nn.Parameter], float]], steps: int) -> None:
        groups, self.weights = [], []
        for weights, rate in rates:
            for matrices in (True, False):
                own = [weight for weight in weights if (weight.ndim > 1) == matrices]
                decay = WEIGHT_DECAY if matrices else 0.0
                groups.append({"params": own, "lr": rate, "weight_decay": decay})
                self.weights += own
        self.inner = torch.optim.AdamW(groups)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.inner, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1
        )

    def step(self, loss: torch.Tensor) -> None:
        self.inner.zero_grad()
        loss.backward()
        clip_grad_norm_(self.weights, 1.0)
        self.inner.step()
        self.schedule.step()


def tower_states(split: ExitVisionLanguage, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
    """States of the tower behind its exits and its last layer."""
    tower, states = split.whole.tower, {}
    state = tower.stem(pixels)
    for number, layer in enumerate(tower.layers, start=1):
        states[number] = state = layer(state)
    return {number: states[number] for number in [*TOWER_EXITS, LAYERS]}


def train_tower(split: ExitVisionLanguage, batches: Batches, steps: int) -> None:
    """Teaches the tower to see before it meets the language model, as the towers of real models
    do: linear probes, which are not kept, tell from each patch which digit covers it."""
    stops = [*TOWER_EXITS, LAYERS]
    probes = nn.ModuleDict({str(layer): nn.Linear(TOWER_WIDTH, 11) for layer in stops})
    trained = [*split.model.model.vision_tower.parameters(), *probes.parameters()]
    optimizer = Optimizer([(trained, TOWER_RATE)], steps)
    for step in range(steps):
        batch = batches.pictures(data.examples("train", TOWER_BATCH, [0, step]))
        wanted = batch["cover"].flatten()
        losses = {
            layer: functional.cross_entropy(probes[str(layer)](state).flatten(0, 1), wanted)
            for layer, state in tower_states(split, batch["pixel_values"]).items()
        }
        optimizer.step(torch.stack([*losses.values()]).sum())
        tell("tower", step, losses)


def train(split: ExitVisionLanguage, batches: Batches, steps: int) -> None:
    """Trains all weights. The language model answers behind its exit and its last layer; the
    projectors of the tower's exits learn to make the image tokens of the last one."""
    tower = [*split.model.model.vision_tower.parameters()]
    others = [weight for weight in split.parameters() if not any(weight is one for one in tower)]
    optimizer = Optimizer([(others, RATE), (tower, LATER_TOWER_RATE)], steps)
    for step in range(steps):
        batch = batches.conversations(data.examples("train", BATCH, [1, step]))
        states = tower_states(split, batch["pixel_values"])
        features = split.whole.tower.projector(states[LAYERS])
        logits = split(batch["input_ids"], image_features=features)
        losses = {k: token_loss(z[:, :-1], batch["labels"][:, 1:]) for k, z in logits.items()}
        wanted = features.detach()
        early = [
            functional.mse_loss(split.tower.projectors[exit_name(layer)](states[layer]), wanted)
            for layer in TOWER_EXITS
        ]
        apart = torch.stack(early).sum() / wanted.var()
        optimizer.step(losses[LAYERS] + EXIT_WEIGHT * sum(losses[k] for k in EXITS) + apart)
        tell("all", step, losses | {0: apart})


def tell(what: str, step: int, losses: dict[int, torch.Tensor]) -> None:
    if step % 100 == 99:
        said = ", ".join(f"{layer}: {loss.item():.4f}" for layer, loss in losses.items())
        print(f"{what}, step {step + 1}, {time.process_time():.0f} s: {said}", file=sys.stderr)


@torch.no_grad()
def accuracy(
    split: ExitVisionLanguage, batches: Batches, examples: Sequence[data.Example]
) -> dict[str, float]:
    """Share of questions that greedy decoding answers right, word for word, by where the model is
    left.

    An answer is right if each of its tokens is the likeliest behind the right ones before it, which
    is when greedy decoding writes it.
    """
    right: dict[str, list[bool]] = {}
    for start in range(0, len(examples), BATCH):
        batch = batches.conversations(examples[start : start + BATCH])
        targets = batch["labels"][:, 1:]
        for stop in (LAYERS, *TOWER_EXITS):
            features = split.tower(batch["pixel_values"], layers=stop)
            for layer, logits in split(batch["input_ids"], image_features=features).items():
                same = (logits[:, :-1].argmax(-1) == targets) | (targets == IGNORED)
                name = f"{exit_name(stop)}, exit_{layer}"
                right.setdefault(name, []).extend(same.all(-1).tolist())
    return {name: round(float(np.mean(found)), 4) for name, found in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="default: checkpoint/ here")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps; needs -o")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.smoke and options.output is None:
        parser.error("--smoke needs -o: it would replace the real checkpoint")
    if options.threads:
        torch.set_num_threads(options.threads)
    output = options.output or HERE / "checkpoint"
    torch.manual_seed(0)
    processor, model = make_processor(), make_model()
    batches = Batches(processor)
    split = ExitVisionLanguage(model, trunk(model), EXITS, TOWER_EXITS)
    train_tower(split, batches, SMOKE_STEPS if options.smoke else TOWER_STEPS)
    train(split, batches, SMOKE_STEPS if options.smoke else STEPS)
    minutes = round(time.process_time() / 60, 1)
    note_origins(split, dict.fromkeys(split.exit_origins, "trained"))

    # Measured as it is stored: in float16.
    split.half().float().eval()
    examples = data.examples("validation", BATCH if options.smoke else VALIDATION, 0)
    facts = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "processor_minutes": minutes,
        "validation": accuracy(split, batches, examples),
    }
    save(split, processor, output)
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
