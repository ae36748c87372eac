"""Data sets for commands: files and functions become batches that fit a bundle.

Four forms. ``.npz`` keyed by the manifest's input names, plus ``label``; a folder of images, with a
sub-folder per label or none; ``.jsonl`` with ``{"text": ...}`` or ``{"image": path}`` and
``"label"``; ``module:function``. Images and texts go through the bundle's own preprocessing,
without torch. Every form streams, and every refusal names the file and the row.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import ImagePreprocessing, TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, InputError, UsageError
from edgeexit.measure.preprocess import (
    ImageSource,
    TextSource,
    encode_texts,
    open_image,
    preprocess_images,
)
from edgeexit.runtime.programs.forward import check_inputs

LABEL = "label"
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_FORMS = "Give a .npz, a .jsonl, a folder of images, or module:function."


@dataclass(frozen=True)
class Batch:
    """Rows that run together: inputs by name, class indices ``[batch]`` or None, their number."""

    inputs: dict[str, NDArray]
    labels: NDArray[np.int64] | None
    rows: int


@dataclass
class DataSet:
    """A data set opened for a bundle.

    Attributes:
        name: File, folder or function, without the folders it lies in.
        rows: How many there are; None where only reading tells.
    """

    name: str
    rows: int | None
    _batches: Callable[[int, Callable[[bytes], None]], Iterator[Batch]] = field(repr=False)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)
    _read: bool = field(default=False, repr=False)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of at most `batch_size` rows. A data set is read once."""
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is less than 1", fix="Use 1 or more.")
        if self._read:
            raise UsageError(f"{self.name} was read already", fix="Open the data again.")
        self._read = True
        count = 0
        labelled: bool | None = None
        for batch in self._batches(batch_size, self._digest.update):
            has_labels = batch.labels is not None
            if labelled is not None and has_labels != labelled:
                raise DataError(
                    f"{self.name}: row {count} has {'a' if has_labels else 'no'} label, rows "
                    f"before it have {'none' if has_labels else 'one'}",
                    fix="Give every row a label, or none.",
                )
            labelled = has_labels
            count += batch.rows
            yield batch
        if not count:
            raise DataError(f"{self.name}: it holds no rows", fix="Give at least one row.")

    @property
    def digest(self) -> str:
        """SHA-256 of the content that was read; complete after the last batch."""
        return str(self._digest.hexdigest())


def open_data(source: str | os.PathLike[str], bundle: Bundle) -> DataSet:
    """Opens a data set for a bundle.

    Args:
        source: Path of a ``.npz``, ``.jsonl`` or folder of images, or ``module:function``.
        bundle: Says which inputs, labels and preprocessing there are.

    Raises:
        DataError: It cannot be read or does not fit, naming file and row; also when iterated.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        return _folder(path, bundle)
    if path.is_file() and path.suffix == ".npz":
        return _npz(path, bundle)
    if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, bundle)
    if not path.exists() and ":" in text:
        return _function(text, bundle)
    what = f"{text}: not a form of data" if path.exists() else f"{text} does not exist"
    raise DataError(what, fix=_FORMS)


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """Imports ``module:function`` or ``file.py:function``; `what` names the option in errors."""
    module_name, _, name = spec.rpartition(":")
    fix = "Give module:function or path/to/file.py:function; the current directory is importable."
    if not module_name or not name.isidentifier():
        raise UsageError(f"{what} {spec}: not of the form module:function", fix=fix)
    try:
        if module_name.endswith(".py"):
            module = _load_file(Path(module_name))
        else:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module missing inside the user's own module is another fault than a wrong name.
        if error.name is None:
            raise
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{what} {spec}: it needs the module {error.name}, which is not installed",
                fix=f"Install what brings {error.name} into this environment.",
            ) from error
        raise UsageError(f"{what} {spec}: there is no module {error.name}", fix=fix) from error
    except FileNotFoundError as error:
        raise UsageError(f"{what} {spec}: {module_name} does not exist", fix=fix) from error
    found = getattr(module, name, None)
    if not callable(found):
        kind = "has no" if found is None else "has no function"
        raise UsageError(f"{what} {spec}: {module_name} {kind} {name}", fix=fix)
    return found


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def label_index(value: object, labels: Sequence[str], classes: int | None, where: str) -> int:
    """Index of a label given by name or number. Raises `DataError` for one that is not a label."""
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    limit = len(labels) or classes
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if value >= 0 and (limit is None or value < limit):
            return int(value)
        raise DataError(
            f"{where}: the label {value} is not a class from 0 to {(limit or 1) - 1}",
            fix="Give the index or the name of one of the bundle's labels (`edgeexit inspect`).",
        )
    some = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    raise DataError(
        f"{where}: {str(value)[:60]!r} is not a label" + (f" (labels: {some})" if some else ""),
        fix="Give the index or the name of one of the bundle's labels.",
    )


def class_count(bundle: Bundle) -> int | None:
    """Number of classes that the logits have; None where the manifest leaves it open."""
    for output in bundle.manifest.outputs:
        if output.name == "logits" and len(output.axes) == 2 and isinstance(output.axes[1], int):
            return output.axes[1]
    return None


def _npz(path: Path, bundle: Bundle) -> DataSet:
    arrays = read_npz(path)
    labels = arrays.pop(LABEL, None)
    inputs, rows = _checked(arrays, bundle, path.name)
    indices = None if labels is None else _label_array(labels, rows, bundle, path.name)

    def batches(size: int, update: Callable[[bytes], None]) -> Iterator[Batch]:
        for name, value in [*sorted(inputs.items()), (LABEL, indices)]:
            if value is not None:
                _hash_array(update, name, value)
        yield from _slices(bundle, inputs, indices, rows, size)

    return DataSet(name=path.name, rows=rows, _batches=batches)


def read_npz(path: Path) -> dict[str, NDArray]:
    """Reads every array of a ``.npz``, refusing pickles. Raises `DataError`."""
    fix = "Write it with numpy.savez(path, **arrays), one array per input."
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not an archive")
            with archive:
                return {name: archive[name] for name in archive.files}
    except ValueError as error:
        reason = "it holds pickled objects" if "pickle" in str(error) else str(error)
        raise DataError(f"{path.name}: cannot be read as .npz ({reason})", fix=fix) from error
    except (OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name}: cannot be read as .npz ({error})", fix=fix) from error


def _checked(
    arrays: Mapping[str, Any], bundle: Bundle, where: str
) -> tuple[dict[str, NDArray], int]:
    """The inputs in the manifest's order, and how many rows they have."""
    manifest = bundle.manifest
    expected = {tensor.name: tensor for tensor in manifest.inputs}
    try:
        sizes = check_inputs(expected, arrays, manifest.limits)
    except InputError as error:
        raise DataError(f"{where}: {error.what}", fix=error.fix) from error
    return {name: arrays[name] for name in expected}, sizes["batch"]


