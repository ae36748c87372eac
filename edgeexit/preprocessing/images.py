"""Image preprocessing with Pillow, which is imported with the first image.

Files are rotated by their EXIF orientation, as transformers' loader does. The exporter compares the
results with the checkpoint's processor, on files and arrays; `edgeexit check` compares them again
on the device, on a sample in the bundle.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import ImagePreprocessing
from edgeexit.errors import DataError, EngineError, InputError, first_line

IMAGE_LIMIT_PIXELS = 256 << 20
ImageSource = Any
"""A ``PIL.Image.Image``, without an import of Pillow."""


def import_pillow() -> Any:
    """Imports ``PIL.Image``. Raises `EngineError` with the extra to install if it fails."""
    try:
        import PIL.Image
    except ImportError as error:
        raise EngineError(
            f"images need Pillow, which cannot be imported ({error})",
            fix='Install it: pip install "edgeexit[images]".',
        ) from error
    return PIL.Image


def open_image(
    path: Path, where: str, update: Callable[[bytes], None] | None = None
) -> ImageSource:
    """Reads an image file and rotates the image by its EXIF orientation.

    Args:
        path: The file.
        where: Its name in messages.
        update: Called with the file's bytes.

    Raises:
        DataError: Pillow cannot read the file as an image.
        EngineError: Pillow is not installed.
    """
    pillow = import_pillow()
    from PIL.ImageOps import exif_transpose as transpose

    fix = "Give a readable image file, or remove it from the data."
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{where}: not a regular file", fix=fix)
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})", fix=fix) from error
    except ValueError as error:  # NUL or lone surrogates, invalid in file names
        raise DataError(f"{where}: {str(path)!a} is not a file name", fix=fix) from error
    if update is not None:
        update(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pillow.open(io.BytesIO(raw))
            if image.width * image.height > IMAGE_LIMIT_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.load()
            image = transpose(image)
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        reason = first_line(error).split("<_io")[0].strip()
        raise DataError(f"{where}: not an image that Pillow reads ({reason})", fix=fix) from error
    return image


def image_from_array(value: NDArray[np.uint8]) -> ImageSource:
    """An image from ``[height, width]`` or ``[height, width, 3]`` uint8."""
    return import_pillow().fromarray(value)


def preprocess_images(
    preprocessing: ImagePreprocessing, images: Sequence[ImageSource]
) -> NDArray[np.float32]:
    """Images to ``[batch, channel, height, width]`` float32, as `ImagePreprocessing` says."""
    return np.stack([_preprocess_image(preprocessing, image) for image in images])


def _preprocess_image(preprocessing: ImagePreprocessing, image: ImageSource) -> NDArray[np.float32]:
    _check_resized(preprocessing, image)
    resample = import_pillow().Resampling[preprocessing.resample.upper()]
    height, width = preprocessing.height, preprocessing.width
    image = image.convert(preprocessing.mode)
    if (edge := preprocessing.shortest_edge) is not None:
        short, long = sorted(image.size)
        longer = int(edge * long / short)
        size = (edge, longer) if image.width <= image.height else (longer, edge)
        image = image if image.size == size else image.resize(size, resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    elif image.size != (width, height):
        image = image.resize((width, height), resample)
    pixels = np.atleast_3d(np.asarray(image, np.float32)).transpose(2, 0, 1)
    mean = np.asarray(preprocessing.mean, np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, np.float32)[:, None, None]
    scaled = pixels * np.float32(preprocessing.scale)
    return np.ascontiguousarray((scaled - mean) / std, np.float32)


def _check_resized(preprocessing: ImagePreprocessing, image: ImageSource) -> None:
    """Refuses an image whose resized longer side would be too large."""
    short, long = sorted(image.size)
    edge = preprocessing.shortest_edge
    if not short or (edge is not None and edge * (edge * long // short) > IMAGE_LIMIT_PIXELS):
        raise InputError(
            f"an image of {image.width} x {image.height} pixels cannot be resized to a shorter "
            f"side of {edge or preprocessing.width}",
            fix="Crop it to a usual aspect ratio.",
        )


__all__ = ["ImageSource", "image_from_array", "import_pillow", "open_image", "preprocess_images"]
