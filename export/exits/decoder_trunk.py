"""`DecoderTrunk`, a family's description of a causal language model: how a token's embedding
becomes the first state, what each layer does before and after attention, and the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgeexit.export.trace.attention import Heads


@dataclass(frozen=True)
class DecoderTrunk:
    """A family's description of its model.

    Attributes:
        embedding: The model's own parameter ``[vocabulary, embedded]``; the first segment takes the
            rows of its tokens, times `embedding_scale`.
        stem: ``(embedded [batch, new, embedded], positions [batch, new]) -> state``; None where the
            embedding is the first state.
        layers: Each has ``before(state) -> (q, k, v)``, ``[batch, new, heads * size]`` and not yet
            rotated, and ``after(state, attended) -> state``.
        head: ``state [rows, width] -> logits [rows, vocabulary]``: final norm (its attribute
            ``norm``, if there is one) and projection. Exits can have a draft vocabulary if its last
            step is an ``nn.Linear`` ``projection``, with, at most, a ``bias`` added
            (`edgeexit.export.exits.draft_vocabulary`).
        width: Size of a state.
        positions: The most positions that the model supports; None: any number.
        capacity: Default limit of a text, in tokens; None: `positions`. One of the two must be
            given.
        float32: Modules that stay in float32 (`edgeexit.export.contract.SplitModel`).
        stop_tokens: Token ids that end a text.
    """

    embedding: torch.Tensor
    stem: nn.Module | None
    layers: Sequence[nn.Module]
    head: nn.Module
    heads: Heads
    width: int
    positions: int | None
    stop_tokens: tuple[int, ...] = ()
    capacity: int | None = None
    float32: tuple[str, ...] = ()
    embedding_scale: float = 1.0


def scaled(embedded: torch.Tensor, scale: float) -> torch.Tensor:
    """Embeddings times a family's scale. The product is made in each pass: trained weights change,
    and a stored product would keep the graph of the first backward pass."""
    return embedded if scale == 1.0 else embedded * scale


__all__ = ["DecoderTrunk", "scaled"]
