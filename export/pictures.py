"""Compares the device's image preprocessing with the checkpoint's processor on many images.

A manifest cannot express all options of processors, and image files differ in mode, palette,
transparency and orientation. This module runs the device's code on images and files, and export
fails if a result differs from the processor's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers.image_utils import load_image

from edgeexit.bundle.manifest import ImagePreprocessing
from edgeexit.errors import ExportError
from edgeexit.preprocessing.images import open_image, preprocess_images

GREY_LEVELS = 0.05
"""Tolerance in steps of 1/255 before normalisation: covers rounding only."""

SIZES = ((1.0, 1.0), (1.6, 0.9), (0.9, 1.6), (6.0, 0.6), (0.5, 2.8), (0.25, 0.25))
"""Widths and heights of test images, relative to the model's."""

ORIENTATION = 0x0112
"""The EXIF tag of the orientation; cameras write 1 to 8."""

UNDERSTOOD = {
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_center_crop", "crop_size", "do_convert_rgb", "crop_pct"),
    *("image_processor_type", "processor_class", "return_tensors", "data_format", "device"),
    *("input_data_format", "disable_grouping", "default_to_square", "feature_extractor_type"),
    *("do_image_splitting", "max_image_size", "crop_to_patches", "min_patches", "max_patches"),
}
"""Options of processors that the manifest can express, or that change no pixels."""


def compare_pictures(path: Path, schema: ImagePreprocessing, processor: Any) -> None:
    """Compares the device's preprocessing with a processor.

    Args:
        path: Of the processor's file, for messages.
        schema: The preprocessing for the manifest.
        processor: The processor of transformers, with Pillow.

    Raises:
        ExportError: Pixels differ; the message lists options that the manifest cannot express.
    """
    step = GREY_LEVELS * schema.scale / min(abs(value) for value in schema.std)
    compared = 0
    with tempfile.TemporaryDirectory() as folder:
        for what, picture, expected in _pictures(schema, processor, Path(folder)):
            compared += 1
            made = preprocess_images(schema, [picture])
            if made.shape == expected.shape and np.abs(made - expected).max() <= step:
                continue
            how = (
                f"off by {np.abs(made - expected).max():.3g}"
                if made.shape == expected.shape
                else f"{list(made.shape)} instead of {list(expected.shape)}"
            )
            raise ExportError(
                f"{path}: pixels on the device would differ for {what} from {_name(processor)} "
                f"({how}){_not_understood(processor)}",
                fix="Change the options and fine-tune again, or remove the file: the bundle then "
                "takes preprocessed inputs (.npz) only.",
            )
    if not compared:
        raise ExportError(
            f"{path}: {_name(processor)} fails for every test image, so the device's preprocessing "
            "cannot be compared with it",
            fix="Repair the file, or remove it: the bundle then takes preprocessed inputs (.npz) "
            "only.",
        )


def _name(processor: Any) -> str:
    return type(processor).__name__


def _not_understood(processor: Any) -> str:
    options = processor.to_dict()
    odd = sorted(k for k, v in options.items() if k not in UNDERSTOOD and v not in (None, False))
    return f"; unsupported: {', '.join(f'{k}={options[k]!r:.40}' for k in odd)}" if odd else ""


