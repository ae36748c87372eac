"""Vision-language models against transformers: towers, prompts with images, and exits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgeexit.bundle.manifest import Exit
from edgeexit.bundle.policy import Policy, Rule
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EdgeExitError, ExportError, UsageError
from edgeexit.export.exits.saved import EXITS_WEIGHTS
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import load
from edgeexit.runtime.model import Model
from edgeexit.runtime.programs.prompts import pad_source
from tests.vision_models import (
    DECODERS,
    EXITS,
    FAMILIES,
    PLACEHOLDER,
    load_split,
    make_images,
    make_model,
    make_processor,
    make_tokenizer,
    marker_of,
)
from tests.vision_reference import prompts_of, random_pixels, reference_text

COUNT = 12
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="session")
def splits(vision_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """The split model of a family."""
    return functools.cache(lambda family: load_split(family, vision_folder(family)))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def original(family: str) -> Any:
    """A family's model in transformers."""
    return make_model(family)


def image_tokens(split: Any) -> int:
    return int(split.whole.tower.tokens)


def inputs_of(bundle: Bundle, pixels: torch.Tensor) -> dict[str, Any]:
    """Inputs of the vision chain, and of an encoder that does not matter."""
    inputs: dict[str, Any] = {"pixel_values": pixels.numpy()}
    for tensor in bundle.manifest.inputs:
        if tensor.name in ("input_ids", "attention_mask"):
            inputs[tensor.name] = np.ones((len(pixels), 4), np.int64)
    return inputs


@pytest.mark.parametrize("rows", [1, 3])
def test_tower_equals_transformers(
    splits: Callable[[str], Any], vision_bundle: Bundles, family: str, rows: int
) -> None:
    bundle = vision_bundle(family)
    pixels = random_pixels(splits(family), rows)
    given = pixels[:, None] if family == "smolvlm" else pixels
    with torch.no_grad():
        features = original(family).get_image_features(pixel_values=given).pooler_output
    wanted = torch.stack(list(features)) if not torch.is_tensor(features) else features
    for unsplit in (False, True):
        with load(bundle, unsplit=unsplit) as model:
            [*_, last] = model.trace(inputs_of(bundle, pixels), chain="vision").outputs
        np.testing.assert_allclose(last["image_features"], wanted, atol=2e-5, rtol=1e-4)


def test_every_exit_of_a_tower_hands_on_what_its_projector_makes(
    splits: Callable[[str], Any], vision_bundle: Bundles, family: str
) -> None:
    split, bundle = splits(family), vision_bundle(family)
    pixels, layers = random_pixels(split, 3), split.tower.exit_layers
    with load(bundle) as model:
        trace = model.trace(inputs_of(bundle, pixels), chain="vision")
        both = zip(trace.exit_times_ms, trace.times_ms, strict=True)
        assert all(0 < projector < whole for projector, whole in both)
    assert trace.exits[:-1] == [f"tower_exit_{layer}" for layer in layers]
    for layer, outputs, scores in zip(layers, trace.outputs, trace.scores, strict=False):
        with torch.no_grad():
            wanted = split.tower(pixels, layers=layer).numpy()
        np.testing.assert_allclose(outputs["image_features"], wanted, atol=2e-5, rtol=1e-4)
        assert (np.abs(scores["saturation"]) <= 1 + 1e-6).all()


def test_check_holds(vision_bundle: Bundles, family: str) -> None:
    with load(vision_bundle(family), all_scores=True) as model:
        report = check(model)
    assert [one for one in report.comparisons if not one.passed] == []


KINDS = ["none", "three", "end", "two", "start", "middle"]


