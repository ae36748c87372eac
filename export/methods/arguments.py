"""Arguments that `edgeexit.export.methods.training.ExitTrainer` refuses: those of another kind, and
those that transformers' `Trainer` would accept but not follow for models with exits."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.method import Method

UNSUPPORTED = (
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "use_liger_kernel",
    "gradient_checkpointing",
    "activation_checkpointing",
)
"""Training arguments that only work for transformers' own models and losses."""


def check_kinds(method: Method, args: transformers.TrainingArguments) -> None:
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


def refuse_unsupported(
    model: nn.Module, args: transformers.TrainingArguments, others: dict[str, Any]
) -> None:
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


__all__ = ["UNSUPPORTED", "check_kinds", "refuse_unsupported"]
