"""Opens data sets of the commands: files and functions, as batches that fit a bundle.

Formats: ``.npz`` keyed by the manifest's input names, plus ``label``; images and texts in files
(`edgeexit.measure.raw_data`); texts for a model that writes text (`edgeexit.measure.texts`);
``module:function``. All but ``.npz`` and texts for writing are read batch by batch. Errors have the
file and the row.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.files import read_npz
from edgeexit.bundle.paths import not_a_file, not_a_folder, shown
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, InputError
from edgeexit.measure.batches import (
    LABEL,
    Batch,
    DataSet,
    Update,
    class_count,
    label_index,
    refuse_misnamed_label,
    take_rows,
)
from edgeexit.measure.functions import load_function
from edgeexit.measure.raw_data import open_folder, open_lines
from edgeexit.measure.texts import open_texts
from edgeexit.runtime.programs.forward import check_inputs

logger = logging.getLogger(__name__)

_FORMS = "Give a .npz, a .jsonl, a folder of images, or module:function."


def open_data(source: str | os.PathLike[str], bundle: Bundle) -> DataSet:
    """Opens a data set for a bundle.

    Args:
        source: Path of a ``.npz``, ``.jsonl`` or folder of images, or ``module:function``.
        bundle: Its manifest has the inputs, labels and preprocessing.

    Raises:
        DataError: The data cannot be read or does not fit; also raised while reading batches.
    """
    text = os.fspath(source)
    try:
        opened = _open(text, bundle)
    except OSError as error:
        raise DataError(
            f"{shown(text)}: cannot be read ({error.strerror or error})",
            fix="Check the path and its permissions.",
        ) from error
    return dataclasses.replace(opened, most_rows=bundle.manifest.limits.get("batch"))


def _open(text: str, bundle: Bundle) -> DataSet:
    path = Path(text)
    missing = not_a_file(path) if not_a_folder(path) else ""
    file = not not_a_file(path)
    lines = file and path.suffix in (".jsonl", ".ndjson")
    arrays = file and path.suffix == ".npz"
    function = bool(missing) and ":" in text
    if bundle.manifest.decoding is not None:
        if lines or arrays or function:
            return open_texts(text, bundle)
        if not missing:
            raise DataError(
                f"{text}: unsupported format for {bundle.manifest.name}, which writes text",
                fix='Give a .jsonl with {"text": "..."} per line, a .npz of token ids, or '
                "module:function.",
            )
    if not not_a_folder(path):
        return open_folder(path, bundle)
    if arrays:
        return _npz(path, bundle)
    if lines:
        return open_lines(path, bundle)
    if function:
        return _function(text, bundle)
    what = f"{shown(text)} {missing}" if missing else f"{text}: unsupported format"
    raise DataError(what, fix=_FORMS)


def _npz(path: Path, bundle: Bundle) -> DataSet:
    arrays = read_npz(path)
    labels = arrays.pop(LABEL, None)
    refuse_misnamed_label(arrays, bundle, path.name)
    inputs, rows = _checked(arrays, bundle, path.name)
    _warn_of_no_numbers(inputs, bundle, path.name)
    indices = None if labels is None else _label_array(labels, rows, bundle, path.name)

    def batches(size: int, update: Update) -> Iterator[Batch]:
        _hash(update, inputs, indices)
        yield from _slices(bundle, inputs, indices, rows, size)

    return DataSet(name=path.name, rows=rows, _batches=batches)


def _checked(
    arrays: Mapping[str, Any], bundle: Bundle, where: str
) -> tuple[dict[str, NDArray], int]:
    """Checks the inputs. Returns them in the manifest's order, and the number of rows."""
    manifest = bundle.manifest
    expected = {tensor.name: tensor for tensor in manifest.inputs}
    # The batch limit of a graph does not limit the size of a data set.
    limits = {axis: size for axis, size in manifest.limits.items() if axis != "batch"}
    try:
        sizes = check_inputs(expected, arrays, limits)
    except InputError as error:
        raise DataError(f"{where}: {error.what}", fix=error.fix) from error
    return {name: arrays[name] for name in expected}, sizes["batch"]


def _warn_of_no_numbers(inputs: Mapping[str, NDArray], bundle: Bundle, where: str) -> None:
    """Logs a warning with the rows that have NaN or infinity."""
    axes = {tensor.name: tensor.row_axis for tensor in bundle.manifest.inputs}
    for name, value in inputs.items():
        if value.dtype.kind != "f" or np.isfinite(value).all():
            continue
        axis = axes[name]
        if axis is None:
            which = "in every row"
        else:
            flat = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
            rows = np.flatnonzero(~np.isfinite(flat).all(axis=1))
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            which = f"in row {rows[0]}{more}"
        logger.warning(
            "%s: %s has NaN or infinity %s: outputs are meaningless, and a NaN score never stops "
            "a row",
            where,
            name,
            which,
        )


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
    for start in range(0, rows, size):
        part = np.arange(start, min(start + size, rows))
        own = None if labels is None else labels[part]
        yield Batch(take_rows(bundle, inputs, part), own, len(part))


def _hash(update: Update, inputs: Mapping[str, NDArray], labels: NDArray[np.int64] | None) -> None:
    for name, value in [*sorted(inputs.items()), (LABEL, labels)]:
        if value is not None:
            update(f"{name} {value.dtype.str} {value.shape} ".encode())
            update(np.ascontiguousarray(value).tobytes())


def _function(spec: str, bundle: Bundle) -> DataSet:
    made = load_function(spec, "--data")()
    pairs = [made] if _is_pair(made) else made
    if isinstance(pairs, Mapping) or not hasattr(pairs, "__iter__"):
        raise DataError(
            f"{spec}: it returned a {type(made).__name__}",
            fix="Return (inputs, labels) with inputs a dict of arrays and labels an array or None, "
            "or an iterable of such pairs.",
        )

    def batches(size: int, update: Update) -> Iterator[Batch]:
        for number, pair in enumerate(pairs):
            where = f"{spec}: batch {number}"
            if not _is_pair(pair):
                raise DataError(
                    f"{where}: not a pair (inputs, labels)",
                    fix="Yield (dict of arrays, array of labels or None).",
                )
            inputs, rows = _checked(pair[0], bundle, where)
            _warn_of_no_numbers(inputs, bundle, where)
            labels = None if pair[1] is None else _label_array(pair[1], rows, bundle, where)
            _hash(update, inputs, labels)
            yield from _slices(bundle, inputs, labels, rows, size)

    known = _checked(made[0], bundle, spec)[1] if _is_pair(made) else None
    return DataSet(name=spec, rows=known, _batches=batches)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Mapping)
