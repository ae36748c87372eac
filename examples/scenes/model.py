"""The model of the scenes example before its training, in transformers' own classes, with
tokenizer, image processor and chat template: a LLaVA (a SigLIP tower, a projector and a Llama), or
the same in BLIP-2's form. Every word is one token."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedModel,
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
LAYERS, WIDTH, HEAD = 16, 192, 32
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


def make_blip2(layers: int = LAYERS, width: int = WIDTH) -> Blip2ForConditionalGeneration:
    """The same size in BLIP-2's form: a ViT, a Q-Former with a query per patch, an OPT."""
    heads = {"num_attention_heads": TOWER_WIDTH // HEAD, "hidden_size": TOWER_WIDTH}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **heads,
            intermediate_size=2 * TOWER_WIDTH,
            num_hidden_layers=TOWER_LAYERS,
            image_size=data.SIZE,
            patch_size=PATCH,
        ),
        qformer_config=Blip2QFormerConfig(
            **heads,
            intermediate_size=2 * TOWER_WIDTH,
            num_hidden_layers=1,
            encoder_hidden_size=TOWER_WIDTH,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=OPTConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD,
            max_position_embeddings=POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            init_std=width**-0.5,
        ),
        num_query_tokens=PATCHES,
        image_token_index=1,
        image_token_id=1,
    )
    model = Blip2ForConditionalGeneration(config)
    patches = sine_positions(data.SIZE // PATCH, TOWER_WIDTH)
    places = sine_positions_of_text(POSITIONS, width)
    with torch.no_grad():
        tower = model.vision_model.embeddings
        tower.position_embedding[0, 1:] = 2 * patches
        model.query_tokens[0] = 2 * patches
        model.language_model.model.decoder.embed_positions.weight[2:] = places
    return model


def sine_positions_of_text(count: int, width: int) -> torch.Tensor:
    """Sines and cosines ``[count, width]``, for OPT's positions to start from: neighbours must be
    told apart before anything else is learnt."""
    rates = 1000.0 ** -torch.linspace(0, 1, width // 2)
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1) * width**-0.5 * 4


def language_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The decoder of a model in either form, its final norm, and its head."""
    if isinstance(model, Blip2ForConditionalGeneration):
        decoder = model.language_model.model.decoder
        return decoder, decoder.final_layer_norm, model.language_model.lm_head
    return model.model.language_model, model.model.language_model.norm, model.lm_head


FAMILIES = {"llava": make_model, "blip2": make_blip2}


def make_processor(family: str = "llava") -> LlavaProcessor | Blip2Processor:
    """Tokenizer, image processor and chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    processor = processor_of(tokenizer, data.SIZE, PATCH, CHAT)
    if family == "llava":
        return processor
    own = Blip2Processor(processor.image_processor, processor.tokenizer, num_query_tokens=PATCHES)
    own.chat_template = CHAT.replace("<image> ", "")  # images stand in front of the prompt
    return own
