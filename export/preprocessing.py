"""Converts a checkpoint's preprocessing to the schema that the device executes, with a sample.

transformers reads the checkpoint's files, old names and defaults included, and processes the
sample. Steps that the schema cannot express are refused, never left out. `edgeexit check` compares
the device's result with the sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import transformers

from edgeexit.bundle.manifest import ImagePreprocessing, TextPreprocessing
from edgeexit.errors import ExportError
from edgeexit.export.device_tokenizer import make_tokenizer
from edgeexit.export.library_errors import translated

_RESAMPLE: Mapping[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_WARPS_FROM = 384
"""ConvNeXt's processor (ResNet's too) crops below this size and warps from it on."""
_SAMPLE_TEXTS = (
    "The film was better than anyone had hoped, and I would watch it again tomorrow.",
    "No.",
    "Was it 3.50 or 4? Größe, naïveté, 東京 — and an e-mail to nobody@example.org!",
)
Sample = dict[str, np.ndarray]
LARGEST_EDGE = 8192
MEND = "Correct or remove the file; without it, the bundle takes preprocessed inputs (.npz) only."


def image_preprocessing(folder: Path, channels: int) -> tuple[ImagePreprocessing, Sample] | None:
    """From ``preprocessor_config.json``; None when the checkpoint has none.

    Args:
        folder: The checkpoint.
        channels: Of the images that the model takes.

    Returns:
        The schema and a sample ``{"image", "expected/pixel_values"}``: an image larger than the
        model's, neither square nor smooth.

    Raises:
        ExportError: transformers cannot read it, or a step is not supported.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    # The device has Pillow; filters of torchvision round differently.
    pillow: dict[str, Any] = {"backend": "pil"} if _version() >= 5 else {"use_fast": False}
    with translated(path, "transformers cannot read it", MEND):
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=False, **pillow
        )
        config = processor.to_dict()
    name = type(processor).__name__
    with translated(path, f"options of {name} are not supported", MEND):
        schema = _checked(path, _image_schema(path, config, name, channels))
    from edgeexit.export.pictures import compare_pictures  # needs Pillow, as the processor does

    with translated(path, f"{name} cannot process an image", MEND):
        compare_pictures(path, schema, processor)
        image = _sample_image(schema)
        last = image if image.ndim == 3 else image[..., None]
        made = processor(last, input_data_format="channels_last", return_tensors="np")
        pixels = np.asarray(made["pixel_values"], np.float32)
    return schema, {"image": image, "expected/pixel_values": pixels}


def _checked(path: Path, schema: ImagePreprocessing) -> ImagePreprocessing:
    """The schema, if its numbers are valid for images."""
    schema = msgspec.convert(msgspec.to_builtins(schema), ImagePreprocessing)
    sizes = schema.height, schema.width, schema.shortest_edge or 1
    if max(sizes) > LARGEST_EDGE:
        raise _refused(path, f"image size {max(sizes)} is out of range (1 to {LARGEST_EDGE})")
    numbers = [schema.scale, *schema.mean, *schema.std]
    if not all(map(math.isfinite, numbers)) or not all(schema.std) or not schema.scale:
        raise _refused(path, f"invalid scale, mean or std ({', '.join(map(str, numbers))})")
    return schema


def _image_schema(
    path: Path, config: Mapping[str, Any], processor: str, channels: int
) -> ImagePreprocessing:
    for step in ("do_pad", "do_flip_channel_order", "do_reduce_labels"):
        if config.get(step):
            raise _refused(path, f"{step} is not supported")
    if not config.get("do_resize", True):
        raise _refused(path, "do_resize is false, but a graph takes images of one size")
    if channels not in (1, 3):
        raise _refused(path, f"the model takes {channels} channels, images have 1 or 3")
    size = {key: value for key, value in dict(config["size"]).items() if value is not None}
    shortest = size.get("shortest_edge")
    crop = dict(config["crop_size"]) if config.get("do_center_crop") else None
    if shortest is not None and processor.startswith("ConvNext"):
        if shortest >= _WARPS_FROM:
            size, shortest = {"height": shortest, "width": shortest}, None
        else:
            crop = crop or {"height": shortest, "width": shortest}
            shortest = int(shortest / config["crop_pct"])
    elif crop is not None and shortest is None:
        raise _refused(path, "a crop without shortest_edge is not supported")
    target = crop if shortest is not None else size
    resample = _RESAMPLE.get(int(config.get("resample", 2)))
    if resample is None or target is None or not {"height", "width"} <= target.keys():
        raise _refused(
            path,
            f"size {config['size']} with resample {config.get('resample')} is not supported",
        )
    normalise = config.get("do_normalize", True)
    return ImagePreprocessing(
        input="pixel_values",
        height=target["height"],
        width=target["width"],
        mode="L" if channels == 1 else "RGB",
        resample=resample,
        shortest_edge=shortest,
        scale=float(config["rescale_factor"]) if config.get("do_rescale", True) else 1.0,
        mean=_per_channel(path, config["image_mean"] if normalise else 0.0, channels),
        std=_per_channel(path, config["image_std"] if normalise else 1.0, channels),
    )


