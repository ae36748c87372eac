"""Data sets for models that write text: prompts to continue, and whole texts for traces.

Formats: ``.jsonl`` with ``prompt`` or ``text``, or ``tokens`` (ids), per line; ``.npz`` keyed by
the program's inputs; or ``module:function`` that returns a list of texts, of lists of ids, or of
such objects. ``target`` is the answer to a prompt: what traces are about. If an encoder reads the
prompt, it is the text of the decoder. A line may have ``image`` or ``images``: paths, relative to
the file. Speech models take ``audio``, a path, in place of a prompt, and ``language`` and ``task``
where their checkpoint's defaults do not hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.files import read_npz
from edgeexit.bundle.manifest import Gather
from edgeexit.bundle.paths import not_a_file, shown
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, InputError, UsageError
from edgeexit.measure.batches import LABEL, Batch, DataSet, Update
from edgeexit.measure.functions import load_function
from edgeexit.measure.raw_data import json_object
from edgeexit.runtime.programs.forward import check_inputs
from edgeexit.runtime.programs.images import image_input, marked, write_images
from edgeexit.runtime.programs.prompts import pad_source
from edgeexit.runtime.programs.sounds import audio_input, features_of, is_long, read_sounds
from edgeexit.runtime.programs.start_tokens import start_tokens
from edgeexit.runtime.text.tokenizer import encode, encode_batch, open_tokenizer

CHOICES = ("language", "task")
"""Fields of lines that a model without such a choice refuses, as ``edgeexit run`` does."""


@dataclass(frozen=True)
class Text:
    """A text for a model that writes text.

    Attributes:
        tokens: Token ids for the decoder.
        inputs: Inputs of earlier chains, with one row.
        asked: Number of tokens in front of a target.
    """

    tokens: list[int]
    inputs: dict[str, NDArray] = field(default_factory=dict)
    asked: int = 0

    def row(self, tokens: str) -> dict[str, NDArray]:
        """The program's inputs, with one row; `tokens`: the name of the decoder's."""
        return {tokens: np.array([self.tokens])} | self.inputs


def read_texts(source: str, bundle: Bundle, *, targets: bool = False) -> list[Text]:
    """Reads texts.

    Args:
        source: A ``.jsonl`` or ``.npz`` file, or ``module:function``.
        bundle: Of a model that writes text.
        targets: Also read targets. Without, a text ends with its prompt, or has only the start
            tokens if an encoder reads the prompt.

    Raises:
        DataError: The texts cannot be read or do not fit; with file and line.
    """
    if source.endswith(".npz"):
        return _from_arrays(Path(source), bundle, targets=targets)
    reader = _Reader(bundle, targets=targets)
    return [reader.text(row, where) for where, row in _rows(source)]


def open_texts(source: str, bundle: Bundle) -> DataSet:
    """Opens texts as a data set: rows of a batch are texts of one length. Images are read batch by
    batch."""
    name = Path(source).name
    if source.endswith(".npz"):
        return as_data(_from_arrays(Path(source), bundle, targets=True), bundle, name)
    reader = _Reader(bundle, targets=True)
    texts = [
        functools.partial(reader.text, row, where)
        if reader.images(row, where) or "audio" in row
        else reader.text(row, where)
        for where, row in _rows(source)
    ]
    return as_data(texts, bundle, name)


def _rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file or a function, each with its place for messages."""
    rows: list[tuple[str, dict[str, Any]]]
    if source.endswith((".jsonl", ".ndjson")):
        rows = [(where, _beside(row, Path(source).parent)) for where, row in _lines(source)]
    else:
        made = load_function(source, "--data")()
        if isinstance(made, (str, Mapping)) or not isinstance(made, Iterable):
            raise DataError(
                f"{source}: it returned a {type(made).__name__}",
                fix="Return a list of texts, of lists of token ids, or of objects.",
            )
        rows = [
            (f"{source}: prompt {n}", dict(row) if isinstance(row, Mapping) else {"text": row})
            for n, row in enumerate(made, start=1)
        ]
    if not rows:
        raise DataError(f"{source}: there are no prompts", fix="Give at least one.")
    return rows


