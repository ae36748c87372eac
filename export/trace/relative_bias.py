"""Relative positions: a bias that attention adds to a score by the distance of key and query.

Distances are grouped in buckets, smaller for short distances, and every head has a bias for each
bucket (T5, arXiv:1910.10683, section 2.1). All distances beyond a maximum have the same bucket, so
one row per distance up to it is enough for texts of any length. `edgeexit.export.trace.attention`
adds the bias in every form; a family's encoder layers add it themselves.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class RelativeBias(nn.Module):
    """Biases of attention scores by distance.

    Args:
        weight: ``[buckets, heads]``, shared with the model and trained with it.
        buckets: Bucket of every distance (position of the query minus that of the key), starting
            at `-ahead`. Distances beyond either end have the bucket at that end.
        ahead: Number of distances to later keys; 0 in causal attention.
    """

    def __init__(self, weight: torch.Tensor, buckets: torch.Tensor, ahead: int = 0) -> None:
        super().__init__()
        self.weight = weight
        self.buckets = nn.Buffer(buckets)
        self.ahead = ahead

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Biases ``[..., heads, new, seen]`` for positions ``[..., new]`` and ``[..., seen]``."""
        distances = queries.unsqueeze(-1) - keys.unsqueeze(-2)
        if self.ahead:
            distances = distances + self.ahead
        rows = distances.clamp(0, self.buckets.shape[0] - 1)
        return functional.embedding(rows, self.weight[self.buckets]).movedim(-1, -3)


__all__ = ["RelativeBias"]
