"""Trains the codelm example: a small Llama that completes Python, with exits for drafting.

    python examples/codelm/train.py                     # checkpoint/
    python examples/codelm/train.py --plain             # the same model without LayerSkip
    python examples/codelm/train.py --truncated 6       # a 6-layer model, without LayerSkip
    python examples/codelm/train.py --smoke -o DIR      # a few steps, to see that it works

LayerSkip is followed by a second, shorter phase in which the exits learn to say what the last layer
says, for that is what `exact` and `fast` ask of them.

Needs ``edgeexit[export]``; ``--compiled`` halves the time where there is a C++ compiler. An
interrupted training goes on where it was saved (``--state``, by default below local/codelm). Test
files are only read for perplexities, which nothing is chosen by.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families.llama import trunk
from edgeexit.export.methods.layerskip import TokenBatches, next_token_loss, train_layerskip

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402

LAYERS, EXITS = 12, [2, 4, 8]
WIDTH, HEADS, KEYS, INNER = 256, 4, 2, 512
POSITIONS = 1024
SEQUENCE, TOKENS = 512, 2048
"""Longest passage, and how many tokens a step sees."""

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


def make_batches(tokens: np.ndarray, seed: int) -> TokenBatches:
    """Random passages ``[TOKENS / seq, seq + 1]`` of the training text, fixed by the step."""

    def batches(step: int) -> torch.Tensor:
        length = SEQUENCE if step % SHORT_STEPS == 0 else SEQUENCE // 2
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(tokens) - length - 1, size=TOKENS // length)
        rows = [tokens[start : start + length + 1].astype(np.int64) for start in starts]
        return torch.from_numpy(np.stack(rows))

    return batches


@torch.no_grad()
def perplexities(decoder: ExitDecoder, tokens: np.ndarray, limit: int = 200) -> dict[str, float]:
    """Perplexity per token of every exit on the first passages of a text."""
    totals: dict[int, list[float]] = {}
    for start in range(0, min(len(tokens) - SEQUENCE - 1, limit * SEQUENCE), SEQUENCE):
        row = tokens[start : start + SEQUENCE + 1].astype(np.int64)
        ids = torch.from_numpy(row)[None]
        for layer, logits in decoder(ids[:, :-1]).items():
            totals.setdefault(layer, []).append(next_token_loss(logits, ids).item())
    return {f"exit_{k}": round(math.exp(float(np.mean(v))), 3) for k, v in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="where to write; default: see above")
    parser.add_argument("--plain", action="store_true", help="no dropout, no losses at exits")
    parser.add_argument("--truncated", type=int, metavar="N", help="a plain model of N layers")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps; needs -o")
    parser.add_argument("--state", type=Path, help="file to save the training in and resume from")
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
    state = given.state or (None if given.smoke else work / f"{kind}.state")
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = output / "tokenizer.json"
    data.train_tokenizer(tokenizer)
    text, test = (data.tokens(split, tokenizer) for split in ("train", "test"))
    print(f"{len(data.files('train'))} files, {len(text)} tokens to train on", file=sys.stderr)

    torch.manual_seed(1)
    model = make_model(layers)
    decoder = ExitDecoder(model, trunk(model), [] if plain else EXITS)
    steps = SMOKE_STEPS if given.smoke else given.steps

    def progress(done: int, of: int, loss: float) -> None:
        if done % 20 == 0 or done == of:
            print(f"step {done}/{of}  loss {loss:.4f}", file=sys.stderr, flush=True)

    if given.compiled:
        decoder.compile()
    common: dict[str, Any] = {
        "weight_decay": WEIGHT_DECAY,
        "autocast": torch.bfloat16,
        "save_every": 100,
        "progress": progress,
    }
    train_layerskip(
        decoder,
        make_batches(text, seed=1),
        steps=steps,
        learning_rate=LEARNING_RATE,
        warmup=min(WARMUP, steps // 2),
        dropout=0.0 if plain else DROPOUT,
        weights=None if plain else EXIT_WEIGHTS,
        state_file=state,
        **common,
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
        train_layerskip(
            decoder,
            make_batches(text, seed=2),
            steps=facts["agreeing_steps"],
            learning_rate=AGREEING_RATE,
            warmup=min(AGREEING_WARMUP, facts["agreeing_steps"] // 2),
            dropout=0.0,
            weights=AGREEING_WEIGHTS,
            distillation=DISTILLATION,
            state_file=state and state.with_stem(f"{state.stem}-agreeing"),
            **common,
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
