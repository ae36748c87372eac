"""ResNet image classifiers: residual blocks, global average pooling.

Each residual block counts as a layer, numbered from 1 through all stages. ResNet-50 has stages of
3, 4, 6 and 3 blocks, which end at blocks 3, 7, 13 and 16: ``exits=[3, 7, 13]`` puts an exit behind
each stage except the last. `stage_ends` gives these numbers for any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from transformers import ResNetForImageClassification

from edgeexit.bundle.manifest import Tensor
from edgeexit.export.exits.classifier import Trunk
from edgeexit.export.families.images import PixelStem, image_example

PIXELS = (224, 224)
"""Height and width if the checkpoint gives none; the weights accept any size."""


def trunk(model: ResNetForImageClassification, size: tuple[int, int] | None = None) -> Trunk:
    """Describes a ResNet classifier for images of one size (height, width; None: 224 x 224)."""
    config = model.config
    shape = [config.num_channels, *(size or PIXELS)]
    sizes = _state_sizes(model, shape)
    return Trunk(
        inputs=(Tensor(name="pixel_values", dtype="float32", axes=["batch", *shape]),),
        stem=PixelStem(model.resnet.embedder),
        layers=_blocks(model),
        state_axes=[["batch", *size] for size in sizes],
        pool=global_average,
        widths=[channels for channels, _, _ in sizes[1:]],
        head=_Head(model.classifier),
        classes=config.num_labels,
        example=image_example(shape),
    )


def stage_ends(model: ResNetForImageClassification) -> list[int]:
    """Numbers of the last block of each stage."""
    return list(accumulate(len(stage.layers) for stage in model.resnet.encoder.stages))


def global_average(state: torch.Tensor) -> torch.Tensor:
    """Mean over all positions: ``[batch, channels, height, width] -> [batch, channels]``."""
    return state.mean(dim=(2, 3))


def _state_sizes(
    model: ResNetForImageClassification, shape: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Channels, height and width behind the stem and every block, found by a run."""
    training = model.training
    model.eval()  # the black image must not change batch statistics
    with torch.no_grad():
        states = [model.resnet.embedder(torch.zeros(1, *shape, dtype=model.dtype))]
        for block in _blocks(model):
            states.append(block(states[-1]))
    model.train(training)
    return [(state.shape[1], state.shape[2], state.shape[3]) for state in states]


def _blocks(model: ResNetForImageClassification) -> list[nn.Module]:
    return [block for stage in model.resnet.encoder.stages for block in stage.layers]


class _Head(nn.Module):
    """Global average, then the model's classifier (which flattens its input)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.classifier(global_average(state))
