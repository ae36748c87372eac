"""Parts of a small LLaVA that the examples vlm and scenes share: where a tower's positions start,
the processor, and how a checkpoint is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

from edgeexit.export.exits.vision_language import ExitVisionLanguage

END, IMAGE = "<|end|>", "<image>"
POSITIONS = 512


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column ``[side * side, width]``, for the tower's positions to
    start from: in so few steps it would not find out which patches are neighbours."""
    rates = 16.0 ** -torch.linspace(0, 1, width // 4) * math.pi / 2
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def processor_of(tokenizer: Tokenizer, size: int, patch: int, chat: str) -> LlavaProcessor:
    """Tokenizer, image processor and chat template.

    Args:
        size: Edge of a picture in pixels.
        patch: Edge of a patch in pixels.
    """
    edge = {"height": size, "width": size}
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=edge, do_convert_rgb=True),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END,
            pad_token=END,
            padding_side="right",
            model_max_length=POSITIONS,
            extra_special_tokens={"image_token": IMAGE},
        ),
        patch_size=patch,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=chat,
    )


def save(split: ExitVisionLanguage, processor: ProcessorMixin, folder: Path) -> None:
    """Writes the checkpoint as a hub has them, in float16, with the exits beside it."""
    split.half()
    folder.mkdir(parents=True, exist_ok=True)
    split.save_pretrained(folder)
    split.float()
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # transformers 5 writes a name that transformers 4 does not know.
    written = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(written, indent=2) + "\n")
