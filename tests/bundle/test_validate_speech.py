"""Manifests of speech models that do not fit together are refused, with the field and its value."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgeexit.bundle.manifest import Manifest, StartChoice, Timestamps
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.validate import check_structure
from edgeexit.errors import BundleError
from tests.speech_models import END, FIRST_TIME, NO_TIMES, VOCABULARY

PREPROCESSING: dict[str, tuple[dict[str, Any], str]] = {
    "other mels": ({"mels": 24}, r"makes float32\['batch', 24, 100\], but the input input_feat"),
    "other frames": ({"samples": 32000}, r"makes float32\['batch', 16, 200\]"),
    "no such input": ({"input": "sound"}, "makes sound, which is not an input"),
    "gaps": ({"hop": 500}, "hop 500 is more than fft 400"),
    "a short window": ({"samples": 300}, r"samples 300 is out of range \(400 to"),
    "too high": ({"highest_hz": 9000.0}, "highest_hz 9000 is more than half of rate 16000"),
}
TIMES = Timestamps(first=FIRST_TIME, without=NO_TIMES, end=END)
DECODING: dict[str, tuple[dict[str, Any], str]] = {
    "no start token": ({"start_tokens": []}, "chosen, but there is no start token"),
    "a default that is no option": (
        {"choices": {"tone": StartChoice(options={"kind": [1]}, default="rude")}},
        "the choice tone: default is 'rude', not one of its options",
    ),
    "an alias that is no option": (
        {"choices": {"tone": StartChoice(options={"kind": [1]}, aliases={"nice": "good"})}},
        "the choice tone: alias nice is 'good', not one of its options",
    ),
    "a token that the model does not have": (
        {"choices": {"tone": StartChoice(options={"kind": [VOCABULARY]})}},
        f"the token of the tone kind {VOCABULARY} is outside the vocabulary",
    ),
    "a time that it does not have": (
        {"timestamps": msgspec.structs.replace(TIMES, first=VOCABULARY)},
        f"the first time {VOCABULARY} is outside the vocabulary",
    ),
}


def manifest_with(
    bundle: Bundle, preprocessing: dict[str, Any], decoding: dict[str, Any]
) -> Manifest:
    manifest = bundle.manifest
    assert manifest.audio_preprocessing is not None and manifest.decoding is not None
    return msgspec.structs.replace(
        manifest,
        preprocessing=[msgspec.structs.replace(manifest.audio_preprocessing, **preprocessing)],
        decoding=msgspec.structs.replace(manifest.decoding, **decoding),
    )


def test_the_manifest_of_a_speech_model_fits(speech_bundle: Bundle) -> None:
    check_structure(manifest_with(speech_bundle, {}, {}))


@pytest.mark.parametrize("case", PREPROCESSING)
def test_preprocessing_that_does_not_fit_is_refused(speech_bundle: Bundle, case: str) -> None:
    changes, said = PREPROCESSING[case]
    with pytest.raises(BundleError, match=said):
        check_structure(manifest_with(speech_bundle, changes, {}))


@pytest.mark.parametrize("case", DECODING)
def test_start_tokens_that_do_not_fit_are_refused(speech_bundle: Bundle, case: str) -> None:
    changes, said = DECODING[case]
    with pytest.raises(BundleError, match=said):
        check_structure(manifest_with(speech_bundle, {}, changes))
