"""What a method says of a training: the part of the model that learns, and the loss of a batch.

`edgeexit.export.methods.training.ExitTrainer` does the rest. A method that needs more than a loss
(a second optimizer, an evaluation every so many steps) brings a callback of transformers with it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from edgeexit.errors import UsageError

Batch = Mapping[str, torch.Tensor]
"""What a data collator gives."""

Forward = Callable[..., Any]
"""Calls the model, with its arguments and results."""

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A scalar, and logits by exit, from shallow to deep."""


class Method(abc.ABC):
    """How the exits of a model learn.

    Subclasses are frozen dataclasses: their settings are written into checkpoints, and a training
    is resumed with the settings that it was started with. `model` is always an `ExitClassifier` or
    `ExitDecoder`, as it was given to the trainer.
    """

    @abc.abstractmethod
    def check(self, model: Any) -> None:
        """Raises `UsageError` for settings that are invalid, or invalid for this model."""

    @abc.abstractmethod
    def loss(self, model: Any, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        """The loss of a batch: a mean over its targets.

        Args:
            model: For what it says of itself. Not called: it may be wrapped in another module.
            forward: Calls it, in the precision and on the devices of the training.
            inputs: The batch.
            step: Optimizer steps before this one: the same in every process, and after a
                resumption. What is drawn at random for a step is drawn from it. None: an
                evaluation, where nothing is.
        """

    @abc.abstractmethod
    def inputs(self, model: Any) -> list[str]:
        """Columns of a data set that `loss` reads, labels aside."""

    def part(self, model: Any) -> nn.Module:
        """What is trained: the model, or a module in it. The rest is frozen."""
        return model

    def count(self, inputs: Batch) -> torch.Tensor:
        """Number of targets that the loss of a batch is the mean of: its rows."""
        return torch.tensor(len(next(iter(inputs.values()))))

    @abc.abstractmethod
    def mark(self, model: Any) -> None:
        """Records in the model what was trained."""


def column(inputs: Batch, name: str, fix: str) -> torch.Tensor:
    """A column of a batch. Raises `UsageError` where there is none."""
    if name not in inputs:
        raise UsageError(
            f"training: a batch has no {name!r} (it has {_listed(inputs)})",
            fix=fix,
        )
    return inputs[name]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


__all__ = ["Batch", "Forward", "Loss", "Method", "column"]
