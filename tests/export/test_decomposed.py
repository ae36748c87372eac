"""Florence-2 with image and text read apart, against transformers' own layers under a mask that
keeps the two apart."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgeexit.bundle.policy import Policy, Rule, forced
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError, InputError, UsageError
from edgeexit.export import export
from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.measure.inspect import axis_sizes, describe
from edgeexit.runtime import load
from tests.vision_models import (
    LAYERS,
    make_images,
    make_model,
    make_processor,
    make_tokenizer,
    save_checkpoint,
)

COUNT = 10
PROMPTS = ["What does it show?", "ab", "is this a cat or a dog"]
IMAGES = make_images(3)
Made = tuple[Any, Bundle, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("decomposed")
    checkpoint = save_checkpoint("florence2", folder / "checkpoint")
    split = from_pretrained(
        checkpoint,
        exits=[2],
        encoder_exits=[1, 3],
        image_encoder_exits=[2],
        tower_exits=[4],
        untrained=True,
    )
    return split, export(split.split_model(), folder / "bundle"), checkpoint


def expected(image: int, text: int) -> list[list[int]]:
    """What transformers writes with the image's states of one encoder layer and the text's of
    another. Image and text stand in one sequence; a mask keeps each to itself."""
    model = make_model("florence2").double()
    base = model.model.language_model
    encoder, found = base.encoder, []
    for prompt, picture in zip(PROMPTS, IMAGES, strict=True):
        ids = torch.tensor([make_tokenizer("florence2")(prompt)["input_ids"]])
        pixels = make_processor("florence2")([picture], return_tensors="pt")["pixel_values"]
        features = model.get_image_features(torch.as_tensor(pixels).double()).pooler_output
        count = features.shape[1]
        words = base.get_input_embeddings()(ids)
        embedded = torch.cat([features.reshape(1, count, -1), words], 1)
        state = encoder.layernorm_embedding(embedded + encoder.embed_positions(embedded[..., 0]))
        apart = torch.full((1, 1, state.shape[1], state.shape[1]), -1e9, dtype=torch.float64)
        apart[..., :count, :count] = apart[..., count:, count:] = 0
        states = [state]
        for layer in encoder.layers:
            output = layer(states[-1], apart)
            states.append(output[0] if isinstance(output, tuple) else output)
        source = torch.cat([states[image][:, :count], states[text][:, count:]], 1)
        tokens = torch.tensor([[2]])
        for _ in range(COUNT):
            decoded = base.decoder(tokens, encoder_hidden_states=source, use_cache=False)
            token = model.lm_head(decoded.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, token], 1)
        written = tokens[0, 1:].tolist()
        ends = [number for number, token in enumerate(written) if token in (0, 2)]
        found.append(written[: ends[0]] if ends else written)
    return found


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_texts_equal_transformers_under_a_mask(made: Made, mode: Any) -> None:
    _, bundle, _ = made
    with torch.no_grad():
        wanted = expected(LAYERS, LAYERS)
    with load(bundle) as model:
        texts = model.generate(PROMPTS, images=IMAGES, max_new_tokens=COUNT, mode=mode).finish()
        assert texts.tokens == wanted
        alone = model.generate(PROMPTS[1], images=IMAGES[1], max_new_tokens=COUNT, mode=mode)
        assert alone.finish().tokens == wanted[1:2]


def test_a_second_question_about_an_image_does_not_run_the_tower(made: Made) -> None:
    with load(made[1]) as model:
        texts = [
            model.generate(prompt, images=IMAGES[0], max_new_tokens=COUNT).finish().tokens
            for prompt in (*PROMPTS, PROMPTS[0])
        ]
        assert (model.features.misses, model.features.hits) == (1, 3)
        assert texts[0] == texts[3]
        model.features.clear()
        again = model.generate(PROMPTS, images=[IMAGES[0]] * 3, max_new_tokens=COUNT).finish()
        assert again.tokens == [text for [text] in texts[:3]]
        assert (model.features.misses, model.features.hits) == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "exits"),
    [
        ({"tower_exits": [4]}, {"vision": ["tower_exit_4"]}),
        ({"encoder_exits": [1]}, {"encoder": ["encoder_exit_1"]}),
        ({"image_encoder_exits": [2]}, {"image_encoder": ["image_encoder_exit_2"]}),
    ],
    ids=["tower", "encoder", "image encoder"],
)
def test_exits_in_one_part_alone(
    made: Made, options: dict[str, Any], exits: dict[str, list[str]], tmp_path: Path
) -> None:
    split = from_pretrained(made[2], **options, untrained=True)
    bundle = export(split.split_model(), tmp_path / "bundle")
    chains = bundle.manifest.chains
    early = {name: [exit_.name for exit_ in chain.stops[:-1]] for name, chain in chains.items()}
    assert {name: names for name, names in early.items() if names} == exits
    with load(bundle) as model:
        assert check(model).passed
        texts = model.generate(PROMPTS, images=IMAGES, max_new_tokens=COUNT).finish()
    assert [len(text) for text in texts.tokens] == [COUNT] * len(PROMPTS)


def test_unsplit_writes_the_same(made: Made) -> None:
    _, bundle, _ = made
    with load(bundle) as model, load(bundle, unsplit=True) as unsplit:
        texts, same = (
            one.generate(PROMPTS, images=IMAGES, max_new_tokens=COUNT).finish().tokens
            for one in (model, unsplit)
        )
    assert texts == same


@pytest.mark.parametrize(("image", "text"), [(2, LAYERS), (LAYERS, 1), (2, 3)])
def test_each_branch_hands_over_at_its_own_exit(made: Made, image: int, text: int) -> None:
    _, bundle, _ = made
    layers = {"image_encoder": image, "text_encoder": text}
    rules = dict.fromkeys(bundle.manifest.chains, Rule())
    for name, layer in layers.items():
        rule = forced(bundle.manifest.chains[name].stops, f"{name}_exit_{layer}")
        rules[name] = Rule(
            thresholds=rule.thresholds, score="saturation", first=rule.first, last=rule.last
        )
    with torch.no_grad():
        wanted = expected(image, text)
    with load(bundle, policy=Policy(rules=rules)) as model:
        texts = model.generate(PROMPTS, images=IMAGES, max_new_tokens=COUNT).finish()
    assert texts.tokens == wanted
    for name, layer in layers.items():
        assert texts.statistics.earlier[name] == [f"{name}_exit_{layer}"] * len(PROMPTS)


def test_check_holds(made: Made) -> None:
    with load(made[1], all_scores=True) as model:
        report = check(model)
    compared = {one.where for one in report.comparisons}
    assert {"image_encoder_exit_2", "text_encoder_exit_1", "tower_exit_4", "joined"} <= compared
    assert [one for one in report.comparisons if not one.passed] == []


def test_scores_ignore_padding(made: Made) -> None:
    split, bundle, _ = made
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    mask = (ids > 0).long()
    pixels = torch.zeros(1, *split.whole.tower.pixels)
    found = []
    with load(bundle) as model:
        for width in (3, 5):
            inputs = {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}
            given = {
                name: value.numpy() for name, value in {**inputs, "pixel_values": pixels}.items()
            }
            trace = model.trace(given, chain="text_encoder")
            found.append([float(scores["saturation"][0]) for scores in trace.scores])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_weights_of_both_branches_are_stored_once(made: Made) -> None:
    _, bundle, _ = made
    image, text = (stored(bundle, f"{name}_encoder_unsplit") for name in ("image", "text"))
    layers = {place for place in image if place in text}
    assert sum(length for _, length in layers) > 0.95 * sum(length for _, length in image)


def stored(bundle: Bundle, component: str) -> set[tuple[int, int]]:
    """Offset and length of a component's weights in the store."""
    graph = onnx.load(bundle.file(f"graphs/{component}.onnx"), load_external_data=False).graph
    found = set()
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            found.add((int(place["offset"]), int(place["length"])))
    return found


