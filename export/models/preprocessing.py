"""A checkpoint's own preprocessing files, read into the schema that the device executes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgeexit.errors import ExportError
from edgeexit.manifest import ImagePreprocessing, TextPreprocessing

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def image_preprocessing(folder: Path) -> ImagePreprocessing | None:
    """From ``preprocessor_config.json``; None when the checkpoint has none.

    Raises `ExportError` for steps the schema cannot express, rather than leaving them out.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    size = config.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    shortest = size.get("shortest_edge")
    if config.get("crop_pct") is not None and shortest is not None and shortest < 384:
        crop = crop or {"height": shortest, "width": shortest}
        shortest = int(shortest / config["crop_pct"])
    target = crop or ({"height": shortest, "width": shortest} if shortest else size)
    resample = _RESAMPLE.get(config.get("resample", 2))
    if resample is None or not {"height", "width"} <= set(target):
        raise ExportError(
            f"{path}: size {config.get('size')}, resample {config.get('resample')} cannot be expressed",
            fix="Give height and width (or shortest_edge) and a PIL resample filter from 0 to 3.",
        )
    normalise = config.get("do_normalize", True)
    mean = config.get("image_mean", [0.5] * 3) if normalise else [0.0]
    std = config.get("image_std", [0.5] * 3) if normalise else [1.0]
    return ImagePreprocessing(
        input="pixel_values",
        height=target["height"],
        width=target["width"],
        mode="L" if len(mean) == 1 and normalise else "RGB",
        resample=resample,
        shortest_edge=shortest,
        scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        mean=[float(value) for value in mean],
        std=[float(value) for value in std],
    )


def text_preprocessing(
    folder: Path, inputs: Sequence[str], positions: int
) -> tuple[TextPreprocessing | None, str | None]:
    """From ``tokenizer.json`` and its config; (None, None) when the checkpoint has no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None, None
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    pad = config.get("pad_token", "[PAD]")
    pad = pad["content"] if isinstance(pad, dict) else pad
    vocabulary = {t["content"]: t["id"] for t in json.loads(path.read_text()).get("added_tokens", [])}
    limit = config.get("model_max_length", positions)
    return (
        TextPreprocessing(
            max_length=int(min(limit, positions)),
            ids="input_ids",
            mask="attention_mask" if "attention_mask" in inputs else None,
            types="token_type_ids" if "token_type_ids" in inputs else None,
            pad_id=vocabulary.get(pad, 0),
            pad_token=pad,
        ),
        str(path),
    )
