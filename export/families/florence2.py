"""Florence-2: a DaViT tower, a projector with positions, a BART encoder and decoder.

The image tokens stand in front of the encoder's text. A stage of the tower begins with a
convolution that halves the image. An exit inside a stage therefore still runs the later stages,
each with its convolution and its last block only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Florence2ForConditionalGeneration

from edgeexit.bundle.manifest import Axis, ImageText
from edgeexit.export.exits.tower import TowerTrunk
from edgeexit.export.exits.vision_encoder_decoder import VisionEncoderTrunk
from edgeexit.export.families import bart

IMAGE_SIZE = 768
"""Height and width that the released checkpoints were trained with; the model has no such field."""


def trunk(
    model: Florence2ForConditionalGeneration, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> VisionEncoderTrunk:
    """Describes a Florence-2 model.

    Args:
        size: Height and width of images.
    """
    config, base = model.config, model.model
    tower = base.vision_tower
    stem, layers = tower.convs[0], list(_blocks(tower))
    axes: list[list[Axis]] = []
    pixels = (int(config.vision_config.in_channels), *size)
    with torch.no_grad():
        state = stem(torch.zeros(1, *pixels))
        axes.append(["batch", *state.shape[1:]])
        for layer in layers:
            state = layer(state)
            axes.append(["batch", *state.shape[1:]])
        tokens, width = base.multi_modal_projector(state).shape[1:]
    encoder, decoder = bart.halves(model, base.language_model)
    stems = [bart.source_stem(base.language_model, offset) for offset in (0, tokens)]
    image, text = (dataclasses.replace(encoder, stem=stem) for stem in stems)
    return VisionEncoderTrunk(
        tower=TowerTrunk(
            pixels=pixels,
            stem=stem,
            layers=layers,
            state_axes=axes,
            projector=base.multi_modal_projector,
            tokens=tokens,
            width=width,
            projector_at=lambda layer: nn.Sequential(
                *_stages_behind(tower, layer), base.multi_modal_projector
            ),
        ),
        encoder=encoder,
        decoder=decoder,
        placeholder=config.image_token_id,
        prompt=ImageText(placeholder="<image>", tokens=tokens, in_front=True),
        branches=(image, text),
    )


def _blocks(tower: Any) -> Iterator[nn.Module]:
    """All blocks of a tower in order; the first one of a later stage behind its convolution."""
    for stage, blocks in enumerate(tower.blocks):
        for number, block in enumerate(blocks):
            begins = stage > 0 and number == 0
            yield nn.Sequential(tower.convs[stage], block) if begins else block


def _stages_behind(tower: Any, layer: int) -> Iterator[nn.Module]:
    """The convolution and the last block of every stage behind that of a layer (1 = the first)."""
    count = 0
    for stage, blocks in enumerate(tower.blocks):
        if count >= layer:
            yield nn.Sequential(tower.convs[stage], blocks[-1])
        count += len(blocks)


__all__ = ["trunk"]
