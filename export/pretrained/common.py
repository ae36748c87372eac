"""What all kinds of checkpoints share: names, the family's description, what is known of exits."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import transformers

from edgeexit.errors import ExportError
from edgeexit.export.checkpoint import Checkpoint
from edgeexit.export.device_tokenizer import has_tokenizer
from edgeexit.export.library_errors import translated

logger = logging.getLogger(__name__)

LONGEST_TEXT = 4096
"""Maximum tokens of an encoder's text if neither the model nor its tokenizer has a limit."""


def name_of(path: str | Path) -> str:
    """Name of a checkpoint: its folder's name, or the parent's if that is generic.

    >>> name_of("models/talker"), name_of("models/digits/checkpoint")
    ('talker', 'digits')
    """
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name


def trunk_of(
    checkpoint: Checkpoint, module_name: str, model: transformers.PreTrainedModel, *more: Any
) -> Any:
    """The description of a model by its family's module."""
    family = importlib.import_module(f"edgeexit.export.families.{module_name}")
    does = f"this configuration of {checkpoint.config.model_type} is not supported"
    with translated(checkpoint.path, does, "Correct config.json and generation_config.json."):
        try:
            return family.trunk(model.eval(), *more)
        except ExportError as error:  # families do not know the path
            raise ExportError(f"{checkpoint.path}: {error.what}", fix=error.fix) from error


def depth_of_config(config: transformers.PretrainedConfig) -> int:
    """Number of a model's layers (ResNet: blocks; encoder-decoders: those of the decoder;
    vision-language models: those of the language model)."""
    if depths := getattr(config, "depths", None):
        return sum(depths)
    if hasattr(config, "vision_config"):
        config = config.get_text_config()
    names = ("num_decoder_layers", "decoder_layers") if config.is_encoder_decoder else ()
    names = (*names, "num_hidden_layers")
    return next((int(n) for name in names if (n := getattr(config, name, None))), 1)


def tell_of_tokenizer(checkpoint: Checkpoint) -> None:
    """Warns that a bundle will not take texts."""
    if not has_tokenizer(checkpoint.text_folder):
        logger.warning(
            "%s: the checkpoint has no tokenizer, so the bundle takes token ids, not texts; to add "
            "one, save it in the same folder (tokenizer.save_pretrained)",
            checkpoint.path,
        )
