"""MuE (CVPR 2023): trains an encoder-decoder whose decoder may stop behind every exit, and whose
encoder may hand over early.

Exits have no weights of their own: those of the decoder share its head, and those of the encoder
pass their state on. So all weights are trained, with a loss behind every decoder exit and behind
the last layer. The published training has no loss for the encoder: its decoder never reads what an
early exit of the encoder passes on. With ``hand_over="sampled"`` it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder import ExitEncoder
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.methods.method import (
    GIVE_EXITS,
    IGNORED,
    Batch,
    Forward,
    Loss,
    Method,
    is_number,
)
from edgeexit.export.methods.sources import columns_of, count_targets, decoder_batch

HandOver = Literal["last", "sampled"]


@dataclass(frozen=True)
class Mue(Method):
    """Trains all weights of an encoder-decoder with exits, behind a vision tower or without one.

    The loss is the sum, over the decoder's exits and its last layer, of the label-smoothed
    cross-entropy of that layer's logits.

    Batches are those of transformers' sequence-to-sequence models: ``input_ids`` ``[batch,
    source]``, ``attention_mask``, and ``labels`` ``[batch, seq]`` with -100 for tokens to ignore;
    with a tower also ``pixel_values`` ``[images, channels, height, width]``. A model that reads
    images and texts apart takes one image a row, and texts without placeholders. The decoder reads
    the labels, one place further behind its start token, or ``decoder_input_ids`` ``[batch, seq]``
    if there are any. Those can begin with a text whose labels are -100, such as a statement that is
    to be judged. Padding is on the right.

    Attributes:
        hand_over: Which state the decoder reads. ``"last"``: that of the encoder's last layer, as
            published; early exits of the encoder are not trained. ``"sampled"``: in each step, each
            branch of the encoder hands over behind a layer that is drawn from its exits and its
            last layer. An evaluation always takes the last layer.
        label_smoothing: Share of the targets' probability that is spread over the vocabulary.
    """

    hand_over: HandOver = "last"
    label_smoothing: float = 0.1

    def check(self, model: Any) -> None:
        if not isinstance(model, ExitEncoderDecoder):
            fix = "Use LayerSkip or AdapterDistillation for a language model without an encoder."
            if not isinstance(model, ExitDecoder):
                fix = "Use Joint." if isinstance(model, ExitClassifier) else GIVE_EXITS
            raise UsageError(
                f"Mue trains encoder-decoders with exits, not {type(model).__name__}", fix=fix
            )
        if self.hand_over not in get_args(HandOver):
            known = " or ".join(map(repr, get_args(HandOver)))
            raise UsageError(
                f"Mue: hand_over {self.hand_over!r} is not known", fix=f"Give {known}."
            )
        if not is_number(self.label_smoothing) or not 0 <= self.label_smoothing < 1:
            raise UsageError(
                f"Mue: label_smoothing {self.label_smoothing!r} is out of range",
                fix="Give a number from 0 to less than 1.",
            )
        if not self.trains(model):
            part = "model" if self.hand_over == "sampled" else "decoder"
            raise UsageError(f"Mue: the {part} has no exits", fix=GIVE_EXITS)
        branches = [branch.exit_layers for branch, _ in _branches(model)]
        if self.hand_over == "sampled" and not any(branches):
            raise UsageError(
                "Mue: the encoder has no exits to hand over at",
                fix="Give it exits (encoder_exits=...), or leave out hand_over.",
            )

    def inputs(self, model: ExitEncoderDecoder) -> list[str]:
        return columns_of(model)

    def loss(
        self, model: ExitEncoderDecoder, forward: Forward, inputs: Batch, step: int | None
    ) -> Loss:
        tokens, targets, others = decoder_batch(model, inputs, step)
        layers = self.layers(model, step)
        hand_over = {argument: layers[branch.name] for branch, argument in _branches(model)}
        logits = forward(tokens, hand_over=hand_over, **others)
        smoothing = self.label_smoothing
        each = [smoothed_loss(own, targets, smoothing) for own in logits.values()]
        answers = {f"exit_{layer}": own for layer, own in logits.items()}
        if self.hand_over == "sampled" and step is not None:
            # The decoder has read what these exits pass on, so they are trained.
            for branch, _ in _branches(model):
                layer = layers[branch.name]
                if layer < branch.depth:
                    answers[branch.exit_name(layer)] = logits[model.depth]
        return torch.stack(each).sum(), answers

    def layers(self, model: ExitEncoderDecoder, step: int | None) -> dict[str, int]:
        """Branch of the encoder -> the layer behind which it hands over in a step; None: an
        evaluation."""
        # The step is the seed: the same draws in every process and after a resumption.
        generator = None if step is None else torch.Generator().manual_seed(step)
        chosen = {}
        for branch, _ in _branches(model):
            choice = [*branch.exit_layers, branch.depth]
            if self.hand_over == "sampled" and generator is not None:
                drawn = int(torch.randint(len(choice), (), generator=generator))
                chosen[branch.name] = choice[drawn]
            else:
                chosen[branch.name] = branch.depth
        return chosen

    def count(self, model: ExitEncoderDecoder, inputs: Batch) -> torch.Tensor:
        return count_targets(model, inputs)

    def trains(self, model: ExitEncoderDecoder) -> list[str]:
        names = [f"exit_{layer}" for layer in model.exit_layers]
        if self.hand_over == "sampled":
            for branch, _ in _branches(model):
                names += map(branch.exit_name, branch.exit_layers)
        return names


def smoothed_loss(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Mean label-smoothed cross-entropy of logits ``[batch, seq, vocabulary]`` against targets
    ``[batch, seq]`` that are not -100, in nats. 0 if there are none."""
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return total / (targets != IGNORED).sum().clamp(min=1)


def _branches(model: ExitEncoderDecoder) -> list[tuple[ExitEncoder, str]]:
    """The encoder's branches, and the argument of `encode` that says how many layers run."""
    if isinstance(model, ExitDecomposed):
        return [(model.encoder, "layers"), (model.image_encoder, "image_layers")]
    return [(model.encoder, "layers")]


__all__ = ["HandOver", "Mue", "smoothed_loss"]
