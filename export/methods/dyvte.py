"""DyVTE (Dynamic Visual-Token Exit, NeurIPS 2025): trains gates that drop image tokens.

The model is frozen. For every prompt, the layers behind a gate run twice, with and without the
image tokens. The gate learns whether the answer is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.gates import gate_name
from edgeexit.export.exits.vision_language import AtGate, ExitVisionLanguage
from edgeexit.export.methods.images import further_inputs
from edgeexit.export.methods.layerskip import IGNORED, checked_tokens
from edgeexit.export.methods.method import (
    GIVE_EXITS,
    Batch,
    Forward,
    Loss,
    Method,
    check_share,
    column,
    is_number,
)

_ANSWERS = (
    "Give rows of one question each, with labels: -100 for the prompt, token ids for the answer."
)


@dataclass(frozen=True)
class Dyvte(Method):
    """Trains the gates of an `ExitVisionLanguage`; everything else is frozen.

    A step trains one gate, drawn uniformly. An evaluation uses all. A prompt's label is 1 (the
    image tokens can leave) if at least `agreement` of the answer's tokens are the same without
    them, and the answer's cross-entropy in nats per token is less than `ratio` times that with
    them, plus `slack`. The paper trains on 1 % of a model's instruction data, for one epoch at a
    learning rate of 4e-5 to 6e-5.

    Batches hold ``input_ids`` and ``labels`` ``[batch, seq]``, a prompt with images and its answer
    per row, and ``pixel_values``; labels are -100 for the prompt. Padding is on the right.

    Attributes:
        agreement: Share of an answer's tokens.
        ratio, slack: Of the cross-entropy. The paper has no slack; without it, labels of answers
            that the model is sure of are noise.
    """

    agreement: float = 0.99
    ratio: float = 1.03
    slack: float = 0.01
    left_out: ClassVar[str] = "it trains gates only"

    def check(self, model: Any) -> None:
        if not isinstance(model, ExitVisionLanguage):
            raise UsageError(
                f"Dyvte trains vision-language models without an encoder, not "
                f"{type(model).__name__}",
                fix=GIVE_EXITS,
            )
        if not len(model.gates):
            raise UsageError(
                "Dyvte: the model has no gates",
                fix="Read it with gates: from_pretrained(path, gates=[4], untrained=True), and the "
                "layers of your choice.",
            )
        check_share("Dyvte", "agreement", self.agreement, "Give a share of an answer's tokens.")
        for name, least in (("ratio", 1.0), ("slack", 0.0)):
            value = getattr(self, name)
            if not is_number(value) or value < least:
                raise UsageError(
                    f"Dyvte: {name} {value!r} is out of range",
                    fix=f"Give a number of at least {least:g}.",
                )

    def part(self, model: ExitVisionLanguage) -> nn.Module:
        return model.gates

    def inputs(self, model: ExitVisionLanguage) -> list[str]:
        return ["input_ids", "attention_mask", *model.read_by_embed]

    def loss(
        self, model: ExitVisionLanguage, forward: Forward, inputs: Batch, step: int | None
    ) -> Loss:
        layers = model.gate_layers
        if step is not None:  # the same in every process and after a resumption
            draw = torch.randint(len(layers), (), generator=torch.Generator().manual_seed(step))
            layers = [layers[int(draw)]]
        losses, logits = [], {}
        for layer in layers:
            judged = self.judge(model, forward, inputs, layer, step)
            losses.append(functional.cross_entropy(judged.logits.float(), judged.labels))
            logits[gate_name(layer)] = judged.logits
        return torch.stack(losses).mean(), logits

    def judge(
        self,
        model: ExitVisionLanguage,
        forward: Forward,
        inputs: Batch,
        layer: int,
        step: int | None = None,
    ) -> Judged:
        """A gate's logits for the prompts of a batch, and its labels.

        Raises:
            UsageError: A row has not one answer, no prompt before it, or no image tokens.
        """
        column(inputs, "labels", _ANSWERS)
        tokens, targets = checked_tokens(model, inputs, step)
        answer = targets != IGNORED
        prompts = answer.int().argmax(dim=1) + 1
        if not (tokens.is_cuda and step):  # a GPU would wait for it
            _check_rows(model, tokens, answer, prompts)
        others = further_inputs(model, inputs, step)
        made: AtGate = forward(tokens, gate=layer, **{**others, "prompts": prompts})
        with torch.no_grad():
            counts = answer.sum(dim=1)
            same = made.full.argmax(-1) == made.without.argmax(-1)
            agreeing = (same & answer).sum(dim=1) >= self.agreement * counts
            full, without = (_cross_entropy(z, targets, answer) for z in (made.full, made.without))
            labels = agreeing & (without < self.ratio * full + self.slack)
        return Judged(made.gate, labels.long())

    def trains(self, model: ExitVisionLanguage) -> list[str]:
        return list(model.gates)


@dataclass(frozen=True)
class Judged:
    """A gate's logits ``[batch, 2]`` and labels ``[batch]``: 0 for stay, 1 for leave."""

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """The score ``[batch]`` that the gate has on the device."""
        return torch.sigmoid(self.logits.float().diff(dim=-1)[:, 0])


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """Mean over an answer's tokens ``[batch]``, in nats."""
    each = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(targets.shape).sum(dim=1) / answer.sum(dim=1).clamp(min=1)


def _check_rows(
    model: ExitVisionLanguage, tokens: torch.Tensor, answer: torch.Tensor, prompts: torch.Tensor
) -> None:
    """Raises `UsageError` for rows from which a gate cannot learn."""
    if not bool(answer.any(dim=1).all()):
        raise UsageError("training: a row has no answer (all labels are -100)", fix=_ANSWERS)
    begins = answer[:, :1].sum(dim=1) + (answer[:, 1:] & ~answer[:, :-1]).sum(dim=1)
    if bool((begins > 1).any()):
        raise UsageError("training: a row has more than one answer", fix=_ANSWERS)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    image = (tokens == model.whole.placeholder) & (places < prompts[:, None])
    if not bool(image.any(dim=1).all()):
        raise UsageError(
            "training: a row has no image tokens in its prompt, so a gate has nothing to drop",
            fix="Leave out rows without an image; their labels must be -100 up to the answer.",
        )


__all__ = ["Dyvte", "Judged"]