def _per_channel(path: Path, value: float | Sequence[float], channels: int) -> list[float]:
    values = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
    if len(values) not in (1, channels):
        raise _refused(path, f"{len(values)} means or deviations for {channels} channels")
    return values * channels if len(values) == 1 else values


def _sample_image(schema: ImagePreprocessing) -> np.ndarray:
    """Slopes, stripes and noise, 3/2 times as wide as what the model sees and 5/4 as high."""
    edge = schema.shortest_edge or 1
    height, width = max(schema.height, edge) * 5 // 4, max(schema.width, edge) * 3 // 2
    y, x = np.mgrid[0:height, 0:width]
    random = np.random.RandomState(0)
    planes = [
        255 * (x / width * (1 - share) + share * y / height) * (1 + ((x + y) // 3) % 2) / 2
        for share in (0.2, 0.5, 0.8)[: 1 if schema.mode == "L" else 3]
    ]
    noisy = np.stack(planes, -1) + random.randint(-20, 21, (height, width, len(planes)))
    image = noisy.clip(0, 255).astype(np.uint8)
    return image[..., 0] if schema.mode == "L" else image


def text_preprocessing(
    folder: Path, inputs: Sequence[str], positions: int
) -> tuple[TextPreprocessing, bytes, Sample] | None:
    """From a tokenizer's files; None when the checkpoint has no tokenizer.

    Args:
        folder: The checkpoint.
        inputs: Names of the inputs that the model takes.
        positions: The longest sequence that the model takes.

    Returns:
        The schema, the content of ``tokenizer.json``, and a sample ``{"text",
        "expected/<input>"}`` with padding and truncation.

    Raises:
        ExportError: transformers cannot read it, it pads on the left, or ids on the device would
            differ.
    """
    made = make_tokenizer(folder)
    if made is None:
        return None
    raw, tokenizer = made
    path = folder / "tokenizer.json"
    if tokenizer is None:
        raise _refused(path, "padding and truncation are unknown without transformers' tokenizer")
    if tokenizer.padding_side != "right" or tokenizer.truncation_side != "right":
        raise _refused(path, "padding or truncation on the left is not supported")
    if tokenizer.pad_token_id is None:
        raise _refused(path, "it has no padding token")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise _refused(path.with_name("tokenizer_config.json"), f"model_max_length is {longest!r}")
    schema = TextPreprocessing(
        max_length=int(min(longest, positions)),
        ids="input_ids",
        mask="attention_mask" if "attention_mask" in inputs else None,
        types="token_type_ids" if "token_type_ids" in inputs else None,
        pad_id=int(tokenizer.pad_token_id),
        pad_token=str(tokenizer.pad_token),
    )
    texts = [*_SAMPLE_TEXTS, " ".join([_SAMPLE_TEXTS[0]] * (schema.max_length // 12 + 1))]
    with translated(path, "transformers cannot encode texts with it", MEND):
        encoded = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=schema.max_length,
            return_token_type_ids=schema.types is not None,
            return_tensors="np",
        )
        expected = {f"expected/{name}": np.asarray(encoded[name], np.int64) for name in inputs}
    return schema, raw, {"text": np.array(texts), **expected}


def _refused(path: Path, why: str) -> ExportError:
    return ExportError(f"{path}: {why}", fix=MEND)


def _version() -> int:
    return int(transformers.__version__.split(".")[0])
