"""LayerSkip training (arXiv:2404.16710): a decoder that can be left early with its one shared head.

Two things are added to plain language modelling. Layers are dropped at random, deeper ones more
often, so that no state relies on what comes next; and early exits have losses of their own through
the shared head, and through their adapters where they have any. It is what makes drafting with the
first layers worth while (``exact`` decoding).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.training import Progress, train

TokenBatches = Callable[[int], torch.Tensor]
"""``batches(step)`` gives that step's token ids ``[batch, seq + 1]``; each predicts the next."""


def train_layerskip(
    decoder: ExitDecoder,
    batches: TokenBatches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    warmup: int = 0,
    dropout: float = 0.1,
    exit_scale: float = 1.0,
    weights: Mapping[int, float] | None = None,
    distillation: float = 0.0,
    autocast: torch.dtype | None = None,
    state_file: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    progress: Progress | None = None,
) -> list[float]:
    """Trains all weights, those of adapters too, with layer dropout and early-exit losses.

    Every step trains the last layer's answer and that of one exit, taking turns (the rotational
    curriculum; one head more a step whatever the number of exits).

    Args:
        decoder: What to train, in place. Its exits are the layers that get losses.
        batches: ``batches(step) -> [batch, seq + 1]`` token ids.
        dropout: p_max, the chance that the last layer is dropped from a step; see
            `dropout_rates`. A layer is dropped for the whole batch, which saves its time (the paper
            draws per sample).
        exit_scale: e_scale of the paper, see `exit_weights`.
        weights: Exit layer -> weight of its loss beside 1 for the last layer, in place of the
            paper's. 0 for all of them and no dropout is plain language modelling.
        distillation: Share of an exit's loss that comes from the last layer's answers instead of
            the text. `exact` and `fast` ask exits to agree with the last layer, not to be right.
        autocast: Type in which matrices are multiplied, as `torch.autocast` does; weights and the
            optimizer stay as they are.

    The other arguments and the result are those of `train_joint`.
    """
    chosen = weights
    if chosen is None:
        chosen = exit_weights(decoder.exit_layers, decoder.depth, exit_scale)
    return train(
        decoder,
        decoder,
        _loss(decoder, batches, dropout, chosen, distillation, autocast),
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        settings=f"layerskip {dropout} {sorted(chosen.items())} {autocast}"
        + (f" distillation {distillation}" if distillation else ""),
        state_file=state_file,
        save_every=save_every,
        progress=progress,
    )


def _loss(
    decoder: ExitDecoder,
    batches: TokenBatches,
    dropout: float,
    weights: Mapping[int, float],
    distillation: float,
    autocast: torch.dtype | None,
) -> Callable[[int], torch.Tensor]:
    """The loss of a step, once the arguments were found to make sense."""
    depth = decoder.depth
    if not 0 <= dropout < 1:
        raise UsageError(
            f"dropout {dropout} is no chance", fix="Give a number from 0 to less than 1."
        )
    if not 0 <= distillation <= 1:
        raise UsageError(
            f"distillation {distillation} is no share", fix="Give a number from 0 to 1."
        )
    if unknown := sorted(set(weights) - set(decoder.exit_layers)):
        raise UsageError(
            f"weights: layer {unknown[0]} has no exit (exits: {decoder.exit_layers})",
            fix="Give weights to exits only.",
        )
    rates = dropout_rates(depth, dropout)
    turns = [layer for layer in decoder.exit_layers if weights.get(layer, 0.0) > 0]

    def loss_at(step: int) -> torch.Tensor:
        tokens = batches(step)
        generator = torch.Generator().manual_seed(step)
        draws = torch.rand(depth, generator=generator).tolist()
        skipped = [n for n, rate in enumerate(rates, start=1) if draws[n - 1] < rate]
        early = turns[step % len(turns)] if turns else None
        exits = [depth] if early is None else [early, depth]
        with torch.autocast(tokens.device.type, autocast, enabled=autocast is not None):
            logits = decoder(tokens[:, :-1], exits=exits, skipped=skipped)
        loss = next_token_loss(logits[depth], tokens)
        if early is None:
            return loss
        weight, of_exit = weights[early], next_token_loss(logits[early], tokens)
        if distillation:
            agreeing = agreement_loss(logits[early], logits[depth])
            of_exit = (1 - distillation) * of_exit + distillation * agreeing
        return (loss + weight * of_exit) / (1 + weight)

    return loss_at


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


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits ``[batch, seq, vocabulary]`` against the next of the tokens
    ``[batch, seq + 1]``, in nats."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def agreement_loss(logits: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of an exit's logits ``[batch, seq, vocabulary]`` against what the last
    layer's say, in nats; no gradient flows into these."""
    target = last.detach().flatten(0, 1).float().softmax(-1)
    return functional.cross_entropy(logits.flatten(0, 1).float(), target)


__all__ = [
    "TokenBatches",
    "agreement_loss",
    "dropout_rates",
    "exit_weights",
    "next_token_loss",
    "train_layerskip",
]
