"""Small vision-language models of every family, made from a configuration and saved as a checkpoint
with tokenizer and image processor; and the plainest way to run them.

Weights are drawn wide, so that positions, image tokens and masks matter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

VOCABULARY, LAYERS, SIZE, PATCH = 300, 4, 32, 8
PLACEHOLDER = VOCABULARY - 1
DECODERS = ("llava", "internvl", "internvl_qwen3", "smolvlm", "blip2")
"""Families whose decoder reads the image tokens; Florence-2's encoder does."""
FAMILIES = (*DECODERS, "florence2")
MARKERS = {"internvl": "<IMG_CONTEXT>", "internvl_qwen3": "<IMG_CONTEXT>"}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 48}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_OTHERS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_OTHERS += ["<img>", "</img>", "<fake_token_around_image>", "<global-img>"]


def marker_of(family: str) -> str:
    """What a prompt says for an image; empty where images stand in front."""
    return "" if family in ("blip2", "florence2") else MARKERS.get(family, "<image>")


def make_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model of four layers, in the tower and behind it, with random weights."""
    torch.manual_seed(seed)
    t: Any = transformers
    if family == "llava":
        config = t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**_VISION, projection_dim=16),
            text_config=t.LlamaConfig(**_LLAMA),
            image_token_id=PLACEHOLDER,
            image_token_index=PLACEHOLDER,
        )
        model = t.LlavaForConditionalGeneration(config)
    elif family.startswith("internvl"):
        text = (
            t.Qwen3Config(**_LLAMA, head_dim=16) if "qwen3" in family else t.Qwen2Config(**_LLAMA)
        )
        vision = {**_VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
        config = t.InternVLConfig(
            vision_config=t.InternVLVisionConfig(**vision),
            text_config=text,
            image_token_id=PLACEHOLDER,
            downsample_ratio=0.5,
        )
        model = t.InternVLForConditionalGeneration(config)
    elif family == "smolvlm":
        config = t.SmolVLMConfig(
            vision_config=SmolVLMVisionConfig(**_VISION),
            text_config=t.LlamaConfig(**_LLAMA),
            image_token_id=PLACEHOLDER,
            scale_factor=2,
            tie_word_embeddings=False,
        )
        model = t.SmolVLMForConditionalGeneration(config)
    elif family == "blip2":
        config = t.Blip2Config(
            vision_config=t.Blip2VisionConfig(**_VISION),
            qformer_config=t.Blip2QFormerConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                encoder_hidden_size=32,
                cross_attention_frequency=2,
            ),
            text_config=t.OPTConfig(**_TEXT, ffn_dim=48, word_embed_proj_dim=64),
            num_query_tokens=6,
            image_token_index=PLACEHOLDER,
            image_token_id=PLACEHOLDER,
        )
        model = t.Blip2ForConditionalGeneration(config)
    else:
        model = t.Florence2ForConditionalGeneration(_florence2())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def _florence2() -> Any:
    t: Any = transformers
    return t.Florence2Config(
        vision_config=t.Florence2VisionConfig(
            embed_dim=[8, 16, 32, 64],
            num_heads=[1, 2, 4, 4],
            num_groups=[1, 2, 4, 4],
            depths=[1, 1, 3, 1],
            window_size=4,
            projection_dim=64,
            max_position_embeddings=8,
            max_temporal_embeddings=4,
        ),
        text_config=t.BartConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=96,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        image_token_id=PLACEHOLDER,
    )


def make_tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer whose last token is the placeholder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: n for n, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    others = VOCABULARY - 1 - len(vocabulary) - len(_OTHERS)
    special = [*_OTHERS, *(f"<other_{n}>" for n in range(others))]
    special.append(MARKERS.get(family, "<image>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        padding_side="right",
        model_max_length=96,
        chat_template=CHAT,
    )


CHAT = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "MARKER{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: "
)


def make_processor(family: str) -> Any:
    """The image processor of a family."""
    t: Any = transformers
    if family == "llava":
        return t.CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        )
    if family.startswith("internvl"):
        return GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE}, max_patches=3)
    if family == "smolvlm":
        return SmolVLMImageProcessorPil(
            size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}
        )
    size = 2 * SIZE if family == "florence2" else SIZE
    return t.CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)


def save_checkpoint(family: str, folder: Path) -> Path:
    """Writes a checkpoint as `save_pretrained` of model, tokenizer and image processor does."""
    model = make_model(family)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = CHAT.replace("MARKER", MARKERS.get(family, "<image>"))
    tokenizer.save_pretrained(folder)
    make_processor(family).save_pretrained(folder)
    return folder


def make_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Images of unlike sizes."""
    random = np.random.RandomState(seed)
    shapes = [(40 + 30 * n, 70 - 15 * n, 3) for n in range(count)]
    return [Image.fromarray(random.randint(0, 256, shape).astype(np.uint8)) for shape in shapes]


def reference_text(
    model: Any, ids: Sequence[int], pixels: torch.Tensor | None, count: int
) -> list[int]:
    """The greedy tokens of transformers' `generate` for one prompt, up to the stop token."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    if pixels is not None:
        smolvlm = type(model).__name__.startswith(("SmolVLM", "Idefics3"))
        inputs["pixel_values"] = pixels[None] if smolvlm else pixels
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0].tolist()
    new = made[len(ids) :]
    return new[: new.index(0)] if 0 in new else new


def in_float64(split: Any) -> Any:
    """A copy of a model with exits that computes in float64; kept while the model lives."""
    made = getattr(split, "float64", None)
    if made is None:
        made = copy.deepcopy(split)
        made.double()
        object.__setattr__(split, "float64", made)  # not a part of the model
    return made


def text_without_images(
    split: Any, ids: Sequence[int], pixels: torch.Tensor | None, layer: int, count: int
) -> list[int]:
    """Greedy tokens in float64 where the prompt's image tokens are left out behind a layer and all
    others keep their positions; every token from the beginning."""
    split = in_float64(split)
    pixels = None if pixels is None else pixels.double()
    prompt, tokens = len(ids), list(ids)
    for _ in range(count):
        all_ids = torch.tensor([tokens])
        images = () if pixels is None else (pixels,)
        state = torch.cat(
            [split.embed(all_ids[:, :prompt], *images), split.embed(all_ids[:, prompt:])], 1
        )
        positions = torch.arange(len(tokens))[None]
        if split.trunk.stem is not None:
            state = split.trunk.stem(state, positions)
        for number, one in enumerate(split.layers, start=1):
            state = split._through_layer(one, state, positions)
            if number == layer:
                kept = (all_ids[0] != PLACEHOLDER) | (torch.arange(len(tokens)) >= prompt)
                state, positions = state[:, kept], positions[:, kept]
        assert state.dtype == torch.float64
        token = int(split.trunk.head(state[:, -1]).argmax())
        if token == 0:
            break
        tokens.append(token)
    return tokens[prompt:]
