"""InternVL: its own tower, patches joined two by two, a projector, a Qwen2, Qwen3 or Llama decoder.

An image stands between two tokens of its own in a prompt.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from edgeexit.bundle.manifest import ImageText
from edgeexit.export.exits.vision_language import VisionLanguageTrunk
from edgeexit.export.families.language import decoder_of
from edgeexit.export.families.towers import (
    Projector,
    every_patch,
    layers_read,
    patches_of,
    tower_of,
    without_class_token,
)


def trunk(model: InternVLForConditionalGeneration) -> VisionLanguageTrunk:
    """Describes an InternVL model."""
    config, base = model.config, model.model
    patches = patches_of(base.vision_tower)
    given = config.vision_feature_layer
    reads = layers_read(given, len(patches.layers))
    bare = config.vision_feature_select_strategy == "default"
    length = patches.length - bare
    tower = tower_of(
        patches,
        _Projector(
            Projector(
                nn.Identity(),
                without_class_token if bare else every_patch,
                # transformers takes the normalised output for -1 only, not for the same layer by
                # its number.
                norm=patches.norm if given == -1 else None,
            ),
            base.multi_modal_projector,
            config.downsample_ratio,
        ),
        tokens=int(length * config.downsample_ratio**2),
        width=config.text_config.hidden_size,
        reads=reads,
    )
    return VisionLanguageTrunk(
        tower,
        decoder_of(model, base.language_model),
        placeholder=config.image_token_id,
        prompt=ImageText(
            placeholder="<IMG_CONTEXT>", tokens=tower.tokens, whole="<img>{image}</img>"
        ),
    )


class _Projector(nn.Module):
    """Joins neighbouring patches and projects them."""

    def __init__(self, select: nn.Module, projector: nn.Module, ratio: float) -> None:
        super().__init__()
        self.select, self.projector, self.ratio = select, projector, ratio

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        patches = self.select(state)
        side = int(patches.shape[1] ** 0.5)
        joined = join_patches(patches.unflatten(1, (side, side)), round(1 / self.ratio))
        return self.projector(joined.flatten(1, 2))


def join_patches(state: torch.Tensor, factor: int) -> torch.Tensor:
    """Joins ``factor x factor`` patches of ``[batch, height, width, channels]`` to one, in the
    order of InternVL's ``pixel_shuffle``: ``[batch, height / factor, width / factor,
    channels * factor²]``."""
    batch, height, width, channels = state.shape
    state = state.reshape(batch, height, width // factor, channels * factor)
    state = state.permute(0, 2, 1, 3)
    state = state.reshape(batch, width // factor, height // factor, channels * factor**2)
    return state.permute(0, 2, 1, 3)
