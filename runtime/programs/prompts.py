"""`Prompts`: token ids, the inputs of earlier chains (encoders, vision towers), and the positions
in the prompt at which their output rows replace placeholder tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Gather, Place, TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.runtime.programs.arguments import Prompt, token_rows
from edgeexit.runtime.programs.forward import check_placeholders
from edgeexit.runtime.text.tokenizer import encode_batch


@dataclass(frozen=True)
class Prompts:
    """The prompts and inputs of a call of `Model.generate`.

    Attributes:
        tokens: Per row, the token ids at the start of its text.
        inputs: Inputs of earlier chains.
        groups: Token group -> per row, which tokens of the prompt belong to it.
        places: The steps that replace tokens by rows of earlier chains.
        forced: Tokens at the end of each row of `tokens` that are the first of its result.
    """

    tokens: list[NDArray[np.int64]]
    inputs: dict[str, NDArray[Any]]
    groups: dict[str, list[NDArray[np.bool_]]]
    places: Sequence[Place]
    forced: Sequence[int] = ()

    @property
    def lengths(self) -> list[int]:
        """Per row, the tokens that are not part of its result."""
        return [len(row) - len(self.forced) for row in self.tokens]

    @property
    def asks_earlier(self) -> bool:
        """Whether earlier chains must run. They need not if all their outputs replace placeholders
        and the prompts have none."""
        return bool(self.inputs) or not self.places

    def prefix(
        self, handed: Mapping[str, NDArray[Any]]
    ) -> list[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Per row, the positions of rows from earlier chains in the prompt, and those rows.

        Raises:
            InputError: There are more placeholders than rows, or fewer.
        """
        if not self.places:
            return []
        prefixes = []
        taken = {step.group: 0 for step in self.places}
        sources = {step.group: _flat(handed.get(step.source)) for step in self.places}
        for row in range(len(self.tokens)):
            where, what = [], []
            for step in self.places:
                places = np.flatnonzero(self.groups[step.group][row])
                start = taken[step.group]
                taken[step.group] = start + len(places)
                where.append(places)
                what.append(sources[step.group][start : start + len(places)])
            prefixes.append((np.concatenate(where), np.concatenate(what)))
        for step in self.places:
            check_placeholders(step, taken[step.group], len(sources[step.group]))
        return prefixes


def _flat(source: NDArray[Any] | None) -> NDArray[Any]:
    """``[batch, tokens, width]`` to ``[rows, width]``."""
    if source is None:
        return np.empty((0, 0), np.float32)
    return source.reshape(-1, source.shape[-1])


def read_prompts(
    bundle: Bundle,
    prompts: Prompt | Sequence[Prompt],
    inputs: Mapping[str, NDArray[Any]] | None,
    encode: Callable[[str], list[int]] | None,
    start: Callable[[], Sequence[int]] | None = None,
) -> Prompts:
    """Converts prompts and inputs to the form that the steps of a program take.

    Args:
        encode: Converts a text to token ids; None: prompts are what the decoder's text begins with.
        start: Gives what a text begins with, where an encoder reads the prompts; None: the start
            tokens.

    Raises:
        InputError: A prompt is invalid, or inputs are missing.
    """
    decoding = bundle.manifest.decoding
    assert decoding is not None
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs are a {type(inputs).__name__}, not a mapping",
            fix="Give arrays by name: inputs={...}; `edgeexit inspect` lists them.",
        )
    given = dict(inputs or {})
    forced: Sequence[int] = ()
    if decoding.start_tokens and encode is not None:
        begun = given and not _is_empty(prompts)
        first = decoding.start_tokens if begun or start is None else start()
        chosen = bool(decoding.choices) or decoding.timestamps is not None
        forced = () if begun or chosen else first[1:]
        rows, more = _source_texts(bundle, prompts, given, first)
        given |= more
    else:
        rows = token_rows(prompts, encode or (lambda text: []))
    [embedded] = [
        step.output.name
        for step in bundle.manifest.steps
        if isinstance(step, Gather) and step.when == "token"
    ]
    places = [
        step
        for step in bundle.manifest.steps
        if isinstance(step, Place) and step.target == embedded
    ]
    groups = {name: [row == group.token for row in rows] for name, group in decoding.groups.items()}
    if places and not given:
        empty = {step.group: [bool(own.any()) for own in groups[step.group]] for step in places}
        for group, rows_with in empty.items():
            if any(rows_with):
                raise InputError(
                    f"a prompt has tokens of the group {group}, but no inputs are given for them",
                    fix="Give the inputs: inputs={...}; `edgeexit inspect` lists them.",
                )
    return Prompts(rows, given, groups, places, forced)


