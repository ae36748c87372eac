"""Data sets for models that write text: prompts to continue, and whole texts for traces.

Formats: ``.jsonl`` with ``prompt`` or ``text``, or ``tokens`` (ids), per line; ``.npz`` keyed by
the program's inputs; or ``module:function`` that returns a list of texts, of lists of ids, or of
such objects. If an encoder reads the prompt, ``target`` is the text of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Gather
from edgeexit.bundle.paths import shown
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, InputError
from edgeexit.measure.batches import LABEL, Batch, DataSet, Update, read_npz
from edgeexit.measure.functions import load_function
from edgeexit.measure.raw_data import json_object
from edgeexit.runtime.programs.forward import check_inputs
from edgeexit.runtime.text.tokenizer import encode, encode_batch, open_tokenizer


@dataclass(frozen=True)
class Text:
    """A text for a model that writes text.

    Attributes:
        tokens: Token ids for the decoder.
        inputs: Inputs of earlier chains, with one row.
    """

    tokens: list[int]
    inputs: dict[str, NDArray] = field(default_factory=dict)


def read_texts(source: str, bundle: Bundle, *, targets: bool = False) -> list[Text]:
    """Reads texts.

    Args:
        source: A ``.jsonl`` or ``.npz`` file, or ``module:function``.
        bundle: Of a model that writes text.
        targets: If an encoder reads the prompt, also read the decoder's text. Without, the
            decoder's text has only the start tokens.

    Raises:
        DataError: The texts cannot be read or do not fit; with file and line.
    """
    if source.endswith(".npz"):
        return _from_arrays(Path(source), bundle, targets=targets)
    if source.endswith((".jsonl", ".ndjson")):
        rows: list[tuple[str, Any]] = _lines(source)
    else:
        made = load_function(source, "--data")()
        if isinstance(made, (str, Mapping)) or not isinstance(made, Iterable):
            raise DataError(
                f"{source}: it returned a {type(made).__name__}",
                fix="Return a list of texts, of lists of token ids, or of objects.",
            )
        rows = [(f"{source}: prompt {n}", row) for n, row in enumerate(made, start=1)]
    if not rows:
        raise DataError(f"{source}: there are no prompts", fix="Give at least one.")
    reader = _Reader(bundle, targets=targets)
    return [
        reader.text(row if isinstance(row, Mapping) else {"text": row}, where)
        for where, row in rows
    ]


def open_texts(source: str, bundle: Bundle) -> DataSet:
    """Opens texts as a data set: rows of a batch are texts of one length."""
    return as_data(read_texts(source, bundle, targets=True), bundle, Path(source).name)


def as_data(texts: Sequence[Text], bundle: Bundle, name: str) -> DataSet:
    """Makes a data set of texts: rows of a batch are texts of one length."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    rows = [{decoding.tokens: np.array([text.tokens])} | text.inputs for text in texts]

    def batches(size: int, update: Update) -> Iterator[Batch]:
        alike: dict[object, list[int]] = {}
        for row in rows:
            for name, value in sorted(row.items()):
                update(f"{name} {value.dtype.str} {value.shape} ".encode() + value.tobytes())
        for number, row in enumerate(rows):
            same = alike.setdefault(tuple(value.shape for value in row.values()), [])
            same.append(number)
            if len(same) == size:
                yield _together(rows, same)
                same.clear()
        for same in alike.values():
            if same:
                yield _together(rows, same)

    return DataSet(name=name, rows=len(rows), _batches=batches)


def _together(rows: list[dict[str, NDArray]], numbers: list[int]) -> Batch:
    inputs = {name: np.concatenate([rows[n][name] for n in numbers]) for name in rows[numbers[0]]}
    return Batch(inputs, None, len(numbers), np.array(numbers))


def vocabulary(bundle: Bundle, ids: str) -> int:
    """Number of rows of the table in which an input of ids is looked up."""
    steps = bundle.manifest.steps
    return next((s.size for s in steps if isinstance(s, Gather) and s.ids == ids), 1 << 31)


