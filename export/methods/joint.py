"""Trains a classifier with exits: the whole model, or only the exit heads on a frozen backbone.

The loss is a weighted mean of the exits' cross-entropies (BranchyNet, arXiv:1709.01686). With
distillation each early exit also learns from the last exit's softened outputs (arXiv:1905.08094).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import Tensor
from edgeexit.errors import UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.saved import name_layers
from edgeexit.export.methods.method import (
    GIVE_EXITS,
    Batch,
    Forward,
    Loss,
    Method,
    check_share,
    column,
    is_number,
    whole_numbers,
)

TOKEN_TYPES = "token_type_ids"
"""Column of BERT that may be missing: its tokens then belong to one part."""


@dataclass(frozen=True)
class Joint(Method):
    """Trains backbone and exits of an `ExitClassifier` together.

    Batches hold the model's inputs and ``labels`` ``[batch]``, class numbers.

    Attributes:
        weights: One per trained exit, shallow to deep; the last exit is trained unless the backbone
            is frozen. None: equal weights.
        distillation: Share of the early exits' loss that comes from the last exit's outputs, from
            0 to 1.
        temperature: Softens both sides of the distillation.
        freeze_backbone: Train only the exit heads. Backbone and last head do not change, and run as
            on the device: without dropout and with fixed batch statistics.
    """

    weights: Sequence[float] | None = None
    distillation: float = 0.0
    temperature: float = 2.0
    freeze_backbone: bool = False

    def check(self, model: Any) -> None:
        if not isinstance(model, ExitClassifier):
            fix = "Use LayerSkip or AdapterDistillation for a language model."
            fix = fix if isinstance(model, ExitDecoder) else GIVE_EXITS
            raise UsageError(
                f"Joint trains classifiers with exits, not {type(model).__name__}", fix=fix
            )
        if self.freeze_backbone and not len(model.heads):
            raise UsageError(
                "Joint: there are no exit heads to train, and the backbone is frozen",
                fix=f"{name_layers(model.depth)}: from_pretrained(path, exits=..., "
                "untrained=True).",
            )
        weights = self._weights(model)
        if not all(weight >= 0 for weight in weights) or not sum(weights):
            raise UsageError(
                f"Joint: weights {weights} are invalid", fix="Give numbers >= 0, not all of them 0."
            )
        fix = "Give the share of the loss that comes from the last exit's outputs."
        check_share("Joint", "distillation", self.distillation, fix)
        if not is_number(self.temperature) or self.temperature <= 0:
            raise UsageError(
                f"Joint: temperature {self.temperature!r} is invalid", fix="Give a number above 0."
            )

    def part(self, model: ExitClassifier) -> nn.Module:
        return model.heads if self.freeze_backbone else model

    def inputs(self, model: ExitClassifier) -> list[str]:
        return [tensor.name for tensor in model.trunk.inputs]

    def loss(
        self, model: ExitClassifier, forward: Forward, inputs: Batch, step: int | None
    ) -> Loss:
        names = self.inputs(model)
        fix = f"The data set must have {', '.join(names)} and labels."
        labels = _labels(column(inputs, "labels", fix), model.trunk.classes, step)
        if TOKEN_TYPES not in inputs and "input_ids" in inputs:
            # As the model itself does: a text of one part.
            inputs = {**inputs, TOKEN_TYPES: torch.zeros_like(inputs["input_ids"])}
        given = {tensor.name: column(inputs, tensor.name, fix) for tensor in model.trunk.inputs}
        for tensor in model.trunk.inputs:
            given[tensor.name] = _input(model, tensor, given[tensor.name], step)
        logits = forward(**given)
        loss = exit_loss(
            logits,
            labels,
            weights=[*self._weights(model), *([0.0] if self.freeze_backbone else [])],
            distillation=self.distillation,
            temperature=self.temperature,
        )
        return loss, dict(zip(model.exit_names, logits, strict=True))

    def trains(self, model: ExitClassifier) -> list[str]:
        pairs = zip(model.heads, self._weights(model), strict=False)
        return [name for name, weight in pairs if weight > 0]

    def _weights(self, model: ExitClassifier) -> list[float]:
        """One weight per trained exit."""
        count = len(model.heads) + (not self.freeze_backbone)
        if self.weights is None:
            return [1.0] * count
        if isinstance(self.weights, str) or not all(map(is_number, self.weights)):
            raise UsageError(
                f"Joint: weights {self.weights!r} are invalid",
                fix=f"Give a list of {count} numbers >= 0.",
            )
        if len(self.weights) != count:
            raise UsageError(
                f"Joint: {len(self.weights)} weights for {count} exits",
                fix="Give one weight per trained exit, shallow to deep.",
            )
        return [float(weight) for weight in self.weights]


def _labels(labels: torch.Tensor, classes: int, step: int | None) -> torch.Tensor:
    """Class numbers ``[batch]``. Raises `UsageError` for anything else."""
    if labels.ndim != 1:
        raise UsageError(
            f"training: labels have the shape {list(labels.shape)}, not [{labels.shape[0]}]"
            if labels.ndim
            else "training: labels are a single number",
            fix="Give one class number per row (one-hot labels: labels.argmax(-1)).",
        )
    return whole_numbers(labels, "labels", classes, step)


def _input(
    model: ExitClassifier, tensor: Tensor, value: torch.Tensor, step: int | None
) -> torch.Tensor:
    """An input of the model. Raises `UsageError` if it does not fit."""
    if value.ndim != len(tensor.axes):
        raise UsageError(
            f"training: {tensor.name} has the shape {list(value.shape)}, the model takes "
            f"{list(tensor.axes)}",
            fix="Give rows of that shape, without the batch axis.",
        )
    for axis, size in zip(tensor.axes, value.shape, strict=True):
        most = model.trunk.limits.get(str(axis), size)
        if size > most:
            raise UsageError(
                f"training: {tensor.name}: {axis} is {size}, the model takes at most {most}",
                fix="Truncate the texts.",
            )
    if tensor.name == "input_ids":
        size = int(model.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        return whole_numbers(value, tensor.name, size, step)
    if tensor.name == TOKEN_TYPES:
        return whole_numbers(value, tensor.name, int(model.model.config.type_vocab_size), step)  # type: ignore[union-attr, arg-type]
    return value


def exit_loss(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 2.0,
) -> torch.Tensor:
    """Weighted mean of the exits' losses.

    With a = `distillation`, T = `temperature`, z = logits of an exit, y = those of the last one
    held constant: an early exit's loss is (1 - a) CE(z, label) + a T² KL(softmax(y / T) ||
    softmax(z / T)), the last one's is CE(y, label). T² keeps gradients comparable
    (arXiv:1503.02531).

    Args:
        logits: Of every exit, shallow to deep, each ``[batch, classes]``.
        labels: ``[batch]``, class numbers.
        weights: One per exit; 0 leaves out the exit's loss.
    """
    weights = [1.0] * len(logits) if weights is None else weights
    target = functional.log_softmax(logits[-1].detach() / temperature, dim=-1)
    total = logits[-1].new_zeros(())
    for number, (z, weight) in enumerate(zip(logits, weights, strict=True)):
        if weight == 0:
            continue
        loss = functional.cross_entropy(z, labels)
        if distillation and number < len(logits) - 1:
            soft = functional.log_softmax(z / temperature, dim=-1)
            distance = functional.kl_div(soft, target, reduction="batchmean", log_target=True)
            loss = (1 - distillation) * loss + distillation * temperature**2 * distance
        total = total + weight * loss
    return total / sum(weights)


__all__ = ["Joint", "exit_loss"]
