"""Data sets of images and texts in files, converted by the bundle's preprocessing.

Formats: a folder of images, with one sub-folder per label or without labels; or ``.jsonl`` with
``{"text": ...}`` or ``{"image": path}`` and ``"label"``. Files are read batch by batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import ImagePreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, InputError
from edgeexit.measure.batches import (
    LABEL,
    Batch,
    DataSet,
    Update,
    class_count,
    input_names,
    label_index,
)
from edgeexit.preprocessing.images import ImageSource, open_image, preprocess_images
from edgeexit.preprocessing.texts import Text
from edgeexit.runtime.text.tokenizer import encode_batch

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def open_folder(path: Path, bundle: Bundle) -> DataSet:
    """Opens a folder of images as a data set."""
    preprocessing = _images_wanted(bundle, str(path))
    rows = _image_rows(path, bundle)
    if not rows:
        raise DataError(
            f"{path}: no images in it", fix=f"Known endings: {', '.join(sorted(IMAGE_SUFFIXES))}."
        )

    def batches(size: int, update: Update) -> Iterator[Batch]:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            for file, _ in part:
                update(file.relative_to(path).as_posix().encode() + b"\0")
            images = [
                open_image(file, file.relative_to(path).as_posix(), update) for file, _ in part
            ]
            names = [file.relative_to(path).as_posix() for file, _ in part]
            pixels = _pixels(preprocessing, images, names)
            yield _image_batch(preprocessing, pixels, [label for _, label in part])

    return DataSet(name=path.name, rows=len(rows), _batches=batches)


def _image_rows(path: Path, bundle: Bundle) -> list[tuple[Path, int | None]]:
    """The images of a folder, labelled by the names of their sub-folders."""
    found, folders = _image_files(path), sorted(f for f in path.iterdir() if f.is_dir())
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    if found and folders:
        raise DataError(
            f"{path}: both images and folders ({found[0].name}, {folders[0].name})",
            fix="Put images into one folder per label, or all into one folder without labels.",
        )
    labels = bundle.manifest.labels
    rows: list[tuple[Path, int | None]] = [(file, None) for file in found]
    for folder in folders:
        name: object = folder.name
        if folder.name not in labels and folder.name.isascii() and folder.name.isdigit():
            name = int(folder.name)
        index = label_index(name, labels, class_count(bundle), f"{path}: folder {folder.name}")
        rows += [(file, index) for file in _image_files(folder)]
    return rows


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and file.suffix.lower() in IMAGE_SUFFIXES
        and not file.name.startswith(".")
    )


def _images_wanted(bundle: Bundle, where: str) -> ImagePreprocessing:
    preprocessing = bundle.manifest.image_preprocessing
    if preprocessing is None:
        raise DataError(
            f"{where}: the bundle has no image preprocessing",
            fix=f"Give the model's inputs as .npz: {input_names(bundle)}.",
        )
    return preprocessing


def _pixels(
    preprocessing: ImagePreprocessing, images: Sequence[ImageSource], names: Sequence[str]
) -> NDArray:
    """Preprocesses images. Raises `DataError` with the name of an image that is refused."""
    found = []
    for image, name in zip(images, names, strict=True):
        try:
            found.append(preprocess_images(preprocessing, [image]))
        except InputError as error:
            raise DataError(f"{name}: {error.what}", fix=error.fix) from error
    return np.concatenate(found)


def _image_batch(
    preprocessing: ImagePreprocessing, pixels: NDArray, labels: Sequence[int | None]
) -> Batch:
    return Batch({preprocessing.input: pixels}, _labels(labels), len(labels))


def _labels(labels: Sequence[int | None]) -> NDArray[np.int64] | None:
    if any(label is None for label in labels):
        return None
    return np.asarray(labels, np.int64)


def open_lines(path: Path, bundle: Bundle) -> DataSet:
    """Opens a ``.jsonl`` file of texts or images as a data set."""
    if not bundle.manifest.preprocessing:
        raise DataError(
            f"{path.name}: the bundle has no preprocessing for texts or images",
            fix=f"Give the model's inputs as .npz: {input_names(bundle)}.",
        )
    key = "text" if bundle.manifest.image_preprocessing is None else "image"

    def batches(size: int, update: Update) -> Iterator[Batch]:
        part: list[tuple[str, dict[str, Any]]] = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                update(line)
                where = f"{path.name}: line {number}"
                part.append((where, _row(line, where, key)))
                if len(part) == size:
                    yield _batch(part, path, bundle, key, update)
                    part = []
        if part:
            yield _batch(part, path, bundle, key, update)

    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return DataSet(name=path.name, rows=rows, _batches=batches)


def json_object(line: str | bytes, where: str, example: str) -> dict[str, Any]:
    """Parses the JSON object of a line. Raises `DataError` with `where`."""
    fix = f"Write one object per line: {example}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})", fix=fix) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object", fix=fix)
    return row


def _row(line: bytes, where: str, key: str) -> dict[str, Any]:
    example = f'{{"{key}": "...", "{LABEL}": 0}}'
    row = json_object(line, where, example)
    if not isinstance(row.get(key), str):
        what = f"{key!r} is not a string" if key in row else f"there is no {key!r}"
        raise DataError(f"{where}: {what}", fix=f"Write one object per line: {example}")
    return row


def _batch(
    part: Sequence[tuple[str, dict[str, Any]]],
    path: Path,
    bundle: Bundle,
    key: str,
    update: Update,
) -> Batch:
    labels, classes = bundle.manifest.labels, class_count(bundle)
    indices: list[int | None] = [
        None if row.get(LABEL) is None else label_index(row[LABEL], labels, classes, where)
        for where, row in part
    ]
    if any(index is None for index in indices) and any(index is not None for index in indices):
        where = part[indices.index(None)][0]
        raise DataError(f"{where}: the label is missing", fix="Label every row, or no row.")
    preprocessing = bundle.manifest.image_preprocessing
    if preprocessing is not None:
        images = [
            open_image(path.parent / row[key], f"{where}: {row[key]}", update)
            for where, row in part
        ]
        pixels = _pixels(preprocessing, images, [f"{where}: {row[key]}" for where, row in part])
        return _image_batch(preprocessing, pixels, indices)
    texts: list[Text] = []
    for where, row in part:
        pair = row.get("text_pair")
        if pair is not None and not isinstance(pair, str):
            raise DataError(
                f"{where}: 'text_pair' is not a string", fix="Give a string or leave it out."
            )
        texts.append(row[key] if pair is None else (row[key], pair))
    return Batch(encode_batch(bundle, texts, tell=True), _labels(indices), len(texts))
