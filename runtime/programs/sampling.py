"""Sampling of tokens: logits processors, and the rejection rule that keeps drafting exact.

`distribution` is a pure function of logits, settings and history, so the drafting exit and the last
exit use the same processors (arXiv:2211.17192). Everything is computed in float64 on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Decoding, Timestamps
from edgeexit.errors import UsageError
from edgeexit.runtime.programs.times import forbid

_LARGEST = float(np.finfo(np.float64).max)
Floats64 = NDArray[np.float64]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits. 0: take the most likely token and ignore `top_k` and
            `top_p`.
        top_k: Sample from the most likely tokens, at most this many; 0: all.
        top_p: Sample from the most likely tokens with this total probability.
        repetition_penalty: For tokens that occurred before, positive logits are divided by it and
            negative logits multiplied (CTRL, arXiv:1909.05858). 1: no penalty.
        suppressed: Tokens that are never generated.
        suppressed_first: Tokens that are not generated as the first one of a text.
        seed: Random seed. Each row of a batch has its own random stream.

    Raises:
        UsageError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether the token with the largest unprocessed logit is taken."""
        never = self.suppressed or self.suppressed_first
        return self.temperature == 0 and self.repetition_penalty == 1.0 and not never

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises `UsageError` for invalid settings."""
        for name, kind in (
            ("temperature", float),
            ("top_k", int),
            ("top_p", float),
            ("repetition_penalty", float),
            ("seed", int),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise UsageError(
                    f"{name} is {value!r}", fix=f"Use a {'whole ' * (kind is int)}number."
                )
        for name, value, holds, range_ in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "more than 0",
            ),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not math.isfinite(value) or not holds:
                raise UsageError(f"{name} {value} is out of range", fix=f"Use {range_}.")
        for name in ("suppressed", "suppressed_first"):
            for token in getattr(self, name):
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise UsageError(f"{name} holds {token!r}", fix="Use token ids.")


def own_sampling(decoding: Decoding) -> Sampling:
    """The sampling settings of a bundle; without settings, the most likely token is taken."""
    given = decoding.generation
    if given is None:
        return Sampling()
    settings = {name: getattr(given, name) for name in given.__struct_fields__}
    never = {name: tuple(settings[name]) for name in ("suppressed", "suppressed_first")}
    return Sampling(**settings | never)


def distribution(
    logits: NDArray,
    sampling: Sampling,
    history: Sequence[int],
    begin: int = 0,
    times: Timestamps | None = None,
) -> Floats64:
    """Probabilities ``[vocabulary]`` of the next token, after all processors, in the order that
    transformers applies them. With temperature 0, a single token has probability 1. Arguments: as
    for `processed`.
    """
    z = processed(logits, sampling, history, begin, times).astype(np.float64, copy=False)
    if sampling.temperature == 0:
        only = np.zeros_like(z)
        only[z.argmax()] = 1.0
        return only
    with np.errstate(over="ignore"):  # the largest logit becomes 0 for any temperature
        z = np.minimum(z, _LARGEST)
        z = (z - z.max()) / sampling.temperature
    if 0 < sampling.top_k < len(z):
        kept = np.argpartition(z, -sampling.top_k)[-sampling.top_k :]
        masked = np.full_like(z, -np.inf)
        masked[kept] = z[kept]
        z = masked
    p = np.exp(z - z.max())
    p /= p.sum()
    if sampling.top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= sampling.top_p]] = 0.0
        p /= p.sum()
    return np.asarray(p, np.float64)


def processed(
    logits: NDArray,
    sampling: Sampling,
    history: Sequence[int],
    begin: int = 0,
    times: Timestamps | None = None,
) -> NDArray[Any]:
    """Logits ``[vocabulary]`` without those of tokens that must not follow, and with penalties.

    Args:
        logits: ``[vocabulary]``; they are not changed.
        history: Earlier tokens, prompt included.
        begin: Number of tokens of the prompt.
        times: Tokens that say times, in a text that has them.

    Raises:
        UsageError: No token is left.
    """
    exact = sampling.repetition_penalty != 1.0 or times is not None
    z = logits.astype(np.float64) if exact else np.array(logits)
    if sampling.repetition_penalty != 1.0 and len(history):
        seen = np.unique(np.asarray(history))
        with np.errstate(over="ignore"):
            z[seen] = np.where(
                z[seen] > 0,
                z[seen] / sampling.repetition_penalty,
                z[seen] * sampling.repetition_penalty,
            )
    if sampling.suppressed:
        z[_within(sampling.suppressed, len(z))] = -np.inf
    if sampling.suppressed_first and len(history) <= begin:
        z[_within(sampling.suppressed_first, len(z))] = -np.inf
    if times is not None:
        forbid(z, times, history[begin:])
    if np.isneginf(z.max()):
        raise UsageError(
            "no token is left: those that an exit can answer with (its draft vocabulary) are all "
            "suppressed, or forbidden behind the tokens so far",
            fix="Suppress fewer tokens, give the draft vocabulary more, or draft at another exit.",
        )
    return z


@functools.lru_cache(maxsize=32)
def _within(tokens: tuple[int, ...], vocabulary: int) -> NDArray[np.int64]:
    return np.array([token for token in tokens if token < vocabulary], np.int64)


@dataclass
class Sampler:
    """Samples tokens for the rows of a batch, each with its own random stream.

    Attributes:
        histories: Per row, the prompt and the tokens so far; the caller appends new tokens.
        times: Tokens that say times, if the texts have them.
    """

    sampling: Sampling
    histories: list[list[int]]
    times: Timestamps | None = None

    def __post_init__(self) -> None:
        own = self.sampling
        self._begins = [len(history) for history in self.histories]
        self._remembers = (
            own.repetition_penalty != 1.0 or bool(own.suppressed_first) or self.times is not None
        )
        self._streams = [
            np.random.default_rng((self.sampling.seed, row)) for row in range(len(self.histories))
        ]

    def chances(self, row: int, logits: NDArray, drafted: Sequence[int] = ()) -> Floats64:
        """`distribution` after a row's history and the drafted tokens."""
        if not self._remembers:
            return distribution(logits, self.sampling, ())
        history = [*self.histories[row], *drafted]
        return distribution(logits, self.sampling, history, self._begins[row], self.times)

    @property
    def greedy(self) -> bool:
        """Whether always the likeliest token is taken, of those that are left."""
        return self.sampling.temperature == 0

    def likeliest(self, row: int, logits: NDArray, drafted: Sequence[int] = ()) -> int:
        """The token with probability 1 if `greedy`."""
        if not self._remembers:
            return int(processed(logits, self.sampling, ()).argmax())
        history = [*self.histories[row], *drafted]
        begin = self._begins[row]
        return int(processed(logits, self.sampling, history, begin, self.times).argmax())

    def draw(self, row: int, chances: Floats64) -> int:
        """A random token with these probabilities."""
        total = np.cumsum(chances)
        place = np.searchsorted(total, self._streams[row].random() * total[-1], side="right")
        return int(min(place, np.flatnonzero(chances)[-1]))

    def verify(
        self, row: int, drafts: Sequence[int], q: Sequence[Floats64], p: Sequence[Floats64]
    ) -> tuple[int, int]:
        """Accepts the first drafts and draws one more token, so that all of them are distributed as
        if drawn from `p` (arXiv:2211.17192, algorithm 1).

        Args:
            drafts: Tokens drawn from `q`.
            q: The drafting exit's probabilities, per draft.
            p: The last exit's probabilities, per draft and for the token after them.

        Returns:
            The number of accepted drafts, and the token after them.
        """
        for place, token in enumerate(drafts):
            if self._streams[row].random() * q[place][token] >= p[place][token]:
                left = np.maximum(p[place] - q[place], 0.0)
                return place, self.draw(row, left if left.sum() > 0 else p[place])
        return len(drafts), self.draw(row, p[len(drafts)])


def sampler_of(
    sampling: Sampling,
    rows: Sequence[NDArray[np.int64]],
    vocabulary: int,
    times: Timestamps | None = None,
) -> Sampler | None:
    """The sampler for these prompts; None if the token that the graph outputs can be used. `times`:
    tokens that say times, if the texts have them.

    Raises:
        UsageError: Every token of the vocabulary is suppressed.
    """
    if sum(token < vocabulary for token in set(sampling.suppressed)) == vocabulary:
        raise UsageError(
            f"suppressed holds all {vocabulary} tokens of the model: none is left to generate",
            fix="Suppress fewer tokens.",
        )
    if sampling.plain and times is None:
        return None
    return Sampler(sampling, [row.tolist() for row in rows], times)


__all__ = ["Sampler", "Sampling", "distribution", "own_sampling", "sampler_of"]
