"""Removes attentions that the scenes model does not need (EAS): looks for them, trains the model
without them, and folds the adapters in their place.

    python examples/scenes/attention.py -o local/scenes/eas --remove 4        # resumable
    python examples/scenes/attention.py -o local/scenes/eas --remove 4 --smoke # the way

Writes ``search.json`` (each attention's loss alone, scores, everything that was tried), and two
checkpoints: ``adapted`` and ``folded``. Needs ``edgeexit[export]`` and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from edgeexit.export.exits.skipped_attention import SkippedAttention
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.eas import Eas, fold, rewrite, search
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from exits import Conversations, Row, collate  # noqa: E402
from model import LAYERS, make_processor  # noqa: E402
from small_llava import save  # noqa: E402
from train import Pixels  # noqa: E402

RANK = 16
SEARCH_STEPS, SEARCH_BATCH, HELD_OUT = 150, 8, 48
FOLDED_ON = 8
"""Batches of prompts whose mean summary the folded adapters read."""


def bare(checkpoint: Path) -> Any:
    """The model without its exits."""
    return from_pretrained(
        checkpoint, exits=[LAYERS // 2], adapters=[], tower_exits=[], gates=[], untrained=True
    ).float()


def batches(split: str, size: int, seed: int, *, packed: bool = True) -> Iterator[Row]:
    """Endless batches of conversations."""
    rows = Conversations(Pixels(make_processor()), seed, packed=packed, split=split)
    yield from DataLoader(rows, size, collate_fn=collate)


def looked_for(model: Any, remove: int, steps: int, seed: int) -> dict[str, Any]:
    """Searches while adapters of all layers train. Returns what it tried and chose."""
    method, width = Eas(), model.trunk.width
    model.skipped = skipped = SkippedAttention(
        model.layers, width, dict.fromkeys(range(1, LAYERS + 1), RANK)
    )
    held_out, rows = next(batches("validation", HELD_OUT, 1)), batches("train", SEARCH_BATCH, seed)
    optimizer = torch.optim.AdamW(skipped.pia.parameters(), lr=2e-3)

    @torch.no_grad()
    def loss(layers: Sequence[int]) -> float:
        skipped.remove(layers)
        return float(method.loss(model, model, held_out, None)[0])

    def train(layers: Sequence[int]) -> None:
        skipped.remove(layers)
        optimizer.zero_grad()
        method.loss(model, model, next(rows), 0)[0].backward()
        optimizer.step()

    model.requires_grad_(False)
    skipped.requires_grad_(True)
    alone = {str(layer): round(loss([layer]), 5) for layer in range(1, LAYERS + 1)}
    found = search(
        range(1, LAYERS + 1), remove, loss, train=train, steps=steps, turn=3, subsets=4, seed=seed,
        rate=2.0,
    )  # fmt: skip
    model.requires_grad_(True)
    return {"loss": round(loss([]), 5), "loss_without_one": alone, **found.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--remove", type=int, default=4, help="attentions")
    parser.add_argument("--layers", help="these, as in 13,14, without a search")
    parser.add_argument("--rank", type=int, default=RANK, help="of the adapters; 0: none")
    parser.add_argument("--trained", choices=["adapters", "decoder"], default="decoder")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few steps")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    report = given.output / "search.json"
    if given.layers is None and not report.exists():
        steps = 6 if given.smoke else SEARCH_STEPS
        found = looked_for(bare(given.model), given.remove, steps, given.seed)
        report.write_text(json.dumps(found, indent=1) + "\n")
    layers = (
        [int(layer) for layer in given.layers.split(",")]
        if given.layers
        else json.loads(report.read_text())["chosen"]
    )
    print(f"without the attentions of layers {layers}")
    model = bare(given.model)
    rewrite(model, layers, given.rank or None)
    folder = given.output / "state"
    arguments = TrainingArguments(
        str(folder),
        max_steps=2 if given.smoke else given.steps,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        max_grad_norm=1.0,
        per_device_train_batch_size=24,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        seed=given.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    rows = Conversations(Pixels(make_processor()), given.seed, packed=True)
    method = Eas(trained=given.trained)
    trainer = ExitTrainer(model, method, arguments, train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    save(model, make_processor(), given.output / "adapted")
    if given.rank:
        prompts = batches("train", 24, given.seed + 1)
        fold(model, (next(prompts) for _ in range(FOLDED_ON)))
        save(model, make_processor(), given.output / "folded")


if __name__ == "__main__":
    main()
