"""Prompts as a program takes them: token ids, what earlier chains are given, and where the rows
that they hand on stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Place, TextPreprocessing
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.runtime.programs.arguments import Prompt, token_rows
from edgeexit.runtime.text.tokenizer import encode_batch


@dataclass(frozen=True)
class Prompts:
    """What `Model.generate` was given.

    Attributes:
        tokens: Per row, the token ids that its text begins with.
        inputs: What earlier chains take.
        groups: Token group -> per row, which tokens of the prompt belong to it.
        places: The steps that put rows in the place of tokens.
    """

    tokens: list[NDArray[np.int64]]
    inputs: dict[str, NDArray[Any]]
    groups: dict[str, list[NDArray[np.bool_]]]
    places: Sequence[Place]

    @property
    def asks_earlier(self) -> bool:
        """Whether chains before the text have anything to do: not where all that they make is for
        placeholders, and the prompts have none."""
        return bool(self.inputs) or not self.places

    def prefix(
        self, handed: Mapping[str, NDArray[Any]]
    ) -> list[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Per row, where rows of other chains stand in the prompt, and those rows.

        Raises:
            InputError: There are more placeholders than rows, or fewer.
        """
        if not self.places:
            return []
        found = []
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
            found.append((np.concatenate(where), np.concatenate(what)))
        for step in self.places:
            there = len(sources[step.group])
            if taken[step.group] != there:
                more = "more" if taken[step.group] > there else "fewer"
                raise InputError(
                    f"the prompts have {taken[step.group]} tokens of the group {step.group}, "
                    f"{more} than the {there} rows that {step.source} has for them",
                    fix="Write one placeholder token for each of those rows, in their order.",
                )
        return found


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
) -> Prompts:
    """Prompts and inputs as the steps of a program take them.

    Raises:
        InputError: A prompt is none, or inputs are missing.
    """
    decoding = bundle.manifest.decoding
    assert decoding is not None
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs are a {type(inputs).__name__}, not a mapping",
            fix="Give arrays by name: inputs={...}; `edgeexit inspect` names them.",
        )
    given = dict(inputs or {})
    if decoding.start_tokens and encode is not None:
        rows, more = _source_texts(bundle, prompts, given, decoding.start_tokens)
        given |= more
    else:
        rows = token_rows(prompts, encode or (lambda text: []))
    places = [step for step in bundle.manifest.steps if isinstance(step, Place)]
    groups = {name: [row == group.token for row in rows] for name, group in decoding.groups.items()}
    if places and not given:
        empty = {step.group: [bool(own.any()) for own in groups[step.group]] for step in places}
        for group, rows_with in empty.items():
            if any(rows_with):
                raise InputError(
                    f"a prompt has tokens of the group {group}, and nothing is given for them",
                    fix="Give what the program takes: inputs={...}; `edgeexit inspect` names it.",
                )
    return Prompts(rows, given, groups, places)


def check_alike(tokens: Sequence[NDArray[np.int64]]) -> None:
    """Raises `UsageError` for prompts of unlike length, which the unsplit graph cannot take: it
    answers for the last place of a run."""
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
    """Prompts that an encoder reads: texts, or rows of token ids; the written text then begins with
    the start tokens. Where the encoder's inputs are given, what the text begins with."""
    preprocessing = bundle.manifest.preprocessing
    if inputs:
        if isinstance(prompts, (list, tuple)) and not prompts:
            first = next(iter(inputs.values()))
            count = len(first) if isinstance(first, np.ndarray) and first.ndim else 1
            return [np.array(start, np.int64)] * max(count, 1), {}
        if isinstance(prompts, str) or _texts(prompts):
            raise InputError(
                "a text and inputs are both given, and an encoder reads one of them",
                fix="Leave inputs out, or give no text: generate([], inputs={...}). Token ids "
                "beside inputs are what the written text begins with.",
            )
        return token_rows(prompts, lambda text: []), {}
    if not isinstance(preprocessing, TextPreprocessing):
        raise InputError(
            f"{bundle.path}: the bundle does not say how a prompt becomes inputs",
            fix="Give them: generate([], inputs={...}).",
        )
    texts = [prompts] if isinstance(prompts, str) else _texts(prompts)
    if texts and (isinstance(prompts, str) or len(texts) == len(prompts)):
        found: dict[str, NDArray[Any]] = dict(encode_batch(bundle, texts, truncate=False))
    elif texts:
        raise InputError(
            "some prompts are texts, others token ids", fix="Give all of them in one form."
        )
    else:
        found = _padded(preprocessing, token_rows(prompts, lambda text: []))
    return [np.array(start, np.int64)] * len(next(iter(found.values()))), found


def _texts(prompts: object) -> list[str]:
    """Those of several prompts that are texts."""
    several = isinstance(prompts, (list, tuple))
    return [one for one in prompts if isinstance(one, str)] if several else []  # type: ignore[attr-defined]


def _padded(
    preprocessing: TextPreprocessing, rows: Sequence[NDArray[np.int64]]
) -> dict[str, NDArray[Any]]:
    """Rows of token ids, padded on the right to the longest."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), preprocessing.pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    found: dict[str, NDArray[Any]] = {preprocessing.ids: ids}
    return found if preprocessing.mask is None else found | {preprocessing.mask: mask}


__all__ = ["Prompts", "check_alike", "read_prompts"]
