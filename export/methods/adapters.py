"""Trains only the adapters of early exits, to predict what the last layer predicts; the model does
not change (Kangaroo, arXiv:2404.18911).

``exact`` decoding compares drafts with the last layer, so its outputs are the only target. The
training text should be similar to what the model will write. To train the model too, use
`edgeexit.export.methods.layerskip`, which also trains adapters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.kept_states import kept_of
from edgeexit.export.methods.layerskip import agreement_loss, check_decoder
from edgeexit.export.methods.method import Batch, Forward, Loss, Method
from edgeexit.export.methods.sources import columns_of, count_targets, decoder_batch, state_column


@dataclass(frozen=True)
class AdapterDistillation(Method):
    """Trains all adapters of an `ExitDecoder`; its other layers are frozen.

    The loss is the mean, over adapters and tokens, of the cross-entropy between the exit's
    prediction and the last layer's probabilities, in nats. Of an exit with a draft vocabulary
    (`ExitDecoder.set_draft_vocabularies`) both are over its tokens only.

    Batches are those of `edgeexit.export.methods.layerskip.LayerSkip`. Those of an encoder-decoder
    hold what its encoder reads, and ``labels``, the text to write, as transformers' models take
    them (`edgeexit.export.methods.sources`). With the model's states in a batch
    (`edgeexit.export.methods.kept_states`) only the adapters and the head run. Logits that an
    evaluation returns are over all draft vocabularies if every adapter's exit has one.
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
        return [*columns_of(model), *map(state_column, [*model.adapter_sizes, model.depth])]

    def loss(self, model: ExitDecoder, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        tokens, targets, others = decoder_batch(model, inputs, step)
        exits = [*model.adapter_sizes, model.depth]
        drafted = [model.draft_vocabularies.get(layer) for layer in model.adapter_sizes]
        known = [ids for ids in drafted if ids is not None]
        over = sorted({*itertools.chain(*known)}) if len(known) == len(drafted) else None
        kept = kept_of(inputs, exits, tokens.shape[1])
        logits = forward(tokens, exits=exits, over=over, kept=kept, **others)
        last = logits[model.depth]
        losses = []
        for layer, ids in zip(model.adapter_sizes, drafted, strict=True):
            pair = logits[layer], last
            if ids is not None and ids != over:
                of = torch.tensor(ids if over is None else np.searchsorted(over, ids))
                pair = pair[0][..., of.to(last.device)], pair[1][..., of.to(last.device)]
            losses.append(agreement_loss(*pair, targets))
        return torch.stack(losses).mean(), {f"exit_{n}": z for n, z in logits.items()}

    def count(self, model: ExitDecoder, inputs: Batch) -> torch.Tensor:
        return count_targets(model, inputs)

    def trains(self, model: ExitDecoder) -> list[str]:
        return list(model.adapters)


__all__ = ["AdapterDistillation"]
