"""Training of adapters alone: the model stays bit for bit as it is, and its early exits learn to
say what its last layer says (Kangaroo, arXiv:2404.18911).

That is what a draft is held against in ``exact`` decoding, so the model's own answers are all there
is to learn from: any text will do that is like what the model will write. Where the model itself
is trained, `edgeexit.export.methods.layerskip` trains adapters with it.
"""

from __future__ import annotations

import os

import torch

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.layerskip import TokenBatches, agreement_loss
from edgeexit.export.methods.training import Progress, train


def train_adapters(
    decoder: ExitDecoder,
    batches: TokenBatches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 0,
    state_file: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    progress: Progress | None = None,
) -> list[float]:
    """Trains every adapter of a decoder behind its frozen layers.

    The loss is the mean, over adapters and tokens, of the cross-entropy of the exit's answer
    against the probabilities that the last layer gives, in nats.

    Args:
        decoder: Its adapters are trained in place.
        batches: ``batches(step) -> [batch, seq + 1]`` token ids, as for `train_layerskip`; the last
            of each row is not used.

    The other arguments and the result are those of `train_joint`.
    """
    layers = list(decoder.adapter_sizes)
    if not layers:
        raise UsageError(
            "train_adapters: the decoder has no adapters",
            fix="Read it with exits=[2, 4], adapters=[2], untrained=True.",
        )

    def loss_at(step: int) -> torch.Tensor:
        logits = decoder(batches(step)[:, :-1], exits=[*layers, decoder.depth])
        last = logits[decoder.depth]
        return torch.stack([agreement_loss(logits[layer], last) for layer in layers]).mean()

    return train(
        decoder,
        decoder.adapters,
        loss_at,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        settings=f"adapters {decoder.adapter_sizes}",
        state_file=state_file,
        save_every=save_every,
        progress=progress,
    )


__all__ = ["train_adapters"]
