"""Image preprocessing with Pillow, which is imported with the first image.

Files are rotated by their EXIF orientation, as transformers' loader does. The exporter compares the
results with the checkpoint's processor, on files and arrays; `edgeexit check` compares them again
on the device, on a sample in the bundle.
"""

from __future__ import annotations

import io
import math
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import ImagePreprocessing, Tiles
from edgeexit.errors import DataError, EngineError, InputError, first_line

IMAGE_LIMIT_PIXELS = 256 << 20
FILE_LIMIT_BYTES = 1 << 30
"""An uncompressed image of that many pixels with alpha."""
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

    Alpha is dropped, but a colour that stands for transparency stays in ``info``: transformers'
    loader does the same.

    Args:
        path: The file.
        where: Its name in messages.
        update: Called with the file's bytes.

    Raises:
        DataError: Pillow cannot read the file as an image.
        EngineError: Pillow is not installed.
    """
    import_pillow()
    fix = "Give a readable image file, or remove it from the data."
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{where}: not a regular file", fix=fix)
        if status.st_size > FILE_LIMIT_BYTES:
            raise DataError(
                f"{where}: {status.st_size} bytes, more than the {FILE_LIMIT_BYTES} allowed",
                fix="Give a smaller image file.",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})", fix=fix) from error
    except ValueError as error:  # NUL or lone surrogates, invalid in file names
        raise DataError(f"{where}: {str(path)!a} is not a file name", fix=fix) from error
    if update is not None:
        update(raw)
    return decode_image(raw, where)


def decode_image(raw: bytes, where: str, *, limit_pixels: int | None = None) -> ImageSource:
    """An image from the bytes of a file, as `open_image` reads it.

    Args:
        raw: The bytes.
        where: Its name in messages.
        limit_pixels: Images with more pixels are refused before they are decoded; None:
            `IMAGE_LIMIT_PIXELS`.

    Raises:
        DataError: Pillow cannot read the bytes as an image.
        EngineError: Pillow is not installed.
    """
    pillow = import_pillow()
    fix = "Give a readable image file, or remove it from the data."
    return _upright(
        lambda: pillow.open(io.BytesIO(raw)),
        where,
        fix,
        without_alpha=True,
        limit_pixels=limit_pixels,
    )


def upright(image: ImageSource, where: str) -> ImageSource:
    """An image of Pillow, decoded and rotated by its EXIF orientation. Raises `DataError` if it
    cannot be decoded."""
    return _upright(lambda: image, where, "Give an image that Pillow can decode.")


def _upright(
    open_it: Callable[[], ImageSource],
    where: str,
    fix: str,
    *,
    without_alpha: bool = False,
    limit_pixels: int | None = None,
) -> ImageSource:
    from PIL.ImageOps import exif_transpose

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_it()
            most = IMAGE_LIMIT_PIXELS if limit_pixels is None else limit_pixels
            if image.width * image.height > most:
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.load()
            image = exif_transpose(image)
            return image.convert("RGB") if without_alpha and _has_transparency(image) else image
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        reason = first_line(error).split("<_io")[0].strip()
        raise DataError(f"{where}: not an image that Pillow reads ({reason})", fix=fix) from error


def image_from_array(value: NDArray[np.uint8]) -> ImageSource:
    """An image from ``[height, width]`` or ``[height, width, 3]`` uint8."""
    return import_pillow().fromarray(value)


def preprocess_images(
    preprocessing: ImagePreprocessing, images: Sequence[ImageSource]
) -> NDArray[np.float32]:
    """Images to ``[batch, channel, height, width]`` float32, as `ImagePreprocessing` says. With
    tiles, an image has several rows (`cut_image`)."""
    return np.concatenate([cut_image(preprocessing, image).pixels for image in images])


@dataclass(frozen=True)
class Cut:
    """A preprocessed image.

    Attributes:
        pixels: ``[tile, channel, height, width]`` float32; the overview is the last tile.
        rows, columns: The grid of tiles.
    """

    pixels: NDArray[np.float32]
    rows: int = 1
    columns: int = 1


def cut_image(preprocessing: ImagePreprocessing, image: ImageSource) -> Cut:
    """Resizes an image, and cuts it into tiles if `preprocessing` says so.

    Raises:
        InputError: The image is too long and narrow, or of a mode that Pillow cannot convert.
    """
    _check_resized(preprocessing, image)
    resample = import_pillow().Resampling[preprocessing.resample.upper()]

    def resized(source: ImageSource, width: int, height: int) -> ImageSource:
        same = source.size == (width, height)
        return source if same else source.resize((width, height), resample)

    height, width = preprocessing.height, preprocessing.width
    image = _converted(preprocessing, image)
    if preprocessing.longest_edge is not None:
        size = with_longest_edge(image.width, image.height, preprocessing.longest_edge)
        image = resized(image, *size)
    if (edge := preprocessing.shortest_edge) is not None:
        short, long = sorted(image.size)
        longer = int(edge * long / short)
        size = (edge, longer) if image.width <= image.height else (longer, edge)
        image = resized(image, *size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return Cut(
            _normalised(preprocessing, [image.crop((left, top, left + width, top + height))])
        )
    if preprocessing.tiles is None:
        return Cut(_normalised(preprocessing, [resized(image, width, height)]))
    columns, rows = grid_of(preprocessing.tiles, image.size, (width, height))
    whole = resized(image, columns * width, rows * height)
    tiles = [
        whole.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        # SmolVLM's overview is made of the image that the tiles were cut from.
        source = whole if preprocessing.tiles.rule == "cover" else image
        tiles.append(resized(source, width, height))
    return Cut(_normalised(preprocessing, tiles), rows, columns)


def with_longest_edge(width: int, height: int, edge: int) -> tuple[int, int]:
    """Width and height of an image whose longer side gets that many pixels.

    >>> with_longest_edge(300, 100, 512), with_longest_edge(10, 4000, 512)
    ((512, 170), (2, 512))
    """
    if width >= height:
        other = int(edge / (width / height))
        return edge, max(other + other % 2, 1)
    other = int(edge * (width / height))
    return max(other + other % 2, 1), edge


def grid_of(tiles: Tiles, size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of the grid that an image is cut into.

    Args:
        size: Width and height of the image.
        tile: Width and height of a tile.

    >>> grid_of(Tiles(rule="aspect-ratio", most=12), (800, 400), (448, 448))
    (2, 1)
    >>> grid_of(Tiles(rule="cover", most=16), (2048, 1024), (512, 512))
    (4, 2)
    """
    (width, height), (tile_width, tile_height) = size, tile
    ratio = width / height
    if tiles.rule == "cover":
        if width >= height:
            columns = -(-width // tile_width)
            return columns, math.ceil(int(columns * tile_width / ratio) / tile_height)
        rows = -(-height // tile_height)
        return math.ceil(int(rows * tile_height * ratio) / tile_width), rows
    grids = [
        (columns, rows)
        for columns in range(1, tiles.most + 1)
        for rows in range(1, tiles.most + 1)
        if tiles.least <= columns * rows <= tiles.most
    ]
    best, nearest = (1, 1), math.inf
    for columns, rows in sorted(grids, key=math.prod):
        distance = abs(ratio - columns / rows)
        large = width * height > 0.5 * tile_width * tile_height * columns * rows
        if distance < nearest or (distance == nearest and large):
            best, nearest = (columns, rows), distance
    return best


def _has_transparency(image: ImageSource) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None


def _converted(preprocessing: ImagePreprocessing, image: ImageSource) -> ImageSource:
    """The image in the mode and on the background that the model takes, by the steps of
    transformers' ``convert_to_rgb``."""
    pillow = import_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if preprocessing.background is not None and _has_transparency(image):
                image = image.convert("RGBA")
                background = pillow.new("RGBA", image.size, preprocessing.background)
                image = pillow.alpha_composite(background, image)
            return image.convert(preprocessing.mode)
    except ValueError as error:
        raise InputError(
            f"an image of Pillow's mode {image.mode} cannot be converted to {preprocessing.mode}",
            fix="Convert it to RGB, RGBA or L first: a mode with a small a (La, RGBa) to LA or "
            "RGBA.",
        ) from error


def _normalised(
    preprocessing: ImagePreprocessing, tiles: Sequence[ImageSource]
) -> NDArray[np.float32]:
    mean = np.asarray(preprocessing.mean, np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, np.float32)[:, None, None]
    stacked = [np.atleast_3d(np.asarray(tile, np.float32)).transpose(2, 0, 1) for tile in tiles]
    scaled = np.stack(stacked) * np.float32(preprocessing.scale)
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


__all__ = [
    "Cut",
    "ImageSource",
    "cut_image",
    "decode_image",
    "image_from_array",
    "import_pillow",
    "open_image",
    "preprocess_images",
    "upright",
]
