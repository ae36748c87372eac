"""Selects data to quantise with: batches to measure on, and batches to compare.

Rows of one-pass models stay in their batches. For models that write text, each text is a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Gather, Manifest
from edgeexit.errors import UsageError

logger = logging.getLogger(__name__)

CALIBRATION_ROWS, CALIBRATION_TEXTS = 256, 64
"""Number of rows, or texts, that are measured on."""
COMPARED_ROWS, COMPARED_BYTES = 256, 4 << 20
COMPARED_TEXTS, COMPARED_TOKENS = 16, 64
"""Number of further rows, or texts and tokens of each, whose float32 outputs the bundle stores."""

Rows = Mapping[str, NDArray[Any]]


def split(batches: Iterable[Rows], manifest: Manifest) -> tuple[list[Rows], list[Rows]]:
    """Batches to measure on, and batches to compare (the same ones if there are no more).

    Raises:
        UsageError: There is too little data, or an id that a table does not have.
    """
    checked = (_checked(batch, manifest) for batch in batches)
    return (_rows if manifest.decoding is None else _texts)(checked, manifest)


def _checked(batch: Rows, manifest: Manifest) -> Rows:
    for step in (step for step in manifest.steps if isinstance(step, Gather)):
        ids = np.asarray(batch.get(step.ids, ()))
        wrong = ids[(ids < 0) | (ids >= step.size)]
        if wrong.size:
            raise UsageError(
                f"--calibration-data: {step.ids} has the id {int(wrong[0])}; the model has 0 to "
                f"{step.size - 1}",
                fix="Make the data with the model's own tokenizer.",
            )
    return batch


def _rows(batches: Iterable[Rows], manifest: Manifest) -> tuple[list[Rows], list[Rows]]:
    first: list[Rows] = []
    rest: list[Rows] = []
    remaining = iter(batches)
    for batch in remaining:
        first.append(batch)
        if count(first) >= CALIBRATION_ROWS:
            break
    size = 0
    for batch in remaining:
        rest.append(batch)
        size += sum(value.nbytes for value in batch.values())
        if count(rest) >= COMPARED_ROWS or size >= COMPARED_BYTES:
            break
    if count(first) < 2:
        raise UsageError(
            f"{manifest.name}: quantising needs data (two rows or more) to measure on",
            fix=f"Give --calibration-data with some hundred rows ({CALIBRATION_ROWS} are used).",
        )
    return first, rest or first


def _texts(batches: Iterable[Rows], manifest: Manifest) -> tuple[list[Rows], list[Rows]]:
    """Texts to measure on, cropped to the model's limit, and texts to compare, all of one
    length. Each is a batch."""
    assert manifest.decoding is not None
    name, limit = manifest.decoding.tokens, manifest.limits.get("positions")
    texts: list[Rows] = []
    for batch in batches:
        for row, tokens in enumerate(batch[name] if batch[name].size else ()):
            text = {key: np.asarray(value[row : row + 1]) for key, value in batch.items()}
            texts.append(_cropped(text, name, len(tokens) if limit is None else limit - 1))
        if len(texts) >= CALIBRATION_TEXTS + COMPARED_TEXTS:
            break
    if not texts:
        raise UsageError(
            f"{manifest.name}: quantising needs texts to measure on",
            fix=f"Give --calibration-data with some texts ({CALIBRATION_TEXTS} are used).",
        )
    if len(texts) < CALIBRATION_TEXTS:
        logger.warning(
            "quantising measures on %d texts; %d are recommended",
            len(texts),
            CALIBRATION_TEXTS,
        )
    first, others = texts[:CALIBRATION_TEXTS], texts[CALIBRATION_TEXTS:] or texts
    lengths = [text[name].shape[1] for text in others]
    length = min(COMPARED_TOKENS, int(np.median(lengths)))
    long = [text for text, size in zip(others, lengths, strict=True) if size >= length]
    return first, [_cropped(text, name, length) for text in long[:COMPARED_TEXTS]]


def _cropped(text: Rows, name: str, length: int) -> Rows:
    return {**text, name: np.asarray(text[name], np.int64)[:, :length]}


def count(batches: Iterable[Rows]) -> int:
    """Number of rows in batches."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of all batches in one array. Shorter texts are padded with zeros, which their masks
    exclude."""
    most = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
    padded = [
        np.pad(part, [(0, 0), *((0, m - n) for m, n in zip(most, part.shape[1:], strict=True))])
        for part in parts
    ]
    return np.concatenate(padded)


__all__ = ["Rows", "count", "split", "stacked"]
