"""FREE (Fast and Robust Vision Language Models with Early Exits, ACL Findings 2025): trains early
exits of a frozen language model against an adversary.

An exit is an adapter of one transformer layer before the model's own head, which all exits share.
The adapter is a generator: a discriminator per exit learns to tell its features from those of the
last layer, and the adapter learns to pass for the last layer, besides predicting the next token.
It trains vision-language models and language models alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.kept_states import kept_of
from edgeexit.export.methods.layerskip import agreement_loss, token_loss
from edgeexit.export.methods.method import IGNORED, Batch, Forward, Loss, column, is_number
from edgeexit.export.methods.sources import decoder_batch

Supervision = Literal["labels", "distillation"]
Features = dict[int, torch.Tensor]
"""Layer -> logits or features of its exit."""
_FIX_LABELS = (
    'Give rows with labels (-100 for tokens to ignore), or use supervision="distillation", which '
    "needs none."
)


@dataclass(frozen=True)
class Free(AdapterDistillation):
    """Trains all adapters of an `ExitDecoder`; its other layers and its head are frozen.

    The loss is the mean over exits of the supervised loss of a token plus `adversary` times the
    adapter's adversarial loss; beside it, each discriminator minimises its own
    (`adversarial_losses`). Batches are those of `AdapterDistillation`. The
    paper trains both with AdamW at 1e-4 and clips gradients to a norm of 1.0.

    Attributes:
        supervision: ``labels``: cross-entropy of the labels, which batches must hold.
            ``distillation``: cross-entropy against the last layer's probabilities.
        adversary: Weight of the adversarial loss; 0 trains without an adversary.
        inner: Width of the discriminators' hidden layer; None: four times the state's.
    """

    supervision: Supervision = "labels"
    adversary: float = 1.0
    inner: int | None = None

    def check(self, model: Any) -> None:
        super().check(model)
        if self.supervision not in get_args(Supervision):
            raise UsageError(
                f"Free: supervision {self.supervision!r} is not known",
                fix=f"Use one of {', '.join(get_args(Supervision))}.",
            )
        if not is_number(self.adversary) or self.adversary < 0:
            raise UsageError(
                f"Free: adversary {self.adversary!r} is out of range",
                fix="Give the weight of the adversarial loss: 0 or more.",
            )
        if self.inner is not None and (type(self.inner) is not int or self.inner < 1):
            raise UsageError(
                f"Free: inner {self.inner!r} is not a width", fix="Give a number from 1 on."
            )

    def companions(self, model: ExitDecoder) -> nn.ModuleDict:
        if not self.adversary:
            return nn.ModuleDict()
        width = model.trunk.width
        inner = self.inner or 4 * width
        return nn.ModuleDict({name: Discriminator(width, inner) for name in model.adapters})

    def loss(self, model: ExitDecoder, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        if self.supervision == "labels":
            column(inputs, "labels", _FIX_LABELS)
        tokens, targets, others = decoder_batch(model, inputs, step)
        exits = [*model.adapter_sizes, model.depth]
        counted = targets != IGNORED
        against = self.adversary and step is not None and bool(counted.any())

        def finish(logits: Features, features: Features) -> Loss:
            return self._loss(model, logits, features if against else {}, targets)

        kept = kept_of(inputs, exits, tokens.shape[1])
        made: Loss = forward(tokens, exits=exits, finish=finish, kept=kept, **others)
        return made

    def _loss(
        self, model: ExitDecoder, logits: Features, features: Features, targets: torch.Tensor
    ) -> Loss:
        """The loss, and logits by exit. `features`: empty without an adversary."""
        last, counted = logits[model.depth], targets != IGNORED
        losses = []
        for layer in model.adapter_sizes:
            if self.supervision == "labels":
                loss = token_loss(logits[layer], targets)
            else:
                loss = agreement_loss(logits[layer], last, targets)
            if features:
                generator, discriminator = adversarial_losses(
                    cast("nn.ModuleDict", model.companions)[f"exit_{layer}"],
                    features[layer][counted],
                    features[model.depth][counted],
                )
                loss = loss + self.adversary * generator + discriminator
            losses.append(loss)
        return torch.stack(losses).mean(), {f"exit_{n}": z for n, z in logits.items()}


class Discriminator(nn.Sequential):
    """``features [tokens, width] -> logits [tokens, 1]``: high for features of the last layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.LeakyReLU(0.2), nn.Linear(inner, 1))


def adversarial_losses(
    discriminator: nn.Module, made: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of an adapter and of its discriminator D, in nats per token: -log D(made), and
    -log D(real) - log(1 - D(made)).

    The first has no gradient in the discriminator, the second none in the adapter, so their sum
    trains both in one backward pass.

    Args:
        made, real: Features ``[tokens, width]`` of the adapter and of the last layer.
    """
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    passing = functional_call(discriminator, frozen, (made.float(),))
    generator = functional.binary_cross_entropy_with_logits(passing, torch.ones_like(passing))
    judged = discriminator(torch.cat([real.detach(), made.detach()]).float())
    wanted = torch.cat([torch.ones_like(passing), torch.zeros_like(passing)])
    return generator, 2 * functional.binary_cross_entropy_with_logits(judged, wanted)


__all__ = ["Discriminator", "Free", "Supervision", "adversarial_losses"]
