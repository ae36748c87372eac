"""`PrefixCache`: states of earlier texts, so that a text that begins like one of them computes only
what is new.

The last text stays in its session. When another one takes its place, its states are copied, up to a
bound; so are states that were saved in a file (`edgeexit.runtime.programs.prefix_file`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import StateError
from edgeexit.runtime.executor.session import Session
from edgeexit.runtime.memory import check_limit_bytes

PREFIX_BYTES = 64 << 20
"""Default bound of kept states."""
LEAST = 16
"""Fewer tokens take less time to compute than to copy and look after."""


@dataclass(frozen=True, eq=False)  # eq: arrays have no truth value
class Prefix:
    """States of a text's first tokens.

    Attributes:
        tokens: ``[tokens]``.
        counts: Per part of a session (components, then adapters): tokens in its states.
        states: Per part, per shape and dtype of its caches: ``[cache, heads, tokens, size]``.
        stays: Whether it is never dropped.
    """

    tokens: NDArray[np.int64]
    counts: list[int]
    states: list[list[NDArray]]
    stays: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the states."""
        return sum(array.nbytes for own in self.states for array in own)


class PrefixCache:
    """States of earlier texts, the newest last.

    Attributes:
        limit_bytes: Most bytes that are kept beside the last text; the oldest go first. 0 keeps
            nothing else, None has no bound.
        hits, misses: Prompts of which something was kept, and others.
    """

    def __init__(self, limit_bytes: int | None = PREFIX_BYTES) -> None:
        self._kept: list[Prefix] = []
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0

    @property
    def limit_bytes(self) -> int | None:
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int | None) -> None:
        self._limit_bytes = check_limit_bytes(limit_bytes)
        self._drop_oldest()

    @property
    def bytes(self) -> int:
        """Bytes that are kept beside the last text."""
        return sum(prefix.bytes for prefix in self._kept)

    def clear(self) -> None:
        """Forgets all texts, those of files, too. The last one stays in its session."""
        self._kept.clear()

    def add(self, prefix: Prefix) -> None:
        """Keeps states that must stay.

        Raises:
            StateError: They are larger than what `limit_bytes` leaves.
        """
        others = [one for one in self._kept if one.stays and not _same(one, prefix)]
        held = sum(other.bytes for other in others)
        limit = self.limit_bytes
        if limit is not None and held + prefix.bytes > limit:
            raise StateError(
                f"the prefix has {prefix.bytes} bytes of states, and {held} of {limit} are taken",
                fix="Raise model.prefixes.limit_bytes, or call model.prefixes.clear() first.",
            )
        self._keep(prefix)

    def fetch(
        self,
        session: Session,
        row: int,
        prompt: NDArray[np.int64],
        asked: Collection[int],
        *,
        waiting: bool,
    ) -> int:
        """Looks for the text that a prompt continues, and puts its states into a row of a session.

        Args:
            asked, waiting: As for `HeldTexts.usable`.

        Returns:
            How many of the prompt's first tokens the row has then, but never all: the last one is
            always run.
        """
        most, texts = len(prompt) - 1, session.texts
        own = np.asarray(texts.tokens(row) if texts.whole else [], np.int64)
        here = texts.usable(row, min(_alike(own, prompt), most), asked, waiting=waiting)
        found, best = None, here
        for prefix in self._kept:
            usable = _usable(prefix, session, min(_alike(prefix.tokens, prompt), most), asked)
            if usable >= best + (1 if prefix.stays or found else LEAST):
                found, best = prefix, usable
        if texts.whole and len(own) - here >= LEAST:  # what follows will be overwritten
            self._copy(session, row)
        if found is not None:
            put(session, row, found)
            here = best
            self._kept = [*(one for one in self._kept if one is not found), found]
            self._drop_oldest()
        self.hits += here > 0
        self.misses += here == 0
        return here

    def _copy(self, session: Session, row: int) -> None:
        """Keeps a row's text, if it is not larger than the bound."""
        held = [part.states for part in session.parts]
        count = min(states.lengths[row] for states in held)
        token = sum(part.states.token_bytes for part in session.stateful)
        limit = self.limit_bytes
        if session.engine.gpu is not None or count < LEAST:
            return
        if limit is None or count * token <= limit:
            self._keep(taken(session, row, count))

    def _keep(self, prefix: Prefix) -> None:
        """Keeps a prefix as the newest, in place of those that it begins with."""
        self._kept = [
            one
            for one in self._kept
            if (one.stays and not (prefix.stays and _same(one, prefix)))
            or (not one.stays and _alike(one.tokens, prefix.tokens) < len(one.tokens))
        ]
        self._kept.append(prefix)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Drops the oldest texts beyond the bound."""
        limit, size = self.limit_bytes, self.bytes
        for one in list(self._kept):
            if limit is None or size <= limit:
                break
            if not one.stays:
                self._kept = [other for other in self._kept if other is not one]
                size -= one.bytes


def taken(session: Session, row: int, count: int) -> Prefix:
    """A copy of the states of a row's first tokens."""
    counts = [min(count, part.states.lengths[row]) for part in session.stateful]
    states = [
        part.states.read(row, own) for part, own in zip(session.stateful, counts, strict=True)
    ]
    tokens = np.array(session.texts.tokens(row)[:count], np.int64)
    return Prefix(tokens, counts, states)


def put(session: Session, row: int, prefix: Prefix) -> None:
    """Writes a prefix into a row of a session."""
    parts = zip(session.stateful, prefix.counts, prefix.states, strict=True)
    for part, count, arrays in parts:
        part.states.write(row, count, arrays)
    session.texts.put(row, prefix.tokens.tolist())


def _usable(prefix: Prefix, session: Session, most: int, asked: Collection[int]) -> int:
    """As `HeldTexts.usable`, for states that are not in a session."""
    held = dict(zip(session.stateful, prefix.counts, strict=True))
    needed = [*session.parts, *(part for number in asked for part in session.adapters.path(number))]
    return min(most, *(held[part] for part in needed))


def _same(one: Prefix, other: Prefix) -> bool:
    return np.array_equal(one.tokens, other.tokens)


def _alike(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many first tokens two texts share."""
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size


__all__ = ["PREFIX_BYTES", "Prefix", "PrefixCache", "put", "taken"]
