"""``/v1/predict`` answers what the model answers, with the exit that was taken."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from edgeexit.bundle.reader import Bundle
from edgeexit.preprocessing.images import open_image, preprocess_images
from edgeexit.runtime import Model, Rule, load
from tests.serve.conftest import Start
from tests.serve.servers import Server


@pytest.fixture(scope="module")
def model(vit_bundle: Bundle) -> Iterator[Model]:
    with load(vit_bundle, policy=Rule(thresholds=0.95)) as model:
        yield model


def make_image(seed: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, len(mode)), np.uint8)
    raw = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(raw, kind)
    return raw.getvalue()


@pytest.mark.parametrize("mode, kind", [("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG")])
def test_an_image_is_answered_as_its_file_is(
    painter: Server, model: Model, tmp_path, mode: str, kind: str
) -> None:
    exits = set()
    for seed in range(6):
        raw = make_image(seed, mode, kind)
        (tmp_path / "image").write_bytes(raw)
        preprocessing = model.bundle.manifest.image_preprocessing
        assert preprocessing is not None
        pixels = preprocess_images(preprocessing, [open_image(tmp_path / "image", "it")])
        made = model({preprocessing.input: pixels})
        found = painter.ask("/v1/predict", raw, {"Content-Type": f"image/{kind.lower()}"}).json
        [row] = found["rows"]
        assert (found["model"], found["score"]) == ("vit", "max_prob")
        assert row["exit"] == made.exit_names[0]
        assert row["score"] == pytest.approx(float(made.scores[0]), abs=1e-6)
        assert row["class"] == made.outputs["logits"][0].argmax()
        assert row["label"] == ["cat", "dog", "owl"][row["class"]] and "outputs" not in row
        encoded = base64.b64encode(raw).decode()
        for image in (encoded, f"data:image/{kind.lower()};base64,{encoded}"):
            assert painter.ask("/v1/predict", {"image": image}).json == found
        exits.add(row["exit"])
    assert len(exits) > 1


def test_inputs_are_rows_with_outputs_on_request(painter: Server, model: Model) -> None:
    name = model.bundle.manifest.inputs[0].name
    rows = np.random.default_rng(3).standard_normal((5, 3, 16, 16)).astype(np.float32)
    before = painter.metric(f'edgeexit_exits_total{{exit="{model.exits[-1].name}"}}')
    body = {"inputs": {name: rows.tolist()}, "outputs": True}
    found = painter.ask("/v1/predict", body).json["rows"]
    made = model({name: rows})
    assert [row["exit"] for row in found] == made.exit_names
    logits = np.array([row["outputs"]["logits"] for row in found])
    np.testing.assert_allclose(logits, made.outputs["logits"], atol=1e-5)
    after = painter.metric(f'edgeexit_exits_total{{exit="{model.exits[-1].name}"}}')
    assert after - before == made.exit_names.count(model.exits[-1].name)


def test_texts_are_rows(serve: Start, bert_bundle: Bundle) -> None:
    server = serve(bert_bundle)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    rows = server.ask("/v1/predict", {"texts": texts}).json["rows"]
    alone = [server.ask("/v1/predict", {"text": text}).json["rows"][0] for text in texts]
    assert [row["label"] for row in rows] == [row["label"] for row in alone]
    assert rows[0]["label"] in ("bad", "fair", "good") and rows[0]["exit"] == "exit_4"
    refused = server.ask("/v1/predict", make_image(0), {"Content-Type": "image/png"})
    assert refused.status == 400 and "no image preprocessing" in refused.message


BAD_INPUTS = {
    "nothing": ({}, "exactly one of"),
    "two": ({"text": "a", "image": "b"}, "found image and text"),
    "unknown": ({"picture": "a"}, "picture"),
    "ragged": ({"inputs": {"pixel_values": [[1], [1, 2]]}}, "equal lengths"),
    "words": ({"inputs": {"pixel_values": ["a"]}}, "float32"),
    "shape": ({"inputs": {"pixel_values": [[1.0]]}}, "pixel_values"),
    "name": ({"inputs": {"pixels": [[1.0]]}}, "pixel_values is missing"),
    "empty": ({"inputs": {"pixel_values": []}}, "pixel_values"),
    "rows": ({"inputs": {"pixel_values": np.zeros((257, 3, 1, 1)).tolist()}}, "256 at most"),
    "none": ({"inputs": {}}, "pixel_values"),
    "a text": ({"text": "a"}, "takes images"),
    "no texts": ({"texts": []}, "texts"),
    "base64": ({"image": "%%"}, "not base64"),
    "no image": ({"image": "AAAA"}, "not an image"),
    "a list": ([], "not a JSON object"),
    "deadline": ({"text": "a", "deadline_s": 0}, "deadline_s"),
    "model": ({"text": "a", "model": "b"}, "no model 'b'"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_what_is_wrong_is_said(painter: Server, name: str) -> None:
    body, said = BAD_INPUTS[name]
    refused = painter.ask("/v1/predict", body)
    assert refused.status in (400, 404)
    assert said in refused.message and refused.message.endswith(".")


def test_damaged_bodies_are_refused(painter: Server) -> None:
    json_type, png = {"Content-Type": "application/json"}, {"Content-Type": "image/png"}
    assert painter.ask("/v1/predict", b"{", json_type).status == 400
    assert painter.ask("/v1/predict", b"[" * 100_000, json_type).status == 400
    assert painter.ask("/v1/predict", b"", json_type).status == 400
    assert painter.ask("/v1/predict", b"", png).status == 400
    assert painter.ask("/v1/predict", make_image(0)[:60], png).status == 400
    assert painter.ask("/v1/predict", b"a=b").status == 415
    assert painter.ask("/v1/predict").status == 405
    assert "/v1/predict" in painter.ask("/v1/completions", {"prompt": "a"}).message


def test_an_image_that_is_huge_when_decoded_is_refused(painter: Server) -> None:
    raw = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(raw, "PNG")
    assert len(raw.getvalue()) < 100_000
    refused = painter.ask("/v1/predict", raw.getvalue(), {"Content-Type": "image/png"})
    assert refused.status == 400 and "10000 x 10000 pixels" in refused.message
