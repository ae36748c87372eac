"""Vision-language models of every class and with every language model inside, in torch: what is
read of a checkpoint computes what transformers computes. And checkpoints that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgeexit.errors import ExportError
from edgeexit.export.pretrained import DECODERS, ENCODER_DECODERS, VISION_LANGUAGE, from_pretrained
from tests.vision_models import (
    _LLAMA,
    _QFORMER,
    _VISION,
    FAMILIES,
    PLACEHOLDER,
    VARIANTS,
    make_llava,
    make_model,
    make_tokenizer,
    make_variant,
)
from tests.vision_reference import prompts_of, random_pixels


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_of_a_saved_model_equal_transformers(
    name: str, vision_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    if name in FAMILIES:
        original, folder = make_model(name), vision_folder(name)
    else:
        original, folder = make_variant(name), tmp_path
        original.save_pretrained(folder)
        make_tokenizer("llava").save_pretrained(folder)
    split: Any = from_pretrained(folder, exits=[2])
    tokens = split.whole.tower.tokens
    for kind, images in (("none", 0), ("middle", 1), ("three", 3)):
        [prompt] = prompts_of(tokens, [kind])
        ids, pixels = torch.tensor([prompt]), random_pixels(split, images)
        tiled = type(original).__name__.startswith(("SmolVLM", "Idefics3"))
        given: dict[str, Any] = {"pixel_values": pixels[None] if tiled else pixels}
        own, encodes = {"pixel_values": pixels}, name == "florence2"
        language = original
        if not images:
            given, own = {}, {}
            if name == "blip2":
                language = original.language_model
        source: Any = ()
        with torch.no_grad():
            if encodes:
                source = split.encode(ids, torch.ones_like(ids), images=tuple(own.values()))
                given |= {"decoder_input_ids": torch.tensor([[2, 5, 6]])}
                own = {}
            wanted = language(input_ids=ids, **given).logits
            ids = given.get("decoder_input_ids", ids)
            found = split(ids, exits=[4], source=source, **own)[4]
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def test_every_class_has_a_model_here() -> None:
    kinds = {make_model(name).config.model_type for name in FAMILIES}
    kinds |= {make_variant(name).config.model_type for name in VARIANTS}
    assert kinds == set(VISION_LANGUAGE)


def small(kind: str) -> Any:
    """Models with a part that is not supported."""
    t: Any = transformers
    llama = t.LlamaConfig(**_LLAMA)
    if kind == "tower":
        return make_llava(t.PixtralVisionConfig(**_VISION), llama)
    if kind == "language model":
        text = t.GemmaConfig(**_LLAMA, head_dim=16)
        return make_llava(t.CLIPVisionConfig(**_VISION), text)
    config = t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**_VISION),
        qformer_config=t.Blip2QFormerConfig(**_QFORMER),
        text_config=t.T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=2, num_heads=4),
        image_token_index=PLACEHOLDER,
    )
    return t.Blip2ForConditionalGeneration(config)


UNSUPPORTED = {
    "tower": "the vision tower PixtralVisionModel is not supported.*Use a tower like CLIP",
    "language model": "its language model is a gemma.*supported: llama, qwen2, qwen3",
    "encoder-decoder": "a BLIP-2 with t5, an encoder-decoder, is not supported.*with OPT",
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_parts_that_are_not_supported_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    small(kind).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=UNSUPPORTED[kind]) as caught:
        from_pretrained(tmp_path, exits=[1], tower_exits=[1], untrained=True)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", ["llava_next", "mllama", "paligemma", "qwen2_audio"])
def test_a_family_that_is_not_known_is_refused_with_those_that_are(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ExportError, match=f"no adapter for the model type '{kind}'") as caught:
        from_pretrained(tmp_path, exits=[1], tower_exits=[1])
    known = str(caught.value).partition("(it has ")[2].partition(")")[0].split(", ")
    assert {*VISION_LANGUAGE, *DECODERS, *ENCODER_DECODERS} < set(known)


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another size": ("llava", {"crop_size": {"height": 24, "width": 24}}, "24 x 24, the tower"),
    "padding": ("llava", {"do_pad": True}, "do_pad"),
    "no resizing": ("internvl", {"do_resize": False}, "do_resize"),
    "any shape": ("llava", {"do_center_crop": False}, "without do_center_crop"),
    "a crop of a warped image": ("blip2", {"do_center_crop": True}, "do_center_crop"),
    "BGR": ("blip2", {"do_flip_channel_order": True}, "do_flip_channel_order"),
    "a filter": ("smolvlm", {"resample": 5}, "resample 5"),
    "one mean": ("florence2", {"image_mean": [0.5]}, "image_mean has 1 values"),
    "no deviation": ("florence2", {"image_std": [0, 1, 1]}, "invalid scale, mean or std"),
    "too many tiles": ("internvl", {"max_patches": 300}, "max_patches .* 300 tiles"),
    "far too many tiles": ("smolvlm", {"size": {"longest_edge": 8192}}, "size / max_image_size"),
    "tiles of no edge": ("smolvlm", {"size": {"shortest_edge": 64}}, "needs longest_edge"),
    "tiles of another size": ("smolvlm", {"max_image_size": {"longest_edge": 64}}, "64 x 64, the"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_processors_that_a_device_cannot_follow_are_refused_with_the_field(
    case: str, vision_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    family, changed, message = FIELDS[case]
    for path in vision_folder(family).iterdir():
        (tmp_path / path.name).symlink_to(path)
    name = "preprocessor_config.json"
    options = json.loads((tmp_path / name).read_text())
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(json.dumps(options | changed))
    with pytest.raises(ExportError, match=message):
        from_pretrained(tmp_path, exits=[1])
