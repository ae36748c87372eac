"""Data sets as batches of rows with optional labels.

A `DataSet` yields batches. `edgeexit.measure.data` opens it from files and functions, `raw_data`
from images and texts, `texts` from prompts of a model that writes text.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.paths import shown
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, InputError, UsageError

LABEL = "label"
Update = Callable[[bytes], None]
"""Called with bytes that were read, for the digest of a data set."""


@dataclass(frozen=True)
class Batch:
    """Rows that run in one batch.

    Attributes:
        inputs: Name -> array.
        labels: ``[batch]`` class indices, or None.
        rows: Number of rows.
        numbers: Index of each row in the data set, if batches are in another order.
        asked: Number of tokens of each row that ask for the others; None: rows are not texts.
    """

    inputs: dict[str, NDArray]
    labels: NDArray[np.int64] | None
    rows: int
    numbers: NDArray[np.int64] | None = None
    asked: NDArray[np.int64] | None = None


@dataclass
class DataSet:
    """A data set opened for a bundle.

    Attributes:
        name: Name of the file, folder or function, without parent folders.
        rows: Number of rows; None if it is unknown before reading.
        most_rows: The largest batch that the bundle takes; None: any size.
    """

    name: str
    rows: int | None
    _batches: Callable[[int, Update], Iterator[Batch]] = field(repr=False)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)
    _read: bool = field(default=False, repr=False)
    most_rows: int | None = None

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of at most `batch_size` rows. A data set can be read only once."""
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is less than 1", fix="Use 1 or more.")
        if self._read:
            raise UsageError(f"{self.name}: already read", fix="Open the data again.")
        self._read = True
        batch_size = min(batch_size, self.most_rows or batch_size)
        count = 0
        labelled: bool | None = None
        for batch in self._readable(batch_size):
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
            raise DataError(f"{self.name}: there are no rows", fix="Give at least one row.")

    def _readable(self, batch_size: int) -> Iterator[Batch]:
        try:
            yield from self._batches(batch_size, self._digest.update)
        except OSError as error:
            where = shown(error.filename or self.name)
            raise DataError(
                f"{where}: cannot be read ({error.strerror or error})",
                fix="Check the path and its permissions.",
            ) from error

    @property
    def digest(self) -> str:
        """SHA-256 of the data read so far; complete after the last batch."""
        return str(self._digest.hexdigest())


@contextlib.contextmanager
def naming_rows(first: int, count: int) -> Iterator[None]:
    """Context manager: names the rows of a data set in errors about inputs."""
    try:
        yield
    except InputError as error:
        rows = f"row {first}" if count == 1 else f"rows {first} to {first + count - 1}"
        raise InputError(f"{rows}: {error.what}", fix=error.fix) from error


def refuse_misnamed_label(arrays: Mapping[str, NDArray], bundle: Bundle, where: str) -> None:
    """Raises `DataError` if an array has a name like ``labels`` instead of ``label``."""
    inputs = {tensor.name for tensor in bundle.manifest.inputs}
    for name in arrays:
        if name.lower() in (LABEL, "labels") and name not in inputs:
            raise DataError(
                f"{where}: {name} is not an input of the model ({input_names(bundle)})",
                fix=f"Name labels {LABEL}: numpy.savez(path, **inputs, {LABEL}={name}).",
            )


def take_rows(
    bundle: Bundle, inputs: Mapping[str, NDArray], rows: NDArray[np.int64]
) -> dict[str, NDArray]:
    """Selects rows of a program's inputs. Inputs without a row axis are kept."""
    axes = {tensor.name: tensor.row_axis for tensor in bundle.manifest.inputs}
    return {
        name: value
        if (axis := axes[name]) is None
        else np.ascontiguousarray(np.take(value, rows, axis=axis))
        for name, value in inputs.items()
    }


def row_count(bundle: Bundle, inputs: Mapping[str, NDArray]) -> int:
    """Number of rows in a program's inputs (texts, for a model that writes text)."""
    decoding = bundle.manifest.decoding
    tensors = [t for t in bundle.manifest.inputs if t.row_axis is not None and t.name in inputs]
    tensors.sort(key=lambda tensor: decoding is None or tensor.name != decoding.tokens)
    return int(inputs[tensors[0].name].shape[tensors[0].row_axis or 0])


def label_index(value: object, labels: Sequence[str], classes: int | None, where: str) -> int:
    """Index of a label given by name or number. Raises `DataError` for an unknown label."""
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    limit = len(labels) or classes
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if value >= 0 and (limit is None or value < limit):
            return int(value)
        raise DataError(
            f"{where}: the label {value} is out of range (0 to {(limit or 1) - 1})",
            fix="Give the index or the name of one of the bundle's labels (`edgeexit inspect`).",
        )
    if isinstance(value, (float, np.floating)):
        if np.isnan(value):
            raise DataError(
                f"{where}: the label is NaN, a missing value",
                fix="Leave out rows without a label, or the labels of all rows.",
            )
        raise DataError(
            f"{where}: the label {value} is a floating-point number",
            fix="Give whole numbers, the indices of classes: labels.astype(int).",
        )
    some = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    raise DataError(
        f"{where}: {str(value)[:60]!r} is not a label" + (f" (labels: {some})" if some else ""),
        fix="Give the index or the name of one of the bundle's labels.",
    )


def class_count(bundle: Bundle) -> int | None:
    """Number of classes of the logits; None if the manifest does not state it."""
    for output in bundle.manifest.outputs:
        if output.name == "logits" and len(output.axes) == 2 and isinstance(output.axes[1], int):
            return output.axes[1]
    return None


def input_names(bundle: Bundle) -> str:
    """The program's inputs, for messages."""
    return ", ".join(tensor.name for tensor in bundle.manifest.inputs)
