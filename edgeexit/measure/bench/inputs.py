"""Prepares the inputs of both sides, rows or prompts, in a file that their processes read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Tensor, TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import MeasurementError
from edgeexit.measure.batches import Batch, read_npz, take_rows
from edgeexit.measure.bench.cases import write_inputs
from edgeexit.measure.check import REFERENCE
from edgeexit.measure.data import open_data
from edgeexit.measure.texts import Text, read_texts, vocabulary

RANDOM_PROMPTS = 8


@dataclass(frozen=True)
class Inputs:
    """Inputs of both sides.

    Attributes:
        path: The file.
        count: Number of inputs: single rows, full batches, or prompts.
        batch: Rows per input.
        labels: Labels per input; None: no labels.
        name, digest: Name and digest of the data; the digest is None without a data set.
        real: Whether this is the user's data; if not, natural exits are not measured.
        lengths: Tokens of each prompt; empty for rows.
        capacity: Largest number of tokens of a text, prompt included; None for rows.
    """

    path: str
    count: int
    batch: int
    labels: list[NDArray[np.int64]] | None
    name: str
    digest: str | None
    real: bool
    lengths: tuple[int, ...] = ()
    capacity: int | None = None


def prepare_rows(
    bundle: Bundle, data: str | os.PathLike[str] | None, batch: int, folder: str, seed: int
) -> Inputs:
    """Writes the data, in random batches of `batch` rows, to a file for the workers.

    Rows with different shapes (texts) keep the order of the data. Rows that do not fill a batch are
    left out.
    """
    digest, labels = None, None
    if data is None:
        whole = _samples(bundle)
        rows = next(whole[t.name].shape[t.row_axis or 0] for t in _row_inputs(bundle))
        order = np.arange(rows) if batch == 1 else np.resize(np.arange(rows), batch)
        chosen = [take_rows(bundle, whole, part) for part in np.split(order, len(order) // batch)]
        name = "samples"
    else:
        opened = open_data(data, bundle)
        batches = list(opened.batches(batch))
        name, digest = opened.name, opened.digest
        if batch > 1:
            batches = _shuffled(bundle, batches, batch, seed)
        if not batches:
            raise MeasurementError(
                f"{name}: fewer rows than one batch of {batch}", fix="Use a smaller --batch."
            )
        chosen = [part.inputs for part in batches]
        labels = [part.labels for part in batches if part.labels is not None] or None
    path = Path(folder) / "inputs.npz"
    write_inputs(path, chosen)
    return Inputs(str(path), len(chosen), batch, labels, name, digest, real=data is not None)


def _samples(bundle: Bundle) -> dict[str, NDArray]:
    if REFERENCE not in bundle.manifest.samples:
        raise MeasurementError(
            f"{bundle.path}: the bundle has no samples to run", fix="Give real inputs with --data."
        )
    samples = read_npz(bundle.file(REFERENCE))
    return {t.name: samples[f"input/{t.name}"] for t in bundle.manifest.inputs}


def _row_inputs(bundle: Bundle) -> list[Tensor]:
    return [tensor for tensor in bundle.manifest.inputs if tensor.row_axis is not None]


def _shuffled(bundle: Bundle, batches: list[Batch], size: int, seed: int) -> list[Batch]:
    """The same rows in random batches. If shapes differ, the full batches without changes."""
    shapes = {
        (t.name, *np.delete(part.inputs[t.name].shape, t.row_axis or 0))
        for part in batches
        for t in _row_inputs(bundle)
    }
    if len(shapes) > len(_row_inputs(bundle)):
        return [part for part in batches if part.rows == size]
    whole = dict(batches[0].inputs)
    for tensor in _row_inputs(bundle):
        parts = [part.inputs[tensor.name] for part in batches]
        whole[tensor.name] = np.concatenate(parts, axis=tensor.row_axis or 0)
    rows = sum(part.rows for part in batches)
    labels = None
    if batches[0].labels is not None:
        labels = np.concatenate([part.labels for part in batches if part.labels is not None])
    order = np.random.default_rng(seed).permutation(rows)
    shuffled = []
    for start in range(0, rows - size + 1, size):
        chosen = order[start : start + size]
        own = None if labels is None else labels[chosen]
        shuffled.append(Batch(take_rows(bundle, whole, chosen), own, size))
    return shuffled


def prepare_texts(
    bundle: Bundle,
    data: str | os.PathLike[str] | None,
    prompt_tokens: int,
    new_tokens: int,
    folder: str,
    seed: int,
) -> Inputs:
    """Writes prompts, from the data or random, to a file for the workers."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    if data is None:
        texts, name = random_texts(bundle, prompt_tokens, seed=seed), ""
    else:
        texts, name = read_texts(os.fspath(data), bundle), Path(data).name
    longest = max(len(text.tokens) for text in texts)
    limit = bundle.manifest.limits.get("positions")
    if limit is not None and longest + new_tokens > limit:
        raise MeasurementError(
            f"a prompt of {longest} tokens and {new_tokens} new tokens exceed the model's limit of "
            f"{limit}",
            fix="Lower --new-tokens, or leave out long prompts.",
        )
    path = Path(folder) / "inputs.npz"
    tokens: list[Mapping[str, NDArray]] = [
        {decoding.tokens: np.array(text.tokens)} | text.inputs for text in texts
    ]
    write_inputs(path, tokens)
    return Inputs(
        str(path),
        len(texts),
        1,
        None,
        name or f"{len(texts)} random prompts",
        None,
        real=data is not None,
        lengths=tuple(_length(bundle, text) for text in texts),
        capacity=longest + new_tokens,
    )


def _length(bundle: Bundle, text: Text) -> int:
    """Tokens of a prompt, which an encoder or a decoder reads."""
    preprocessing = bundle.manifest.preprocessing
    source = None
    if isinstance(preprocessing, TextPreprocessing):
        source = text.inputs.get(preprocessing.ids)
    return len(text.tokens) if source is None else int(source.shape[1])


def random_texts(bundle: Bundle, length: int, *, seed: int) -> list[Text]:
    """Prompts of random tokens.

    Raises:
        MeasurementError: The program needs other inputs besides text.
    """
    decoding, preprocessing = bundle.manifest.decoding, bundle.manifest.preprocessing
    assert decoding is not None
    taken = {tensor.name for tensor in bundle.manifest.inputs} - {decoding.tokens}
    ids, mask = decoding.tokens, None
    if decoding.start_tokens and isinstance(preprocessing, TextPreprocessing):
        ids, mask = preprocessing.ids, preprocessing.mask
    if others := sorted(taken - {ids, mask}):
        raise MeasurementError(
            f"{bundle.path}: the model takes {others[0]}, which random prompts do not have",
            fix="Give prompts with --data: an .npz with all inputs.",
        )
    rng = np.random.default_rng(seed)
    drawn = rng.integers(1, vocabulary(bundle, ids), (RANDOM_PROMPTS, length))
    if ids == decoding.tokens:
        return [Text(row.tolist()) for row in drawn]
    masks = {} if mask is None else {mask: np.ones((1, length), np.int64)}
    return [Text(list(decoding.start_tokens), {ids: row[None]} | masks) for row in drawn]
