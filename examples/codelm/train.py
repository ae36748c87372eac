"""Trains the codelm example: a small Llama that completes Python, with exits for drafting.

    python examples/codelm/train.py                     # checkpoint/
    python examples/codelm/train.py --plain             # the same model without LayerSkip
    python examples/codelm/train.py --truncated 6       # a 6-layer model, without LayerSkip
    python examples/codelm/train.py --smoke -o DIR      # a few steps, to see that it works

LayerSkip is followed by a second, shorter phase in which the exits learn to say what the last layer
says, for that is what `exact` and `fast` ask of them.

Needs ``edgeexit[export]``; ``--compiled`` halves the time where there is a C++ compiler. Training
writes checkpoints below local/codelm (``--checkpoints``); ``--resume`` goes on from the last of
them. Test files are only read for perplexities, which nothing is chosen by.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families.llama import trunk
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.layerskip import LayerSkip, token_loss
from edgeexit.export.methods.method import Method
from edgeexit.export.methods.training import ExitTrainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402

LAYERS, EXITS = 12, [2, 4, 8]
WIDTH, HEADS, KEYS, INNER = 256, 4, 2, 512
POSITIONS = 1024
SEQUENCE, TOKENS = 512, 2048
"""Longest passage, and how many tokens a step sees."""

PASSAGES = TOKENS // SEQUENCE
SHORT_STEPS = 4
"""All but one in so many steps take passages of half that length: attention costs less."""

STEPS, SMOKE_STEPS = 3200, 4
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 150, 0.1
DROPOUT = 0.1
EXIT_WEIGHTS = {2: 1.0, 4: 0.5, 8: 0.25}
"""Far above the paper's for the early exits, which here must draft well after a short training."""

AGREEING_STEPS, AGREEING_RATE, AGREEING_WARMUP = 1000, 6e-4, 50
AGREEING_WEIGHTS = {2: 2.0, 4: 1.0, 8: 0.5}
DISTILLATION = 0.9
"""The second phase: its steps, and how much of an exit's loss comes from the last layer."""


def make_model(layers: int) -> LlamaForCausalLM:
    """A narrow Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


class Passages(IterableDataset):
    """Random passages of the training text, ``SEQUENCE`` tokens and one more at a time: one long
    passage, or two short ones.

    `PASSAGES` of these make a batch, which depends on its number alone: a resumed training sees
    those that an uninterrupted one would have seen.
    """

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self.tokens, self.seed = tokens, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in itertools.count():
            length = SEQUENCE if number % SHORT_STEPS == 0 else SEQUENCE // 2
            rng = np.random.default_rng((self.seed, number))
            starts = rng.integers(len(self.tokens) - length - 1, size=TOKENS // length)
            rows = [self.tokens[start : start + length + 1].astype(np.int64) for start in starts]
            yield from torch.from_numpy(np.stack(rows)).chunk(PASSAGES)


def together(passages: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of passages."""
    return {"input_ids": torch.cat(passages)}


@torch.no_grad()
def perplexities(decoder: ExitDecoder, tokens: np.ndarray, limit: int = 200) -> dict[str, float]:
    """Perplexity per token of every exit on the first passages of a text."""
    totals: dict[int, list[float]] = {}
    for start in range(0, min(len(tokens) - SEQUENCE - 1, limit * SEQUENCE), SEQUENCE):
        row = tokens[start : start + SEQUENCE + 1].astype(np.int64)
        ids = torch.from_numpy(row)[None]
        for layer, logits in decoder(ids[:, :-1]).items():
            totals.setdefault(layer, []).append(token_loss(logits, ids[:, 1:]).item())
    return {f"exit_{k}": round(math.exp(float(np.mean(v))), 3) for k, v in totals.items()}


def train(
    decoder: ExitDecoder,
    method: Method,
    passages: Passages,
    checkpoints: Path,
    resume: bool,
    *,
    steps: int,
    learning_rate: float,
    warmup: int,
) -> None:
    """One phase of the training."""
    arguments = TrainingArguments(
        str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=PASSAGES,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(warmup, steps // 2),
        weight_decay=WEIGHT_DECAY,
        bf16=True,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = ExitTrainer(
        decoder, method, arguments, train_dataset=passages, data_collator=together
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints) if resume else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="where to write; default: see above")
    parser.add_argument("--plain", action="store_true", help="no dropout, no losses at exits")
    parser.add_argument("--truncated", type=int, metavar="N", help="a plain model of N layers")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps; needs -o")
    parser.add_argument("--checkpoints", type=Path, help="folder of the training's checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    given = parser.parse_args()
    if given.smoke and given.output is None:
        parser.error("--smoke needs -o: it would replace the real checkpoint")
    if given.threads:
        torch.set_num_threads(given.threads)
    plain = given.plain or given.truncated is not None
    layers = given.truncated or LAYERS
    kind = f"truncated-{layers}" if given.truncated else "plain" if plain else "layerskip"
    work = HERE.parent.parent / "local/codelm"
    default = HERE / "checkpoint" if kind == "layerskip" else work / kind
    output = given.output or default
    checkpoints = given.checkpoints or (output if given.smoke else work) / "checkpoints" / kind
    if last_checkpoint(checkpoints) and not given.resume:
        parser.error(f"{checkpoints} holds a training: --resume it, or delete it to start anew")
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = output / "tokenizer.json"
    data.train_tokenizer(tokenizer)
    text, test = (data.tokens(split, tokenizer) for split in ("train", "test"))
    print(f"{len(data.files('train'))} files, {len(text)} tokens to train on", file=sys.stderr)

    torch.manual_seed(1)
    model = make_model(layers)
    decoder = ExitDecoder(model, trunk(model), [] if plain else EXITS)
    steps = SMOKE_STEPS if given.smoke else given.steps

    if given.compiled:
        decoder.compile()
    train(
        decoder,
        LayerSkip(dropout=0.0, weights={})
        if plain
        else LayerSkip(dropout=DROPOUT, weights=EXIT_WEIGHTS),
        Passages(text, seed=1),
        checkpoints,
        given.resume,
        steps=steps,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
    )
    facts: dict[str, Any] = {
        "kind": kind,
        "layers": layers,
        "steps": steps,
        "python": sys.version.split()[0],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if not plain:
        facts["first_phase_test_perplexity"] = perplexities(decoder, test)
        facts["agreeing_steps"] = SMOKE_STEPS if given.smoke else AGREEING_STEPS
        train(
            decoder,
            LayerSkip(dropout=0.0, weights=AGREEING_WEIGHTS, distillation=DISTILLATION),
            Passages(text, seed=2),
            checkpoints / "agreeing",
            given.resume,
            steps=facts["agreeing_steps"],
            learning_rate=AGREEING_RATE,
            warmup=AGREEING_WARMUP,
        )
    # Measured as it is stored: in float16.
    model.half().float()
    facts["test_perplexity"] = perplexities(decoder, test)
    model.half()
    decoder.save_pretrained(output)
    (output / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": data.END}) + "\n"
    )
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
