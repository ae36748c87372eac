"""`Method`, the interface of a training method: the part of the model to train, and the loss of a
batch.

`edgeexit.export.methods.training.ExitTrainer` does the rest. A method that needs more than a loss
(a second optimizer, an evaluation every N steps) comes with a callback of transformers.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from edgeexit.errors import UsageError

Batch = Mapping[str, torch.Tensor]
"""Output of a data collator."""

Forward = Callable[..., Any]
"""Calls the model; same arguments and results."""

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A scalar, and logits by exit, from shallow to deep."""

IGNORED = -100
"""Label of a token that the loss ignores, as in transformers."""

GIVE_EXITS = (
    "Give it exits: edgeexit.export.pretrained.from_pretrained(path, exits=..., untrained=True)."
)


class Method(abc.ABC):
    """A training method.

    Subclasses are frozen dataclasses: checkpoints store their settings, and a training must be
    resumed with the same settings. `model` is always the `ExitClassifier` or `ExitDecoder` that was
    given to the trainer.

    Attributes:
        left_out: Why exits are not trained that `trains` does not name, for a warning.
    """

    left_out: ClassVar[str] = "their losses have weight 0; give them weights (weights=...)"

    @abc.abstractmethod
    def check(self, model: Any) -> None:
        """Raises `UsageError` for settings that are invalid, or invalid for this model."""

    @abc.abstractmethod
    def loss(self, model: Any, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        """The loss of a batch: a mean over its targets.

        Args:
            model: The model, to read its attributes. Do not call it: it may be wrapped in another
                module.
            forward: Calls the model, in the precision and on the devices of the training.
            inputs: The batch.
            step: Number of optimizer steps before this one: the same in every process, and after a
                resumption. Use it as the seed of random draws. None: an evaluation, without random
                draws.
        """

    @abc.abstractmethod
    def inputs(self, model: Any) -> list[str]:
        """Columns of a data set that `loss` reads, without labels."""

    def part(self, model: Any) -> nn.Module:
        """The part to train: the model, or a module in it. The rest is frozen."""
        return model

    def companions(self, model: Any) -> nn.ModuleDict:
        """New modules that are trained beside the model and not saved with it: an adversary, for
        example. While it trains, the model has them as its attribute ``companions``; checkpoints to
        resume from store them."""
        return nn.ModuleDict()

    def count(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Number of targets in a batch, of which `loss` is the mean; by default its rows."""
        return torch.tensor(len(next(iter(inputs.values()))))

    @abc.abstractmethod
    def trains(self, model: Any) -> list[str]:
        """Names of the early exits that this method trains: those whose loss has a weight. An exit
        is marked as trained when its logits were part of a step's loss."""


def column(inputs: Batch, name: str, fix: str) -> torch.Tensor:
    """A column of a batch. Raises `UsageError` if it does not exist."""
    if name not in inputs:
        raise UsageError(
            f"training: a batch has no {name!r} (it has {_listed(inputs)})",
            fix=fix,
        )
    return inputs[name]


def whole_numbers(
    values: torch.Tensor,
    name: str,
    size: int,
    step: int | None,
    *,
    ignored: int | None = None,
) -> torch.Tensor:
    """A column of class numbers or token ids as int64.

    Args:
        name: Name of the column, for messages.
        size: Number of classes or tokens.
        step: As in `Method.loss`. On a GPU, which would wait for it, the range is only checked in
            the first step and in evaluations.
        ignored: A value that stands for none.

    Raises:
        UsageError: They are not whole numbers, or not from 0 to ``size - 1``.
    """
    if values.is_floating_point() or values.is_complex():
        raise UsageError(
            f"training: {name} are {str(values.dtype).removeprefix('torch.')}, not whole numbers",
            fix=f"Convert {name} to integers (int64).",
        )
    values = values.long()
    if values.is_cuda and step:
        return values
    counted = values if ignored is None else values[values != ignored]
    if wrong := counted[(counted < 0) | (counted >= size)][:1].tolist():
        raise UsageError(
            f"training: {name} has the value {wrong[0]}, the model has 0 to {size - 1}",
            fix="Use the numbers that the model was made with."
            + ("" if ignored is None else f" {ignored} marks what the loss ignores."),
        )
    return values


def check_share(method: str, name: str, value: Any, fix: str) -> None:
    """Raises `UsageError` unless a setting is a number from 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise UsageError(f"{method}: {name} {value!r} is out of range (0 to 1)", fix=fix)


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


__all__ = [
    "GIVE_EXITS",
    "IGNORED",
    "Batch",
    "Forward",
    "Loss",
    "Method",
    "check_share",
    "column",
    "is_number",
    "whole_numbers",
]
