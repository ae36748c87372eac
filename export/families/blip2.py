"""BLIP-2 with OPT: a ViT tower, a Q-Former whose queries read its patches, a projection, an OPT
decoder.

The image tokens stand in front of the prompt, before its start token. The Q-Former is part of the
projector: an exit of the tower has a Q-Former of its own.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2ForConditionalGeneration

from edgeexit.bundle.manifest import ImageText
from edgeexit.errors import ExportError
from edgeexit.export.exits.vision_language import VisionLanguageTrunk
from edgeexit.export.families import opt
from edgeexit.export.families.towers import patches_of, tower_of


def trunk(model: Blip2ForConditionalGeneration) -> VisionLanguageTrunk:
    """Describes a BLIP-2 model."""
    config = model.config
    if not config.use_decoder_only_language_model:
        raise ExportError(
            f"a BLIP-2 with {config.text_config.model_type}, an encoder-decoder, is not supported",
            fix="Use a checkpoint with OPT.",
        )
    patches = patches_of(model.vision_model)
    tower = tower_of(
        patches,
        _Projector(patches.norm, model),
        tokens=config.num_query_tokens,
        width=config.text_config.hidden_size,
    )
    return VisionLanguageTrunk(
        tower,
        opt.trunk(model.language_model),
        placeholder=config.image_token_index,
        prompt=ImageText(placeholder="<image>", tokens=tower.tokens, in_front=True),
    )


class _Projector(nn.Module):
    """The tower's last norm, the Q-Former and the projection."""

    def __init__(self, norm: nn.Module, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.norm, self.queries = norm, model.query_tokens
        self.reader, self.projection = model.qformer, model.language_projection

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        patches = self.norm(state)
        read = self.reader(
            query_embeds=self.queries.expand(patches.shape[0], -1, -1),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], device=patches.device),
            return_dict=True,
        )
        return self.projection(read.last_hidden_state)
