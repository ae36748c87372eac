"""`ExitTrainer`: transformers' `Trainer` for models with exits.

A method (`edgeexit.export.methods.method.Method`) gives the loss and names the part that is
trained. This module adds what `Trainer` leaves to models of transformers: frozen parts take no
gradients and stay in eval mode, the loss is the mean over all batches and processes of a step,
`edgeexit.export.pretrained.from_pretrained` reads the checkpoints, and a loss that is not finite
ends the training before it changes the weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import TrainOutput

from edgeexit.errors import ExportError, UsageError, first_line
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.saved import load_exits, read_exits
from edgeexit.export.methods.method import Batch, Method

logger = logging.getLogger(__name__)

METHOD = "method.txt"
"""File in a checkpoint: the training method and its settings."""

STATE = "trainer_state.json"
"""File that `Trainer` writes last into a checkpoint: without it a checkpoint is incomplete."""

UNSUPPORTED = (
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "use_liger_kernel",
    "gradient_checkpointing",
    "activation_checkpointing",
)
"""Training arguments that only work for transformers' own models and losses."""


class ExitTrainer(transformers.Trainer):
    """Trains exits with a method.

    Args:
        model: The model to train, in place. After `train` it is in eval mode and its exits are
            marked as trained.
        method: `Joint`, `LayerSkip`, `AdapterDistillation`, or your own.
        args: `transformers.TrainingArguments`: all settings that do not belong to the method.
        others: Further arguments of `transformers.Trainer`: `train_dataset`, `eval_dataset`,
            `data_collator`, `processing_class`, `callbacks`, `compute_metrics` (its predictions are
            the logits of every exit, shallow to deep).

    Weight decay (`args.weight_decay`) applies to matrices, but not to biases, norms, class tokens
    and positions.

    Raises:
        UsageError: The method's settings are invalid or do not fit the model, or an argument is not
            supported for models with exits.
        ExportError: In `train`: the loss is not finite, or a checkpoint is damaged.
    """

    # Losses are already the mean of a whole step. transformers up to 4.57 reads this from
    # `model_accepts_loss_kwargs`, which __init__ sets.
    loss_is_scaled_for_ga = True
    model_wrapped: nn.Module

    def __init__(
        self,
        model: ExitClassifier | ExitDecoder,
        method: Method,
        args: transformers.TrainingArguments,
        **others: Any,
    ) -> None:
        _check_kinds(method, args, others)
        method.check(model)
        _refuse(model, args, others)
        if not model.exit_layers and not getattr(model, "encoder_exit_layers", None):
            logger.warning("training: the model has no exits; only its last layer is trained")
        self.exits, self.method = model, method
        self._decaying = {name for name, weight in model.named_parameters() if _decays(weight)}
        super().__init__(model, args, **others)
        self.model_accepts_loss_kwargs = True
        self.data_collator = _Collator(self.data_collator)  # type: ignore[has-type]

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **others: Any
    ) -> TrainOutput:
        """Trains, or resumes from a checkpoint; arguments and result are those of `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True: the last complete checkpoint in
                ``args.output_dir``.
        """
        if self.train_dataset is None or _is_empty(self.train_dataset):
            what = "is missing" if self.train_dataset is None else "has no rows"
            raise UsageError(
                f"training: train_dataset {what}",
                fix="Give rows: ExitTrainer(..., train_dataset=rows).",
            )
        folder = _checkpoint(self.args.output_dir, resume_from_checkpoint)
        if folder is not None:
            self._check_method(folder)
            if (ended := self._ended(folder)) is not None:
                return ended
        with _only(self.method.part(self.exits), self.exits):
            try:
                output = super().train(folder and str(folder), **others)
            finally:
                self._unwrap()
        self.method.mark(self.exits)
        return output

    def _ended(self, folder: Path) -> TrainOutput | None:
        """The result of a training that has already made all its steps (`Trainer` would make one
        more step); else None."""
        state = transformers.TrainerState.load_from_json(str(folder / STATE))
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not 0 < self.args.max_steps <= state.global_step:
            return None
        load_weights(self.exits, folder)
        self.exits.eval()
        self.state = state
        self.method.mark(self.exits)
        return TrainOutput(state.global_step, 0.0, {})

    def _unwrap(self) -> None:
        """Removes the wrapper from the model; else another training would take it as already
        prepared for a precision and a device."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        for name in ("forward", "_is_accelerate_prepared"):
            self.exits.__dict__.pop(name, None)
        self.model_wrapped = self.exits

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The method's loss. In training it is weighted by the batch's share of the step's targets,
        so that several batches and processes give the same as one batch."""
        training = model.training
        if training:
            self.exits.eval()  # `Trainer` puts the whole model in train mode
            self.method.part(self.exits).train()
        step = self.state.global_step if training else None
        loss, logits = self.method.loss(self.exits, model, inputs, step)
        if training and not torch.isfinite(loss):
            raise ExportError(
                f"training: the loss of step {self.state.global_step + 1} is {loss.item()}",
                fix="Lower the learning rate or warm up longer; check inputs for NaN.",
            )
        if num_items_in_batch is not None:
            loss = loss * (self.method.count(inputs) / num_items_in_batch)
        return (loss, logits) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> torch.Tensor | None:
        """Number of targets in all batches of a step: the mean over processes, because their
        gradients are averaged."""
        if not batch_samples:
            return None
        counts = [self.method.count(batch).to(device, torch.float32) for batch in batch_samples]
        count = torch.stack(counts).sum()
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, reduction="mean")
        return count.clamp(min=1)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """Loss, logits of every exit, and labels of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        each = tuple(z.detach() for z in logits.values())
        return loss.detach(), each[0] if len(each) == 1 else each, inputs.get("labels")

    # Columns of a data set, and weight decay

    def _set_signature_columns_if_needed(self) -> None:
        """Sets the columns to read. `Trainer` takes them from `forward`, which accepts any name."""
        self._signature_columns = [*self.method.inputs(self.exits), "labels", "label", "label_ids"]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay."""
        # FSDP 1 renames and flattens parameters before the optimizer is created.
        names = {n: n.replace("_fsdp_wrapped_module.", "") for n, _ in model.named_parameters()}
        return [name for name, original in names.items() if original in self._decaying]

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model with its exits, by default into ``args.output_dir``, as
        `edgeexit.export.pretrained.from_pretrained` reads it. Call it in every process."""
        super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and "FULL" not in str(plugin.state_dict_type) and not _internal_call:
            # `Trainer` only writes shards here, which a separate tool would have to merge.
            self._save(output_dir, self.accelerator.get_state_dict(self.model))

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.exits.save_pretrained(folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        (folder / METHOD).write_text(f"{self.method}\n")
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.exits, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.exits, Path(self.state.best_model_checkpoint))

    def _check_method(self, folder: Path) -> None:
        path = folder / METHOD
        if path.is_file() and (written := path.read_text().strip()) != str(self.method):
            raise UsageError(
                f"{folder}: the checkpoint was trained with {written}, not with {self.method}",
                fix="Resume with the checkpoint's method, or train into another output_dir.",
            )


class _Collator:
    """A data collator whose exceptions say what can be done."""

    def __init__(self, inner: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        try:
            return self.inner(rows)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"training: rows cannot be put into one batch ({first_line(error)})",
                fix="Give rows with the same columns and shapes, or a data_collator that pads: "
                "transformers.DataCollatorWithPadding(tokenizer).",
            ) from error


def _is_empty(rows: Any) -> bool:
    return hasattr(rows, "__len__") and len(rows) == 0


def _check_kinds(method: Method, args: transformers.TrainingArguments, others: Any) -> None:
    """Raises `UsageError` for arguments of another kind."""
    if not isinstance(method, Method):
        given = method.__name__ if isinstance(method, type) else repr(method)
        raise UsageError(
            f"training: the method is {given}", fix="Give a method, as in Joint(distillation=0.5)."
        )
    if not isinstance(args, transformers.TrainingArguments):
        raise UsageError(
            f"training: args is a {type(args).__name__}",
            fix="Give transformers.TrainingArguments(output_dir, ...).",
        )
    for name in ("train_dataset", "eval_dataset"):
        if isinstance(others.get(name), (str, os.PathLike)):
            raise UsageError(
                f"training: {name} is {str(others[name])[:60]!r}, not a data set",
                fix="Give rows, each a dictionary of columns, as datasets.load_dataset reads them.",
            )


def load_weights(model: ExitClassifier | ExitDecoder, folder: Path) -> None:
    """Loads a checkpoint of `save_pretrained` into a model with the same exits.

    Raises:
        ExportError: A file is damaged, or belongs to another model or other exits.
    """
    saved = read_exits(folder)
    modules = model.heads if isinstance(model, ExitClassifier) else model.adapters
    pairs = [("layers", saved.layers, model.exit_layers)]
    if isinstance(model, ExitEncoderDecoder):
        pairs.append(("layers of the encoder", saved.encoder, model.encoder_exit_layers))
    for what, those, own in pairs:
        if those != own:
            raise ExportError(
                f"{folder}: the checkpoint has exits behind {what} {those}, the model behind {own}",
                fix="Resume with the checkpoint's exits, or train into another output_dir.",
            )
    try:
        # transformers' own reader supports shards, tied weights and renamed weights.
        read = type(model.model).from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
        model.model.load_state_dict(read.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"{folder}: not a checkpoint of this model ({first_line(error)})",
            fix="Resume from another checkpoint, or delete this one.",
        ) from error
    if len(modules):
        load_exits(modules, [int(name.removeprefix("exit_")) for name in modules], folder)


def _refuse(model: nn.Module, args: transformers.TrainingArguments, others: dict[str, Any]) -> None:
    """Raises `UsageError` for arguments that `Trainer` would accept but not follow."""
    if given := [name for name in ("model_init", "compute_loss_func") if others.get(name)]:
        raise UsageError(f"{given[0]} is not supported with exits", fix="Write a Method.")
    if given := [name for name in UNSUPPORTED if getattr(args, name, None)]:
        raise UsageError(f"{given[0]} is not supported with exits", fix="Leave it out.")
    wrapped = (args.fsdp_config or {}).get("transformer_layer_cls_to_wrap")
    if args.fsdp and wrapped and isinstance(model, ExitDecoder):
        raise UsageError(
            "fsdp_config: transformer_layer_cls_to_wrap is not supported for language models, "
            "because their layers do not run as one module",
            fix="Leave it out: all weights are sharded together.",
        )
    if args.n_gpu > 1:
        raise UsageError(
            f"training: one process with {args.n_gpu} GPUs (DataParallel) is not supported",
            fix="Start one process per GPU: torchrun --nproc-per-node "
            f"{args.n_gpu} or accelerate launch; or choose one GPU with CUDA_VISIBLE_DEVICES=0.",
        )


def _decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to biases, norms, class tokens and
    positions (their first axis is 1)."""
    return parameter.ndim > 1 and parameter.shape[0] > 1


