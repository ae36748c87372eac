"""Trains the exits of the scenes example on its checkpoint, whose own weights do not change:
adapters (FREE), gates (DyVTE) and projectors of the tower.

    python examples/scenes/exits.py -o local/scenes/exits                      # all three
    python examples/scenes/exits.py -o DIR --part free --supervision labels --seed 1
    python examples/scenes/exits.py -o DIR --part free --exits 1,2,3,4,5,6,7   # quality by depth

Adapters have no adversary unless `--adversary` asks for one (README.md). Parts are trained apart,
in any order or side by side; each can be interrupted and goes on from its last checkpoint. Needs
``edgeexit[export]`` and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from edgeexit.export.exits.origins import note_origins
from edgeexit.export.exits.saved import load_named
from edgeexit.export.methods.checkpoints import last_checkpoint, trained_before
from edgeexit.export.methods.dyvte import Dyvte
from edgeexit.export.methods.free import Free
from edgeexit.export.methods.method import Method
from edgeexit.export.methods.tower import TowerDistillation
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402
from conversations import IDS, IGNORED, Turns  # noqa: E402
from language import TURNS, describing_turn  # noqa: E402
from model import ASSISTANT, END, IMAGE, PATCHES, USER, make_processor  # noqa: E402
from small_llava import save  # noqa: E402
from train import TOWER_EXITS, Pixels, hardest  # noqa: E402

EXITS, GATES, GATE_WIDTH = [3, 4], [4, 7, 10], 64
PARTS = ("tower", "free", "gates")
STEPS = {"tower": 200, "free": 400, "gates": 600}
RATES = {"tower": 1e-3, "free": 1e-3, "gates": 2e-3}
BATCH = {"tower": 32, "free": 24, "gates": 48}
Row = dict[str, torch.Tensor]


class Conversations(IterableDataset):
    """Endless rows of a split: a picture, and token ids with labels for its answers.

    Args:
        packed: Several questions about a picture in one row; else one question of any kind.
        most_steps: Of questions.
        in_front: As for `Turns`.
    """

    def __init__(
        self,
        pixels: Pixels,
        seed: int,
        *,
        packed: bool,
        most_steps: int = data.MOST_STEPS,
        split: str = "train",
        in_front: bool = False,
    ) -> None:
        self.pixels, self.seed, self.packed, self.split = pixels, seed, packed, split
        self.most_steps, self.in_front = most_steps, in_front

    def __iter__(self) -> Iterator[Row]:
        rng = np.random.default_rng([4, self.seed, self.packed])
        while True:
            scene = data.make_scene(rng, int(rng.integers(data.FEWEST, data.CARDS + 1)))
            if self.packed:
                before = describing_turn(rng)
                level, after = hardest(self.most_steps), TURNS - before
                turns = Turns([scene], rng, level, before, after, in_front=self.in_front)
                ids, labels = turns.ids[0], turns.labels[0]
            else:
                steps = int(rng.integers(1, self.most_steps + 1))
                ids, labels = question(scene, rng, steps, in_front=self.in_front)
            [picture] = self.pixels([scene], rng, self.split)
            yield {"input_ids": ids, "labels": labels, "pixel_values": picture}


def question(
    scene: data.Scene,
    rng: np.random.Generator,
    steps: int,
    kind: str | None = None,
    *,
    in_front: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of one question with its answer, and the labels; by default of any kind."""
    kind = kind or str(rng.choice(["read", "walk", "follow", "go", "go"]))
    asked, answer = data.ask(scene, kind, *scene.draw_question(rng, steps))
    seen = [IDS[IMAGE]] * PATCHES
    prompt = [*seen, IDS[USER]] if in_front else [IDS[USER], *seen]
    prompt += [IDS[word] for word in f"{asked} {ASSISTANT}".split()]
    said = [IDS[word] for word in f"{answer} {END}".split()]
    return torch.tensor(prompt + said), torch.tensor([IGNORED] * len(prompt) + said)


def collate(rows: Sequence[Row]) -> Row:
    """A batch of the columns that a method reads, padded on the right."""
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    if "input_ids" not in rows[0]:
        return batch
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = int(lengths.max())
    for name, value in (("input_ids", 0), ("labels", IGNORED)):
        padded = [pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
        batch[name] = torch.stack(padded)
    return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def train(part: str, options: argparse.Namespace) -> None:
    """Trains one part, if it is not trained yet."""
    folder = options.output / "state" / part
    steps = options.steps or STEPS[part]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=RATES[part],
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        weight_decay=0.01,
        max_grad_norm=1.0,
        per_device_train_batch_size=BATCH[part],
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(options.seed)
    model, method = new_model(options), method_of(part, options)
    rows = Conversations(
        Pixels(make_processor()),
        options.seed,
        packed=part != "gates",
        most_steps=options.most_steps,
        in_front=model.whole.prompt.in_front,
    )
    trainer = ExitTrainer(model, method, arguments, train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def new_model(options: argparse.Namespace) -> Any:
    """The model with new adapters and gates, whether or not the checkpoint has some. Projectors of
    the tower go on from those of the checkpoint, which `train.py` has trained with the model."""
    exits = options.exits
    bare = from_pretrained(
        options.model, exits=[], gates=[], tower_exits=TOWER_EXITS, untrained=True
    )
    with tempfile.TemporaryDirectory() as folder:
        save(bare.float(), make_processor(), Path(folder))
        return from_pretrained(
            folder,
            exits=exits,
            adapters=exits,
            tower_exits=TOWER_EXITS,
            gates=dict.fromkeys(options.gates, GATE_WIDTH),
            untrained=True,
        ).float()


def method_of(part: str, options: argparse.Namespace) -> Method:
    """How a part is trained."""
    if part == "free":
        return Free(supervision=options.supervision, adversary=options.adversary)
    return TowerDistillation() if part == "tower" else Dyvte()


def gathered(options: argparse.Namespace) -> Any:
    """The model with every part that has been trained so far, each from its own training."""
    model = new_model(options)
    for part in PARTS:
        folder = last_checkpoint(options.output / "state" / part)
        if folder is None:
            continue
        method = method_of(part, options)
        modules: Any = method.part(model)
        load_named(modules, modules, folder)
        note_origins(model, dict.fromkeys(trained_before(folder), "trained"))
    return model


def layers(text: str) -> list[int]:
    """``"3,4"`` -> layers."""
    return [int(layer) for layer in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--exits", type=layers, default=EXITS, help="with an adapter each")
    parser.add_argument("--gates", type=layers, default=GATES)
    parser.add_argument("--most-steps", type=int, default=data.MOST_STEPS, help="of questions")
    parser.add_argument("--supervision", choices=["labels", "distillation"], default="distillation")
    parser.add_argument("--adversary", type=float, default=0.0, help="its weight; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each part; default: as many as it takes")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for part in PARTS if options.part is None else [options.part]:
        train(part, options)
    save(gathered(options), make_processor(), options.output)


if __name__ == "__main__":
    main()