def _beside(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The object of a line, with paths of images and sounds from its file's folder."""

    def path(given: Any) -> Any:
        return folder / given if isinstance(given, str) and "://" not in given else given

    found = dict(row)
    for key in {"image", "audio"} & row.keys():
        found[key] = path(row[key])
    if isinstance(row.get("images"), list):
        found["images"] = [path(given) for given in row["images"]]
    return found


def as_data(texts: Sequence[Text | Callable[[], Text]], bundle: Bundle, name: str) -> DataSet:
    """Makes a data set of texts, or of functions that read one: rows of a batch are texts of one
    length."""
    decoding = bundle.manifest.decoding
    assert decoding is not None

    def batches(size: int, update: Update) -> Iterator[Batch]:
        alike: dict[object, dict[int, Text]] = {}
        for number, given in enumerate(texts):
            text = given() if callable(given) else given
            row = text.row(decoding.tokens)
            for name, value in sorted(row.items()):
                update(f"{name} {value.dtype.str} {value.shape} ".encode() + value.tobytes())
            if text.asked:
                update(f"asked {text.asked} ".encode())
            same = alike.setdefault(tuple(value.shape for value in row.values()), {})
            same[number] = text
            if len(same) == size:
                yield _together(same, decoding.tokens)
                same.clear()
        for same in alike.values():
            if same:
                yield _together(same, decoding.tokens)

    return DataSet(name=name, rows=len(texts), _batches=batches)


def _together(texts: Mapping[int, Text], tokens: str) -> Batch:
    rows = [text.row(tokens) for text in texts.values()]
    inputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    asked = np.array([text.asked for text in texts.values()])
    return Batch(inputs, None, len(rows), np.array(list(texts)), asked)


def vocabulary(bundle: Bundle, ids: str) -> int:
    """Number of rows of the table in which an input of ids is looked up."""
    steps = bundle.manifest.steps
    return next((s.size for s in steps if isinstance(s, Gather) and s.ids == ids), 1 << 31)


class _Reader:
    """Converts texts to a program's token ids."""

    def __init__(self, bundle: Bundle, *, targets: bool) -> None:
        manifest, decoding = bundle.manifest, bundle.manifest.decoding
        assert decoding is not None
        self._bundle, self._targets, self._tokens = bundle, targets, decoding.tokens
        self._start = decoding.start_tokens
        self._needs_image = manifest.image_preprocessing is not None and not decoding.groups
        read = manifest.text_preprocessing
        self._prompt = read.ids if self._start and read is not None else decoding.tokens
        self._tokenizer: Any = None

    def text(self, row: Mapping[str, Any], where: str) -> Text:
        """A text from the fields of a line."""
        if row.get("audio") is not None:
            return self._heard(row, where)
        given = next((row[name] for name in ("prompt", "text", "tokens") if name in row), None)
        images = self.images(row, where)
        if not self._start:
            tokens, inputs = (
                self._seen(given, images, where)
                if images
                else (self._ids(given, self._tokens, where), {})
            )
            if not self._targets or row.get("target") is None:
                return Text(tokens, inputs)
            written = self._ids(row["target"], self._tokens, where, special_tokens=False)
            return Text([*tokens, *written], inputs, len(tokens))
        inputs = self._seen(given, images, where)[1] if images else self._source(given, where)
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

    def _heard(self, row: Mapping[str, Any], where: str) -> Text:
        """What is said in a sound, with the model's own start and end around the target."""
        decoding = self._bundle.manifest.decoding
        assert decoding is not None
        names = dict.fromkeys([*decoding.choices, *CHOICES])
        choices = {name: str(row[name]) for name in names if row.get(name) is not None}
        try:
            preprocessing = audio_input(self._bundle)
            sounds = read_sounds(self._bundle, row["audio"])
            if is_long(preprocessing, sounds):
                raise DataError(
                    f"the sound is longer than the model's window of {preprocessing.seconds:g} s",
                    fix="Cut it into parts, each with its target.",
                )
            start = start_tokens(decoding, choices)
        except (InputError, DataError, UsageError) as error:
            raise DataError(f"{where}: {error.what}", fix=error.fix) from error
        inputs: dict[str, NDArray] = dict(features_of(preprocessing, sounds))
        if not self._targets:
            return Text(start, inputs)
        if "target" not in row:
            raise DataError(
                f"{where}: there is no 'target', what is said",
                fix='Write lines like {"audio": "a.wav", "target": "..."}.',
            )
        written = self._ids(row["target"], self._tokens, where, special_tokens=False)
        return Text([*start, *written, *decoding.stop_tokens[:1]], inputs)

    def images(self, row: Mapping[str, Any], where: str) -> list[Any]:
        """The images of a line. Raises `DataError` for what is none, and for missing files."""
        if row.get("image") is not None and row.get("images") is not None:
            raise DataError(f"{where}: both 'image' and 'images'", fix="Give one of them.")
        several = row.get("images")
        if several is not None and not isinstance(several, (list, tuple)):
            raise DataError(
                f"{where}: 'images' is a {type(several).__name__}",
                fix='Write a list: {"images": ["first.png", "second.png"], "text": "..."}.',
            )
        one = row.get("image")
        found = list(several or ()) if one is None else [one]
        for image in found:
            if isinstance(image, Path) and (reason := not_a_file(image)):
                raise DataError(
                    f"{where}: {shown(image)} {reason}",
                    fix="Paths of images begin at the folder of the file that names them.",
                )
        return found

    def _seen(
        self, given: Any, images: list[Any], where: str
    ) -> tuple[list[int], dict[str, NDArray]]:
        """Token ids of a prompt with images, and the inputs of earlier chains."""
        try:
            written, _ = image_input(self._bundle)
            if isinstance(given, str):
                prompt: Any = marked(written, given, len(images))
            else:
                prompt = self._ids(given, self._prompt, where)
            [row], inputs = write_images(self._bundle, [prompt], [images], self._encode)
            if self._start:
                inputs |= pad_source(self._bundle, [row])
        except (InputError, DataError) as error:
            raise DataError(f"{where}: {error.what}", fix=error.fix) from error
        return list(row), inputs  # type: ignore[arg-type]

    def _source(self, given: Any, where: str) -> dict[str, NDArray]:
        """The encoder's inputs for a text or token ids."""
        preprocessing = self._bundle.manifest.text_preprocessing
        if preprocessing is None:
            hears = self._bundle.manifest.audio_preprocessing is not None
            raise DataError(
                f"{where}: the bundle has no preprocessing for prompts",
                fix='Write lines like {"audio": "a.wav", "target": "..."}.'
                if hears
                else "Give the model's inputs as .npz.",
            )
        if self._needs_image:
            raise DataError(
                f"{where}: the model reads an image with each prompt, and there is none",
                fix='Write lines like {"image": "cat.jpg", "text": "..."}.',
            )
        if isinstance(given, str):
            return encode_batch(self._bundle, [given])
        ids = np.array([self._ids(given, preprocessing.ids, where)])
        mask = {} if preprocessing.mask is None else {preprocessing.mask: np.ones_like(ids)}
        return {preprocessing.ids: ids} | mask

    def _encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._bundle)
        return encode(self._tokenizer, text, special_tokens=special_tokens)

    def _ids(self, given: Any, name: str, where: str, *, special_tokens: bool = True) -> list[int]:
        if isinstance(given, str):
            given = self._encode(given, special_tokens=special_tokens)
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
        if not {"prompt", "text", "tokens", "audio"} & row.keys():
            raise DataError(
                f"{where}: there is no prompt, text, tokens or audio",
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
