"""Small vision-language models of every family, made from a configuration and saved as a checkpoint
with tokenizer and image processor.

Weights are drawn wide, so that positions, image tokens and masks matter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgeexit.export import SplitModel
from edgeexit.export.pretrained import from_pretrained

VOCABULARY, LAYERS, SIZE, PATCH = 300, 4, 32, 8
PLACEHOLDER = VOCABULARY - 1
DECODERS = ("llava", "internvl", "smolvlm", "blip2")
"""Families whose decoder reads the image tokens; Florence-2's encoder does."""
FAMILIES = (*DECODERS, "florence2")
MARKERS = {"internvl": "<IMG_CONTEXT>"}
EXITS, DROPS = [1, 2], [3]
GATES = [1, 3]
TOWER_EXITS = {"llava": [1, 2], "florence2": [3]}
"""Exits of a family's tower; others have one behind the first layer. Florence-2's is inside a
stage."""
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
_QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 2,
}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 48}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
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
    """A model of a few layers, in the tower and behind it, with random weights."""
    torch.manual_seed(seed)
    t: Any = transformers
    if family == "llava":  # its projector reads the last but one of four layers
        vision = t.CLIPVisionConfig(**{**_VISION, "num_hidden_layers": 4}, projection_dim=16)
        model = make_llava(vision, t.Qwen3Config(**_LLAMA, head_dim=16))
    elif family == "internvl":
        model = make_internvl(t.Qwen2Config(**_LLAMA))
    elif family == "smolvlm":
        model = make_smolvlm(t.SmolVLMConfig, SmolVLMVisionConfig)
    elif family == "blip2":
        config = t.Blip2Config(
            vision_config=t.Blip2VisionConfig(**_VISION),
            qformer_config=t.Blip2QFormerConfig(**_QFORMER),
            text_config=t.OPTConfig(**_TEXT, ffn_dim=48, word_embed_proj_dim=64),
            num_query_tokens=6,
            image_token_index=PLACEHOLDER,
            image_token_id=PLACEHOLDER,
        )
        model = t.Blip2ForConditionalGeneration(config)
    else:
        model = t.Florence2ForConditionalGeneration(_florence2())
    return widened(model)


def make_variant(name: str) -> transformers.PreTrainedModel:
    """A model of a class and parts that `make_model` has in no family."""
    torch.manual_seed(1)
    t: Any = transformers
    llama, qwen2 = t.LlamaConfig(**_LLAMA), t.Qwen2Config(**_LLAMA)
    clip = t.CLIPVisionConfig(**_VISION, projection_dim=16)
    if name == "LLaVA, CLIP, Llama":
        model = make_llava(clip, llama)
    elif name == "LLaVA, SigLIP, Qwen2":
        siglip = t.SiglipVisionConfig(**_VISION)
        model = make_llava(siglip, qwen2, vision_feature_select_strategy="full")
    elif name == "LLaVA, two layers read":
        model = make_llava(clip, llama, vision_feature_layer=[1, -1])
    elif name == "InternVL, Qwen3":
        model = make_internvl(t.Qwen3Config(**_LLAMA, head_dim=16))
    elif name == "InternVL, Llama":
        model = make_internvl(llama, vision_feature_layer=2)
    else:
        model = make_smolvlm(t.Idefics3Config, Idefics3VisionConfig)
    return widened(model)


VARIANTS = (
    "LLaVA, CLIP, Llama",
    "LLaVA, SigLIP, Qwen2",
    "LLaVA, two layers read",
    "InternVL, Qwen3",
    "InternVL, Llama",
    "Idefics3",
)


def make_llava(vision: Any, text: Any, **options: Any) -> transformers.PreTrainedModel:
    """A LLaVA model of these configurations, without the weights of `widened`."""
    t: Any = transformers
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=PLACEHOLDER,
        image_token_index=PLACEHOLDER,
        **options,
    )
    return t.LlavaForConditionalGeneration(config)


def make_internvl(text: Any, **options: Any) -> transformers.PreTrainedModel:
    """An InternVL model with this language model."""
    t: Any = transformers
    vision = {**_VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**vision),
        text_config=text,
        image_token_id=PLACEHOLDER,
        downsample_ratio=0.5,
        **options,
    )
    return t.InternVLForConditionalGeneration(config)


def make_smolvlm(kind: Any, vision: Any) -> transformers.PreTrainedModel:
    """A SmolVLM or Idefics3, whose configurations are of these kinds."""
    t: Any = transformers
    config = kind(
        vision_config=vision(**_VISION),
        text_config=t.LlamaConfig(**_LLAMA),
        image_token_id=PLACEHOLDER,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    name = kind.__name__.removesuffix("Config")
    return getattr(t, f"{name}ForConditionalGeneration")(config)


def widened(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A model with noise on its weights, so that everything in it matters."""
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
            depths=[1, 1, 2, 1],
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


def load_split(family: str, folder: Path) -> Any:
    """A family's checkpoint with exits, as its bundle has them."""
    encodes = family == "florence2"
    return from_pretrained(
        folder,
        exits=EXITS,
        tower_exits=TOWER_EXITS.get(family, [1]),
        encoder_exits=[2] if encodes else None,
        image_drops=() if encodes else DROPS,
        untrained=True,
    )


def gated(family: str, folder: Path) -> Any:
    """A family's checkpoint with gates whose scores differ from prompt to prompt."""
    split: Any = from_pretrained(folder, exits=[2], tower_exits=[1], gates=GATES, untrained=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in split.gates.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return split


FIRST_FORM = {"llava": 0, "internvl": 1}
"""The first form of token states in a family's shared bundles, so that families differ in the form
that their tests run: LLaVA in place, InternVL fixed, the others `PLAIN`."""
PLAIN = 2


def with_fewer_forms(model: SplitModel, first: int) -> SplitModel:
    """A split model without the fastest forms of token states."""
    components = [
        dataclasses.replace(one, forms=one.forms[first:]) if one.token_states else one
        for one in model.components
    ]
    return dataclasses.replace(model, components=components)