def _pictures(
    schema: ImagePreprocessing, processor: Any, folder: Path
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Yields a description of each test image, the image as the device reads it, and the
    processor's result ``[tile, channel, height, width]``."""
    for wide, high in SIZES:
        size = max(1, round(schema.width * wide)), max(1, round(schema.height * high))
        picture = _picture(size).convert(schema.mode)
        given = np.asarray(picture)[..., None] if schema.mode == "L" else picture
        if (made := _try(processor, given)) is not None:
            yield f"an image of {size[0]} x {size[1]}", picture, made
    if schema.mode != "RGB":  # transformers' loader always returns three channels
        return
    for file in _write_files(_picture((50, 31)), folder):
        what = f"{file.stem.replace('_', ' ')} {file.suffix}"
        picture = open_image(file, file.name)
        with Image.open(file) as opened:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of palettes with transparency
                loaded = load_image(opened)  # given a path, it would leave the file open
            if (made := _try(processor, loaded)) is not None:
                yield f"a file ({what})", picture, made
            # Others take only images of three channels, or read them as arrays (SmolVLM's, 4.57).
            converts = schema.background is not None
            if converts and (made := _try(processor, opened)) is not None:
                yield f"an image of Pillow ({what})", opened, made


def background_of(processor: Any, schema: ImagePreprocessing) -> Literal["white"] | None:
    """The colour that a processor lays transparent pixels on; None: it ignores transparency, or
    does something else, which `compare_pictures` finds."""
    if schema.mode != "RGB":
        return None
    clear = Image.new("RGB", (schema.width, schema.height))
    clear.info["transparency"] = (0, 0, 0)
    made, white = _try(processor, clear), _try(processor, Image.new("RGB", clear.size, "white"))
    same = made is not None and white is not None and np.array_equal(made, white)
    return "white" if same else None


def _try(processor: Any, picture: Image.Image | np.ndarray) -> np.ndarray | None:
    """The processor's result; None for images that the processor itself cannot process."""
    try:
        return processed(processor, picture)
    except Exception:  # many types, for images that are too small or too long
        return None


def processed(processor: Any, image: Image.Image | np.ndarray) -> np.ndarray:
    """The processor's result ``[tile, channel, height, width]`` for one image: Pillow's, or
    ``[height, width, channel]``."""
    made = processor(image, input_data_format="channels_last", return_tensors="np")
    values = np.asarray(made["pixel_values"], np.float32)
    return values.reshape(-1, *values.shape[-3:])


def _picture(size: tuple[int, int]) -> Image.Image:
    """A test image of slopes, stripes and noise, with distinct corners and channels."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 - 255 * x / width]
    stripes = 1 - ((x + 2 * y) // 5 % 2) / 3
    noise = np.random.RandomState(0).randint(-20, 21, (height, width, 3))
    pixels = np.stack(planes, -1) * stripes[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_files(picture: Image.Image, folder: Path) -> list[Path]:
    """Writes files of the image in every file mode and EXIF orientation."""
    grey = picture.convert("L")
    clear = picture.convert("RGBA")
    clear.putalpha(grey)
    few = picture.quantize(8)
    plain, shades = few.convert("RGB"), few.convert("RGB").convert("L")
    middle = picture.width // 2, picture.height // 2
    kinds = {
        "RGB.png": picture,
        "grey.png": grey,
        "transparent.png": clear,
        "transparent_grey.png": clear.convert("LA"),
        "palette.png": picture.quantize(32),
        "palette.gif": picture.quantize(32),
        "two_colours.png": picture.convert("1"),
        "16_bits.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "CMYK.jpg": picture.convert("CMYK"),
        "grey.jpg": grey,
        "RGB.webp": picture,
        "RGB.bmp": picture,
    }
    see_through: dict[str, tuple[Image.Image, Any]] = {
        "transparent_colour.png": (plain, plain.getpixel(middle)),
        "transparent_shade.png": (shades, shades.getpixel(middle)),
        "transparent_entry.png": (few, few.getpixel(middle)),
        "transparent_entries.png": (few, bytes([0, 64, 128, 255])),
        "transparent_entry.gif": (few, few.getpixel(middle)),
    }
    written = []
    for name, image in kinds.items():
        image.save(folder / name)
        written.append(folder / name)
    for name, (image, transparency) in see_through.items():
        image.save(folder / name, transparency=transparency)
        written.append(folder / name)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        written.append(folder / f"turned_by_EXIF_{turn}.jpg")
        picture.save(written[-1], exif=exif)
    return written


__all__ = ["background_of", "compare_pictures", "processed"]
