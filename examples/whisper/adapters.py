"""Trains an adapter for an early exit of a Whisper checkpoint's decoder, on the model's own
transcripts, and gives the exit a head over frequent tokens only.

    python examples/whisper/adapters.py -m tiny-en -o tiny-en-exits          # resumable
    python examples/whisper/adapters.py -m tiny-en -o DIR --smoke            # the way

The model stays as it is. What its encoder says of a sound is computed once and kept beside the
transcripts in ``OUTPUT/speech``. Needs ``edgeexit[export]`` and what `speech` needs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    TrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

from edgeexit.export.exits.draft_vocabulary import frequent_tokens
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speech import RATE, sentences, spoken

SOUNDS, TOGETHER = 400, 8
EXIT, VOCABULARY = 1, 8192
FREQUENT = 5000
"""Ids that a byte-pair vocabulary gave first are of frequent pieces."""
IGNORED = -100
STATES = "encoder_states"


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


class Transcripts(Dataset):
    """Rows of ``encoder_states`` ``[positions, width]`` and ``labels``."""

    def __init__(self, folder: Path, start: Sequence[int]) -> None:
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        for path in sorted(folder.glob("[0-9]*.npz")):
            arrays = np.load(path)
            for row, states in enumerate(arrays["states"]):
                tokens = arrays[f"tokens_{row}"]
                lacking = [] if list(tokens[: len(start)]) == list(start) else list(start)
                self._rows.append((states, np.array([*lacking, *tokens])))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        states, labels = self._rows[number]
        return {STATES: torch.from_numpy(states), "labels": torch.from_numpy(labels)}

    def tokens(self) -> Iterator[int]:
        """All tokens of the transcripts."""
        for _, labels in self._rows:
            yield from labels.tolist()


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest transcript."""
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
    return {STATES: torch.stack([row[STATES] for row in rows]).float(), "labels": labels}


def reading_states(model: Any) -> Any:
    """Lets a model train on its encoder's states, which need not be computed again."""
    model.source_columns = (STATES,)
    model.encode_columns = lambda columns, **_: (columns[STATES],)
    return model


def vocabulary(folder: Path, transcripts: Transcripts, model: Any, size: int) -> tuple[int, ...]:
    """Tokens of an exit's head: frequent ones, and all that end a text or say a time."""
    tokenizer = WhisperTokenizerFast.from_pretrained(folder)
    counts = Counter(transcripts.tokens())
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
    parser.add_argument("--steps", type=int, default=250)
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
    transcripts = Transcripts(speech, begins)
    arguments = TrainingArguments(
        str(state),
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        max_grad_norm=1.0,
        per_device_train_batch_size=8,
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        seed=given.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = ExitTrainer(
        reading_states(model.float()),
        AdapterDistillation(),
        arguments,
        train_dataset=transcripts,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(state))
    ids = vocabulary(given.model, transcripts, model, given.vocabulary)
    model.set_draft_vocabularies({given.exit: ids})
    folder = given.output / "checkpoint"
    model.save_pretrained(folder)
    for path in given.model.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            shutil.copy(path, folder)
    print(f"{folder}: an exit behind layer {given.exit}, whose head has {len(ids)} tokens")


if __name__ == "__main__":
    main()
