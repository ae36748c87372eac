"""The model of the scenes example before its training: a SigLIP tower, a projector and a Llama, in
transformers' own classes, with tokenizer, image processor and chat template. Every word is one
token."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import data  # noqa: E402
from small_llava import (  # noqa: E402
    END,
    IMAGE,
    POSITIONS,
    processor_of,
    sine_positions,
)

PATCH = 8
PATCHES = (data.SIZE // PATCH) ** 2
TOWER_LAYERS, TOWER_WIDTH = 6, 96
LAYERS, WIDTH, HEAD = 12, 192, 32
USER, ASSISTANT = "USER:", "ASSISTANT:"
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
WORDS += ["from", "go", "walk", "read", "the", "cards", ",", ":", *data.STEPS, *data.GARMENTS]


def make_model(layers: int = LAYERS, width: int = WIDTH) -> LlavaForConditionalGeneration:
    """The model with fewer layers or another width for the models that exits compete with."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=TOWER_WIDTH,
            intermediate_size=2 * TOWER_WIDTH,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=TOWER_WIDTH // HEAD,
            image_size=data.SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD // 2,
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
        model.model.vision_tower.embeddings.position_embedding.weight.copy_(
            2 * sine_positions(data.SIZE // PATCH, TOWER_WIDTH)
        )
    return model


def make_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return processor_of(tokenizer, data.SIZE, PATCH, CHAT)
