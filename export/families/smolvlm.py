"""SmolVLM and Idefics3: a SigLIP tower, patches joined, one projection, a Llama decoder.

Whole images of one size only: the class itself finds positions and padding from the data, which
cannot be exported; for a whole image both are constants.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from edgeexit.bundle.manifest import ImageText
from edgeexit.export.exits.vision_language import VisionLanguageTrunk
from edgeexit.export.families.language import decoder_of
from edgeexit.export.families.towers import patches_of, tower_of


def trunk(
    model: SmolVLMForConditionalGeneration | Idefics3ForConditionalGeneration,
) -> VisionLanguageTrunk:
    """Describes a SmolVLM or Idefics3 model."""
    config, base = model.config, model.model
    patches = patches_of(base.vision_model, _Stem(base.vision_model.embeddings))
    tower = tower_of(
        patches,
        nn.Sequential(patches.norm, base.connector),
        tokens=patches.length // config.scale_factor**2,
        width=config.text_config.hidden_size,
    )
    around = "<fake_token_around_image>"
    overview = f"{around}<global-img>{{image}}{around}"
    return VisionLanguageTrunk(
        tower,
        decoder_of(model, base.text_model),
        placeholder=config.image_token_id,
        prompt=ImageText(
            placeholder="<image>",
            tokens=tower.tokens,
            whole=overview,
            tile=f"{around}<row_{{row}}_col_{{column}}>{{image}}",
            row_end="\n",
            overview=f"\n{overview}",
        ),
    )


class _Stem(nn.Module):
    """Patches of a whole image, and their positions."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.patches = embeddings.patch_embedding
        self.positions = embeddings.position_embedding
        size, patch = int(embeddings.image_size), int(embeddings.patch_size)  # type: ignore[arg-type]
        channels = self.patches.in_channels  # type: ignore[union-attr]
        blank = torch.zeros(1, channels, size, size)  # type: ignore[arg-type]
        whole = torch.ones(1, size // patch, size // patch, dtype=torch.bool)
        with torch.no_grad():
            placed = embeddings(blank, whole) - self.patches(blank).flatten(2).transpose(1, 2)  # type: ignore[operator]
            table = self.positions.weight  # type: ignore[union-attr]
            # Rows of the table, which rounding cannot confuse.
            rows = torch.cdist(placed[0], table).argmin(-1)  # type: ignore[arg-type]
        self.rows = nn.Buffer(rows, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions(self.rows)  # type: ignore[operator]
