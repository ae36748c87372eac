"""Shared code of vision towers inside vision-language models: CLIP, SigLIP, InternVL and the like,
which are stacks of layers over patches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeexit.errors import ExportError
from edgeexit.export.exits.tower import TowerTrunk
from edgeexit.export.families.images import image_size


@dataclass(frozen=True)
class Patches:
    """A stack of layers over the patches of an image.

    Attributes:
        stem: Pixels -> the first state ``[batch, patches, width]``.
        layers: Each ``state -> state``.
        norm: The norm behind the last layer.
        pixels: ``[channels, height, width]``.
        length: Patches, with the class token if there is one.
        width: Of a state.
    """

    stem: nn.Module
    layers: Sequence[nn.Module]
    norm: nn.Module
    pixels: tuple[int, int, int]
    length: int
    width: int


def patches_of(tower: nn.Module, stem: nn.Module | None = None) -> Patches:
    """Describes a tower with the parts of transformers' CLIP, SigLIP or InternVL.

    Args:
        stem: Pixels -> the first state; None: as its embeddings do.
    """
    inner: Any = getattr(tower, "vision_model", tower)
    config: Any = tower.config
    parts = [getattr(inner, name, None) for name in ("embeddings", "encoder")]
    if None in parts:
        raise ExportError(
            f"the vision tower {type(tower).__name__} is not supported",
            fix="Use a tower like CLIP, SigLIP or InternVL, or write a family file for it.",
        )
    encoder = inner.encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    if stem is None:
        # CLIP's name of it in transformers is misspelt.
        norm = getattr(inner, "pre_layrnorm", None)
        stem = nn.Sequential(inner.embeddings, *([] if norm is None else [norm]))
    height, width = image_size(config.image_size)
    pixels = (getattr(config, "num_channels", 3), height, width)
    with torch.no_grad():
        shape = stem.eval()(torch.zeros(1, *pixels)).shape
    last = next(getattr(inner, n) for n in ("post_layernorm", "layernorm") if hasattr(inner, n))
    return Patches(stem, [VisionLayer(layer) for layer in layers], last, pixels, shape[1], shape[2])


def tower_of(
    patches: Patches,
    projector: nn.Module,
    *,
    tokens: int,
    width: int,
    reads: tuple[int, ...] = (),
) -> TowerTrunk:
    """Describes a tower before its projector (arguments as in `TowerTrunk`), without the layers
    behind the last one that is read."""
    depth = max(reads, default=len(patches.layers))
    return TowerTrunk(
        pixels=patches.pixels,
        stem=patches.stem,
        layers=patches.layers[:depth],
        state_axes=[["batch", patches.length, patches.width]] * (depth + 1),
        projector=projector,
        tokens=tokens,
        width=width,
        reads=reads,
    )


class VisionLayer(nn.Module):
    """A layer of a tower, without masks: every patch attends to every other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        taken = [*inspect.signature(layer.forward).parameters.values()]
        required = [p for p in taken[1:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        self.masks = len([p for p in required if p.kind is not p.VAR_POSITIONAL])

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        output = self.layer(state, *[None] * self.masks)
        return output[0] if isinstance(output, tuple) else output


class Projector(nn.Module):
    """Concatenates the states of a tower's layers, selects patches and projects them.

    Args:
        projector: The model's own.
        select: ``[batch, patches, width] -> `` the same with what the projector takes.
        norm: Applied to each state first; optional.
    """

    def __init__(
        self,
        projector: nn.Module,
        select: Callable[[torch.Tensor], torch.Tensor],
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.projector, self.select = norm, projector, select

    def forward(self, *states: torch.Tensor) -> torch.Tensor:
        selected = [self.select(x if self.norm is None else self.norm(x)) for x in states]
        return self.projector(torch.cat(selected, -1) if len(selected) > 1 else selected[0])


def without_class_token(state: torch.Tensor) -> torch.Tensor:
    """``[batch, 1 + patches, width]`` without the class token in front."""
    return state[:, 1:]


def every_patch(state: torch.Tensor) -> torch.Tensor:
    """A state as it is."""
    return state


def layers_read(given: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers (0 = the stem) of transformers' ``vision_feature_layer``, which may be negative.

    >>> layers_read(-2, 24), layers_read([3, -1], 4)
    ((23,), (3, 4))
    """
    named = [given] if isinstance(given, int) else list(given)
    layers = tuple(number % (depth + 1) if number < 0 else number for number in named)
    if not layers or not all(-depth - 1 <= n <= depth for n in named):
        raise ExportError(
            f"vision_feature_layer is {given!r}, the tower has {depth} layers",
            fix="Correct vision_feature_layer in config.json.",
        )
    return layers


__all__ = [
    "Patches",
    "Projector",
    "VisionLayer",
    "every_patch",
    "layers_read",
    "patches_of",
    "tower_of",
    "without_class_token",
]
