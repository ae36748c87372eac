"""Trains variants of a model that train.py has made, each with exits of its own kind, or without.

    python examples/entailment/variants.py published   # MuE as published
    python examples/entailment/variants.py sampled     # the encoder hands over early in training
    python examples/entailment/variants.py plain       # no exits; reads image and text together
    python examples/entailment/variants.py truncated --layers 3    # no exits, fewer layers

``--form bart`` does the same with the model that reads scenes in words. Every variant goes on where
it was interrupted, and ends as a checkpoint as hubs have them. Needs ``edgeexit[export]`` and
scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.vision_encoder_decoder import ExitVisionEncoderDecoder
from edgeexit.export.families import bart, florence2
from edgeexit.export.methods.mue import Mue
from edgeexit.export.methods.training import ExitTrainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from batches import IGNORED, Level, padded, text_ids  # noqa: E402
from model import (  # noqa: E402
    END,
    IDS,
    IMAGE,
    LAYERS,
    TOKENS,
    WIDTH,
    make_bart,
    make_florence,
    make_image_processor,
    make_tokenizer,
)
from train import Pictures  # noqa: E402

KINDS = {"florence": ("read", "walk", "go", "check"), "bart": ("rings", "walk", "go", "check")}
STEPS, BATCH, RATE = 300, 32, 4e-4
SCENES = 2000
"""Pictures that a training draws, each for several questions."""


@dataclass(frozen=True)
class Plain(Mue):
    """The same training without exits: the loss is that of the last layer."""

    def check(self, model: Any) -> None:
        assert not self.trains(model)


METHODS = {
    "published": Mue(),
    "sampled": Mue(hand_over="sampled"),
    "plain": Plain(),
    "truncated": Plain(),
}


class Questions(Dataset):
    """Questions about scenes of the training split, one a row, drawn by their number.

    Args:
        form: ``florence`` or ``bart``, as for train.py.
        together: Rows have the places of image tokens in front of the text.
    """

    def __init__(self, form: str, count: int, scenes: int, *, together: bool) -> None:
        self.form, self.count, self.together = form, count, together
        rng = np.random.default_rng(4)
        self.scenes = [data.make_scene(rng) for _ in range(scenes)]
        self.pixels = Pictures()(self.scenes, rng) if form == "florence" else None
        self.level = Level(cards=data.CARDS, steps=data.MOST_STEPS)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng, kinds = np.random.default_rng([4, number]), KINDS[self.form]
        place = int(rng.integers(len(self.scenes)))
        scene = self.scenes[place]
        question = data.ask(scene, kinds[number % len(kinds)], self.level.draw_steps(rng), rng)
        ids = text_ids(scene, question, in_words=self.pixels is None)
        labels = [IDS[word] for word in question.answer.split()] + [END]
        row: dict[str, Any] = {"input_ids": [IMAGE] * TOKENS * self.together + ids}
        row["labels"] = labels
        return row if self.pixels is None else row | {"pixel_values": self.pixels[place]}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one batch, padded on the right."""
    ids, mask = padded([row["input_ids"] for row in rows])
    labels = padded([row["labels"] for row in rows], IGNORED)[0]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "pixel_values" in rows[0]:
        batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
    return batch


def model_of(form: str, variant: str, layers: int, width: int) -> ExitEncoderDecoder:
    """The model of a variant, with random weights."""
    exits = range(1, layers) if variant in ("published", "sampled") else []
    if form == "bart":
        plain = make_bart(layers, width)
        return ExitEncoderDecoder(plain, *bart.trunk(plain), exits, exits)
    model = make_florence(layers, width)
    trunk = florence2.trunk(model, (data.SIZE, data.SIZE))
    if variant == "plain":
        return ExitVisionEncoderDecoder(model, trunk, exits, exits)
    return ExitDecomposed(model, trunk, exits, exits, exits)


def begin(split: ExitEncoderDecoder, file: Path) -> None:
    """Loads the weights of train.py's last stage; fewer layers take the first ones."""
    known = torch.load(file, weights_only=True)["split"]
    own = split.state_dict()
    split.load_state_dict({n: w for n, w in known.items() if n in own}, strict=True)


def save(split: ExitEncoderDecoder, folder: Path) -> None:
    """Writes a checkpoint with its tokenizer and image processor."""
    split.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if isinstance(split, ExitVisionEncoderDecoder):
        make_image_processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("variant", choices=sorted(METHODS))
    parser.add_argument("--form", choices=sorted(KINDS), default="florence")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--state", type=Path, help="train.py's folder")
    parser.add_argument("-o", "--output", type=Path, help="default: a folder beside that")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = options.state or HERE.parents[1] / f"local/entailment/{options.form}-{options.width}"
    name = options.variant
    name += f"-{options.layers}" if options.layers != LAYERS else ""
    name += f"-seed{options.seed}" if options.seed else ""
    output = options.output or state / name
    split = model_of(options.form, options.variant, options.layers, options.width)
    begin(split, state / ("words.pt" if options.form == "bart" else "pixels.pt"))
    together = isinstance(split, ExitVisionEncoderDecoder) and options.variant == "plain"
    rows = Questions(options.form, options.steps * BATCH, options.scenes, together=together)
    arguments = TrainingArguments(
        str(output / "state"),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ExitTrainer(
        split, METHODS[options.variant], arguments, train_dataset=rows, data_collator=collate
    )
    resumes = any((output / "state").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumes)
    save(split, output)


if __name__ == "__main__":
    main()
