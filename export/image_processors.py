"""Converts a checkpoint's image processor to the schema that the device executes, with a sample.

transformers reads the processor's files, old names and defaults included, and processes the sample.
Steps that the schema cannot express are refused, never left out.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import transformers

from edgeexit.bundle.manifest import ImagePreprocessing, Tiles
from edgeexit.bundle.validate_images import preprocessing_fault
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.library_errors import translated

logger = logging.getLogger(__name__)

_RESAMPLE: Mapping[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_WARPS_FROM = 384
"""ConvNeXt's processor (ResNet's too) crops below this size and warps from it on."""
Sample = dict[str, np.ndarray]
MOST_TILES = 256
"""The most that a manifest can say."""
MEND = "Correct or remove the file; without it, the bundle takes preprocessed inputs (.npz) only."
FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of an image processor; the second one has it under ``image_processor``."""


def image_preprocessing(
    folder: Path,
    channels: int,
    *,
    options: Mapping[str, Any] | None = None,
    most_tiles: int | None = None,
) -> tuple[ImagePreprocessing, Sample] | None:
    """From ``preprocessor_config.json`` or ``processor_config.json``; None when the checkpoint has
    neither.

    Args:
        folder: The checkpoint.
        channels: Of the images that the model takes.
        options: Options that the model's processor passes to its image processor.
        most_tiles: Most tiles of an image, besides its overview; None: as the processor says.

    Returns:
        The schema and a sample ``{"image", "expected/pixel_values"}``: an image larger than the
        model's, neither square nor smooth.

    Raises:
        ExportError: transformers cannot read it, or a step is not supported.
        UsageError: `most_tiles` is given for a processor without tiles.
    """
    path = _file_of(folder)
    if path is None:
        return None
    # The device has Pillow; filters of torchvision round differently.
    pillow: dict[str, Any] = {"backend": "pil"} if _version() >= 5 else {"use_fast": False}
    with translated(path, "transformers cannot read it", MEND):
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=False, **pillow, **(options or {})
        )
        if most_tiles is not None:
            _limit_tiles(processor, most_tiles, path)
        config = processor.to_dict()
    name = type(processor).__name__
    with translated(path, f"options of {name} are not supported", MEND):
        schema = _checked(path, _image_schema(path, config, name, channels))
    from edgeexit.export.pictures import (
        background_of,
        compare_pictures,
        processed,
    )  # needs Pillow, as the processor does

    with translated(path, f"{name} cannot process an image", MEND):
        schema = msgspec.structs.replace(schema, background=background_of(processor, schema))
        compare_pictures(path, schema, processor)
        image = _sample_image(schema)
        pixels = processed(processor, image if image.ndim == 3 else image[..., None])
    return schema, {"image": image, "expected/pixel_values": pixels}


def _file_of(folder: Path) -> Path | None:
    """The file of an image processor in a checkpoint."""
    for path in (folder / name for name in FILES):
        if path.is_file() and (path.name == FILES[0] or "image_processor" in _json(path)):
            return path
    return None


def _json(path: Path) -> dict[str, Any]:
    with translated(path, "not a JSON object", MEND):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _limit_tiles(processor: Any, most: int, path: Path) -> None:
    """Makes a processor cut images into at most this many tiles.

    Raises:
        UsageError: It has no tiles.
    """
    if hasattr(processor, "crop_to_patches"):
        processor.crop_to_patches = most > 1
        processor.max_patches = min(int(processor.max_patches), most)
    elif hasattr(processor, "do_image_splitting"):
        processor.do_image_splitting = bool(processor.do_image_splitting) and most > 1
        side = math.isqrt(most)
        edge = int(dict(processor.max_image_size)["longest_edge"]) * side
        own = int(dict(processor.size)["longest_edge"])
        processor.size = {"longest_edge": min(own, edge)}
        if edge < own and side**2 < most:
            logger.warning(
                "at most %d tiles: this model's images are scaled to a whole number of tiles in "
                "the longer side, so %s (other limits are 1, 4, 9, 16, ...)",
                most,
                "images stay whole" if side == 1 else f"they have {side**2} tiles at most",
            )
    else:
        raise UsageError(
            f"{path}: {type(processor).__name__} does not cut images into tiles",
            fix="Leave --max-tiles (most_tiles) out; InternVL, SmolVLM and Idefics3 have tiles.",
        )


