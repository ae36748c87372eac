"""Small trainings that several tests share, and that `torchrun` starts in several processes:

torchrun --nproc-per-node 2 tests/training.py FOLDER joint-ddp layerskip-fsdp
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families import bert, llama
from edgeexit.export.methods.free import Free
from edgeexit.export.methods.joint import Joint
from edgeexit.export.methods.layerskip import LayerSkip
from edgeexit.export.methods.method import Method
from edgeexit.export.methods.training import ExitTrainer
from tests.checkpoints import CLASSES, make_model
from tests.decoders import VOCABULARY, make_decoder

Rows = list[dict[str, torch.Tensor]]


def text_classifier(dropout: float = 0.1) -> ExitClassifier:
    """A BERT of three layers with exits behind the first two."""
    model = make_model("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        if hasattr(module, "dropout_prob"):  # that of attention, before transformers 5
            module.dropout_prob = dropout  # type: ignore[assignment]
    torch.manual_seed(3)
    return ExitClassifier(model, bert.trunk(model), [1, 2])  # type: ignore[arg-type]


def decoder(exits: list[int], adapters: list[int] | None = None) -> ExitDecoder:
    """A Llama of four layers."""
    model = make_decoder("llama")
    return ExitDecoder(model, llama.trunk(model), exits, adapters or [])  # type: ignore[arg-type]


def first_word(count: int, seed: int = 0) -> Rows:
    """The label is written in the first token, the one that exits look at."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 60, (count, 6), generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    ids[:, 0] = labels + 4
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    columns = zip(ids, torch.ones_like(ids), 0 * ids, labels, strict=True)
    return [dict(zip(names, row, strict=True)) for row in columns]


def counting(count: int, seed: int = 0) -> Rows:
    """Tokens that count upwards from a random start: the next one can be known."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, VOCABULARY, (count, 1), generator=generator)
    return [{"input_ids": ids} for ids in (starts + torch.arange(13)) % 20 + 1]


def ragged(count: int) -> Rows:
    """The same, of 2 to 13 tokens with padding behind."""
    generator = torch.Generator().manual_seed(1)
    rows = counting(count)
    for row in rows:
        length = torch.randint(2, 14, (), generator=generator)
        row["attention_mask"] = (torch.arange(13) < length).long()
    return rows


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    """On this processor, in silence, and without checkpoints unless they are asked for."""
    usual: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
    }
    # Before transformers 5 it stays there, and the process's next training has that precision, too.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    args = TrainingArguments(str(folder), **(usual | given))
    if args.fsdp and args.device.type == "cpu":
        # accelerate shards on GPUs only; where processors pass for such, torch does it there.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def losses(trainer: ExitTrainer) -> list[float]:
    """Of each step, the last run's at the end."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(
    folder: Path,
    model: ExitClassifier | ExitDecoder,
    method: Method,
    rows: Rows | IterableDataset,
    *,
    resume: bool | str = False,
    callbacks: list[TrainerCallback] | None = None,
    **given: Any,
) -> ExitTrainer:
    """Trains on rows, with training arguments as they are given."""
    args = arguments(folder, **given)
    trainer = ExitTrainer(model, method, args, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(TrainerCallback):
    """Ends a training after a step, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def in_all_processes(folder: Path, kind: str, rows: int, **given: Any) -> ExitTrainer:
    """A training that is alike in one process with `rows` rows a step, and in two with half of
    them."""
    # Where a gradient is nothing but rounding, Adam's usual epsilon makes whole steps of it.
    given |= {"max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "adam_epsilon": 1e-4}
    given |= {"per_device_train_batch_size": rows}
    if kind == "joint":  # without dropout, whose draws differ from process to process
        return train(folder, text_classifier(0.0), Joint(distillation=0.5), first_word(96), **given)
    if kind == "free":
        free = Free(supervision="distillation", adversary=0.3)
        return train(folder, decoder([1, 2], [1, 2]), free, ragged(96), **given)
    method = LayerSkip(dropout=0.5, weights={1: 1.0, 2: 0.5})
    return train(folder, decoder([1, 2], [1]), method, ragged(96), **given)


def main() -> None:
    """One of the processes that torchrun starts: a training for each name that is given."""
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        folder, (kind, wrapper) = Path(sys.argv[1]) / name, name.split("-")
        AcceleratorState._reset_state(reset_partial_state=True)
        given: dict[str, Any] = {"fsdp": True} if wrapper == "fsdp" else {}
        trainer = in_all_processes(folder, kind, 8, **given)
        assert isinstance(trainer.model, FSDPModule) == (wrapper == "fsdp")
        assert trainer.args.world_size == 2
        trainer.save_model()
        state = {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in trainer.model.state_dict().items()
        }
        torch.save(state, folder / f"rank-{trainer.args.process_index}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Gloo's threads now and then abort an interpreter that ends while they still run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
