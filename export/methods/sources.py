"""What a decoder's exits learn from in a batch: its text, and what is read before it.

A language model's text is ``input_ids``. That of an encoder-decoder is ``labels``, as transformers
expects them: the text to write, -100 at padding; the other columns are the encoder's.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder_decoder import (
    ENCODED,
    READ,
    SOURCE_IDS,
    SOURCE_MASK,
    ExitEncoderDecoder,
)
from edgeexit.export.exits.vision_encoder_decoder import ExitVisionEncoderDecoder
from edgeexit.export.methods.images import (
    GIVE_IMAGES,
    check_places,
    checked_pixels,
    further_inputs,
)
from edgeexit.export.methods.layerskip import checked_tokens, tokens_and_targets
from edgeexit.export.methods.method import IGNORED, Batch, column, whole_numbers

DECODER_IDS = "decoder_input_ids"
_FIX_LABELS = (
    "Give the ids of the text to write, -100 at its padding, as "
    "transformers.DataCollatorForSeq2Seq(tokenizer) makes them."
)


def state_column(layer: int) -> str:
    """The column with states behind a layer (`edgeexit.export.methods.kept_states`)."""
    return f"state_{layer}"


def has_states(batch: Batch) -> bool:
    """Whether a batch holds states of the model's layers."""
    return any(name.startswith("state_") for name in batch)


def columns_of(model: ExitDecoder) -> list[str]:
    """Columns of a data set that `decoder_batch` reads, without labels."""
    if isinstance(model, ExitEncoderDecoder):
        return [*model.source_columns, ENCODED, READ, DECODER_IDS]
    return ["input_ids", "attention_mask", *model.read_by_embed]


def count_targets(model: ExitDecoder, inputs: Batch) -> torch.Tensor:
    """Number of tokens in a batch that exits learn to predict."""
    if isinstance(model, ExitEncoderDecoder):
        return (column(inputs, "labels", _FIX_LABELS) != IGNORED).sum()
    return (tokens_and_targets(inputs)[1] != IGNORED).sum()


