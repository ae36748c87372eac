"""Trains the projectors of exits in a vision tower on the model's own image tokens.

The model is frozen. An exit's projector learns to make, of the state behind its layer, the image
tokens that the whole tower makes. It needs images only, no texts and no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.exits.tower import PIXELS, ExitTower, exit_name
from edgeexit.export.methods.images import GIVE_IMAGES, checked_pixels
from edgeexit.export.methods.method import GIVE_EXITS, Batch, Forward, Loss, Method, column


@dataclass(frozen=True)
class TowerDistillation(Method):
    """Trains all projectors of a vision-language model's tower; everything else is frozen.

    The loss is the mean over exits of the squared error of their image tokens, relative to the
    variance of the whole tower's. Batches hold ``pixel_values`` ``[images, channels, height,
    width]``.
    """

    left_out: ClassVar[str] = "it trains exits of the tower only"

    def check(self, model: Any) -> None:
        tower = getattr(model, "tower", None)
        if not isinstance(tower, ExitTower):
            raise UsageError(
                f"TowerDistillation trains vision-language models, not {type(model).__name__}",
                fix=GIVE_EXITS,
            )
        if not tower.exit_layers:
            raise UsageError(
                "TowerDistillation: the tower has no exits",
                fix="Read it with exits: from_pretrained(path, tower_exits=[6], untrained=True), "
                "and the layers of your choice.",
            )

    def part(self, model: Any) -> nn.Module:
        return model.tower.projectors

    def inputs(self, model: Any) -> list[str]:
        return [PIXELS]

    def loss(self, model: Any, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        pixels = checked_pixels(model.tower, inputs)
        if not len(pixels):
            raise UsageError("training: a batch has no image to learn from", fix=GIVE_IMAGES)
        features = forward(None, images=pixels)
        whole = features.pop(model.tower.depth).detach()
        errors = [(made - whole).square().mean() for made in features.values()]
        loss = torch.stack(errors).mean() / whole.var()
        return loss, {exit_name(layer): made for layer, made in features.items()}

    def count(self, model: Any, inputs: Batch) -> torch.Tensor:
        return torch.tensor(len(column(inputs, PIXELS, GIVE_IMAGES)))

    def trains(self, model: Any) -> list[str]:
        return list(model.tower.projectors)


__all__ = ["TowerDistillation"]
