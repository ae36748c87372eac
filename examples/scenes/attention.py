"""Removes attentions that the scenes model does not need (EAS): looks for them, trains the model
without them, and folds the adapters in their place; also in other ways, to compare.

    python examples/scenes/attention.py -o local/scenes/eas --remove 6             # resumable
    python examples/scenes/attention.py -o local/scenes/last --remove 6 --choose last
    python examples/scenes/attention.py -o local/scenes/whole --remove 6 --choose whole
    python examples/scenes/attention.py --table local/scenes/{eas,last,whole} -o attention.json
    python examples/scenes/attention.py -o DIR --remove 4 --smoke                  # the way

Layers before the first one that loses something stay as they are, and their exits and gates with
them. Writes ``search.json`` (each attention's loss alone, scores, everything that was tried),
checkpoints ``adapted`` and ``folded``, and ``report.json`` with the answers to questions of the
test split. Needs ``edgeexit[export]`` and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from edgeexit.export.exits.saved import read_exits
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.families import llava
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.eas import Eas, fold, rewrite, search, search_model
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import accuracy  # noqa: E402
from exits import Conversations, Row, collate  # noqa: E402
from model import LAYERS, language_of, make_model, make_processor  # noqa: E402
from small_llava import save  # noqa: E402
from train import TOWER_EXITS, Pixels  # noqa: E402

RANK = 16
SEARCH_STEPS, SEARCH_BATCH, HELD_OUT = 150, 8, 48
FOLDED_ON = 8
"""Batches of prompts whose mean summary the folded adapters read."""
CHOICES = ("search", "last", "random", "whole")
"""Attentions by the search; the last ones; drawn ones; whole layers that change states least."""


def with_exits_before(checkpoint: Path, first: int) -> Any:
    """The model with those of its exits and gates that stand before a layer."""
    saved = read_exits(checkpoint)
    before = {
        "exits": [layer for layer in saved.layers or [] if layer < first],
        "adapters": {layer: size for layer, size in saved.adapters.items() if layer < first},
        "gates": {layer: width for layer, width in saved.gates.items() if layer < first},
    }
    if not before["exits"]:
        before["exits"] = [LAYERS // 2]  # without a module, so nothing to train
    return from_pretrained(checkpoint, **before, untrained=True).float()  # type: ignore[arg-type]


def without_layers(checkpoint: Path, layers: Sequence[int]) -> ExitVisionLanguage:
    """The model without whole layers, and without exits."""
    whole: Any = from_pretrained(checkpoint, exits=None).float()
    kept = [layer for layer in range(1, LAYERS + 1) if layer not in layers]
    model = make_model(len(kept))
    split = ExitVisionLanguage(model, llava.trunk(model), [], TOWER_EXITS)
    weights = whole.state_dict()
    for name in split.state_dict():
        place, found, rest = name.partition(".layers.")
        if found and "language_model" in place:
            number, _, rest = rest.partition(".")
            weights[name] = whole.state_dict()[f"{place}{found}{kept[int(number)] - 1}.{rest}"]
    split.load_state_dict({name: weights[name] for name in split.state_dict()})
    return split


def batches(split: str, size: int, seed: int, *, packed: bool = True) -> Iterator[Row]:
    """Endless batches of conversations."""
    rows = Conversations(Pixels(make_processor()), seed, packed=packed, split=split)
    yield from DataLoader(rows, size, collate_fn=collate)


def looked_for(model: Any, remove: int, steps: int, seed: int) -> dict[str, Any]:
    """Searches while adapters of all layers train. Returns what it tried and chose."""
    method, skipped = Eas(), search_model(model, RANK)
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

    alone = {str(layer): round(loss([layer]), 5) for layer in range(1, LAYERS + 1)}
    found = search(
        range(1, LAYERS + 1), remove, loss, train=train, steps=steps, turn=3, subsets=5, seed=seed,
        rate=2.0,
    )  # fmt: skip
    return {"loss": round(loss([]), 5), "loss_without_one": alone, **found.to_dict()}


@torch.no_grad()
def influences(model: Any) -> list[float]:
    """How much each layer changes states: 1 minus the mean cosine of its input and output
    (ShortGPT, arXiv:2403.03853)."""
    rows = next(batches("validation", HELD_OUT, 1))
    embedded = model.embed(rows["input_ids"], pixel_values=rows["pixel_values"])
    language = language_of(model.model)[0]
    known: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, made: known.append(torch.cosine_similarity(
            given[0], made[0] if isinstance(made, tuple) else made, dim=-1).mean()))
        for layer in language.layers
    ]  # fmt: skip
    language(inputs_embeds=embedded, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [1 - float(cosine) for cosine in known]


def chosen(given: argparse.Namespace) -> list[int]:
    """The layers that lose their attention, or are lost as a whole."""
    if given.layers:
        return [int(layer) for layer in given.layers.split(",")]
    if given.choose == "last":
        return list(range(LAYERS - given.remove + 1, LAYERS + 1))
    if given.choose == "random":
        rng = np.random.default_rng(given.seed)
        return sorted(1 + int(n) for n in rng.choice(LAYERS, given.remove, replace=False))
    if given.choose == "whole":
        scores = influences(with_exits_before(given.model, 1))
        return sorted(1 + int(layer) for layer in np.argsort(scores)[: given.remove])
    report = given.output / "search.json"
    if not report.exists():
        steps = 6 if given.smoke else SEARCH_STEPS
        found = looked_for(with_exits_before(given.model, 1), given.remove, steps, given.seed)
        report.write_text(json.dumps(found, indent=1) + "\n")
    return list(json.loads(report.read_text())["chosen"])


def trained(model: Any, given: argparse.Namespace, first: int) -> int:
    """Trains the decoder's layers from one on. Returns seconds."""
    folder, started = given.output / "state", time.monotonic()
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
    method = Eas(trained=given.trained, first=first)
    trainer = ExitTrainer(model, method, arguments, train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return round(time.monotonic() - started)


def answered(model: Any, questions: int) -> dict[str, float]:
    """Kind and steps -> share of the test's questions that the model answers right; ``all``: of
    all."""
    shares = accuracy.table(model.eval(), "test", questions, layers=False)[f"exit_{model.depth}"]
    return {"all": round(float(np.mean(list(shares.values()))), 4)} | shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--remove", type=int, default=6, help="attentions; 0: answers as it is")
    parser.add_argument("--choose", choices=CHOICES, default="search")
    parser.add_argument("--layers", help="these, as in 13,14")
    parser.add_argument("--rank", type=int, default=RANK, help="of the adapters; 0: none")
    parser.add_argument("--trained", choices=["adapters", "decoder"], default="decoder")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=20, help="of each kind and steps")
    parser.add_argument("--table", nargs="+", type=Path, metavar="DIR", help="only gather reports")
    parser.add_argument("--smoke", action="store_true", help="few steps")
    given = parser.parse_args()
    if given.table:
        found = {}
        for path in given.table:
            found[path.name] = json.loads((path / "report.json").read_text())
            if (search_ := path / "search.json").exists():
                found[path.name]["search"] = json.loads(search_.read_text())
        given.output.write_text(json.dumps(found, indent=1) + "\n")
        return
    given.output.mkdir(parents=True, exist_ok=True)
    questions = 1 if given.smoke else given.questions
    report: dict[str, Any] = {"remove": given.remove, "questions_each": questions, "right": {}}
    if given.remove:
        report |= without(given, report["right"], questions)
    else:
        report["right"]["whole"] = answered(with_exits_before(given.model, 1), questions)
    (given.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print({name: own["all"] for name, own in report["right"].items()})


def without(given: argparse.Namespace, right: dict[str, Any], questions: int) -> dict[str, Any]:
    """Chooses, trains and saves. Returns what was done; `right` gets the answers."""
    layers = chosen(given)
    whole = given.choose == "whole"
    print(f"without {'layers' if whole else 'the attentions of layers'} {layers}")
    if whole:
        model: Any = without_layers(given.model, layers)
    else:
        model = with_exits_before(given.model, layers[0])
        rewrite(model, layers, given.rank or None)
    first = min(layers[0], model.depth)
    right["untrained"] = answered(model, questions)
    seconds = trained(model, given, first)
    save(model, make_processor(), given.output / "adapted")
    right["adapted"] = answered(model, questions)
    if given.rank and not whole:
        prompts = batches("train", 24, given.seed + 1)
        fold(model, (next(prompts) for _ in range(FOLDED_ON)))
        save(model, make_processor(), given.output / "folded")
        right["folded"] = answered(model, questions)
    return {
        "choose": given.choose,
        "layers": layers,
        "rank": 0 if whole else given.rank,
        "steps": given.steps,
        "trained": f"{given.trained} from layer {first} on",
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
