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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_utils import TrainOutput

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.origins import note_origins
from edgeexit.export.methods.arguments import check_kinds, refuse_unsupported
from edgeexit.export.methods.checkpoints import (
    METHOD,
    STATE,
    checkpoint_to_resume,
    load_companions,
    load_weights,
    save_companions,
    trained_before,
)
from edgeexit.export.methods.method import Batch, Method
from edgeexit.export.methods.rows import ClearCollator, check_data_sets, is_empty

logger = logging.getLogger(__name__)


class ExitTrainer(transformers.Trainer):
    """Trains exits with a method.

    Args:
        model: The model to train, in place. After `train` it is in eval mode, and the exits that
            had a loss in at least one step are marked as trained (`exit_origins`).
        method: A class of this package (`Joint`, `Free`, ...), or your own.
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
        check_kinds(method, args)
        method.check(model)
        refuse_unsupported(model, args, others)
        check_data_sets(args, others)
        if not model.exit_origins:
            logger.warning("training: the model has no exits; only its last layer is trained")
        self.exits, self.method = model, method
        with torch.random.fork_rng(devices=()):  # the same in every process
            torch.manual_seed(args.seed)
            self._companions = method.companions(model)
        self._trained: set[str] = set()
        named = [*model.named_parameters()]
        named += [(f"companions.{name}", one) for name, one in self._companions.named_parameters()]
        self._decaying = {name for name, weight in named if _decays(weight)}
        super().__init__(model, args, **others)
        self.model_accepts_loss_kwargs = True
        self.data_collator = ClearCollator(self.data_collator)  # type: ignore[has-type]

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **others: Any
    ) -> TrainOutput:
        """Trains, or resumes from a checkpoint; arguments and result are those of `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True: the last complete checkpoint in
                ``args.output_dir``.
        """
        if self.train_dataset is None or is_empty(self.train_dataset):
            what = "is missing" if self.train_dataset is None else "has no rows"
            raise UsageError(
                f"training: train_dataset {what}",
                fix="Give rows: ExitTrainer(..., train_dataset=rows).",
            )
        folder = checkpoint_to_resume(self.args.output_dir, resume_from_checkpoint)
        if folder is not None:
            self._check_method(folder)
            if (ended := self._ended(folder)) is not None:
                return ended
        self._trained = set() if folder is None else trained_before(folder)
        self._warn_of_exits_left_out()
        with _beside(self.exits, self._companions), _only(self.method.part(self.exits), self.exits):
            try:
                output = super().train(folder and str(folder), **others)
            finally:
                self._unwrap()
        self._note_trained()
        return output

    def _warn_of_exits_left_out(self) -> None:
        trained = self.method.trains(self.exits)
        kinds = {_kind(name) for name in trained}  # other parts are left out by a method's nature
        names = [name for name in self.exits.exit_origins if not kinds or _kind(name) in kinds]
        if left_out := [name for name in names if name not in trained]:
            logger.warning(
                "training: %s does not train %s: %s",
                type(self.method).__name__,
                ", ".join(left_out),
                self.method.left_out,
            )

    def _note_trained(self) -> None:
        if not self._trained and self.method.trains(self.exits):
            logger.warning(
                "training: no exit was trained, since no step had a learning rate above 0 and a "
                "target (labels other than -100)"
            )
        note_origins(self.exits, dict.fromkeys(self._trained, "trained"))

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
        note_origins(self.exits, dict.fromkeys(trained_before(folder), "trained"))
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
        if training and any(group["lr"] > 0 for group in self.optimizer.param_groups):
            new = set(logits).intersection(self.method.trains(self.exits)) - self._trained
            if new and bool(self.method.count(self.exits, inputs)):  # a GPU is asked once per exit
                self._trained |= new
        if num_items_in_batch is not None:
            loss = loss * (self.method.count(self.exits, inputs) / num_items_in_batch)
        return (loss, logits) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> torch.Tensor | None:
        """Number of targets in all batches of a step: the mean over processes, because their
        gradients are averaged."""
        if not batch_samples:
            return None
        counts = [
            self.method.count(self.exits, batch).to(device, torch.float32)
            for batch in batch_samples
        ]
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
        known = self.exits.exit_origins
        self.exits.exit_origins = known | dict.fromkeys(self._trained, "trained")
        try:
            self.exits.save_pretrained(folder, state_dict)
        finally:
            self.exits.exit_origins = known
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
            load_companions(self._companions, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            save_companions(self._companions, folder)
        super()._save_checkpoint(model, trial)

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


def _kind(exit_name: str) -> str:
    """``tower_exit_4`` -> ``tower_exit``."""
    return exit_name.rpartition("_")[0]


def _decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to biases, norms, class tokens and
    positions (their first axis is 1)."""
    return parameter.ndim > 1 and parameter.shape[0] > 1


@contextlib.contextmanager
def _beside(model: nn.Module, companions: nn.ModuleDict) -> Iterator[None]:
    """Attaches modules to a model while it trains (`Method.companions`)."""
    if not len(companions):
        yield
        return
    model.add_module("companions", companions)
    try:
        yield
    finally:
        del model.companions


@contextlib.contextmanager
def _only(part: nn.Module, model: nn.Module) -> Iterator[None]:
    """Freezes all but the part of a model and its companions. All is unfrozen and in eval mode
    afterwards."""
    trained = [part, getattr(model, "companions", nn.Module())]
    parameters = {id(parameter) for module in trained for parameter in module.parameters()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in parameters]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)


__all__ = ["ExitTrainer"]
