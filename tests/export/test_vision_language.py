"""Vision-language models against transformers: towers, prompts with images, exits, and image tokens
that leave."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeexit.bundle.manifest import Exit
from edgeexit.bundle.policy import ALWAYS, Policy, Rule
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EdgeExitError, ExportError, InputError, UsageError
from edgeexit.export import export
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import load
from edgeexit.runtime.model import Model
from tests.vision_models import (
    DECODERS,
    FAMILIES,
    LAYERS,
    PLACEHOLDER,
    make_images,
    make_model,
    marker_of,
    reference_text,
    save_checkpoint,
    text_without_images,
)

COUNT = 12
EXITS, TOWER_EXITS, DROPS = [1, 2], [1, 2], [3]
Made = tuple[Any, Bundle]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """The split model and the bundle of a family, made when first asked for."""
    folder = tmp_path_factory.mktemp("vision")

    class Families(dict[str, Made]):
        def __missing__(self, family: str) -> Made:
            checkpoint = save_checkpoint(family, folder / family)
            encodes = family == "florence2"
            split = from_pretrained(
                checkpoint,
                exits=EXITS,
                tower_exits=TOWER_EXITS,
                encoder_exits=[2] if encodes else None,
                image_drops=() if encodes else DROPS,
                untrained=True,
            )
            self[family] = split, export(split.split_model(), folder / f"{family}.bundle")
            return self[family]

    return Families()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(made: dict[str, Made], decoder: str) -> Iterator[tuple[str, Any, Model]]:
    split, bundle = made[decoder]
    with load(bundle) as model:
        yield decoder, split, model


def image_tokens(split: Any) -> int:
    return int(split.whole.tower.tokens)


def prompts_of(split: Any, images: list[int]) -> list[list[int]]:
    """Prompts of token ids with these numbers of images: at the start, in the middle, at the end
    and one behind the other."""
    image = [PLACEHOLDER] * image_tokens(split)
    kinds = {
        0: [5, 6, 7, 8, 9, 10, 11],
        1: [*image, 12, 13],
        2: [14, *image, 15, 16, *image, 17],
        3: [18, *image, *image, 19, 20, *image],
    }
    return [kinds[count] for count in images]


def references(family: str, split: Any, prompts: list[list[int]], pixels: torch.Tensor) -> Any:
    model, start, texts = make_model(family), 0, []
    for prompt in prompts:
        images = prompt.count(PLACEHOLDER) // image_tokens(split)
        own = pixels[start : start + images] if images else None
        start += images
        texts.append(reference_text(model, prompt, own, COUNT))
    return texts


def random_pixels(split: Any, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *split.whole.tower.pixels, generator=generator)


@pytest.mark.parametrize("rows", [1, 3])
def test_tower_equals_transformers(made: dict[str, Made], family: str, rows: int) -> None:
    split, bundle = made[family]
    pixels = random_pixels(split, rows)
    given = pixels[:, None] if family == "smolvlm" else pixels
    with torch.no_grad():
        features = make_model(family).get_image_features(pixel_values=given).pooler_output
    wanted = torch.stack(list(features)) if not torch.is_tensor(features) else features
    for unsplit in (False, True):
        with load(bundle, unsplit=unsplit) as model:
            [*_, last] = model.trace(inputs_of(bundle, pixels), chain="vision").outputs
        np.testing.assert_allclose(last["image_features"], wanted, atol=2e-5, rtol=1e-4)


def inputs_of(bundle: Bundle, pixels: torch.Tensor) -> dict[str, Any]:
    """Inputs of the vision chain, and of an encoder that does not matter."""
    inputs: dict[str, Any] = {"pixel_values": pixels.numpy()}
    for tensor in bundle.manifest.inputs:
        if tensor.name in ("input_ids", "attention_mask"):
            inputs[tensor.name] = np.ones((len(pixels), 4), np.int64)
    return inputs


def test_every_exit_of_a_tower_hands_on_what_its_projector_makes(
    made: dict[str, Made], family: str
) -> None:
    split, bundle = made[family]
    pixels = random_pixels(split, 3)
    with load(bundle) as model:
        trace = model.trace(inputs_of(bundle, pixels), chain="vision")
    assert trace.exits[:-1] == [f"tower_exit_{layer}" for layer in TOWER_EXITS]
    for layer, outputs, scores in zip(TOWER_EXITS, trace.outputs, trace.scores, strict=False):
        with torch.no_grad():
            wanted = split.tower(pixels, layers=layer).numpy()
        np.testing.assert_allclose(outputs["image_features"], wanted, atol=2e-5, rtol=1e-4)
        assert (np.abs(scores["saturation"]) <= 1 + 1e-6).all()


def test_check_holds(made: dict[str, Made], family: str) -> None:
    _, bundle = made[family]
    with load(bundle, all_scores=True) as model:
        report = check(model)
    assert [one for one in report.comparisons if not one.passed] == []


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_texts_equal_transformers_for_any_number_of_images(
    loaded: tuple[str, Any, Model], mode: Any
) -> None:
    family, split, model = loaded
    counts = [1, 2, 3] if family == "blip2" else [0, 1, 3, 2]
    prompts, pixels = prompts_of(split, counts), random_pixels(split, sum(counts))
    wanted = references(family, split, prompts, pixels)
    inputs = {"pixel_values": pixels.numpy()}
    made = model.generate(prompts, inputs=inputs, max_new_tokens=COUNT, mode=mode).finish()
    assert made.tokens == wanted
    start = 0
    for prompt, count, text in zip(prompts, counts, wanted, strict=True):
        own = None if not count else {"pixel_values": pixels[start : start + count].numpy()}
        start += count
        alone = model.generate(prompt, inputs=own, max_new_tokens=COUNT, mode=mode).finish()
        assert alone.tokens == [text]


LEAVING = [("llava", layer, 256) for layer in range(1, LAYERS)]
LEAVING += [("llava", 2, 7), ("blip2", 1, 256), ("blip2", 3, 7)]
LEAVING += [(family, 2, 256) for family in ("internvl", "internvl_qwen3", "smolvlm")]


@pytest.mark.parametrize(("decoder", "layer", "chunk"), LEAVING)
def test_image_tokens_that_leave_are_not_read_behind_any_layer(
    made: dict[str, Made],
    decoder: str,
    layer: int,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgeexit.runtime.programs.text_program.CHUNK", chunk)
    split, bundle = made[decoder]
    prompts, pixels = prompts_of(split, [1, 2, 0]), random_pixels(split, 3)
    wanted = [
        text_without_images(split, prompt, own, layer, 20)
        for prompt, own in zip(prompts, (pixels[:1], pixels[1:], None), strict=True)
    ]
    rules = {"vision": Rule(), "main": Rule(thresholds={f"drop_{layer}": ALWAYS})}
    inputs = {"pixel_values": pixels.numpy()}
    with load(bundle, policy=Policy(rules=rules)) as model:
        modes: Any = ("full", "exact", "fast") if chunk == 256 else ("full",)
        for mode in modes:
            made_ = model.generate(prompts, inputs=inputs, max_new_tokens=20, mode=mode)
            assert made_.finish().tokens == wanted, mode


def test_a_prompt_that_ends_with_an_image_cannot_drop_it(made: dict[str, Made]) -> None:
    split, bundle = made["llava"]
    rules = {"vision": Rule(), "main": Rule(thresholds={"drop_1": ALWAYS})}
    [prompt] = prompts_of(split, [3])
    inputs = {"pixel_values": random_pixels(split, 3).numpy()}
    with load(bundle, policy=Policy(rules=rules)) as model:
        with pytest.raises(InputError, match="ends with tokens of that group"):
            model.generate(prompt, inputs=inputs, max_new_tokens=4).finish()
        kept = Policy(rules={"vision": Rule(), "main": Rule()})
        model.policy = kept
        assert model.generate(prompt, inputs=inputs, max_new_tokens=4).finish().tokens[0]


def test_texts_of_images_equal_the_whole_pipeline_of_transformers(
    made: dict[str, Made], decoder: str
) -> None:
    """Files of images and texts with markers: preprocessing, tiles, placeholders, tokens."""
    split, bundle = made[decoder]
    marker, images = marker_of(decoder), make_images(3)
    prompts = [f"a{marker}b {marker}c", f"{marker}what?"]
    own = [images[:2], images[2:]]
    if decoder == "blip2":
        prompts, own = ["abc", "what?"], [images[:1], images[1:2]]
    with load(bundle) as model:
        made_ = model.generate(prompts, images=own, max_new_tokens=COUNT).finish()
        for prompt, few, text in zip(prompts, own, made_.tokens, strict=True):
            ids, pixels = processed(decoder, split, prompt, few)
            assert reference_text(make_model(decoder), ids, pixels, COUNT) == text


def processed(family: str, split: Any, prompt: str, images: list[Any]) -> tuple[Any, torch.Tensor]:
    """Token ids and pixels as transformers' processor of the family makes them."""
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    from tests.vision_models import make_processor, make_tokenizer

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


