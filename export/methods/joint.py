"""Training of exits: all of the model together, or the exit heads alone on a frozen backbone.

`train_joint` minimises a weighted sum of the exits' cross-entropies (BranchyNet, arXiv:1709.01686),
`train_heads` the same over the heads only. With distillation each early exit also learns from the
last one's softened answers (arXiv:1905.08094). Both are functions that a script calls: it brings
the batches, they bring optimizer, schedule and a state file from which an interrupted training goes
on.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.methods.training import Progress, train

Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]
Batches = Callable[[int], Batch]
"""``batches(step)`` gives that step's inputs and labels ``[batch]``. A function of the step, not an
iterator: a resumed training asks for the very batches that an uninterrupted one would have seen."""


def train_joint(
    classifier: ExitClassifier,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: int = 0,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 2.0,
    state_file: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    progress: Progress | None = None,
) -> list[float]:
    """Trains backbone and exits together with AdamW, linear warm-up and cosine decay.

    Args:
        classifier: What to train, in place; left in eval mode with `trained` set.
        batches: ``batches(step) -> (inputs, labels)``.
        steps: Optimizer steps in all, those of earlier runs included.
        learning_rate: Peak, reached after `warmup` steps.
        weight_decay: For matrices; biases, norms and embeddings of one row have none.
        warmup: Steps of linear warm-up.
        weights: One per exit, shallow to deep, the last exit included. None: equal.
        distillation: Share of the early exits' loss that comes from the last exit's answers,
            from 0 to 1.
        temperature: Softens both sides of the distillation.
        state_file: Where training is saved every `save_every` steps and resumed from. Delete it to
            start anew.
        progress: Told of every step.

    Returns:
        The loss of each step made by this call.

    Raises:
        UsageError: An argument that cannot be meant.
        ExportError: `state_file` is not of this training, or the loss is not finite.
    """
    return _train(
        classifier,
        classifier,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        weights=weights,
        distillation=distillation,
        temperature=temperature,
        state_file=state_file,
        save_every=save_every,
        progress=progress,
    )


def train_heads(
    classifier: ExitClassifier,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 0,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 2.0,
    state_file: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    progress: Progress | None = None,
) -> list[float]:
    """Trains the exit heads alone; backbone and last head stay bit for bit as they are.

    The backbone runs as it will on the device, without dropout and with its batch statistics fixed.
    The arguments are those of `train_joint`; `weights` has one entry per early exit.
    """
    if not len(classifier.heads):
        raise UsageError(
            "train_heads: the classifier has no exit heads", fix="Read it with exits=[...]."
        )
    return _train(
        classifier,
        classifier.heads,
        batches,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        weights=weights,
        distillation=distillation,
        temperature=temperature,
        state_file=state_file,
        save_every=save_every,
        progress=progress,
    )


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
        weights: One per exit; 0 leaves an exit's own loss out.
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


def _train(
    classifier: ExitClassifier,
    part: nn.Module,
    batches: Batches,
    *,
    weights: Sequence[float] | None,
    distillation: float,
    temperature: float,
    **how: Any,
) -> list[float]:
    """Trains the classifier, or its heads, once the arguments were found to make sense."""
    joint, early = part is classifier, len(classifier.heads)
    count = early + 1 if joint else early
    chosen = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(chosen) != count:
        raise UsageError(
            f"weights: {len(chosen)} for {count} exits", fix="Give one per exit, shallow to deep."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in chosen) or not sum(chosen):
        raise UsageError(
            f"weights: {chosen} cannot weigh losses", fix="Give numbers >= 0, not all of them 0."
        )
    if not 0 <= distillation <= 1 or not temperature > 0:
        raise UsageError(
            f"distillation {distillation}, temperature {temperature} cannot be meant",
            fix="distillation lies between 0 and 1, temperature above 0.",
        )
    loss_of = functools.partial(
        exit_loss,
        weights=chosen if joint else [*chosen, 0.0],
        distillation=distillation,
        temperature=temperature,
    )

    def loss_at(step: int) -> torch.Tensor:
        inputs, labels = batches(step)
        return loss_of(classifier(**inputs), labels)

    settings = f"{'joint' if joint else 'heads'} {weights} {distillation} {temperature}"
    losses = train(classifier, part, loss_at, settings=settings, **how)
    classifier.trained = True
    classifier.provenance["exits"] = "trained"
    return losses


__all__ = ["Batch", "Batches", "exit_loss", "train_heads", "train_joint"]
