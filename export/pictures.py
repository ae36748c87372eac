"""The device's own image preprocessing beside the checkpoint's processor, on many pictures.

What a manifest can say of a processor is less than processors can do, and a file is more than an
array: it has a mode, perhaps a palette, and an orientation. So the very code that runs on the
device is run here, and a result that differs from the processor's is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_utils import load_image

from edgeexit.bundle.manifest import ImagePreprocessing
from edgeexit.errors import ExportError
from edgeexit.preprocessing.images import open_image, preprocess_images

GREY_LEVELS = 0.05
"""What may differ, in steps of 1/255 before normalisation: rounding, and no pixel."""

SIZES = ((1.0, 1.0), (1.6, 0.9), (0.9, 1.6), (6.0, 0.6), (0.5, 2.8), (0.25, 0.25))
"""Widths and heights of pictures, in those that the model takes."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned; cameras write 1 to 8."""

UNDERSTOOD = {
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_center_crop", "crop_size", "do_convert_rgb", "crop_pct"),
    *("image_processor_type", "processor_class", "return_tensors", "data_format", "device"),
    *("input_data_format", "disable_grouping", "default_to_square", "feature_extractor_type"),
}
"""Options of processors that the manifest expresses, or that change no pixel."""


def compare_pictures(path: Path, schema: ImagePreprocessing, processor: Any) -> None:
    """Holds the device's preprocessing against a processor.

    Args:
        path: Of the processor's file, for messages.
        schema: What the manifest will say of it.
        processor: transformers' own, which computes with Pillow.

    Raises:
        ExportError: Pixels differ; options that the manifest cannot express are named.
    """
    step = GREY_LEVELS * schema.scale / min(abs(value) for value in schema.std)
    with tempfile.TemporaryDirectory() as folder:
        for what, picture, expected in _pictures(schema, processor, Path(folder)):
            made = preprocess_images(schema, [picture])[0]
            if made.shape == expected.shape and np.abs(made - expected).max() <= step:
                continue
            how = (
                f"off by {np.abs(made - expected).max():.3g}"
                if made.shape == expected.shape
                else f"{list(made.shape)} instead of {list(expected.shape)}"
            )
            raise ExportError(
                f"{path}: the device would make other pixels of {what} than {_name(processor)} "
                f"({how}){_not_understood(processor)}",
                fix="Change those options and fine-tune again, or move the file away: the bundle "
                "then takes finished inputs (.npz) only.",
            )


def _name(processor: Any) -> str:
    return type(processor).__name__


def _not_understood(processor: Any) -> str:
    options = processor.to_dict()
    odd = sorted(k for k, v in options.items() if k not in UNDERSTOOD and v not in (None, False))
    return f"; not understood: {', '.join(f'{k}={options[k]!r:.40}' for k in odd)}" if odd else ""


def _pictures(
    schema: ImagePreprocessing, processor: Any, folder: Path
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """What each picture is, the picture as the device has it, and ``[channel, height, width]`` that
    the processor makes of it."""
    for wide, high in SIZES:
        size = max(1, round(schema.width * wide)), max(1, round(schema.height * high))
        picture = _picture(size).convert(schema.mode)
        if (made := _processed(processor, picture)) is not None:
            yield f"a picture of {size[0]} x {size[1]}", picture, made
    if schema.mode != "RGB":  # transformers' loader gives three channels of everything
        return
    for file in _write_files(_picture((50, 31)), folder):
        picture = open_image(file, file.name)
        with Image.open(file) as opened:
            loaded = load_image(opened)  # as of a path, which it would leave open
        if (made := _processed(processor, loaded)) is not None:
            yield f"a file ({file.stem.replace('_', ' ')} {file.suffix})", picture, made


def _processed(processor: Any, picture: Image.Image) -> np.ndarray | None:
    """None where the processor itself fails: what it cannot do, nobody expects."""
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    try:
        made = processor(pixels, input_data_format="channels_last", return_tensors="np")
    except Exception:  # of many kinds, for pictures that are too small or too long
        return None
    return np.asarray(made["pixel_values"][0], np.float32)


def _picture(size: tuple[int, int]) -> Image.Image:
    """Slopes, stripes and noise: no two corners are alike, and no channel is another."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 - 255 * x / width]
    stripes = 1 - ((x + 2 * y) // 5 % 2) / 3
    noise = np.random.RandomState(0).randint(-20, 21, (height, width, 3))
    pixels = np.stack(planes, -1) * stripes[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_files(picture: Image.Image, folder: Path) -> list[Path]:
    """The picture in every mode that files of it come in, and turned in every way."""
    grey = picture.convert("L")
    clear = picture.convert("RGBA")
    clear.putalpha(grey)
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
    written = []
    for name, image in kinds.items():
        image.save(folder / name)
        written.append(folder / name)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        written.append(folder / f"turned_by_EXIF_{turn}.jpg")
        picture.save(written[-1], exif=exif)
    return written


__all__ = ["compare_pictures"]
