"""Checks the arguments of `Model.generate`: prompts and options, before any work begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import InputError, UsageError
from edgeexit.runtime.programs.generation import Piece
from edgeexit.runtime.programs.sampling import Sampling

ModeName = Literal["full", "exact", "fast", "approximate"]
Prompt = str | Sequence[int]


class Options(TypedDict, total=False):
    """The arguments of `Model.generate` except the prompts. `Model.chat` takes them, too."""

    audio: Any
    choices: Mapping[str, str] | None
    timestamps: bool
    inputs: Mapping[str, NDArray[Any]] | None
    max_new_tokens: int | None
    mode: ModeName
    draft_exit: str | None
    drafts: int | None
    draft_threshold: float
    sampling: Sampling | None
    stop: str | Sequence[str]
    audit: bool
    text: bool
    ignore_eos: bool
    reuse: bool
    on_piece: Callable[[Piece], object] | None


def check_options(
    mode: str,
    max_new_tokens: int | None,
    *,
    draft_exit: str | None,
    drafts: int | None,
    draft_threshold: float,
    sampling: Sampling | None,
    audit: bool,
    on_piece: object = None,
    **flags: object,
) -> int | None:
    """Raises `UsageError` for invalid options; `flags` are True or False. Returns `max_new_tokens`
    as an int."""
    for name, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise UsageError(f"{name} is {flag!r}", fix="Use True or False.")
    if mode not in get_args(ModeName):
        raise UsageError(
            f"mode {mode!r} is not known", fix=f"Use one of {', '.join(get_args(ModeName))}."
        )
    if max_new_tokens is not None:
        if not _is_count(max_new_tokens) or max_new_tokens < 1:
            raise UsageError(
                f"max_new_tokens is {max_new_tokens!r}", fix="Use a whole number from 1 up."
            )
        max_new_tokens = int(max_new_tokens)
    if not isinstance(draft_threshold, (int, float)) or not draft_threshold >= 0:
        raise UsageError(
            f"draft_threshold is {draft_threshold!r}",
            fix="Use a number from 0 up; 0: no threshold.",
        )
    if drafts is not None and (not _is_count(drafts) or drafts < 1):
        raise UsageError(f"drafts is {drafts!r}", fix="Use a whole number from 1 up, or None.")
    given = {
        "draft_exit": (draft_exit is not None, "exact"),
        "drafts": (drafts is not None, "exact"),
        "draft_threshold": (draft_threshold > 0, "exact"),
        "audit": (audit, "fast"),
    }
    for name, (is_given, suits) in given.items():
        if is_given and mode != suits:
            raise UsageError(
                f"{name} has no effect in mode {mode}", fix=f'Leave it out, or use mode="{suits}".'
            )
    if on_piece is not None and not callable(on_piece):
        raise UsageError(
            f"on_piece is a {type(on_piece).__name__}", fix="Give a function that takes a Piece."
        )
    if sampling is not None and not isinstance(sampling, Sampling):
        raise UsageError(
            f"sampling is a {type(sampling).__name__}",
            fix="Use edgeexit.runtime.Sampling(temperature=0.8, ...).",
        )
    if sampling is not None:
        sampling.check()
    return max_new_tokens


def check_alone(prompts: Any, images: object, inputs: object) -> None:
    """Raises `UsageError` for what cannot be given together with a sound."""
    others = {"prompts": len(prompts) > 0, "images": images is not None}
    others["inputs"] = inputs is not None
    for name, is_given in others.items():
        if is_given:
            raise UsageError(f"audio and {name} exclude each other", fix="Give one of them.")


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def stop_strings(given: str | Sequence[str]) -> list[str]:
    """Strings that end a text, as a list. Raises `UsageError` for anything else."""
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UsageError(
            f"stop is {given!r}", fix='Use a string that ends a text, or a list: stop=["\\n\\n"].'
        )
    return list(stops)


def token_rows(
    prompts: Prompt | Sequence[Prompt], encode: Callable[[str], list[int]]
) -> list[NDArray[np.int64]]:
    """Prompts as rows of token ids. Raises `InputError` for invalid prompts.

    Args:
        prompts: One prompt, or several.
        encode: Converts a text to token ids.
    """
    check_prompts(prompts)
    single = isinstance(prompts, str) or are_ids(prompts)
    many: Sequence[Any] = [prompts] if single else prompts
    rows = []
    for prompt in many:
        ids = encode(prompt) if isinstance(prompt, str) else prompt
        try:
            row = np.asarray(ids)
        except ValueError:  # lists of different lengths
            row = np.asarray(ids, dtype=object)
        whole = row.dtype.kind in "iu" and row.dtype != np.uint64
        if row.ndim != 1 or row.size == 0 or not whole:
            raise InputError(
                "a prompt is empty"
                if row.size == 0
                else f"a prompt is {row.dtype} with {row.ndim} axes, not a list of token ids",
                fix="Give a text, or a list of at least one token id.",
            )
        rows.append(row.astype(np.int64))
    if not rows:
        raise InputError("there is no prompt", fix="Give at least one prompt.")
    return rows


def check_prompts(prompts: object) -> None:
    """Raises `InputError` for what is neither a prompt nor several."""
    if not isinstance(prompts, (str, Sequence, np.ndarray)) or isinstance(prompts, bytes):
        raise InputError(
            f"the prompts are a {type(prompts).__name__}",
            fix="Give a text, a list of token ids, or a list of either.",
        )
    if isinstance(prompts, np.ndarray) and prompts.ndim == 0:
        raise InputError("the prompts are a number", fix="Give a list of token ids.")


def are_ids(prompts: Any) -> bool:
    """Whether prompts are a single list of token ids."""
    return len(prompts) > 0 and not isinstance(prompts[0], (str, Sequence, np.ndarray))


def check_room(prompt: int, new: int, capacity: int, limit: int | None) -> None:
    """Checks that a prompt and the requested new tokens fit the capacity.

    Args:
        capacity: Largest number of tokens of a text in this loaded model.
        limit: The model's limit; None: no limit.

    Raises:
        InputError: They do not fit.
    """
    if prompt + new <= capacity:
        return
    if limit is None:
        larger = ", or load with a larger capacity"
    elif capacity < limit:
        larger = f", or load with a larger capacity (up to {limit})"
    else:
        larger = " (this is the model's limit)"
    if prompt + 1 > capacity or new + 1 <= capacity:
        what = f"a prompt of {prompt} token{'s' * (prompt != 1)} and {new} new "
        what += f"token{'s' * (new != 1)} exceed the capacity of {capacity}"
        raise InputError(what, fix=f"Shorten the prompt or lower max_new_tokens{larger}.")
    raise InputError(
        f"max_new_tokens is {new}, but a text has {capacity} tokens at most, and the prompt has "
        f"{prompt}",
        fix=f"Use at most {capacity - prompt}{larger}.",
    )


__all__ = [
    "ModeName",
    "Options",
    "Prompt",
    "are_ids",
    "check_alone",
    "check_options",
    "check_prompts",
    "check_room",
    "stop_strings",
    "token_rows",
]
