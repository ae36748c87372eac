"""The bundle's declared preprocessing on the device: images with Pillow, texts with tokenizers.

Neither library is imported before it is needed. `edgeexit check` compares the result with the
sample that the exporter made with the checkpoint's own preprocessing.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import ImagePreprocessing, TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, EngineError
from edgeexit.runtime.text.tokenizer import encode_batch

IMAGE_LIMIT_PIXELS = 256 << 20
ImageSource = Any
"""A ``PIL.Image.Image``; Pillow is not imported here for its types."""


@dataclass(frozen=True)
class TextSource:
    """A text, or a pair of texts."""

    text: str
    pair: str | None = None


def import_pillow() -> Any:
    """Imports ``PIL.Image``, or raises `EngineError` with the extra that brings it."""
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
    """Reads an image file whole; `update` gets its bytes. Raises `DataError` naming `where`."""
    pillow = import_pillow()
    fix = "Give a readable image file, or take it out of the data."
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{where}: not a regular file", fix=fix)
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})", fix=fix) from error
    except ValueError as error:  # NUL or lone surrogates, which no file name can hold
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
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        reason = str(error).split("<_io")[0].strip()
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


def encode_texts(bundle: Bundle, texts: Sequence[TextSource]) -> dict[str, NDArray]:
    """Texts to token ids ``[batch, seq]``, padded to the longest of the batch."""
    if not isinstance(bundle.manifest.preprocessing, TextPreprocessing):
        raise DataError(
            "the bundle has no text preprocessing",
            fix="Give the inputs as .npz, or export from a checkpoint with tokenizer.json.",
        )
    pairs = [source.text if source.pair is None else (source.text, source.pair) for source in texts]
    return encode_batch(bundle, pairs)
