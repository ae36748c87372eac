"""Relative positions: what attention adds to a score for how far the key stands from its query.

Distances share buckets, finer near by than far away, and every head has a number for each bucket
(T5, arXiv:1910.10683, section 2.1). From some distance on the bucket stays the same, so all there
is to store is one row per distance up to there, whatever the length of a text.
`edgeexit.export.trace.attention` adds the bias in every form, a family's encoder layers themselves.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class RelativeBias(nn.Module):
    """Biases of attention scores by distance.

    Args:
        weight: ``[buckets, heads]``, the model's own: it is shared, and trained with the model.
        buckets: Bucket of every distance (position of the query less that of the key), from
            `-ahead` on. What lies beyond either end has the bucket at that end.
        ahead: How many distances to later keys there are; 0 in causal attention.
    """

    def __init__(self, weight: torch.Tensor, buckets: torch.Tensor, ahead: int = 0) -> None:
        super().__init__()
        self.weight = weight
        self.buckets = nn.Buffer(buckets)
        self.ahead = ahead

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Positions ``[..., new]`` and ``[..., seen]`` to biases ``[..., heads, new, seen]``."""
        distances = queries.unsqueeze(-1) - keys.unsqueeze(-2)
        if self.ahead:
            distances = distances + self.ahead
        rows = distances.clamp(0, self.buckets.shape[0] - 1)
        return functional.embedding(rows, self.weight[self.buckets]).movedim(-1, -3)


__all__ = ["RelativeBias"]