def test_texts_equal_transformers_wherever_images_stand(
    splits: Callable[[str], Any], vision_bundle: Bundles, family: str
) -> None:
    """No image, one and three, at the start, in the middle and at the end; prompts alone, and as a
    batch of unlike ones."""
    split = splits(family)
    prompts = prompts_of(image_tokens(split), KINDS)
    counts = [prompt.count(PLACEHOLDER) // image_tokens(split) for prompt in prompts]
    pixels = list(random_pixels(split, sum(counts)).split(counts))
    wanted = [
        reference_text(original(family), prompt, images if len(images) else None, COUNT)
        for prompt, images in zip(prompts, pixels, strict=True)
    ]
    assert len(set(map(tuple, wanted))) > 2 and max(map(len, wanted)) == COUNT
    with load(vision_bundle(family)) as model:
        for mode in ("full", "exact"):
            assert generate(model, prompts, torch.cat(pixels), mode=mode) == wanted, mode
            for kind, prompt, images, text in zip(KINDS, prompts, pixels, wanted, strict=True):
                assert generate(model, [prompt], images, mode=mode) == [text], (kind, mode)


def generate(
    model: Model, prompts: Sequence[list[int]], pixels: torch.Tensor, **options: Any
) -> list[list[int]]:
    """New tokens for prompts of ids, which a decoder or an encoder reads."""
    inputs = {"pixel_values": pixels.numpy()} if len(pixels) else {}
    if model.bundle.manifest.text_preprocessing is not None:
        inputs |= pad_source(model.bundle, prompts)
        prompts = []
    options = {"max_new_tokens": COUNT, **options}
    return model.generate(prompts, inputs=inputs or None, **options).finish().tokens


def test_texts_of_images_equal_the_whole_pipeline_of_transformers(
    splits: Callable[[str], Any], vision_bundle: Bundles, decoder: str
) -> None:
    """Images and texts with markers: preprocessing, tiles, placeholders, tokens."""
    split, bundle = splits(decoder), vision_bundle(decoder)
    marker, images = marker_of(decoder), make_images(3)
    prompts = [f"a{marker}b {marker}c", f"{marker}what?"]
    own = [images[:2], images[2:]]
    if decoder == "blip2":
        prompts, own = ["abc", "what?"], [images[:1], images[1:2]]
    with load(bundle) as model:
        made_ = model.generate(prompts, images=own, max_new_tokens=COUNT).finish()
        for prompt, few, text in zip(prompts, own, made_.tokens, strict=True):
            ids, pixels = processed(decoder, split, prompt, few)
            assert reference_text(original(decoder), ids, pixels, COUNT) == text


def processed(family: str, split: Any, prompt: str, images: list[Any]) -> tuple[Any, torch.Tensor]:
    """Token ids and pixels as transformers' processor of the family makes them."""
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    t: Any = transformers
    tokenizer, processor = make_tokenizer(family), make_processor(family)
    tokens = image_tokens(split)
    if family == "llava":
        whole = t.LlavaProcessor(
            processor,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        found = whole(images=images, text=prompt, return_tensors="pt")
    elif family == "blip2":
        whole = t.Blip2Processor(processor, tokenizer, num_query_tokens=tokens)
        found = whole(images=images, text=prompt, return_tensors="pt")
    elif family == "smolvlm":
        replace = processing_smolvlm.get_image_prompt_string
        text = prompt
        pixels = processor(images, return_tensors="pt", return_row_col_info=True)
        rows, columns = ([*chain.from_iterable(pixels[key])] for key in ("rows", "cols"))
        around, overview = "<fake_token_around_image>", "<global-img>"
        parts = text.split("<image>")
        said = parts[0]
        for row, column, part in zip(rows, columns, parts[1:], strict=True):
            said += replace(row, column, tokens, around, "<image>", overview) + part
        return tokenizer(said)["input_ids"], torch.as_tensor(pixels["pixel_values"])[0]
    else:
        pixels = processor(images, crop_to_patches=True, return_tensors="pt")
        parts = prompt.split("<IMG_CONTEXT>")
        said = parts[0]
        for count, part in zip(list(pixels["num_patches"]), parts[1:], strict=True):
            said += f"<img>{'<IMG_CONTEXT>' * tokens * int(count)}</img>{part}"
        return tokenizer(said)["input_ids"], torch.as_tensor(pixels["pixel_values"])
    return found["input_ids"][0].tolist(), found["pixel_values"]


def test_florence_2_writes_the_texts_of_transformers(
    splits: Callable[[str], Any], vision_bundle: Bundles
) -> None:
    split = splits("florence2")
    prompts, images = ["What does it show?", "ab"], make_images(2)
    tokenizer, processor = make_tokenizer("florence2"), make_processor("florence2")
    with load(vision_bundle("florence2")) as model:
        for mode in ("full", "exact"):
            texts = model.generate(prompts, images=images, max_new_tokens=COUNT, mode=mode)
            for prompt, image, text in zip(prompts, images, texts.finish().tokens, strict=True):
                ids = [PLACEHOLDER] * image_tokens(split) + tokenizer(prompt)["input_ids"]
                pixels = torch.as_tensor(processor([image], return_tensors="pt")["pixel_values"])
                assert reference_text(original("florence2"), ids, pixels, COUNT) == text


def test_saved_exits_are_read_again(splits: Callable[[str], Any], tmp_path: Path) -> None:
    split = splits("llava")
    split.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert (again.exit_layers, again.tower.exit_layers) == (EXITS, [1, 2])
    pixels = random_pixels(split, 2)
    with torch.no_grad():
        for layer in (1, 2):
            assert torch.equal(again.tower(pixels, layers=layer), split.tower(pixels, layers=layer))


@pytest.mark.parametrize("family", ["llava", "florence2"])
def test_projectors_are_saved_with_the_weights_of_a_state_dict(
    splits: Callable[[str], Any], family: str, tmp_path: Path
) -> None:
    split = splits(family)
    place = "tower.projectors."
    trained = {k: x + 1 for k, x in split.state_dict().items() if k.startswith(place)}
    split.save_pretrained(tmp_path, {**split.state_dict(), **trained})
    saved = load_file(tmp_path / EXITS_WEIGHTS)
    assert trained and saved.keys() == {name.removeprefix(place) for name in trained}
    assert all(torch.equal(saved[name.removeprefix(place)], x) for name, x in trained.items())


def test_projector_runs_only_where_an_image_leaves(
    splits: Callable[[str], Any], vision_bundle: Bundles
) -> None:
    split, bundle = splits("llava"), vision_bundle("llava")
    pixels = random_pixels(split, 3)
    with load(bundle) as model:
        scores = model.trace(inputs_of(bundle, pixels), chain="vision").scores[0]["saturation"]
        threshold = float(np.sort(scores)[1:].mean())  # some images leave, some stay
        model.policy = Policy(
            rules={"vision": Rule(thresholds=[threshold, 2.0], score="saturation"), "main": Rule()}
        )
        [first, second, third] = prompts_of(image_tokens(split), ["start"] * 3)
        for prompts in ([first], [first, second, third]):
            inputs = {"pixel_values": pixels[: len(prompts)].numpy()}
            made_ = model.generate(prompts, inputs=inputs, max_new_tokens=2).finish()
            wanted = ["tower_exit_1" if s >= threshold else "tower_exit_3" for s in scores]
            assert made_.statistics.earlier["vision"] == wanted[: len(prompts)]


REFUSED: dict[str, tuple[str, dict[str, Any], type[EdgeExitError], str]] = {
    "tower exits of a text model": (
        "llama",
        {"exits": [1], "tower_exits": [1]},
        UsageError,
        "a llama has no vision tower .* --tower-exits",
    ),
    "tower exits of a classifier": (
        "vit",
        {"tower_exits": [1]},
        UsageError,
        "a vit has no vision tower .* --tower-exits",
    ),
    "tower exits beyond its layers": (
        "llava",
        {"exits": [1], "tower_exits": [9], "untrained": True},
        UsageError,
        "the tower has layers 1 to 3",
    ),
    "untrained tower exits": (
        "llava",
        {"exits": [1], "tower_exits": [1]},
        UsageError,
        "no trained projector behind layer 1",
    ),
    "drop behind no layer": (
        "llava",
        {"exits": [1], "image_drops": [0]},
        UsageError,
        "the decoder has layers 1 to 4",
    ),
    "drop behind the last layer": (
        "blip2",
        {"exits": [1], "image_drops": [4]},
        UsageError,
        "the decoder has layers 1 to 4",
    ),
    "drops of a text model": (
        "llama",
        {"exits": [1], "image_drops": [1]},
        UsageError,
        "a llama has no vision tower .* --drop-image-tokens",
    ),
    "drops of an encoder": (
        "florence2",
        {"exits": [1], "image_drops": [1]},
        UsageError,
        "whose decoder reads the image tokens",
    ),
    "no exits": ("llava", {}, ExportError, "does not say where its exits are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_exits_that_a_model_cannot_have_are_refused(
    case: str,
    decoder_folder: Callable[[str], Path],
    vision_folder: Callable[[str], Path],
    vit_checkpoint: Path,
) -> None:
    kind, options, error, message = REFUSED[case]
    if kind == "vit":
        folder = vit_checkpoint
    else:
        folder = decoder_folder(kind) if kind == "llama" else vision_folder(kind)
    with pytest.raises(error, match=message):
        from_pretrained(folder, **options)


def test_drop_exits_have_neither_path_nor_score(vision_bundle: Bundles) -> None:
    drops = [e for e in vision_bundle("llava").manifest.chains["main"].exits if e.action == "drop"]
    assert [exit_.name for exit_ in drops] == ["drop_1", "drop_2", "drop_3"]
    for exit_ in drops:
        assert isinstance(exit_, Exit)
        assert not exit_.path and not exit_.scores
