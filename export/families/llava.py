"""LLaVA: a CLIP or SigLIP tower, a projector of two layers, a Llama or Qwen decoder.

The projector reads an inner layer of the tower (``vision_feature_layer``); layers behind it are
left out. Without the class token (``vision_feature_select_strategy``), every patch is an image
token.
"""

from __future__ import annotations

from transformers import LlavaForConditionalGeneration

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


def trunk(model: LlavaForConditionalGeneration) -> VisionLanguageTrunk:
    """Describes a LLaVA model."""
    config, base = model.config, model.model
    patches = patches_of(base.vision_tower)
    reads = layers_read(config.vision_feature_layer, len(patches.layers))
    bare = config.vision_feature_select_strategy == "default"
    tower = tower_of(
        patches,
        Projector(base.multi_modal_projector, without_class_token if bare else every_patch),
        tokens=patches.length - bare,
        width=config.text_config.hidden_size,
        reads=reads,
    )
    return VisionLanguageTrunk(
        tower,
        decoder_of(model, base.language_model),
        placeholder=config.image_token_id,
        prompt=ImageText(placeholder="<image>", tokens=tower.tokens),
    )