def _label_array(values: Any, rows: int, bundle: Bundle, where: str) -> NDArray[np.int64]:
    values = np.asarray(values)
    if values.shape != (rows,):
        raise DataError(
            f"{where}: {LABEL} has the shape {list(values.shape)}, the inputs have {rows} rows",
            fix="Give one label per row.",
        )
    labels, classes = bundle.manifest.labels, class_count(bundle)
    made = [
        label_index(v, labels, classes, f"{where}: row {i}") for i, v in enumerate(values.tolist())
    ]
    return np.asarray(made, np.int64)


def _slices(
    bundle: Bundle,
    inputs: Mapping[str, NDArray],
    labels: NDArray[np.int64] | None,
    rows: int,
    size: int,
) -> Iterator[Batch]:
    axes = {tensor.name: tensor.row_axis for tensor in bundle.manifest.inputs}
    for start in range(0, rows, size):
        part = np.arange(start, min(start + size, rows))
        yield Batch(
            {name: take_rows(value, part, axes[name]) for name, value in inputs.items()},
            None if labels is None else labels[part],
            len(part),
        )


def take_rows(value: NDArray, rows: NDArray[np.intp], axis: int | None) -> NDArray:
    """Those rows of a tensor; all of it when it is the same for every row."""
    return value if axis is None else np.ascontiguousarray(np.take(value, rows, axis=axis))


def _hash_array(update: Callable[[bytes], None], name: str, value: NDArray) -> None:
    update(f"{name} {value.dtype.str} {value.shape} ".encode())
    update(np.ascontiguousarray(value).tobytes())


def _folder(path: Path, bundle: Bundle) -> DataSet:
    preprocessing = _images_wanted(bundle, str(path))
    found, folders = _image_files(path), sorted(f for f in path.iterdir() if f.is_dir())
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    if found and folders:
        raise DataError(
            f"{path}: images and folders side by side ({found[0].name}, {folders[0].name})",
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
    if not rows:
        raise DataError(
            f"{path}: no images in it", fix=f"Known endings: {', '.join(sorted(IMAGE_SUFFIXES))}."
        )

    def batches(size: int, update: Callable[[bytes], None]) -> Iterator[Batch]:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            for file, _ in part:
                update(file.relative_to(path).as_posix().encode() + b"\0")
            images = [
                open_image(file, file.relative_to(path).as_posix(), update) for file, _ in part
            ]
            pixels = preprocess_images(preprocessing, images)
            yield _image_batch(preprocessing, pixels, [label for _, label in part])

    return DataSet(name=path.name, rows=len(rows), _batches=batches)


def _input_names(bundle: Bundle) -> str:
    return ", ".join(tensor.name for tensor in bundle.manifest.inputs)


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and file.suffix.lower() in IMAGE_SUFFIXES
        and not file.name.startswith(".")
    )


