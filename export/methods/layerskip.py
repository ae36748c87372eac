"""LayerSkip training (arXiv:2404.16710): a decoder that can be left early with its one shared head.

Two things are added to plain language modelling. Layers are dropped at random, deeper ones more
often, so that no state relies on what comes next; and early exits have losses of their own through
the shared head, and through their adapters where they have any. It is what makes drafting with the
first layers worth while (``exact`` decoding).
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
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.methods.method import Batch, Forward, Loss, Method, column

IGNORED = -100
"""The label of a token that is not learned, as everywhere in transformers."""


@dataclass(frozen=True)
class LayerSkip(Method):
    """Trains all weights of an `ExitDecoder`, those of adapters too, with layer dropout and
    early-exit losses.

    Every step trains the last layer's answer and that of one exit, taking turns (the rotational
    curriculum; one head more a step whatever the number of exits). An evaluation asks all of them
    and drops no layer.

    Batches hold ``input_ids`` ``[batch, seq]`` and, where not every token is to be learned,
    ``labels``: the same ids, -100 where there is nothing to learn, as transformers' data collators
    make them. Padding is on the right.

    Attributes:
        dropout: p_max, the chance that the last layer is dropped from a step; see `dropout_rates`.
            A layer is dropped for the whole batch, which saves its time (the paper draws per
            sample).
        exit_scale: e_scale of the paper, see `exit_weights`.
        weights: Exit layer -> weight of its loss beside 1 for the last layer, in place of the
            paper's. 0 for all of them and no dropout is plain language modelling.
        distillation: Share of an exit's loss that comes from the last layer's answers instead of
            the text. `exact` and `fast` ask exits to agree with the last layer, not to be right.
    """

    dropout: float = 0.1
    exit_scale: float = 1.0
    weights: Mapping[int, float] | None = None
    distillation: float = 0.0

    def check(self, model: Any) -> None:
        check_decoder("LayerSkip", model)
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f"LayerSkip: dropout {self.dropout} is out of range",
                fix="Give a number from 0 to less than 1.",
            )
        if not 0 <= self.distillation <= 1:
            raise UsageError(
                f"LayerSkip: distillation {self.distillation} is out of range (0 to 1)",
                fix="Give the share of an exit's loss that the last layer's answers make up.",
            )
        if unknown := sorted(set(self.weights or {}) - set(model.exit_layers)):
            raise UsageError(
                f"LayerSkip: weights: layer {unknown[0]} has no exit (exits: {model.exit_layers})",
                fix="Give weights to exits only.",
            )
        weights = self._weights(model)
        if not all(math.isfinite(one) and one >= 0 for one in weights.values()):
            raise UsageError(f"LayerSkip: weights {weights} are invalid", fix="Give numbers >= 0.")

    def inputs(self, model: ExitDecoder) -> list[str]:
        return ["input_ids", "attention_mask"]

    def loss(self, model: ExitDecoder, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        depth, weights = model.depth, self._weights(model)
        early = [layer for layer in model.exit_layers if weights.get(layer, 0.0) > 0]
        skipped: list[int] = []
        if step is not None:
            early = early[step % len(early) :][:1] if early else []
            # From the step alone: alike in every process, and after a resumption.
            draws = torch.rand(depth, generator=torch.Generator().manual_seed(step)).tolist()
            rates = dropout_rates(depth, self.dropout)
            skipped = [n for n, rate in enumerate(rates, start=1) if draws[n - 1] < rate]
        tokens, targets = tokens_and_targets(inputs)
        logits = forward(tokens, exits=[*early, depth], skipped=skipped)
        loss = token_loss(logits[depth], targets)
        for layer in early:
            of_exit = token_loss(logits[layer], targets)
            if self.distillation:
                agreeing = agreement_loss(logits[layer], logits[depth], targets)
                of_exit = (1 - self.distillation) * of_exit + self.distillation * agreeing
            loss = loss + weights[layer] * of_exit
        total = 1 + sum(weights[layer] for layer in early)
        return loss / total, {f"exit_{layer}": one for layer, one in logits.items()}

    def count(self, inputs: Batch) -> torch.Tensor:
        return (tokens_and_targets(inputs)[1] != IGNORED).sum()

    def mark(self, model: ExitDecoder) -> None:
        if any(self._weights(model).values()):
            model.provenance["exits"] = "trained"
            if len(model.adapters):
                model.provenance["adapters"] = "trained"

    def _weights(self, model: ExitDecoder) -> Mapping[int, float]:
        if self.weights is not None:
            return self.weights
        return exit_weights(model.exit_layers, model.depth, self.exit_scale)


def check_decoder(method: str, model: nn.Module) -> None:
    """Raises `UsageError` for a model that is not a language model without an encoder."""
    if not isinstance(model, ExitDecoder) or isinstance(model, ExitEncoderDecoder):
        raise UsageError(
            f"{method} trains language models without an encoder, not {type(model).__name__}",
            fix="Use Joint for a classifier.",
        )


def dropout_rates(depth: int, highest: float) -> list[float]:
    """Chance of every layer to be dropped: p_max (exp(l ln 2 / (L - 1)) - 1), l from 0.

    >>> [round(rate, 3) for rate in dropout_rates(3, 0.2)]
    [0.0, 0.083, 0.2]
    """
    last = max(depth - 1, 1)
    return [highest * (math.exp(layer * math.log(2) / last) - 1) for layer in range(depth)]


def exit_weights(exits: list[int], depth: int, scale: float) -> dict[int, float]:
    """Weights of the exits' losses beside 1 for the last layer's: the paper's, which grow
    quadratically with depth, divided by that of the last layer.

    >>> exit_weights([2, 3], 4, scale=1.0)
    {2: 0.16666666666666666, 3: 0.5}
    """
    last = depth - 1 + scale * (depth - 2) * (depth - 1) / 2
    return {layer: scale * (layer - 1) * layer / 2 / last for layer in exits}


def tokens_and_targets(inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[batch, seq - 1]`` of a batch and what follows each; -100 where that is padding
    or is not to be learned.

    Raises:
        UsageError: There are no ids, or padding comes before a token.
    """
    ids = column(inputs, "input_ids", "Tokenize the texts: each row is a list of token ids.")
    targets = inputs.get("labels", ids)[:, 1:]
    mask = inputs.get("attention_mask")
    if mask is not None:
        if bool((mask[:, :-1] < mask[:, 1:]).any()):
            raise UsageError(
                "training: a batch has padding before a token",
                fix='Pad on the right: tokenizer.padding_side = "right".',
            )
        targets = targets.masked_fill(mask[:, 1:] == 0, IGNORED)
    return ids[:, :-1], targets


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits ``[batch, seq, vocabulary]`` against targets ``[batch, seq]``
    that are not -100, in nats."""
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)


def agreement_loss(logits: torch.Tensor, last: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of an exit's logits ``[batch, seq, vocabulary]`` against what the last
    layer's say, over targets ``[batch, seq]`` that are not -100, in nats; no gradient flows into
    the last layer's."""
    said = last.detach().flatten(0, 1).float().softmax(-1)
    each = functional.cross_entropy(logits.flatten(0, 1).float(), said, reduction="none")
    counted = targets.flatten() != IGNORED
    return each.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


__all__ = [
    "IGNORED",
    "LayerSkip",
    "agreement_loss",
    "check_decoder",
    "dropout_rates",
    "exit_weights",
    "token_loss",
    "tokens_and_targets",
]
