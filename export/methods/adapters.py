"""Trains only the adapters of early exits, to predict what the last layer predicts; the model does
not change (Kangaroo, arXiv:2404.18911).

``exact`` decoding compares drafts with the last layer, so its outputs are the only target. The
training text should be similar to what the model will write. To train the model too, use
`edgeexit.export.methods.layerskip`, which also trains adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.layerskip import agreement_loss, check_decoder
from edgeexit.export.methods.method import Batch, Forward, Loss, Method
from edgeexit.export.methods.sources import columns_of, count_targets, decoder_batch


@dataclass(frozen=True)
class AdapterDistillation(Method):
    """Trains all adapters of an `ExitDecoder`; its other layers are frozen.

    The loss is the mean, over adapters and tokens, of the cross-entropy between the exit's
    prediction and the last layer's probabilities, in nats. Batches are those of
    `edgeexit.export.methods.layerskip.LayerSkip`. Those of an encoder-decoder hold what its encoder
    reads, and ``labels``, the text to write, as transformers' models take them
    (`edgeexit.export.methods.sources`).
    """

    left_out: ClassVar[str] = "they have no adapters"

    def check(self, model: Any) -> None:
        name = type(self).__name__
        check_decoder(name, model, encoder=True)
        if not len(model.adapters):
            raise UsageError(
                f"{name}: the decoder has no adapters",
                fix="Read it with adapters: from_pretrained(path, exits=[1], adapters=[1], "
                "untrained=True), and the layers of your choice.",
            )

    def part(self, model: ExitDecoder) -> nn.Module:
        return model.adapters

    def inputs(self, model: ExitDecoder) -> list[str]:
        return columns_of(model)

    def loss(self, model: ExitDecoder, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        tokens, targets, others = decoder_batch(model, inputs, step)
        exits = [*model.adapter_sizes, model.depth]
        logits = forward(tokens, exits=exits, **others)
        last = logits[model.depth]
        losses = [agreement_loss(logits[n], last, targets) for n in model.adapter_sizes]
        return torch.stack(losses).mean(), {f"exit_{n}": z for n, z in logits.items()}

    def count(self, model: ExitDecoder, inputs: Batch) -> torch.Tensor:
        return count_targets(model, inputs)

    def trains(self, model: ExitDecoder) -> list[str]:
        return list(model.adapters)


__all__ = ["AdapterDistillation"]
