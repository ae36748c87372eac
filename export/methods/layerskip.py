"""LayerSkip training (arXiv:2404.16710): a decoder with early exits that share its head.

It adds two things to plain language modelling. Layers are dropped at random, deeper ones more
often, so that states depend less on later layers. Early exits have losses of their own, through the
shared head and through their adapters if they have any. This training makes drafting with the first
layers worthwhile (``exact`` decoding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.methods.images import further_inputs
from edgeexit.export.methods.method import (
    GIVE_EXITS,
    IGNORED,
    Batch,
    Forward,
    Loss,
    Method,
    check_share,
    column,
    is_number,
    whole_numbers,
)


@dataclass(frozen=True)
class LayerSkip(Method):
    """Trains all weights of an `ExitDecoder`, adapters included, with layer dropout and early-exit
    losses.

    Every step trains the last layer and one exit, in rotation (the rotational curriculum), so a
    step runs one head more for any number of exits. An evaluation uses all exits and drops no
    layer.

    Batches hold ``input_ids`` ``[batch, seq]`` and, optionally, ``labels``: the same ids, with -100
    for tokens to ignore, as transformers' data collators make them. Padding is on the right. Those
    of a vision-language model also hold ``pixel_values`` ``[images, channels, height, width]``, in
    the order of their placeholders.

    Attributes:
        dropout: p_max, the chance that the last layer is dropped in a step; see `dropout_rates`.
            A layer is dropped for the whole batch, which saves its time (the paper draws per
            sample).
        exit_scale: e_scale of the paper, see `exit_weights`.
        weights: Exit layer -> weight of its loss; the last layer's weight is 1. None: the paper's
            weights, which are 0 for layer 1. With 0 for all exits and no dropout this is plain
            language modelling.
        distillation: Share of an exit's loss that comes from the last layer's outputs instead of
            the text. `exact` and `fast` decoding need exits that agree with the last layer.
    """

    dropout: float = 0.1
    exit_scale: float = 1.0
    weights: Mapping[int, float] | None = None
    distillation: float = 0.0

    def check(self, model: Any) -> None:
        check_decoder("LayerSkip", model)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UsageError(
                f"LayerSkip: dropout {self.dropout!r} is out of range",
                fix="Give a number from 0 to less than 1.",
            )
        fix = "Give the share of an exit's loss that comes from the last layer's outputs."
        check_share("LayerSkip", "distillation", self.distillation, fix)
        if not isinstance(self.weights, (Mapping, type(None))):
            raise UsageError(
                f"LayerSkip: weights are {self.weights!r}, not a mapping",
                fix="Give a weight for each exit layer, as in weights={2: 0.5}.",
            )
        if unknown := sorted(set(self.weights or {}) - set(model.exit_layers)):
            raise UsageError(
                f"LayerSkip: weights: layer {unknown[0]} has no exit (exits: {model.exit_layers})",
                fix="Give weights to exits only.",
            )
        weights = self._weights(model)
        if not all(is_number(weight) and weight >= 0 for weight in weights.values()):
            raise UsageError(f"LayerSkip: weights {weights} are invalid", fix="Give numbers >= 0.")

    def inputs(self, model: ExitDecoder) -> list[str]:
        return ["input_ids", "attention_mask", *model.read_by_embed]

    def loss(self, model: ExitDecoder, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        depth, weights = model.depth, self._weights(model)
        early = [layer for layer in model.exit_layers if weights.get(layer, 0.0) > 0]
        skipped: list[int] = []
        if step is not None:
            early = early[step % len(early) :][:1] if early else []
            # The step is the seed: the same draws in every process and after a resumption.
            draws = torch.rand(depth, generator=torch.Generator().manual_seed(step)).tolist()
            rates = dropout_rates(depth, self.dropout)
            skipped = [n for n, rate in enumerate(rates, start=1) if draws[n - 1] < rate]
        tokens, targets = checked_tokens(model, inputs, step)
        others = further_inputs(model, inputs, step)
        logits = forward(tokens, exits=[*early, depth], skipped=skipped, **others)
        loss = token_loss(logits[depth], targets)
        for layer in early:
            of_exit = token_loss(logits[layer], targets)
            if self.distillation:
                agreeing = agreement_loss(logits[layer], logits[depth], targets)
                of_exit = (1 - self.distillation) * of_exit + self.distillation * agreeing
            loss = loss + weights[layer] * of_exit
        total = 1 + sum(weights[layer] for layer in early)
        return loss / total, {f"exit_{layer}": z for layer, z in logits.items()}

    def count(self, model: ExitDecoder, inputs: Batch) -> torch.Tensor:
        return (tokens_and_targets(inputs)[1] != IGNORED).sum()

    def trains(self, model: ExitDecoder) -> list[str]:
        weights = self._weights(model)
        return [f"exit_{layer}" for layer in model.exit_layers if weights.get(layer, 0.0) > 0]

    def _weights(self, model: ExitDecoder) -> Mapping[int, float]:
        if self.weights is not None:
            return self.weights
        return exit_weights(model.exit_layers, model.depth, self.exit_scale)


def check_decoder(method: str, model: nn.Module, *, encoder: bool = False) -> None:
    """Raises `UsageError` unless a model writes text, without an encoder if not `encoder`."""
    reads = isinstance(model, ExitEncoderDecoder)
    if not isinstance(model, ExitDecoder) or (reads and not encoder):
        without = "" if encoder else " and without an encoder"
        classifies, writes = isinstance(model, ExitClassifier), isinstance(model, ExitDecoder)
        fix = "Use Joint for a classifier." if classifies else GIVE_EXITS
        raise UsageError(
            f"{method} trains language models with exits{without}, not {type(model).__name__}",
            fix="Write a Method for it." if writes else fix,
        )


def dropout_rates(depth: int, highest: float) -> list[float]:
    """Dropout chance of each layer: p_max (exp(l ln 2 / (L - 1)) - 1), l from 0.

    >>> [round(rate, 3) for rate in dropout_rates(3, 0.2)]
    [0.0, 0.083, 0.2]
    """
    last = max(depth - 1, 1)
    return [highest * (math.exp(layer * math.log(2) / last) - 1) for layer in range(depth)]


def exit_weights(exits: list[int], depth: int, scale: float) -> dict[int, float]:
    """Weights of the exits' losses, relative to 1 for the last layer: the paper's weights, which
    grow quadratically with depth, divided by that of the last layer.

    >>> exit_weights([2, 3], 4, scale=1.0)
    {2: 0.16666666666666666, 3: 0.5}
    """
    last = depth - 1 + scale * (depth - 2) * (depth - 1) / 2
    return {layer: scale * (layer - 1) * layer / 2 / last for layer in exits}


def tokens_and_targets(inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[batch, seq - 1]`` of a batch, and the token that follows each; -100 if that is
    padding or its label is -100.

    Raises:
        UsageError: There are no ids, shapes differ, or padding comes before a token.
    """
    ids = column(inputs, "input_ids", "Tokenize the texts: each row is a list of token ids.")
    mask = inputs.get("attention_mask")
    for name in ("input_ids", "labels", "attention_mask"):
        value = inputs.get(name, ids)
        if ids.ndim != 2 or value.shape != ids.shape:
            expected = "[batch, tokens]" if ids.ndim != 2 else f"{list(ids.shape)}, as input_ids"
            raise UsageError(
                f"training: {name} has the shape {list(value.shape)}, not {expected}",
                fix="Give a list of token ids per row; labels and attention_mask, if there are "
                "any, have one entry per token.",
            )
    targets = inputs.get("labels", ids)[:, 1:]
    if mask is not None:
        if bool((mask[:, :-1] < mask[:, 1:]).any()):
            raise UsageError(
                "training: a batch has padding before a token",
                fix='Pad on the right: tokenizer.padding_side = "right".',
            )
        targets = targets.masked_fill(mask[:, 1:] == 0, IGNORED)
    return ids[:, :-1], targets


