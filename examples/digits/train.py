"""Trains the digits example: a 12-layer ViT with an exit behind every layer.

    python examples/digits/train.py                  # checkpoint/, as it is in the repository
    python examples/digits/train.py --truncated 2    # truncated/2/: a 2-layer model trained alike
    python examples/digits/train.py --smoke -o DIR   # a few steps, to see that it works

Needs ``edgeexit[export]`` and scikit-learn. The training set is all that is ever trained on;
validation accuracy is printed, the test split is not looked at. Training writes checkpoints below
local/digits (``--checkpoints``); ``--resume`` goes on from the last of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.families.vit import trunk
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.joint import Joint
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402

LAYERS = 12
STEPS, SMOKE_STEPS = 2000, 8
BATCH = 128
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 150, 0.05
DISTILLATION, TEMPERATURE = 0.5, 2.0
ROTATION_DEGREES, SHIFT_PIXELS, ZOOM = 12.0, 0.8, 0.12


def make_model(layers: int) -> ViTForImageClassification:
    """A small ViT: 8 x 8 pixels in patches of 2 x 2, so 16 tokens and the class token."""
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )
    return ViTForImageClassification(config)


class Batches(IterableDataset):
    """Rows of random batches of the training split, each image turned, shifted and zoomed a little.

    A batch depends on its number alone, so a resumed training sees those that an uninterrupted one
    would have seen.
    """

    def __init__(self, seed: int) -> None:
        inputs, labels = data.inputs("train")
        self.seed = seed
        self.images, self.labels = (
            torch.from_numpy(inputs["pixel_values"]),
            torch.from_numpy(labels),
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in itertools.count():
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            rows = torch.randint(0, len(self.images), (BATCH,), generator=generator)
            images, labels = augment(self.images[rows], generator), self.labels[rows]
            for image, label in zip(images, labels, strict=True):
                yield {"pixel_values": image, "labels": label}


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images ``[n, 1, 8, 8]``, each under a random small affine map; outside is black."""
    count = len(images)
    angle, zoom, right, down = (torch.rand(4, count, generator=generator) * 2 - 1).unbind()
    angle = angle * math.radians(ROTATION_DEGREES)
    scale = 1 + zoom * ZOOM
    shift = torch.stack([right, down], -1) * (2 * SHIFT_PIXELS / images.shape[-1])
    turn = torch.stack(
        [angle.cos() * scale, -angle.sin() * scale, angle.sin() * scale, angle.cos() * scale], -1
    )
    maps = torch.cat([turn.view(count, 2, 2), shift[:, :, None]], dim=2)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    # Black is -1 once normalised, and grid_sample fills with 0.
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def train(
    layers: int, exits: list[int], steps: int, checkpoints: Path, resume: bool
) -> ExitClassifier:
    """Makes a model and trains it, with fixed seeds."""
    torch.manual_seed(layers)
    model = make_model(layers)
    classifier = ExitClassifier(model, trunk(model), exits)
    arguments = TrainingArguments(
        str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=min(WARMUP, steps // 2),
        weight_decay=WEIGHT_DECAY,
        logging_steps=100,
        save_steps=200,
        save_total_limit=1,
        use_cpu=True,
        report_to="none",
    )
    method = Joint(distillation=DISTILLATION if exits else 0.0, temperature=TEMPERATURE)
    trainer = ExitTrainer(classifier, method, arguments, train_dataset=Batches(seed=1))
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints) if resume else None)
    return classifier


def save(classifier: ExitClassifier, folder: Path) -> None:
    """Writes the checkpoint with its exits and its preprocessing."""
    classifier.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [data.MEAN],
        "image_std": [data.STD],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")


def logits(classifier: ExitClassifier, split: str) -> np.ndarray:
    """Logits ``[exits, n, 10]`` of every exit for a split."""
    inputs, _ = data.inputs(split)
    with torch.no_grad():
        found = classifier(pixel_values=torch.from_numpy(inputs["pixel_values"]))
    return torch.stack(found).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "-o", "--output", type=Path, help="default: checkpoint/ or truncated/N/ here"
    )
    parser.add_argument("--truncated", type=int, metavar="N", help="a model of N layers, no exits")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps; needs -o")
    parser.add_argument("--checkpoints", type=Path, help="folder of the training's checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.smoke and options.output is None:
        parser.error("--smoke needs -o: its checkpoint is worth nothing")
    if options.truncated is not None and not 1 <= options.truncated < LAYERS:
        parser.error(f"--truncated {options.truncated}: 1 to {LAYERS - 1} layers")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    default = HERE / (f"truncated/{options.truncated}" if options.truncated else "checkpoint")
    output = options.output or default
    steps = SMOKE_STEPS if options.smoke else options.steps
    layers = options.truncated or LAYERS
    exits = [] if options.truncated else list(range(1, LAYERS))
    kind = f"truncated-{options.truncated}" if options.truncated else "exits"
    work = output if options.smoke else HERE.parent.parent / "local/digits"
    checkpoints = options.checkpoints or work / "checkpoints" / kind
    if last_checkpoint(checkpoints) and not options.resume:
        parser.error(f"{checkpoints} holds a training: --resume it, or delete it to start anew")
    save(train(layers, exits, steps, checkpoints, options.resume), output)
    classifier = from_pretrained(output)
    if options.truncated:
        arrays = {split: logits(classifier, split)[-1] for split in ("validation", "test")}
        np.savez(output / "logits.npz", **arrays)
    _, labels = data.inputs("validation")
    correct = (logits(classifier, "validation").argmax(-1) == labels).mean(-1)
    for name, share in zip(classifier.exit_names, correct, strict=True):
        print(f"{name:8} {share:.4f} of the validation images right")


if __name__ == "__main__":
    main()
