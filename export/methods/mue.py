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
from edgeexit.export.exits.tower import PIXELS
from edgeexit.export.exits.vision_encoder_decoder import ExitVisionEncoderDecoder
from edgeexit.export.methods.images import GIVE_IMAGES, check_places, checked_pixels
from edgeexit.export.methods.method import (
    GIVE_EXITS,
    IGNORED,
    Batch,
    Forward,
    Loss,
    Method,
    column,
    is_number,
    whole_numbers,
)

HandOver = Literal["last", "sampled"]
DECODER_IDS = "decoder_input_ids"


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
        seen = [PIXELS] if isinstance(model, ExitVisionEncoderDecoder) else []
        return ["input_ids", "attention_mask", DECODER_IDS, *seen]

    def loss(
        self, model: ExitEncoderDecoder, forward: Forward, inputs: Batch, step: int | None
    ) -> Loss:
        tokens, targets = _checked_text(model, inputs, step)
        to_encode = _checked_source(model, inputs, step)
        layers = self.layers(model, step)
        for branch, argument in _branches(model):
            to_encode[argument] = layers[branch.name]
        logits = forward(tokens, to_encode=to_encode)
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

    def count(self, inputs: Batch) -> torch.Tensor:
        return (column(inputs, "labels", GIVE_LABELS) != IGNORED).sum()

    def trains(self, model: ExitEncoderDecoder) -> list[str]:
        names = [f"exit_{layer}" for layer in model.exit_layers]
        if self.hand_over == "sampled":
            for branch, _ in _branches(model):
                names += map(branch.exit_name, branch.exit_layers)
        return names


GIVE_LABELS = "Give labels: token ids of what the model shall write, and -100 at padding."


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


def _checked_text(
    model: ExitEncoderDecoder, inputs: Batch, step: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder reads and what it must write, both ``[batch, seq]``."""
    labels = column(inputs, "labels", GIVE_LABELS)
    rows, most = len(column(inputs, "input_ids", GIVE_TEXTS)), model.trunk.positions
    if labels.ndim != 2 or len(labels) != rows or not labels.shape[1]:
        raise UsageError(
            f"training: labels have the shape {list(labels.shape)}, not [{rows}, tokens]",
            fix="Give a list of token ids for each row of input_ids.",
        )
    if most is not None and labels.shape[1] > most:
        raise UsageError(
            f"training: a row has {labels.shape[1]} labels, the decoder has {most} positions",
            fix="Cut the texts.",
        )
    size = model.trunk.embedding.shape[0]
    targets = whole_numbers(labels, "labels", size, step, ignored=IGNORED)
    if DECODER_IDS not in inputs:
        return _shifted(model, targets, step), targets
    given = inputs[DECODER_IDS]
    if given.shape != labels.shape:
        raise UsageError(
            f"training: {DECODER_IDS} have the shape {list(given.shape)}, not "
            f"{list(labels.shape)}, as labels",
            fix="Give what the decoder reads when it writes each label.",
        )
    return whole_numbers(given, DECODER_IDS, size, step), targets


def _shifted(model: ExitEncoderDecoder, targets: torch.Tensor, step: int | None) -> torch.Tensor:
    """The start token, then the labels without the last one, as transformers shifts them."""
    ignored = targets == IGNORED
    if not (targets.is_cuda and step) and bool((ignored[:, :-1] & ~ignored[:, 1:]).any()):
        raise UsageError(
            "training: a label that is ignored (-100) stands in front of one that is not, so it is "
            "unknown what the decoder reads there",
            fix=f"Give {DECODER_IDS}, too: the start token and the text that the labels continue.",
        )
    trunk = model.encoder.trunk
    start = torch.full_like(targets[:, :1], trunk.start_tokens[0])
    before = targets[:, :-1].masked_fill(ignored[:, :-1], trunk.pad_token)
    return torch.cat([start, before], 1)


GIVE_TEXTS = "Tokenize the texts that the encoder reads: each row is a list of token ids."


def _checked_source(model: ExitEncoderDecoder, inputs: Batch, step: int | None) -> dict[str, Any]:
    """Arguments of the model's `encode`."""
    ids = column(inputs, "input_ids", GIVE_TEXTS)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    if ids.ndim != 2 or mask.shape != ids.shape:
        what, shape = ("input_ids", ids) if ids.ndim != 2 else ("attention_mask", mask)
        expected = "[batch, tokens]" if ids.ndim != 2 else f"{list(ids.shape)}, as input_ids"
        raise UsageError(
            f"training: {what} has the shape {list(shape.shape)}, not {expected}",
            fix="Give a list of token ids per row, and a mask with one entry per token.",
        )
    asks = not (ids.is_cuda and step)  # a GPU, which would wait, is asked in the first step
    if asks and bool((mask[:, :-1] < mask[:, 1:]).any()):
        raise UsageError(
            "training: a batch has padding before a token",
            fix='Pad on the right: tokenizer.padding_side = "right".',
        )
    most = model.longest_text
    if most is not None and ids.shape[1] > most:
        raise UsageError(
            f"training: a row has {ids.shape[1]} tokens, the encoder reads {most} at most",
            fix="Cut the texts.",
        )
    size = model.encoder.trunk.embedding.shape[0]
    given: dict[str, Any] = {
        "input_ids": whole_numbers(ids, "input_ids", size, step),
        "attention_mask": mask,
    }
    if isinstance(model, ExitVisionEncoderDecoder):
        given["images"] = [_checked_images(model, inputs, asks=asks)]
    return given


def _checked_images(model: ExitVisionEncoderDecoder, inputs: Batch, *, asks: bool) -> torch.Tensor:
    """The images of a batch, after a look at the places that its rows have for them."""
    pixels, ids = checked_pixels(model.tower, inputs), inputs["input_ids"]
    if not isinstance(model, ExitDecomposed):
        if asks:
            check_places(ids == model.whole.placeholder, len(pixels), model.whole.tower.tokens)
        return pixels
    if len(pixels) != len(ids):
        raise UsageError(
            f"training: a batch has {len(ids)} rows and {len(pixels)} images",
            fix=f"Give one image for each row. {GIVE_IMAGES}",
        )
    if asks and bool((ids == model.whole.placeholder).any()):
        raise UsageError(
            "training: input_ids have placeholders of image tokens, but the model reads images and "
            "texts apart",
            fix="Give the texts alone: tokenizer(texts), without the processor's image tokens.",
        )
    return pixels


__all__ = ["HandOver", "Mue", "smoothed_loss"]
