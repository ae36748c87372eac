"""Texts with images as data of `trace` and `bench`: what is read, scored and refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, EdgeExitError
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.data import open_data
from edgeexit.measure.given_text import on_given_texts
from edgeexit.measure.texts import Text, as_data, read_texts
from edgeexit.measure.trace import NO_LABEL, Trace, record
from edgeexit.runtime import load
from edgeexit.runtime.model import Model
from edgeexit.runtime.programs.every_exit import NEXT_LOG_PROB
from tests.vision_models import PLACEHOLDER, make_images

Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def model(vision_bundle: Bundles) -> Iterator[Model]:
    with load(vision_bundle("llava"), all_scores=True) as loaded:
        yield loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name, image in zip(("cat.png", "dog.png"), make_images(2), strict=True):
        image.save(tmp_path / "pictures" / name)
    (tmp_path / "pictures/words.png").write_text("no image")
    return tmp_path


CAT, DOG = "pictures/cat.png", "pictures/dog.png"


def write_lines(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def same(text: Text, tokens: list[int], inputs: dict[str, Any]) -> bool:
    return (
        text.tokens == tokens
        and text.inputs.keys() == inputs.keys()
        and all(np.array_equal(text.inputs[name], value) for name, value in inputs.items())
    )


def test_lines_have_the_images_of_prompts_in_python(model: Model, folder: Path) -> None:
    path = write_lines(
        folder,
        {"text": "a<image>b", "image": CAT},
        {"prompt": "<image>a<image>b", "images": [CAT, DOG]},
        {"text": "which?", "images": [DOG, CAT]},
        {"text": "no image", "image": None, "images": []},
    )
    cat, dog = (folder / name for name in (CAT, DOG))
    prompts = ["a<image>b", "<image>a<image>b", "<image><image>\nwhich?"]
    images = [[cat], [cat, dog], [dog, cat]]
    texts = read_texts(path, model.bundle)
    for text, prompt, own in zip(texts, prompts, images, strict=False):
        [row], inputs = model.prompts_with_images([prompt], [own])
        assert same(text, row, inputs)
    assert same(texts[3], model.encode("no image"), {})
    again = write_lines(folder, {"tokens": texts[1].tokens, "images": [CAT, DOG]})
    [text] = read_texts(again, model.bundle)
    assert same(text, texts[1].tokens, texts[1].inputs)


def test_an_encoder_reads_the_images_of_lines(vision_bundle: Bundles, folder: Path) -> None:
    row = {"text": "What is it?", "image": CAT, "target": "cat"}
    path = write_lines(folder, row)
    with load(vision_bundle("florence2"), all_scores=True) as model:
        [text] = read_texts(path, model.bundle, targets=True)
        _, inputs = model.prompts_with_images(["What is it?"], [[folder / CAT]])
        assert same(text, [2, *model.encode("cat")], inputs)
        trace = record(model, open_data(path, model.bundle), 1, token_times=False)
    assert trace.rows == len(text.tokens)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"text": "a", "image": "bird.png"}, "line 2: .*bird.png does not exist"),
    "a file that is none": (
        {"text": "a", "image": "pictures/words.png"},
        "line 2: .*words.png: not an image",
    ),
    "more placeholders": (
        {"text": "<image><image>", "image": CAT},
        "line 2: prompt 1 has 2 placeholders <image> for 1 image",
    ),
    "token ids without placeholders": (
        {"tokens": [1, 2], "image": CAT},
        "line 2: prompt 1 has 0 placeholders .the token 299., its 1 image 16",
    ),
    "both": ({"text": "a", "image": CAT, "images": [CAT]}, "line 2: both 'image' and 'images'"),
    "no list": ({"text": "a", "images": CAT}, "line 2: 'images' is a str"),
    "an address": ({"text": "a", "image": "https://a/b.png"}, "line 2: .*not downloaded"),
    "a number": ({"text": "a", "image": 5}, "line 2: image 1 of prompt 1 is a int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lines_whose_images_do_not_fit_are_refused(model: Model, folder: Path, case: str) -> None:
    row, message = REFUSED[case]
    path = write_lines(folder, {"text": "a"}, row)
    with pytest.raises(DataError, match=message):
        read_texts(path, model.bundle)
    with pytest.raises(DataError, match=message):
        list(open_data(path, model.bundle).batches(1))


def test_images_for_a_model_of_texts_are_refused(decoder_bundle: Bundles, folder: Path) -> None:
    path = write_lines(folder, {"text": "a", "image": CAT})
    with pytest.raises(DataError, match="line 1: .*takes no images"):
        read_texts(path, decoder_bundle("llama"))


def test_placeholders_without_images_are_refused(model: Model, folder: Path) -> None:
    path = write_lines(folder, {"text": "a<image>b"})
    with pytest.raises(EdgeExitError, match="row 0: .*no inputs are given for them"):
        record(model, open_data(path, model.bundle), 1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_placeholders_are_not_scored(model: Model, folder: Path, batch_size: int) -> None:
    """Their rows are not in the trace, and all others are as if they had been traced alone."""
    rows = [
        {"text": "ab<image>cd<image>", "images": [CAT, DOG]},
        {"text": "xyz"},
        {"text": "ef<image>gh<image>", "images": [DOG, DOG]},
    ]
    path = write_lines(folder, *rows)
    trace = record(model, open_data(path, model.bundle), batch_size, token_times=False)
    assert trace.labels is not None and trace.groups is not None
    assert trace.next_log_probs is not None and PLACEHOLDER not in trace.labels
    for number, text in enumerate(read_texts(path, model.bundle)):
        whole = model.trace({"tokens": np.array([text.tokens]), **text.inputs})
        following = np.array([*text.tokens[1:], -1])
        scored = following != PLACEHOLDER
        own = trace.groups == number
        assert trace.labels[own].tolist() == following[scored].tolist()
        for place, outputs in enumerate(whole.outputs):
            assert np.array_equal(trace.predictions[place, own], outputs["token"][0, scored])
            values = outputs[NEXT_LOG_PROB][0, scored]
            np.testing.assert_allclose(trace.next_log_probs[place, own], values, atol=1e-4)
    assert trace.batch_rows.sum() == trace.rows == 4 + 3 + 4


def test_a_trace_is_about_the_target(model: Model, folder: Path) -> None:
    """A row for each token of the target, with what every exit says behind the one before it."""
    prompt, target = "<image>what is it?", "a cat"
    path = write_lines(
        folder,
        {"text": prompt, "image": CAT, "target": target},
        {"text": "no image", "target": target},
    )
    written = model.encode(target, special_tokens=False)
    texts = read_texts(path, model.bundle, targets=True)
    assert [text.tokens[text.asked :] for text in texts] == [written, written]
    [seen, _] = read_texts(path, model.bundle)
    assert seen.tokens == texts[0].tokens[: texts[0].asked]
    trace = record(model, open_data(path, model.bundle), 2, token_times=False)
    assert trace.labels is not None and trace.groups is not None
    for number, text in enumerate(texts):
        own = trace.groups == number
        assert trace.labels[own].tolist() == [*written, NO_LABEL]
        said = model.trace({"tokens": np.array([text.tokens])} | text.inputs)
        expected = np.stack([outputs["token"][0] for outputs in said.outputs])
        assert np.array_equal(trace.predictions[:, own], expected[:, text.asked - 1 :])


def test_a_policy_on_given_texts_counts_no_placeholders(model: Model, folder: Path) -> None:
    path = write_lines(folder, {"text": "ab<image>cd", "image": CAT})
    [text] = read_texts(path, model.bundle)
    given = on_given_texts(model, [text.tokens], [text.inputs])
    assert given is not None and given.tokens == 3


def test_answers_that_are_no_numbers_give_a_warning(
    model: Model, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(folder, {"text": "ab<image>cd", "image": CAT}, {"text": "xyz"})
    shown, plain = read_texts(path, model.bundle)
    bad = Text(shown.tokens, {name: value * np.nan for name, value in shown.inputs.items()})

    def traced(*texts: Text) -> Trace:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="edgeexit"):
            return record(model, as_data(texts, model.bundle, "texts"), 1, token_times=False)

    fine = traced(shown, plain)
    assert not caplog.records
    trace = traced(shown, bad, plain, bad)
    assert [one.getMessage().split(":")[1] for one in caplog.records] == [" row 1 and 1 more"]
    policy, _, _ = calibrate(trace, max_risk=1.0, score="max_prob")
    assert "max_prob is NaN for 8 of 15 tokens" in policy.calibration["warnings"][-1]
    policy, _, _ = calibrate(fine, max_risk=1.0, score="max_prob")
    assert not any("NaN" in doubt for doubt in policy.calibration["warnings"])
