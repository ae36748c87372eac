"""Trains an adapter for an early exit of a Whisper checkpoint's decoder, on the model's own
transcripts, and gives the exit a head over frequent tokens only.

    python examples/whisper/adapters.py -m tiny-en -o tiny-en-exits          # resumable
    python examples/whisper/adapters.py -m tiny-en -o DIR --smoke            # the way

The model stays as it is, so its states are computed once and kept: what the encoder says of a
sound, beside the transcripts in ``OUTPUT/speech``, and the decoder's in ``OUTPUT/states``, about
2.5 MB a sound together. A step then runs the adapter and two small heads. Needs
``edgeexit[export]`` and what `speech` needs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    TrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

from edgeexit.export.exits.draft_vocabulary import frequent_tokens
from edgeexit.export.exits.encoder_decoder import ENCODED
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.kept_states import collate, keep_states
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speech import RATE, sentences, spoken

SOUNDS, TOGETHER = 1200, 8
EXIT, VOCABULARY = 1, 8192
FREQUENT = 5000
"""Ids that a byte-pair vocabulary gave first are of frequent pieces."""
IGNORED = -100


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration, folder: Path, output: Path, count: int, seed: int
) -> None:
    """Writes the model's transcripts of sounds, and its encoder's states, some sounds a file."""
    output.mkdir(parents=True, exist_ok=True)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    start = model.generation_config.decoder_start_token_id
    made: list[Any] = []
    for number, speech in enumerate(spoken(count, seed)):
        path = output / f"{number // TOGETHER:04}.npz"
        if path.exists():
            continue
        made.append(speech)
        if len(made) < TOGETHER and number + 1 < count:
            continue
        given = [one.samples for one in made]
        features = extractor(given, sampling_rate=RATE, return_tensors="pt").input_features
        states = model.get_encoder()(features).last_hidden_state
        written = model.generate(
            encoder_outputs=BaseModelOutput(states),
            do_sample=False,
            num_beams=1,
            max_new_tokens=180,
        )
        arrays = {"states": states.half().numpy()}
        for row, tokens in enumerate(written.tolist()):
            own = tokens[1:] if tokens[0] == start else tokens
            end = model.generation_config.eos_token_id
            own = own[: own.index(end) + 1] if end in own else own
            arrays[f"tokens_{row}"] = np.array(own, np.int64)
        np.savez(path.with_suffix(".partial.npz"), **arrays)
        path.with_suffix(".partial.npz").rename(path)
        made = []
        print(f"{number + 1} of {count} sounds", flush=True)


def written(folder: Path, start: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of transcripts: ``labels``, which begin with `start`, and what the encoder gave."""
    for path in sorted(folder.glob("[0-9]*.npz")):
        arrays, rows = np.load(path), []
        for row in range(len(arrays["states"])):
            tokens = arrays[f"tokens_{row}"].tolist()
            lacking = [] if tokens[: len(start)] == list(start) else list(start)
            rows.append(torch.tensor([*lacking, *tokens]))
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        yield {ENCODED: torch.from_numpy(arrays["states"]).float(), "labels": labels}


def vocabulary(folder: Path, speech: Path, model: Any, size: int) -> tuple[int, ...]:
    """Tokens of an exit's head: frequent ones, and all that end a text or say a time."""
    tokenizer = WhisperTokenizerFast.from_pretrained(folder)
    counts: Counter[int] = Counter()
    for batch in written(speech, ()):
        counts.update(batch["labels"][batch["labels"] != IGNORED].tolist())
    for text in sentences():
        counts.update(tokenizer(f" {text}", add_special_tokens=False).input_ids)
    decoding = model.split_model().decoding
    always = [*model.trunk.stop_tokens, *decoding.start_tokens, *range(256)]
    if decoding.timestamps is not None:
        always += range(decoding.timestamps.first, model.trunk.embedding.shape[0])
    counts.update(dict.fromkeys(range(FREQUENT), 1))
    return frequent_tokens(counts, max(size, len(set(always))), always)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sounds", type=int, default=SOUNDS)
    parser.add_argument("--exit", type=int, default=EXIT, help="layer of the decoder")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of the exit's head")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few sounds and steps")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    count, steps = (TOGETHER, 2) if given.smoke else (given.sounds, given.steps)
    speech, state = given.output / "speech", given.output / "state"
    original = WhisperForConditionalGeneration.from_pretrained(given.model).float().eval()
    transcribe(original, given.model, speech, count, given.seed)
    model = from_pretrained(given.model, exits=[given.exit], adapters=[given.exit], untrained=True)
    begins = [*model.encoder.trunk.start_tokens][1:]
    ids = vocabulary(given.model, speech, model, given.vocabulary)
    model.set_draft_vocabularies({given.exit: ids})
    rows = keep_states(model.float(), written(speech, begins), given.output / "states")
    arguments = TrainingArguments(
        str(state),
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        max_grad_norm=1.0,
        per_device_train_batch_size=8,
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        seed=given.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = ExitTrainer(
        model,
        AdapterDistillation(),
        arguments,
        train_dataset=rows,
        data_collator=collate,
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