def test_florence_2_writes_the_texts_of_transformers(made: dict[str, Made]) -> None:
    split, bundle = made["florence2"]
    prompts, images = ["What does it show?", "ab"], make_images(2)
    from tests.vision_models import make_processor, make_tokenizer

    tokenizer, processor = make_tokenizer("florence2"), make_processor("florence2")
    reference = make_model("florence2")
    reference.generation_config.forced_eos_token_id = None
    with load(bundle) as model:
        for mode in ("full", "exact"):
            texts = model.generate(prompts, images=images, max_new_tokens=COUNT, mode=mode)
            for prompt, image, text in zip(prompts, images, texts.finish().tokens, strict=True):
                front = [PLACEHOLDER] * image_tokens(split)
                ids = torch.tensor([front + tokenizer(prompt)["input_ids"]])
                pixels = torch.as_tensor(processor([image], return_tensors="pt")["pixel_values"])
                made_ = reference.generate(
                    input_ids=ids, pixel_values=pixels, max_new_tokens=COUNT, num_beams=1
                )[0].tolist()[1:]
                assert made_[: len(text)] == text
                assert len(text) == COUNT or made_[len(text)] == 2


def test_saved_exits_are_read_again(made: dict[str, Made], tmp_path: Path) -> None:
    split, _ = made["llava"]
    split.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert (again.exit_layers, again.tower.exit_layers) == (EXITS, TOWER_EXITS)
    pixels = random_pixels(split, 2)
    with torch.no_grad():
        for layer in TOWER_EXITS:
            assert torch.equal(again.tower(pixels, layers=layer), split.tower(pixels, layers=layer))


