"""Prepares the inputs of both sides, rows or prompts, in a file that their processes read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.files import read_npz
from edgeexit.bundle.manifest import Gather, Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, MeasurementError
from edgeexit.measure.batches import Batch, take_rows
from edgeexit.measure.bench.cases import write_inputs
from edgeexit.measure.check import REFERENCE
from edgeexit.measure.data import open_data
from edgeexit.measure.texts import Text, read_texts, texts_of, vocabulary

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
        seeing: Whether every prompt has an image.
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
    seeing: bool = False


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
        texts, name = _own_texts(bundle, prompt_tokens, seed)
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
        name,
        None,
        real=data is not None,
        lengths=tuple(_length(bundle, text) for text in texts),
        capacity=longest + new_tokens,
        seeing=bundle.manifest.vision_chain is not None and all(map(_sees, texts)),
    )


def _sees(text: Text) -> bool:
    return any(array.dtype == np.float32 for array in text.inputs.values())


def _length(bundle: Bundle, text: Text) -> int:
    """Tokens of a prompt, which an encoder or a decoder reads."""
    tables = [s.ids for s in bundle.manifest.steps if isinstance(s, Gather)]
    source = next((text.inputs[name] for name in tables if name in text.inputs), None)
    return len(text.tokens) if source is None else int(source.shape[1])


def random_texts(bundle: Bundle, length: int, *, seed: int) -> list[Text]:
    """Prompts of random tokens, for the decoder or the encoder: the inputs of ids are random, their
    masks are ones. Empty if the program takes anything else, such as images."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    tables = {s.ids for s in bundle.manifest.steps if isinstance(s, Gather)} - {decoding.tokens}
    axes = {tuple(t.axes) for t in bundle.manifest.inputs if t.name in tables}
    others = [t for t in bundle.manifest.inputs if t.name not in {decoding.tokens, *tables}]
    if any(t.dtype != "int64" or tuple(t.axes) not in axes for t in others):
        return []
    rng = np.random.default_rng(seed)
    if not tables:
        drawn = rng.integers(1, vocabulary(bundle, decoding.tokens), (RANDOM_PROMPTS, length))
        return [Text(row.tolist()) for row in drawn]
    start = decoding.start_tokens or [1]
    masks = {t.name: np.ones((1, length), np.int64) for t in others}
    return [
        Text(
            list(start),
            {n: rng.integers(1, vocabulary(bundle, n), (1, length)) for n in sorted(tables)}
            | masks,
        )
        for _ in range(RANDOM_PROMPTS)
    ]


def image_texts(bundle: Bundle, length: int, *, seed: int) -> list[Text]:
    """Random images, each in front of a prompt of random tokens. Empty if the model reads no
    images."""
    manifest, decoding = bundle.manifest, bundle.manifest.decoding
    assert decoding is not None
    name = manifest.vision_chain
    if name is None:
        return []
    [features] = manifest.chains[name].outputs
    [pixels] = [t for t in manifest.inputs if t.dtype == "float32"]
    shape = [1 if axis == "batch" else axis for axis in pixels.axes]
    # Where an encoder reads the prompt, the text has only start tokens.
    tables = [s.ids for s in manifest.steps if isinstance(s, Gather)]
    ids = next((name for name in tables if name != decoding.tokens), decoding.tokens)
    masks = [t.name for t in manifest.inputs if t.name not in (*tables, pixels.name)]
    placeholders = [group.token for group in decoding.groups.values()]
    front = np.repeat(np.array(placeholders, np.int64), int(features.axes[1]))  # type: ignore[arg-type]
    [axis] = [t.axes[1] for t in manifest.inputs if t.name == ids]
    longest = manifest.limits.get(str(axis), length + len(front)) - len(front)
    word = next(n for n in range(1, 9) if n not in placeholders)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RANDOM_PROMPTS):
        words = rng.integers(1, vocabulary(bundle, ids), min(length, longest))
        words[np.isin(words, placeholders)] = word
        prompt = np.concatenate([front, words])
        given = {pixels.name: rng.standard_normal(shape).astype(np.float32)}  # type: ignore[arg-type]
        if ids == decoding.tokens:
            found.append(Text(prompt.tolist(), given))
            continue
        given |= {ids: prompt[None]} | {mask: np.ones_like(prompt[None]) for mask in masks}
        found.append(Text(list(decoding.start_tokens), given))
    return found


def _own_texts(bundle: Bundle, length: int, seed: int) -> tuple[list[Text], str]:
    """Prompts for a bundle without data, and their name: random ones, else the samples."""
    if texts := image_texts(bundle, length, seed=seed):
        return texts, f"{len(texts)} random prompts with an image"
    source = bundle.manifest.limits.get("source", length)
    if texts := random_texts(bundle, min(length, source), seed=seed):
        return texts, f"{len(texts)} random prompts"
    try:
        texts = texts_of(_samples(bundle), bundle, "samples")
    except DataError as error:
        raise MeasurementError(
            f"{bundle.path}: no prompts can be made for it ({error.what})",
            fix="Give prompts with --data: an .npz with all inputs.",
        ) from error
    return texts, f"{len(texts)} sample prompts"
