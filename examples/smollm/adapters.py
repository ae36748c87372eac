"""Trains an adapter for an early exit of a chat model, on texts that the model itself writes, and
gives the exit a head over frequent tokens only.

    python examples/smollm/adapters.py -m smollm2 -b smol4 -o smollm2-exits    # resumable
    edgeexit export -m smollm2-exits/checkpoint --weights int4 -o smol4-exits

The bundle writes answers to `data.training_prompts`, kept in ``OUTPUT/answers``. The model stays as
it is, so its states are computed once and kept in ``OUTPUT/states``, about 2.4 KB a token; a step
then runs the adapter and two small heads. Needs ``edgeexit[export]``.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, TrainingArguments

from edgeexit import runtime
from edgeexit.export.exits.draft_vocabulary import frequent_tokens
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.kept_states import collate, keep_states
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data

EXIT, VOCABULARY = 6, 8192
PROMPTS, NEW_TOKENS, TOGETHER = 320, 128, 8
FREQUENT = 3000
"""Ids that a byte-pair vocabulary gave first are of frequent pieces."""


def write_answers(bundle: Path, checkpoint: Path, folder: Path, count: int) -> list[Path]:
    """Writes a file of token ids for each prompt, with the answer; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    paths = []
    with runtime.load(bundle, threads="process") as model:
        for number, one in enumerate(itertools.islice(data.training_prompts(), count)):
            paths.append(path := folder / f"{number:04}.npy")
            if path.exists():
                continue
            text = one.get("prompt") or tokenizer.apply_chat_template(
                one["messages"], tokenize=False, add_generation_prompt=True
            )
            given = tokenizer(text)["input_ids"]
            [answer] = model.generate(given, max_new_tokens=NEW_TOKENS).finish().tokens
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, np.array([*given, *answer]))
            partial.rename(path)
            if not number % 20:
                print(f"{number} of {count} answers", flush=True)
    return paths


def batches(paths: list[Path]) -> Iterator[dict[str, torch.Tensor]]:
    """Texts, some together, padded on the right."""
    for start in range(0, len(paths), TOGETHER):
        rows = [torch.from_numpy(np.load(path)) for path in paths[start : start + TOGETHER]]
        mask = [torch.ones_like(row) for row in rows]
        yield {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="the checkpoint")
    parser.add_argument("-b", "--bundle", type=Path, required=True, help="writes the answers")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--exit", type=int, default=EXIT, help="its layer")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of the exit's head")
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    torch.manual_seed(0)
    paths = write_answers(given.bundle, given.model, given.output / "answers", given.prompts)
    model = from_pretrained(given.model, exits=[given.exit], adapters=[given.exit], untrained=True)
    counts: Counter[int] = Counter()
    for path in paths:
        counts.update(np.load(path).tolist())
    counts.update(dict.fromkeys(range(FREQUENT), 1))
    ids = frequent_tokens(counts, given.vocabulary, model.trunk.stop_tokens)
    model.set_draft_vocabularies({given.exit: ids})
    rows = keep_states(model.float(), batches(paths), given.output / "states")
    state = given.output / "state"
    arguments = TrainingArguments(
        str(state),
        max_steps=given.steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.01,
        max_grad_norm=1.0,
        per_device_train_batch_size=8,
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        seed=0,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = ExitTrainer(
        model, AdapterDistillation(), arguments, train_dataset=rows, data_collator=collate
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(state))
    folder = given.output / "checkpoint"
    model.save_pretrained(folder)
    for path in given.model.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            shutil.copy(path, folder)
    print(f"{folder}: an exit behind layer {given.exit}, whose head has {len(ids)} tokens")


if __name__ == "__main__":
    main()