def test_projector_runs_only_where_an_image_leaves(made: dict[str, Made]) -> None:
    split, bundle = made["llava"]
    pixels = random_pixels(split, 3)
    with load(bundle) as model:
        scores = model.trace(inputs_of(bundle, pixels), chain="vision").scores[0]["saturation"]
        threshold = float(np.sort(scores)[1:].mean())  # some images leave, some stay
        model.policy = Policy(
            rules={"vision": Rule(thresholds=[threshold, 2.0], score="saturation"), "main": Rule()}
        )
        [first, second, third] = prompts_of(split, [1, 1, 1])
        for prompts in ([first], [first, second, third]):
            inputs = {"pixel_values": pixels[: len(prompts)].numpy()}
            made_ = model.generate(prompts, inputs=inputs, max_new_tokens=2).finish()
            wanted = ["tower_exit_1" if s >= threshold else "tower_exit_3" for s in scores]
            assert made_.statistics.earlier["vision"] == wanted[: len(prompts)]


REFUSED: dict[str, tuple[str, dict[str, Any], type[EdgeExitError], str]] = {
    "tower exits of a text model": (
        "text",
        {"exits": [1], "tower_exits": [1]},
        UsageError,
        "no vision tower",
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
    "drops of an encoder": (
        "florence2",
        {"exits": [1], "image_drops": [1]},
        UsageError,
        "whose decoder reads the image tokens",
    ),
    "no exits": ("llava", {}, ExportError, "does not say where its exits are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_exits_that_a_model_cannot_have_are_refused(case: str, tmp_path: Path) -> None:
    family, options, error, message = REFUSED[case]
    if family == "text":
        from tests.decoders import save_decoder

        save_decoder("llama", tmp_path)
    else:
        save_checkpoint(family, tmp_path)
    with pytest.raises(error, match=message):
        from_pretrained(tmp_path, **options)


def test_drop_exits_have_neither_path_nor_score(made: dict[str, Made]) -> None:
    _, bundle = made["llava"]
    drops = [e for e in bundle.manifest.chains["main"].exits if e.action == "drop"]
    assert [exit_.name for exit_ in drops] == ["drop_1", "drop_2", "drop_3"]
    for exit_ in drops:
        assert isinstance(exit_, Exit)
        assert not exit_.path and not exit_.scores