def checked_tokens(
    model: ExitDecoder, inputs: Batch, step: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokens_and_targets`, after checks against the model.

    Raises:
        UsageError: A token is not in the vocabulary, or a row is too short or too long.
    """
    tokens, targets = tokens_and_targets(inputs)
    size, most = model.trunk.embedding.shape[0], model.trunk.positions
    if not tokens.shape[1]:
        raise UsageError(
            "training: the rows of a batch have one token, so there is none to predict",
            fix="Give rows of at least two tokens.",
        )
    if most is not None and tokens.shape[1] > most:
        raise UsageError(
            f"training: a row has {tokens.shape[1] + 1} tokens, the model has {most} positions",
            fix="Cut the texts into shorter rows.",
        )
    return (
        whole_numbers(tokens, "input_ids", size, step),
        whole_numbers(targets, "labels", size, step, ignored=IGNORED),
    )


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits ``[batch, seq, vocabulary]`` against targets ``[batch, seq]``
    that are not -100, in nats."""
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)


def agreement_loss(logits: torch.Tensor, last: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of an exit's logits ``[batch, seq, vocabulary]`` against the last layer's
    probabilities, over targets ``[batch, seq]`` that are not -100, in nats. No gradient flows into
    the last layer's logits."""
    expected = last.detach().flatten(0, 1).float().softmax(-1)
    each = functional.cross_entropy(logits.flatten(0, 1).float(), expected, reduction="none")
    counted = targets.flatten() != IGNORED
    return each.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


__all__ = [
    "IGNORED",
    "LayerSkip",
    "agreement_loss",
    "check_decoder",
    "checked_tokens",
    "dropout_rates",
    "exit_weights",
    "token_loss",
    "tokens_and_targets",
]
