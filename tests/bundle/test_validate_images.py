"""Image preprocessing that no processor has, or that does not fit the program, is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from edgeexit.bundle.manifest import Manifest
from edgeexit.bundle.reader import Bundle, decode_manifest
from edgeexit.bundle.validate import check_structure
from edgeexit.errors import BundleError

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def tiled(vision_bundle: Callable[[str], Bundle]) -> Raw:
    """Sound: SmolVLM, with tiles."""
    raw: Raw = json.loads(msgspec.json.encode(vision_bundle("smolvlm").manifest))
    return raw


def check(raw: Raw) -> Manifest:
    manifest = decode_manifest(json.dumps(raw).encode())
    check_structure(manifest)
    return manifest


def test_what_export_writes_passes(tiled: Raw) -> None:
    assert check(tiled).image_preprocessing is not None


def test_an_older_bundle_has_no_background(tiled: Raw) -> None:
    raw = copy.deepcopy(tiled)
    assert raw["preprocessing"][0].pop("background") == "white"
    images = check(raw).image_preprocessing
    assert images is not None
    assert images.background is None


PREPROCESSING: dict[str, tuple[Raw, str]] = {
    "mean of two": ({"mean": [0.5, 0.5]}, "mean has 2 values for 3 channels"),
    "no std": ({"std": []}, "std has 0 values for 3 channels"),
    "std 0": ({"std": [0.5, 0, 0.5]}, "invalid scale, mean or std"),
    "std below 0": ({"std": [-0.5]}, "invalid scale, mean or std"),
    "scale 0": ({"scale": 0}, "invalid scale, mean or std"),
    "scale below 0": ({"scale": -1}, "invalid scale, mean or std"),
    "height": ({"height": 10**9}, "height: image size 1000000000 is out of range (1 to 8192)"),
    "width": ({"width": 10**9}, "width: image size 1000000000 is out of range (1 to 8192)"),
    "shortest": ({"shortest_edge": 10**9}, "shortest_edge: image size 1000000000 is out of range"),
    "longest": ({"longest_edge": 10**9}, "longest_edge 1000000000 is out of range (1 to 16384)"),
    "other size": ({"height": 33}, "makes float32[image, 3, 33, 32], but the input pixel_values"),
    "other channels": ({"mode": "L", "mean": [0], "std": [1]}, "makes float32[image, 1, 32, 32]"),
    "input of ids": ({"input": "tokens"}, "but the input tokens is int64['batch', 'new']"),
    "crop of tiles": ({"shortest_edge": 32}, "tiles and shortest_edge exclude each other"),
    "tiles beyond the most": ({"longest_edge": 640}, "longest_edge 640 needs more than 4 tiles"),
    "tiles without a bound": ({"longest_edge": None}, "longest_edge None needs more than 4 tiles"),
    "more than most": (
        {"tiles": {"rule": "aspect-ratio", "most": 2, "least": 3}},
        "at least 3 tiles, but at most 2",
    ),
    "pixels": (
        {"tiles": {"rule": "aspect-ratio", "most": 9}, "height": 8192, "width": 8192},
        "10 tiles of 8192 x 8192 pixels are more than",
    ),
}
TEXTS: dict[str, tuple[Raw, str]] = {
    "tokens": ({"tokens": 10**9}, "written as 1000000000 tokens, but image_features has 4 per"),
    "whole": ({"whole": "an image"}, "whole is 'an image', which does not have {image} once"),
    "tile": ({"tile": "{image}{image}"}, "tile is '{image}{image}', which does not have {image}"),
    "overview": ({"overview": ""}, "overview is '', which does not have {image} once"),
}


@pytest.mark.parametrize("case", PREPROCESSING)
def test_absurd_preprocessing_is_refused(tiled: Raw, case: str) -> None:
    changes, message = PREPROCESSING[case]
    raw = copy.deepcopy(tiled)
    raw["preprocessing"][0] |= changes
    with pytest.raises(BundleError) as caught:
        check(raw)
    assert str(caught.value).startswith("manifest.json: image preprocessing")
    assert message in str(caught.value)


@pytest.mark.parametrize("case", TEXTS)
def test_absurd_texts_for_images_are_refused(tiled: Raw, case: str) -> None:
    changes, message = TEXTS[case]
    raw = copy.deepcopy(tiled)
    raw["decoding"]["groups"]["image"]["image"] |= changes
    with pytest.raises(BundleError) as caught:
        check(raw)
    assert str(caught.value).startswith("manifest.json: token group image")
    assert message in str(caught.value)