class _Reader:
    """Converts texts to a program's token ids."""

    def __init__(self, bundle: Bundle, *, targets: bool) -> None:
        decoding = bundle.manifest.decoding
        assert decoding is not None
        self._bundle, self._targets, self._tokens = bundle, targets, decoding.tokens
        self._start = decoding.start_tokens
        self._tokenizer: Any = None

    def text(self, row: Mapping[str, Any], where: str) -> Text:
        """A text from the fields of a line."""
        given = next((row[name] for name in ("prompt", "text", "tokens") if name in row), None)
        if not self._start:
            return Text(self._ids(given, self._tokens, where))
        inputs = self._source(given, where)
        if not self._targets:
            return Text(list(self._start), inputs)
        if "target" not in row:
            raise DataError(
                f"{where}: there is no 'target', the text that the decoder writes",
                fix='Write lines like {"text": "...", "target": "..."}.',
            )
        written = self._ids(row["target"], self._tokens, where)
        # A tokenizer may begin a text with tokens that the start tokens already end with.
        shared = next(
            n for n in range(len(self._start), -1, -1) if self._start[-n:] == written[:n] or not n
        )
        return Text([*self._start, *written[shared:]], inputs)

    def _source(self, given: Any, where: str) -> dict[str, NDArray]:
        """The encoder's inputs for a text or token ids."""
        preprocessing = self._bundle.manifest.text_preprocessing
        if preprocessing is None:
            raise DataError(
                f"{where}: the bundle has no preprocessing for prompts",
                fix="Give the model's inputs as .npz.",
            )
        if isinstance(given, str):
            return encode_batch(self._bundle, [given])
        ids = np.array([self._ids(given, preprocessing.ids, where)])
        mask = {} if preprocessing.mask is None else {preprocessing.mask: np.ones_like(ids)}
        return {preprocessing.ids: ids} | mask

    def _ids(self, given: Any, name: str, where: str) -> list[int]:
        if isinstance(given, str):
            if self._tokenizer is None:
                self._tokenizer = open_tokenizer(self._bundle)
            given = encode(self._tokenizer, given)
        limit = vocabulary(self._bundle, name)
        if isinstance(given, np.ndarray):
            given = given.tolist()
        known = isinstance(given, (list, tuple)) and len(given) > 0
        if not known or not all(isinstance(n, int) and 0 <= n < limit for n in given):
            raise DataError(
                f"{where} is empty or has invalid token ids",
                fix=f"Give texts, or lists of ids from 0 to {limit - 1}.",
            )
        return list(given)


def _lines(source: str) -> list[tuple[str, Any]]:
    """The objects of a file's lines, each with its file and line for messages."""
    try:
        text = Path(source).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"{shown(source)}: cannot be read ({reason})", fix="Check the path."
        ) from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where, example = f"{source}: line {number}", '{"prompt": "def main("}'
        row = json_object(line, where, example)
        if not {"prompt", "text", "tokens"} & row.keys():
            raise DataError(
                f"{where}: there is no prompt, text or tokens",
                fix=f"Write one object per line: {example}",
            )
        found.append((where, row))
    return found


def _from_arrays(path: Path, bundle: Bundle, *, targets: bool) -> list[Text]:
    arrays = read_npz(path)
    arrays.pop(LABEL, None)
    return texts_of(arrays, bundle, path.name, targets=targets)


def texts_of(
    arrays: dict[str, NDArray], bundle: Bundle, where: str, *, targets: bool = False
) -> list[Text]:
    """Texts from arrays keyed by the program's inputs, one text per row. Raises `DataError`."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    expected = {tensor.name: tensor for tensor in bundle.manifest.inputs}
    if decoding.start_tokens and not targets:
        del expected[decoding.tokens]
        arrays.pop(decoding.tokens, None)
    try:
        rows = check_inputs(expected, arrays, bundle.manifest.limits)["batch"]
    except InputError as error:
        raise DataError(
            f"{where}: {error.what}",
            fix=f"{bundle.manifest.name} writes text: give token ids as {', '.join(expected)}, "
            "or texts as .jsonl.",
        ) from error
    tokens = arrays.pop(decoding.tokens, None)
    return [
        Text(
            decoding.start_tokens if tokens is None else tokens[row].tolist(),
            {name: value[row : row + 1] for name, value in arrays.items()},
        )
        for row in range(rows)
    ]