def decoder_batch(
    model: ExitDecoder, inputs: Batch, step: int | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The decoder's tokens ``[batch, seq]``, the token that follows each (-100: ignored), and
    further arguments of its pass.

    Args:
        step: As in `Method.loss`.

    Raises:
        UsageError: Columns are missing, have other shapes, or hold what the model does not have.
    """
    if not isinstance(model, ExitEncoderDecoder):
        tokens, targets = checked_tokens(model, inputs, step)
        further = {} if has_states(inputs) else further_inputs(model, inputs, step)
        return tokens, targets, further
    targets = _targets(model, inputs, step)
    encoder = model.encoder.trunk
    if DECODER_IDS not in inputs and asks(targets, step):
        _check_labels_follow(targets)
    tokens = inputs.get(DECODER_IDS, shifted(targets, encoder.start_tokens[0], encoder.pad_token))
    if tokens.shape != targets.shape:
        raise UsageError(
            f"training: {DECODER_IDS} has the shape {list(tokens.shape)}, labels "
            f"{list(targets.shape)}",
            fix=f"Leave {DECODER_IDS} out: it is made of the labels.",
        )
    tokens = whole_numbers(tokens, DECODER_IDS, model.trunk.embedding.shape[0], step)
    return tokens, targets, {"columns": _source(model, inputs, len(targets), step)}


def shifted(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """What a decoder reads to predict labels ``[batch, seq]``: the start token, then the labels
    without the last; padding for those that are ignored. transformers shifts labels so.

    >>> shifted(torch.tensor([[7, 8, -100]]), start=2, pad=1).tolist()
    [[2, 7, 8]]
    """
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)], dim=1)


def asks(tensor: torch.Tensor, step: int | None) -> bool:
    """Whether to look into a tensor. A GPU, which would wait, is asked in the first step."""
    return not (tensor.is_cuda and step)


def _check_labels_follow(targets: torch.Tensor) -> None:
    """Refuses labels with a part that is ignored in front of one that is not: what the decoder
    reads there is not known."""
    ignored = targets == IGNORED
    if bool((ignored[:, :-1] & ~ignored[:, 1:]).any()):
        raise UsageError(
            "training: a label that is ignored (-100) stands in front of one that is not, so it is "
            "unknown what the decoder reads there",
            fix=f"Give {DECODER_IDS}, too: the start token and the text that the labels continue.",
        )


def _targets(model: ExitEncoderDecoder, inputs: Batch, step: int | None) -> torch.Tensor:
    """The labels of a batch, after checks against the model."""
    labels = column(inputs, "labels", _FIX_LABELS)
    if labels.ndim != 2 or not labels.shape[1]:
        raise UsageError(
            f"training: labels have the shape {list(labels.shape)}, not [batch, tokens]",
            fix=_FIX_LABELS,
        )
    most = model.trunk.positions
    if most is not None and labels.shape[1] > most:
        raise UsageError(
            f"training: a row has {labels.shape[1]} labels, the decoder has {most} positions",
            fix="Cut the texts into shorter rows.",
        )
    size = model.trunk.embedding.shape[0]
    return whole_numbers(labels, "labels", size, step, ignored=IGNORED)


def _source(model: ExitEncoderDecoder, inputs: Batch, rows: int, step: int | None) -> Batch:
    """The columns that the encoder reads, after checks against the model; or what it gave."""
    if ENCODED in inputs:
        return {name: inputs[name] for name in (ENCODED, READ) if name in inputs}
    first, *_ = model.source_columns
    fix = "Give what the encoder reads, as the model's tokenizer or processor makes it."
    if (given := len(column(inputs, first, fix))) != rows:
        raise UsageError(
            f"training: {first} has {given} rows, labels have {rows}",
            fix="Give a source for each text; check the data collator.",
        )
    source = {name: inputs[name] for name in model.source_columns if name in inputs}
    if SOURCE_IDS.name in source:
        _check_ids(model, source, step)
    if isinstance(model, ExitVisionEncoderDecoder):
        _check_images(model, source, step)
    return source


def _check_images(model: ExitVisionEncoderDecoder, source: Batch, step: int | None) -> None:
    """Compares a batch's images with the places that its rows have for them."""
    pixels, ids = checked_pixels(model.tower, source), source[SOURCE_IDS.name]
    apart = isinstance(model, ExitDecomposed)
    if apart and len(pixels) != len(ids):
        raise UsageError(
            f"training: a batch has {len(ids)} rows and {len(pixels)} images",
            fix=f"Give one image for each row. {GIVE_IMAGES}",
        )
    if not asks(ids, step):
        return
    if not apart:
        check_places(ids == model.whole.placeholder, len(pixels), model.whole.tower.tokens)
    elif bool((ids == model.whole.placeholder).any()):
        raise UsageError(
            "training: input_ids have placeholders of image tokens, but the model reads images and "
            "texts apart",
            fix="Give the texts alone: tokenizer(texts), without the processor's image tokens.",
        )


def _check_ids(model: ExitEncoderDecoder, source: Batch, step: int | None) -> None:
    """Raises `UsageError` for a source that the encoder cannot read."""
    ids, mask = source[SOURCE_IDS.name], source.get(SOURCE_MASK.name)
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        what = (
            list(ids.shape) if mask is None else f"{list(ids.shape)} with a mask {list(mask.shape)}"
        )
        raise UsageError(
            f"training: {SOURCE_IDS.name} has the shape {what}, not [batch, source]",
            fix="Give a list of token ids per row, and attention_mask with one entry per token.",
        )
    if mask is not None and asks(ids, step) and bool((mask[:, :-1] < mask[:, 1:]).any()):
        raise UsageError(
            "training: a batch has padding before a token",
            fix='Pad on the right: tokenizer.padding_side = "right".',
        )
    most = model.longest_text
    if most is not None and ids.shape[1] > most:
        raise UsageError(
            f"training: a row has {ids.shape[1]} tokens, the encoder reads at most {most}",
            fix="Cut the sources: tokenizer(..., truncation=True).",
        )
    embedding = model.encoder.trunk.embedding
    assert embedding is not None
    whole_numbers(ids, SOURCE_IDS.name, embedding.shape[0], step)


__all__ = [
    "columns_of",
    "count_targets",
    "decoder_batch",
    "has_states",
    "shifted",
    "state_column",
]
