"""Shared code of the image families: image sizes of configurations, a stem, an example input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn


def image_size(size: int | Iterable[int]) -> list[int]:
    """Height and width from a configuration's ``image_size``, which is one number or two."""
    return [size, size] if isinstance(size, int) else list(size)


def image_example(shape: Sequence[int]) -> Callable[[int], dict[str, torch.Tensor]]:
    """Returns a function that makes random images ``[rows, channels, height, width]``, normalised
    as models expect."""

    def example(rows: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(rows)
        return {"pixel_values": torch.randn(rows, *shape, generator=generator)}

    return example


class PixelStem(nn.Module):
    """Maps pixels to the first state: patch embeddings or a feature map."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.embeddings(pixel_values),)
