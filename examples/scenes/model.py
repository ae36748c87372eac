"""The model of the scenes example before its training: a SigLIP tower, a projector and a Llama, in
transformers' own classes, with tokenizer, image processor and chat template. Every word is one
token."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data

PATCH = 8
PATCHES = (data.SIZE // PATCH) ** 2
TOWER_LAYERS, TOWER_WIDTH = 6, 96
LAYERS, WIDTH, INNER, HEADS, KEY_HEADS = 8, 256, 512, 8, 4
POSITIONS = 512
END, IMAGE, USER, ASSISTANT = "<|end|>", "<image>", "USER:", "ASSISTANT:"
CHAT = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}<image> {% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ ' <|end|> ' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)
"""``USER: <image> from 3 go two ASSISTANT: 7 <|end|> USER: ...``, as `language.Turns` writes it."""

WORDS = [END, IMAGE, USER, ASSISTANT, *data.DIGITS]
WORDS += ["from", "go", "read", "the", "cards", ",", ":", *data.STEPS, *data.GARMENTS]


def make_model(layers: int = LAYERS, width: int = WIDTH) -> LlavaForConditionalGeneration:
    """The model with fewer layers or another width for the models that exits compete with."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=TOWER_WIDTH,
            intermediate_size=2 * TOWER_WIDTH,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=HEADS // 2,
            image_size=data.SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=INNER * width // WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=width
            ** -0.5,  # 0.02 is for much wider models; this one would stay blind
        ),
        image_token_id=1,
        image_token_index=1,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.copy_(2 * positions())
    return model


def positions() -> torch.Tensor:
    """Sines and cosines of row and column ``[patches, width]``, for the tower's positions to start
    from: in so few steps it would not find out which patches are neighbours."""
    side = data.SIZE // PATCH
    rates = 16.0 ** -torch.linspace(0, 1, TOWER_WIDTH // 4) * math.pi / 2
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def make_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    edge = {"height": data.SIZE, "width": data.SIZE}
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
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT,
    )