def test_a_saved_checkpoint_is_read_apart_again(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split, _, checkpoint = made
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    split.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = from_pretrained(tmp_path)
    assert "apart" not in caplog.text
    assert again.encoder_exit_layers == [1, 3]
    assert again.image_encoder.exit_layers == [2]
    # How it reads is no matter of exits: it stays so where those that are saved are ignored.
    other = from_pretrained(tmp_path, exits=[1], saved_exits=False)
    assert isinstance(other, ExitDecomposed) and other.image_encoder.exit_layers == []


def test_a_checkpoint_that_was_not_trained_so_gives_a_warning(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        from_pretrained(made[2], exits=[1], image_encoder_exits=[])
    assert "does not say that it was trained to read images and texts apart" in caplog.text


def test_inspect_tells_of_the_image(made: Made) -> None:
    found = describe(made[1], axis_sizes(made[1]))["images"]
    assert (found["tokens"], found["placeholder"]) == (5, None)


MISUSES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no image": (PROMPTS, {}, "reads an image with each prompt, and none is given"),
    "an image too few": (PROMPTS, {"images": IMAGES[:2]}, "2 images for 3 prompts"),
    "a prompt without": (PROMPTS[:2], {"images": [IMAGES[:1], []]}, "prompt 2 has 0 images"),
    "two images": (PROMPTS[0], {"images": IMAGES[:2]}, "prompt 1 has 2 images"),
    "a text too long": ("x" * 95, {"images": IMAGES[0]}, "at most 91"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_prompts_that_do_not_fit_are_refused(made: Made, case: str) -> None:
    prompts, images, message = MISUSES[case]
    with load(made[1]) as model, pytest.raises(InputError, match=message):
        model.generate(prompts, **images).finish()


def test_models_without_an_encoder_are_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint("llava", tmp_path)
    with pytest.raises(UsageError, match="no encoder between its tower and its decoder"):
        from_pretrained(checkpoint, exits=[1], image_encoder_exits=[1])


def test_int8_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int8 is not supported for models that write text about"):
        export(made[0].split_model(), tmp_path / "b", dtype="int8", calibration=lambda _: [])
