"""What a pass reads of a batch besides its tokens: images, which must be those that its rows have
places for, and where prompts end."""

from __future__ import annotations

import torch

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.tower import PIXELS, ExitTower
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.methods.method import IGNORED, Batch, column

GIVE_IMAGES = "Give images as the model's image processor makes them."


def further_inputs(model: ExitDecoder, inputs: Batch, step: int | None) -> dict[str, torch.Tensor]:
    """What an `ExitDecoder` reads of a batch besides its tokens: images, and the lengths of prompts
    if adapters in place of attentions summarise them.

    Args:
        step: As in `Method.loss`. On a GPU, which would wait for it, places are only counted in the
            first step and in evaluations.

    Raises:
        UsageError: Images have another shape, or rows have more or fewer places for image tokens.
    """
    if isinstance(model, ExitVisionLanguage):
        ids, images = inputs["input_ids"], 0
        if PIXELS in inputs:
            images = len(checked_pixels(model.tower, inputs))
        if not (ids.is_cuda and step):
            check_places(ids == model.whole.placeholder, images, model.whole.tower.tokens)
    others = {name: inputs[name] for name in model.read_by_embed if name in inputs}
    return others | ({"prompts": prompts_of(inputs)} if model.skipped.summarises else {})


def prompts_of(inputs: Batch) -> torch.Tensor:
    """Tokens in front of the first label that is not ignored, ``[batch]``; of rows without one, all
    tokens but padding behind them.

    Raises:
        UsageError: There are no labels.
    """
    labels = column(
        inputs,
        "labels",
        "Layers without attention summarise prompts: give labels, -100 for the prompt.",
    )
    answer = labels[:, 1:] != IGNORED
    ends = answer.int().argmax(dim=1) + 1
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.where(answer.any(dim=1), ends, labels.shape[1])
    return torch.where(answer.any(dim=1), ends, mask.sum(dim=1))


def checked_pixels(tower: ExitTower, inputs: Batch) -> torch.Tensor:
    """The images of a batch ``[images, channels, height, width]``. Raises `UsageError` if there is
    no such column, or if they have another shape or kind."""
    pixels = column(inputs, PIXELS, GIVE_IMAGES)
    wanted = list(tower.trunk.pixels)
    if pixels.ndim != 4 or list(pixels.shape[1:]) != wanted or not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.")
        raise UsageError(
            f"training: {PIXELS} are {kind} {list(pixels.shape)}, not floating point "
            f"[images, {', '.join(map(str, wanted))}]",
            fix=GIVE_IMAGES,
        )
    return pixels


def check_places(places: torch.Tensor, images: int, tokens: int) -> None:
    """Raises `UsageError` unless rows have as many places ``[batch, seq]`` as images have
    tokens."""
    of_row = places.sum(1).tolist()
    for row, count in enumerate(of_row):
        if count % tokens:
            raise UsageError(
                f"training: row {row} of a batch has {count} places for image tokens, and an image "
                f"makes {tokens}",
                fix="Write each image's placeholder as often as the model's processor does, and do "
                "not cut rows within an image.",
            )
    if sum(of_row) != images * tokens:
        raise UsageError(
            f"training: the rows of a batch have places for {sum(of_row) // tokens} images, and it "
            f"has {images}",
            fix=f"Give {PIXELS} with an image for each, in the order of their places; check that "
            "the data collator keeps them.",
        )


__all__ = ["GIVE_IMAGES", "check_places", "checked_pixels", "further_inputs"]
