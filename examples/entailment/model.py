"""The models before their training, in transformers' own classes: a Florence-2 that reads pictures
and a BART that reads scenes in words, with tokenizer and image processor. Every word is one
token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2VisionConfig,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import data  # noqa: E402

LAYERS, WIDTH, HEAD = 6, 96, 32
TOKENS = data.CELLS + 1
"""Image tokens: one for the whole picture, then one for each cell."""
POSITIONS = 96
START, PAD, END, IMAGE = 0, 1, 2, 3
WORDS = ["<s>", "<pad>", "</s>", "<image>", *data.DIGITS]
WORDS += ["from", "go", "is", "walk", "read", "name", "the", "cards", "rings", ",", ":"]
WORDS += [data.YES, data.NO, *data.STEPS]
IDS = {word: number for number, word in enumerate(WORDS)}


def bart_config(layers: int, width: int) -> BartConfig:
    return BartConfig(
        vocab_size=len(WORDS),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // HEAD,
        decoder_attention_heads=width // HEAD,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=width**-0.5,
        bos_token_id=START,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
    )


def make_bart(layers: int = LAYERS, width: int = WIDTH) -> BartForConditionalGeneration:
    """A BART with positions that start as sines."""
    model = BartForConditionalGeneration(bart_config(layers, width))
    _place(model.model)
    return model


def make_florence(layers: int = LAYERS, width: int = WIDTH) -> Florence2ForConditionalGeneration:
    """A Florence-2 whose tower makes an image token for each cell of a picture."""
    config = Florence2Config(
        vision_config=Florence2VisionConfig(
            embed_dim=[32, 64, 96, 96],
            num_heads=[1, 2, 3, 3],
            num_groups=[1, 2, 3, 3],
            depths=[1, 1, 2, 1],
            patch_stride=[4, 2, 2, 1],
            window_size=4,
            mlp_ratio=2.0,
            drop_path_rate=0.0,
            projection_dim=width,
            max_position_embeddings=8,
            max_temporal_embeddings=4,
        ),
        text_config=bart_config(layers, width),
        image_token_id=IMAGE,
    )
    model = Florence2ForConditionalGeneration(config)
    _place(model.model.language_model)
    with torch.no_grad():  # image tokens are as long as words, and begin as them
        model.model.multi_modal_projector.image_proj_norm.weight.fill_(width**-0.5)
        digits = [IDS[word] for word in data.DIGITS]
        model.model.language_model.shared.weight[digits] = class_vectors(width)[: data.BLANK]
    return model


def _place(base: Any) -> None:
    """Where the weights begin. Positions are sines and cosines: neighbours must be told apart
    before anything else is learnt. The decoder's tokens look for their like in what the encoder
    read: it would take long to find that out."""
    with torch.no_grad():
        for layer in base.decoder.layers:
            layer.encoder_attn.k_proj.weight.copy_(layer.encoder_attn.q_proj.weight)
        for half in (base.encoder, base.decoder):
            table = half.embed_positions.weight
            rates = 100.0 ** -torch.linspace(0, 1, table.shape[1] // 2)
            angles = torch.arange(len(table))[:, None] * rates
            table.copy_(torch.cat([angles.sin(), angles.cos()], -1) * table.shape[1] ** -0.5)


def class_vectors(width: int) -> torch.Tensor:
    """What stands for each class in a cell's image token, and for `data.BLANK`, ``[classes,
    width]``. They never change, so tower and language model can be trained apart."""
    drawn = torch.randn(data.BLANK + 1, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.layer_norm(drawn, (width,)) * width**-0.5


def ideal_tokens(cover: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Image tokens ``[batch, TOKENS, width]`` of classes ``[batch, cells]``."""
    cells = vectors[cover]
    whole = torch.nn.functional.layer_norm(cells.mean(1, keepdim=True), vectors.shape[1:])
    return torch.cat([whole * vectors.shape[1] ** -0.5, cells], 1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=POSITIONS,
        extra_special_tokens={"image_token": "<image>"},
    )


def make_image_processor() -> CLIPImageProcessorPil:
    edge = {"height": data.SIZE, "width": data.SIZE}
    return CLIPImageProcessorPil(size=edge, do_center_crop=False, do_convert_rgb=True)
