"""Every family: layers in order are the model, bundles are the layers, exits are kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from edgeexit.bundle.manifest import ImagePreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.families.resnet import stage_ends
from edgeexit.export.image_processors import image_preprocessing
from edgeexit.export.pretrained import from_pretrained
from edgeexit.preprocessing.images import preprocess_images
from edgeexit.runtime import Rule, load
from edgeexit.runtime.text.tokenizer import encode_batch
from tests.checkpoints import (
    EXITS,
    FAMILIES,
    IMAGE_FAMILIES,
    TEXT_FAMILIES,
    make_model,
    save_preprocessor,
)


@pytest.fixture(scope="session", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest,
    classifiers: dict[str, ExitClassifier],
    family_bundle: Callable[[str], Bundle],
) -> tuple[ExitClassifier, Bundle]:
    return classifiers[request.param], family_bundle(request.param)


def other_inputs(classifier: ExitClassifier, rows: int) -> dict[str, torch.Tensor]:
    """Inputs of another size than the example that was exported: texts of 7 tokens, some padded."""
    made = classifier.trunk.example(rows)
    if "input_ids" in made:
        made = {name: value[:, :7].clone() for name, value in made.items()}
        made["attention_mask"][0, 5:] = 0
        made["input_ids"][0, 5:] = 0
    return made


def answers(classifier: ExitClassifier, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        return [logits.numpy() for logits in classifier(**inputs)]


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_equals_transformers_forward_when_run_layer_by_layer(
    family: str, classifiers: dict[str, ExitClassifier]
) -> None:
    classifier = classifiers[family]
    original = make_model(family)
    for inputs in (classifier.trunk.example(5), other_inputs(classifier, 3)):
        with torch.no_grad():
            expected = original(**inputs).logits.numpy()
        assert expected.std(axis=0).min() > 1e-3, "rows must differ for this to show anything"
        np.testing.assert_allclose(answers(classifier, inputs)[-1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_does_not_change_answers_when_masked(
    family: str, classifiers: dict[str, ExitClassifier]
) -> None:
    classifier = classifiers[family]
    short = {name: value[:1, :6] for name, value in classifier.trunk.example(1).items()}
    padded = {
        name: torch.nn.functional.pad(value, (0, 4), value=0) for name, value in short.items()
    }
    for alone, beside in zip(answers(classifier, short), answers(classifier, padded), strict=True):
        np.testing.assert_allclose(beside, alone, atol=1e-5, rtol=0)


def test_bundle_equals_torch_at_every_exit(exported: tuple[ExitClassifier, Bundle]) -> None:
    classifier, bundle = exported
    with load(bundle) as model, load(bundle, unsplit=True) as unsplit:
        for inputs in (classifier.trunk.example(4), other_inputs(classifier, 1)):
            feeds = {name: value.numpy() for name, value in inputs.items()}
            expected = answers(classifier, inputs)
            found = model.trace(feeds).outputs
            assert len(found) == len(expected) == len(classifier.exit_layers) + 1
            for made, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(made["logits"], wanted, atol=1e-4, rtol=0)
            made = unsplit(feeds).outputs["logits"]
            np.testing.assert_allclose(made, expected[-1], atol=1e-4, rtol=0)


def test_bundle_samples_equal_torch_when_exported(exported: tuple[ExitClassifier, Bundle]) -> None:
    classifier, bundle = exported
    samples = np.load(bundle.file("samples/reference.npz"))
    inputs = {
        tensor.name: torch.from_numpy(samples[f"input/{tensor.name}"])
        for tensor in classifier.trunk.inputs
    }
    for name, expected in zip(classifier.exit_names, answers(classifier, inputs), strict=True):
        np.testing.assert_allclose(samples[f"{name}/logits"], expected, atol=1e-6, rtol=0)


def test_bundle_rows_leave_at_the_exit_their_score_says(
    exported: tuple[ExitClassifier, Bundle],
) -> None:
    classifier, bundle = exported
    inputs = other_inputs(classifier, 6)
    expected = answers(classifier, inputs)
    first = torch.from_numpy(expected[0]).softmax(-1).max(-1).values.numpy()
    threshold = float(np.sort(first)[2:4].mean())
    policy = Rule(thresholds=[threshold] + [np.inf] * (len(expected) - 2))
    with load(bundle, policy=policy) as model:
        result = model({name: value.numpy() for name, value in inputs.items()})
    leaves = np.where(first >= threshold, 0, len(expected) - 1)
    assert set(leaves) == {0, len(expected) - 1}
    np.testing.assert_array_equal(result.exits, leaves)
    wanted = np.stack([expected[exit_taken][row] for row, exit_taken in enumerate(leaves)])
    np.testing.assert_allclose(result.outputs["logits"], wanted, atol=1e-4, rtol=0)


def test_bundle_preprocessing_equals_transformers_on_the_device(
    exported: tuple[ExitClassifier, Bundle],
) -> None:
    _, bundle = exported
    sample = np.load(bundle.file("samples/preprocessing.npz"))
    assert "samples/preprocessing.npz" in bundle.manifest.samples
    [schema] = bundle.manifest.preprocessing
    if isinstance(schema, ImagePreprocessing):
        made = preprocess_images(schema, [Image.fromarray(sample["image"])])
        np.testing.assert_allclose(made, sample["expected/pixel_values"], atol=1e-5, rtol=0)
        return
    encoded = encode_batch(bundle, [str(text) for text in sample["text"]])
    assert encoded.keys() == {tensor.name for tensor in bundle.manifest.inputs}
    for name, value in encoded.items():
        np.testing.assert_array_equal(value, sample[f"expected/{name}"])
    lengths = sample["expected/attention_mask"].sum(-1)
    assert lengths.min() < lengths.max() == bundle.manifest.limits["seq"]


def test_export_refuses_weights_that_give_nan(
    classifiers: dict[str, ExitClassifier], tmp_path: Path
) -> None:
    broken = copy.deepcopy(classifiers["bert"])
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ExportError, match="exit .*: logits hold NaN in 4 of 4 sample rows"):
        export(broken.split_model(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("family", ["bert", "vit", "resnet"])
def test_exits_survive_when_saved_and_read_back(
    family: str, classifiers: dict[str, ExitClassifier], tmp_path: Path
) -> None:
    classifier = classifiers[family]
    classifier.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.exit_layers == EXITS[family] and again.exit_origins == classifier.exit_origins
    inputs = classifier.trunk.example(3)
    if family == "resnet":  # the new folder names no image size
        assert inputs["pixel_values"].shape[-1] == 28
        assert again.trunk.inputs[0].axes == ["batch", 3, 224, 224]
    for made, expected in zip(answers(again, inputs), answers(classifier, inputs), strict=True):
        np.testing.assert_array_equal(made, expected)


def test_exits_are_a_choice_when_more_are_saved(
    classifiers: dict[str, ExitClassifier], tmp_path: Path
) -> None:
    classifiers["bert"].save_pretrained(tmp_path)
    one = from_pretrained(tmp_path, exits=[2])
    inputs = one.trunk.example(2)
    expected = answers(classifiers["bert"], inputs)[1:]
    for made, wanted in zip(answers(one, inputs), expected, strict=True):
        np.testing.assert_array_equal(made, wanted)
    with pytest.raises(UsageError, match="the last layer always has an exit|no layer 4"):
        from_pretrained(tmp_path, exits=[4])


def test_from_pretrained_computes_in_float32_when_weights_are_half(tmp_path: Path) -> None:
    make_model("vit").half().save_pretrained(tmp_path)
    classifier = from_pretrained(tmp_path, exits=[1], untrained=True)
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}


def test_resnet_stage_ends_count_blocks_through_stages() -> None:
    assert stage_ends(make_model("resnet")) == [2, 4]


def test_from_pretrained_names_the_path_when_it_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere does not exist"):
        from_pretrained(tmp_path / "nowhere")


def test_from_pretrained_refuses_when_there_are_no_exits(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match=r"has no exits.*untrained-exits"):
        from_pretrained(checkpoints["bert"])
    with pytest.raises(UsageError, match="no trained exit behind layer 1"):
        from_pretrained(checkpoints["bert"], exits=[1])


@pytest.mark.parametrize(
    "exits, complaint",
    [([0], "no layer 0"), ([9], "no layer 9"), ([2, 2], "twice"), ([2, 1], "not in order")],
)
def test_from_pretrained_refuses_exits_that_cannot_be(
    exits: list[int], complaint: str, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=complaint):
        from_pretrained(checkpoints["vit"], exits=exits, untrained=True)


def test_from_pretrained_names_the_family_when_it_has_no_adapter(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"no adapter for the model type 'gpt2'.*bert"):
        from_pretrained(tmp_path)


def test_from_pretrained_refuses_when_the_classifier_was_never_trained(tmp_path: Path) -> None:
    make_model("bert").bert.save_pretrained(tmp_path)
    (tmp_path / "edgeexit.json").write_text(json.dumps({"format": 1, "exits": [1]}))
    with pytest.raises(ExportError, match="no weights for classifier"):
        from_pretrained(tmp_path)


def test_from_pretrained_names_the_file_when_exits_are_of_another_model(
    classifiers: dict[str, ExitClassifier], tmp_path: Path
) -> None:
    classifiers["bert"].save_pretrained(tmp_path)
    config = transformers.BertConfig.from_pretrained(tmp_path)
    config.hidden_size = 16
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"exits\.safetensors: does not fit the model"):
        from_pretrained(tmp_path)


def test_from_pretrained_finds_a_hub_id_when_it_is_in_the_cache(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    repository = tmp_path / "hub/models--someone--tiny-vit"
    snapshot = repository / "snapshots/0123456789012345678901234567890123456789"
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    snapshot.symlink_to(checkpoints["vit"])
    code = (
        "from edgeexit.export.pretrained import from_pretrained\n"
        "from edgeexit.errors import ExportError\n"
        "found = from_pretrained('someone/tiny-vit', exits=[1], untrained=True)\n"
        "assert found.name == 'tiny-vit' and found.preprocessing[0].height == 8\n"
        "try:\n"
        "    from_pretrained('someone/other', exits=[1])\n"
        "except ExportError as error:\n"
        "    assert 'someone/other' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_image_size_follows_the_preprocessing(
    family: str, classifiers: dict[str, ExitClassifier]
) -> None:
    [schema] = classifiers[family].preprocessing
    assert isinstance(schema, ImagePreprocessing)
    assert classifiers[family].trunk.inputs[0].axes[2:] == [schema.height, schema.width]


def test_vit_refuses_images_of_a_size_that_its_positions_are_not_for(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    make_model("vit").save_pretrained(tmp_path)
    save_preprocessor(tmp_path, image_processor_type="ViTImageProcessor", size=[16, 16])
    with pytest.raises(ExportError, match=r"16 x 16, the model takes 8 x 12"):
        from_pretrained(tmp_path, exits=[1], untrained=True)


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
            (384, None),
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
            (224, 256),
        ),
        ({"image_processor_type": "ViTImageProcessor", "size": 30}, (30, None)),
    ],
)
def test_image_preprocessing_equals_transformers_for_every_way_to_say_size(
    config: dict, expected: tuple[int, int | None], tmp_path: Path
) -> None:
    save_preprocessor(tmp_path, **config)
    schema, sample = image_preprocessing(tmp_path, 3)
    assert (schema.height, schema.shortest_edge) == expected
    made = preprocess_images(schema, [Image.fromarray(sample["image"])])
    np.testing.assert_allclose(made, sample["expected/pixel_values"], atol=1e-5, rtol=0)


def test_image_preprocessing_is_grey_when_the_model_has_one_channel(tmp_path: Path) -> None:
    kind = "ViTImageProcessor"
    save_preprocessor(
        tmp_path, image_processor_type=kind, size=[8, 8], image_mean=[0.5], image_std=[0.5]
    )
    schema, sample = image_preprocessing(tmp_path, 1)
    assert schema.mode == "L" and sample["image"].ndim == 2
    made = preprocess_images(schema, [Image.fromarray(sample["image"])])
    assert made.shape == (1, 1, 8, 8)
    np.testing.assert_allclose(made, sample["expected/pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "extra, complaint",
    [({"do_resize": False}, "do_resize"), ({"resample": 4}, "resample 4")],
)
def test_image_preprocessing_refuses_when_a_step_cannot_be_expressed(
    extra: dict, complaint: str, tmp_path: Path
) -> None:
    kind = "ViTImageProcessor"
    save_preprocessor(tmp_path, image_processor_type=kind, size=[8, 8], **extra)
    with pytest.raises(ExportError, match=complaint):
        image_preprocessing(tmp_path, 3)