def check_alike(tokens: Sequence[NDArray[np.int64]]) -> None:
    """Raises `UsageError` for prompts of different lengths. The unsplit graph cannot take them: it
    answers only for the last token of a run."""
    lengths = {len(row) for row in tokens}
    if len(lengths) > 1:
        raise UsageError(
            "the unsplit graph takes prompts of one length, these have from "
            f"{min(lengths)} to {max(lengths)} tokens",
            fix="Give them one at a time, or load without unsplit.",
        )


def _source_texts(
    bundle: Bundle,
    prompts: Prompt | Sequence[Prompt],
    inputs: Mapping[str, NDArray[Any]],
    start: Sequence[int],
) -> tuple[list[NDArray[np.int64]], dict[str, NDArray[Any]]]:
    """Prompts for an encoder: texts, or rows of token ids; the generated text then begins with the
    start tokens. If the encoder's inputs are given, prompts are the start of the generated
    text."""
    preprocessing = bundle.manifest.text_preprocessing
    if inputs:
        if _is_empty(prompts):
            read = {s.ids for s in bundle.manifest.steps if isinstance(s, Gather)} & inputs.keys()
            first = inputs[next(iter(read or inputs))]  # images may be more than the texts
            count = len(first) if isinstance(first, np.ndarray) and first.ndim else 1
            return [np.array(start, np.int64)] * max(count, 1), {}
        if isinstance(prompts, str) or _texts(prompts):
            raise InputError(
                "both a text and inputs are given, but the encoder reads only one of them",
                fix="Leave inputs out, or give no text: generate([], inputs={...}). With inputs, "
                "token ids are the start of the generated text.",
            )
        return token_rows(prompts, lambda text: []), {}
    if bundle.manifest.audio_preprocessing is not None:
        raise InputError(
            f"{bundle.path}: the model reads sounds, not prompts",
            fix="Give audio: generate(audio=...) (--audio).",
        )
    if preprocessing is None:
        raise InputError(
            f"{bundle.path}: the bundle has no text preprocessing for prompts",
            fix="Give inputs: generate([], inputs={...}).",
        )
    decoding = bundle.manifest.decoding
    assert decoding is not None
    if bundle.manifest.image_preprocessing is not None and not decoding.groups:
        raise InputError(
            f"{bundle.path}: the model reads an image with each prompt, and none is given",
            fix="Give one image for each prompt: images=[...] (--image).",
        )
    texts = [prompts] if isinstance(prompts, str) else _texts(prompts)
    if texts and (isinstance(prompts, str) or len(texts) == len(prompts)):
        encoded: dict[str, NDArray[Any]] = dict(encode_batch(bundle, texts, truncate=False))
    elif texts:
        raise InputError(
            "some prompts are texts, others token ids", fix="Give all of them in one form."
        )
    else:
        encoded = _padded(preprocessing, token_rows(prompts, lambda text: []))
    return [np.array(start, np.int64)] * len(next(iter(encoded.values()))), encoded


def _is_empty(prompts: object) -> bool:
    return isinstance(prompts, (list, tuple)) and not prompts


def _texts(prompts: object) -> list[str]:
    """The texts among several prompts."""
    several = isinstance(prompts, (list, tuple))
    return [text for text in prompts if isinstance(text, str)] if several else []  # type: ignore[attr-defined]


def pad_source(bundle: Bundle, rows: Sequence[Prompt]) -> dict[str, NDArray[Any]]:
    """The encoder's inputs for rows of token ids.

    Raises:
        InputError: The bundle has no text preprocessing, or a row is longer than the model's limit.
    """
    preprocessing = bundle.manifest.text_preprocessing
    if preprocessing is None:
        raise InputError(
            f"{bundle.path}: the bundle has no text preprocessing for prompts",
            fix="Give inputs: generate([], inputs={...}).",
        )
    return _padded(preprocessing, [np.asarray(row, np.int64) for row in rows])


def _padded(
    preprocessing: TextPreprocessing, rows: Sequence[NDArray[np.int64]]
) -> dict[str, NDArray[Any]]:
    """Rows of token ids, padded on the right to the longest."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), preprocessing.pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    padded: dict[str, NDArray[Any]] = {preprocessing.ids: ids}
    return padded if preprocessing.mask is None else padded | {preprocessing.mask: mask}


__all__ = ["Prompts", "check_alike", "read_prompts"]
