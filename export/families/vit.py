"""ViT image classifiers: pre-norm layers over patches, pooling of the class token.

The layers' outputs are unnormalised: exit heads have a norm, and the model's last norm is part of
its head.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import ViTForImageClassification

from edgeexit.bundle.manifest import Tensor
from edgeexit.errors import ExportError
from edgeexit.export.exits.classifier import PlainLayer, Trunk
from edgeexit.export.families.images import PixelStem, image_example, image_size
from edgeexit.export.families.text import first_token


def trunk(model: ViTForImageClassification, size: tuple[int, int] | None = None) -> Trunk:
    """Describes a ViT classifier.

    Args:
        model: The classifier.
        size: Height and width that preprocessing gives, if known. Positions are learned, so the
            size must be the model's.
    """
    config, base = model.config, model.vit
    own = image_size(config.image_size)
    if size is not None and list(size) != own:
        raise ExportError(
            f"preprocessor_config.json makes images of {size[0]} x {size[1]}, the model takes "
            f"{own[0]} x {own[1]}",
            fix="Correct size (or crop_size) in preprocessor_config.json.",
        )
    # transformers 5 keeps the layers in the model itself, 4 in an encoder.
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer
    shape = [config.num_channels, *own]
    tokens, width = base.embeddings.position_embeddings.shape[1:]
    return Trunk(
        inputs=(Tensor(name="pixel_values", dtype="float32", axes=["batch", *shape]),),
        stem=PixelStem(base.embeddings),
        layers=[PlainLayer(layer) for layer in layers],
        state_axes=[["batch", tokens, width]] * (config.num_hidden_layers + 1),
        pool=first_token,
        widths=[width] * config.num_hidden_layers,
        pre_norm=True,
        head=_Head(base.layernorm, model.classifier),
        classes=config.num_labels,
        example=image_example(shape),
    )


class _Head(nn.Module):
    """The model's last norm and classifier. Only the class token is normalised."""

    def __init__(self, norm: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.classifier = classifier

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(first_token(state)))
