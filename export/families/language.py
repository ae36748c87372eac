"""The language models inside vision-language models, described by their own families."""

from __future__ import annotations

from transformers import PreTrainedModel

from edgeexit.errors import ExportError
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.families import llama
from edgeexit.export.families.llama import stop_tokens


def decoder_of(model: PreTrainedModel, base: PreTrainedModel) -> DecoderTrunk:
    """Describes the language model of a larger model.

    Args:
        model: The model, which has the vocabulary projection ``lm_head``.
        base: Its language model.
    """
    kind = base.config.model_type
    if kind in llama.TEXT_MODELS:
        return llama.text_trunk(base, model.lm_head, stop_tokens(model))
    raise ExportError(
        f"its language model is a {kind}, which is not supported inside a "
        f"{model.config.model_type} (supported: {', '.join(llama.TEXT_MODELS)})",
        fix="Use a checkpoint with one of these language models.",
    )


__all__ = ["decoder_of"]
