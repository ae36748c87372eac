"""Rotary positions: rotates queries and keys by their positions (RoPE, arXiv:2104.09864)."""

from __future__ import annotations

import torch

from edgeexit.bundle.manifest import Tensor


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotates queries or keys ``[batch, heads, new, size]`` by their positions ``[batch, new]``."""
    return turn(x, *angles(cos, sin, positions))


def angles(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the tables for positions ``[batch, new]``: ``[batch, 1, new, size / 2]`` each."""
    return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def rotations(size: int) -> tuple[Tensor, ...]:
    """Describes the tensors of `angles` for heads of this size."""
    axes: list[str | int | None] = ["batch", 1, "new", size // 2]
    return tuple(Tensor(name=name, dtype="float32", axes=axes) for name in ("cos", "sin"))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the halves of ``x [batch, heads, new, size]`` by `angles`."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


__all__ = ["angles", "rotate", "rotations", "turn"]