def _checked(path: Path, schema: ImagePreprocessing) -> ImagePreprocessing:
    """The schema, if a bundle may have it."""
    schema = msgspec.convert(msgspec.to_builtins(schema), ImagePreprocessing)
    if (fault := preprocessing_fault(schema)) is not None:
        raise _refused(path, fault)
    return schema


def _image_schema(
    path: Path, config: Mapping[str, Any], processor: str, channels: int
) -> ImagePreprocessing:
    splits = "do_image_splitting" in config
    for step in ("do_pad", "do_flip_channel_order", "do_reduce_labels"):
        # A processor that splits makes tiles of one size, which need no padding.
        if config.get(step) and not (splits and step == "do_pad"):
            raise _refused(path, f"{step} is not supported")
    if not config.get("do_resize", True):
        raise _refused(path, "do_resize is false, but a graph takes images of one size")
    if channels not in (1, 3):
        raise _refused(path, f"the model takes {channels} channels, images have 1 or 3")
    size = {key: value for key, value in dict(config["size"]).items() if value is not None}
    longest, tiles = None, None
    if splits:
        if "longest_edge" not in size or not config.get("max_image_size"):
            raise _refused(path, "do_image_splitting needs longest_edge in size, max_image_size")
        longest, edge = int(size["longest_edge"]), int(config["max_image_size"]["longest_edge"])
        size = {"height": edge, "width": edge}
        if config["do_image_splitting"]:
            most = math.ceil(longest / edge) ** 2
            _check_tiles(path, "size / max_image_size", most)
            tiles = Tiles(rule="cover", most=most)
    elif config.get("crop_to_patches") and config["max_patches"] > 1:
        most, least = int(config["max_patches"]), int(config["min_patches"])
        _check_tiles(path, "max_patches", most)
        tiles = Tiles(rule="aspect-ratio", most=most, least=least)
    shortest = size.get("shortest_edge")
    if config.get("do_center_crop") and not config.get("crop_size"):
        raise _refused(path, "do_center_crop without crop_size is not supported")
    crop = dict(config["crop_size"]) if config.get("do_center_crop") else None
    if shortest is not None and processor.startswith("ConvNext"):
        if shortest >= _WARPS_FROM:
            size, shortest = {"height": shortest, "width": shortest}, None
        else:
            crop = crop or {"height": shortest, "width": shortest}
            shortest = int(shortest / config["crop_pct"])
    elif crop is not None and shortest is None:
        raise _refused(path, "do_center_crop without shortest_edge in size is not supported")
    target = crop if shortest is not None else size
    resample = _RESAMPLE.get(int(config.get("resample", 2)))
    if resample is None:
        raise _refused(path, f"resample {config.get('resample')} is not supported")
    if target is None or not {"height", "width"} <= target.keys():
        without = " without do_center_crop" if shortest is not None and crop is None else ""
        raise _refused(
            path,
            f"size {config['size']}{without} is not supported: a graph takes images of one size",
        )
    normalise = config.get("do_normalize", True)
    return ImagePreprocessing(
        input="pixel_values",
        height=target["height"],
        width=target["width"],
        mode="L" if channels == 1 else "RGB",
        resample=resample,
        shortest_edge=shortest,
        longest_edge=longest,
        tiles=tiles,
        scale=float(config["rescale_factor"]) if config.get("do_rescale", True) else 1.0,
        mean=_per_channel(path, "image_mean", config["image_mean"] if normalise else 0.0, channels),
        std=_per_channel(path, "image_std", config["image_std"] if normalise else 1.0, channels),
    )


def _check_tiles(path: Path, field: str, most: int) -> None:
    if most > MOST_TILES:
        raise _refused(
            path, f"{field} cuts an image into up to {most} tiles (at most {MOST_TILES})"
        )


def _per_channel(
    path: Path, field: str, value: float | Sequence[float], channels: int
) -> list[float]:
    if not isinstance(value, Sequence):
        return [float(value)] * channels
    if len(value) != channels:
        raise _refused(path, f"{field} has {len(value)} values, images have {channels} channels")
    return [float(v) for v in value]


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


def _refused(path: Path, why: str) -> ExportError:
    return ExportError(f"{path}: {why}", fix=MEND)


def _version() -> int:
    return int(transformers.__version__.split(".")[0])


__all__ = ["FILES", "MEND", "image_preprocessing"]
