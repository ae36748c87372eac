"""The model of the vlm example before its training: a SigLIP tower, a projector and a Llama, in
transformers' own classes, with tokenizer, image processor and chat template."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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

LAYERS = 4
"""Of the tower, and of the decoder."""

PATCH, TOWER_WIDTH, WIDTH, INNER, HEADS = 6, 64, 80, 224, 4
VOCABULARY = 512
CHAT = (
    "{% for message in messages %}"
    "{{ message.role | upper }}:{{ '\\n' if message.role == 'assistant' else ' ' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '<|end|>\\n' if message.role == 'assistant' else '\\n' }}{% endfor %}"
    "{{ 'ASSISTANT:\\n' if add_generation_prompt else '' }}"
)
"""What `train.Batches.encode` writes."""


def make_model() -> LlavaForConditionalGeneration:
    """A SigLIP tower of 64 patches, a projector of two layers, and a Llama with tied embeddings."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=TOWER_WIDTH,
            intermediate_size=2 * TOWER_WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=data.SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=0.1,  # 0.02 is for much wider models; with it, this one stays blind
        ),
        image_token_id=1,
        image_token_index=1,
        image_seq_length=(data.SIZE // PATCH) ** 2,
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
    """Tokenizer, image processor and chat template. The byte-level tokenizer learns from all
    questions and answers, so each of their words is one or two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*data.texts(), *["USER: ", "ASSISTANT:\n"] * 20], trainer)
    return processor_of(tokenizer, data.SIZE, PATCH, CHAT)