def _checkpoint(output_dir: str, given: str | os.PathLike[str] | bool | None) -> Path | None:
    """The checkpoint to resume from."""
    if given is None or given is False:
        return None
    if given is not True:
        if not (Path(given) / STATE).is_file():
            raise UsageError(
                f"{given}: not a checkpoint to resume from (it has no {STATE})",
                fix="Give a folder checkpoint-N that a training wrote.",
            )
        return Path(given)
    if (found := last_checkpoint(output_dir)) is None:
        raise UsageError(
            f"{output_dir}: there is no checkpoint to resume from",
            fix="Train without resume_from_checkpoint first; save_steps sets how often "
            "checkpoints are written.",
        )
    return found


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The last complete checkpoint of a training; None if there is none. A checkpoint whose writing
    was interrupted does not count."""
    states = Path(output_dir).glob(f"checkpoint-*/{STATE}")
    steps = {int(n): file.parent for file in states if (n := file.parent.name[11:]).isdecimal()}
    return steps[max(steps)] if steps else None


@contextlib.contextmanager
def _only(part: nn.Module, model: nn.Module) -> Iterator[None]:
    """Freezes all but the part of a model, which is unfrozen and in eval mode afterwards."""
    parameters = set(map(id, part.parameters()))
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in parameters]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)


__all__ = ["ExitTrainer", "last_checkpoint", "load_weights"]