def _images_wanted(bundle: Bundle, where: str) -> ImagePreprocessing:
    preprocessing = bundle.manifest.preprocessing
    if not isinstance(preprocessing, ImagePreprocessing):
        raise DataError(
            f"{where}: the bundle has no image preprocessing",
            fix=f"Give the inputs themselves as .npz: {_input_names(bundle)}.",
        )
    return preprocessing


def _image_batch(
    preprocessing: ImagePreprocessing, pixels: NDArray, labels: Sequence[int | None]
) -> Batch:
    return Batch({preprocessing.input: pixels}, _labels(labels), len(labels))


def _labels(labels: Sequence[int | None]) -> NDArray[np.int64] | None:
    if any(label is None for label in labels):
        return None
    return np.asarray(labels, np.int64)


def _jsonl(path: Path, bundle: Bundle) -> DataSet:
    preprocessing = bundle.manifest.preprocessing
    if preprocessing is None:
        raise DataError(
            f"{path.name}: the bundle declares no preprocessing, for texts or for images",
            fix=f"Give the inputs themselves as .npz: {_input_names(bundle)}.",
        )
    key = "text" if isinstance(preprocessing, TextPreprocessing) else "image"

    def batches(size: int, update: Callable[[bytes], None]) -> Iterator[Batch]:
        part: list[tuple[str, dict[str, Any]]] = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                update(line)
                part.append((f"{path.name}: line {number}", _json_row(line, path, number, key)))
                if len(part) == size:
                    yield _jsonl_batch(part, path, bundle, key, update)
                    part = []
        if part:
            yield _jsonl_batch(part, path, bundle, key, update)

    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return DataSet(name=path.name, rows=rows, _batches=batches)


def _json_row(line: bytes, path: Path, number: int, key: str) -> dict[str, Any]:
    where = f"{path.name}: line {number}"
    example = f'{{"{key}": "...", "{LABEL}": 0}}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error})", fix=f"Write one object per line: {example}"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object", fix=f"Write one object per line: {example}")
    if not isinstance(row.get(key), str):
        what = f"{key!r} is not a string" if key in row else f"there is no {key!r}"
        raise DataError(f"{where}: {what}", fix=f"Write one object per line: {example}")
    return row


def _jsonl_batch(
    part: Sequence[tuple[str, dict[str, Any]]],
    path: Path,
    bundle: Bundle,
    key: str,
    update: Callable[[bytes], None],
) -> Batch:
    labels, classes = bundle.manifest.labels, class_count(bundle)
    indices: list[int | None] = [
        None if row.get(LABEL) is None else label_index(row[LABEL], labels, classes, where)
        for where, row in part
    ]
    if any(index is None for index in indices) and any(index is not None for index in indices):
        where = part[indices.index(None)][0]
        raise DataError(f"{where}: it has no label, others have", fix="Label every row, or none.")
    preprocessing = bundle.manifest.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        images: list[ImageSource] = []
        for where, row in part:
            images.append(open_image(path.parent / row[key], f"{where}: {row[key]}", update))
        return _image_batch(preprocessing, preprocess_images(preprocessing, images), indices)
    texts = [TextSource(row[key], row.get("text_pair")) for _, row in part]
    for (where, _), source in zip(part, texts, strict=True):
        if source.pair is not None and not isinstance(source.pair, str):
            raise DataError(
                f"{where}: 'text_pair' is not a string", fix="Give a string or leave it out."
            )
    return Batch(encode_texts(bundle, texts), _labels(indices), len(texts))


def _function(spec: str, bundle: Bundle) -> DataSet:
    made = load_function(spec, "--data")()
    pairs = [made] if _is_pair(made) else made
    if isinstance(pairs, Mapping) or not hasattr(pairs, "__iter__"):
        raise DataError(
            f"{spec}: it returned a {type(made).__name__}",
            fix="Return (inputs, labels) with inputs a dict of arrays and labels an array or None, "
            "or an iterable of such pairs.",
        )

    def batches(size: int, update: Callable[[bytes], None]) -> Iterator[Batch]:
        for number, pair in enumerate(pairs):
            where = f"{spec}: batch {number}"
            if not _is_pair(pair):
                raise DataError(
                    f"{where}: not a pair (inputs, labels)",
                    fix="Yield (dict of arrays, array of labels or None).",
                )
            inputs, rows = _checked(pair[0], bundle, where)
            labels = None if pair[1] is None else _label_array(pair[1], rows, bundle, where)
            for name, value in [*sorted(inputs.items()), (LABEL, labels)]:
                if value is not None:
                    _hash_array(update, name, value)
            yield from _slices(bundle, inputs, labels, rows, size)

    known = _checked(made[0], bundle, spec)[1] if _is_pair(made) else None
    return DataSet(name=spec, rows=known, _batches=batches)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Mapping)
