"""`FeatureCache`: image tokens of images that were seen before.

A conversation sends the same images with every question, so their tower need not run again. Images
are known by a digest of their pixels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeexit.runtime.executor.rows import Answers
from edgeexit.runtime.memory import check_limit_bytes

FEATURES_BYTES = 64 << 20
"""Default bound of kept image tokens."""

Run = Callable[[Mapping[str, NDArray[Any]]], Answers]
"""Runs a chain over images, which it gets by the input's name."""


class FeatureCache:
    """Answers of vision chains, one entry per chain and image.

    Attributes:
        limit_bytes: Most bytes that are kept; the oldest go first. 0 keeps nothing, None has no
            bound.
        hits, misses: Images that were known, and images that ran through a tower.
    """

    def __init__(self, limit_bytes: int | None = FEATURES_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, _Row] = OrderedDict()
        self._bytes = 0

    @property
    def limit_bytes(self) -> int | None:
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int | None) -> None:
        self._limit_bytes = check_limit_bytes(limit_bytes)

    def clear(self) -> None:
        """Forgets all images: another policy may leave the tower at another exit."""
        self._kept.clear()
        self._bytes = 0

    def answers(
        self, chain: str, name: str, images: NDArray[Any], run: Run, *, together: int = 1
    ) -> Answers:
        """A chain's answers for images ``[image, ...]``, in order.

        Args:
            chain: The chain's name.
            name: Of its input.
            run: Runs the chain over images that are not known.
            together: Images that run at a time.
        """
        digests = [_digest(chain, image) for image in images]
        rows = {digest: self._kept[digest] for digest in digests if digest in self._kept}
        new = [digest for digest in dict.fromkeys(digests) if digest not in rows]
        self.hits += len(digests) - len(new)
        self.misses += len(new)
        for start in range(0, len(new), together):
            chosen = new[start : start + together]
            made = run({name: images[[digests.index(digest) for digest in chosen]]})
            for number, digest in enumerate(chosen):
                own = {key: value[number].copy() for key, value in made.outputs.items()}
                rows[digest] = _Row(own, made.exits[number], made.scores[number])
        for digest in dict.fromkeys(digests):
            self._keep(digest, rows[digest])
        ordered = [rows[digest] for digest in digests]
        return Answers(
            {key: np.stack([row.outputs[key] for row in ordered]) for key in ordered[0].outputs},
            np.array([row.exit for row in ordered]),
            np.array([row.score for row in ordered], np.float32),
        )

    def _keep(self, digest: bytes, row: _Row) -> None:
        """Keeps an image as the newest, and drops the oldest beyond the bound."""
        if self._kept.pop(digest, None) is None:
            self._bytes += row.bytes
        self._kept[digest] = row
        limit = self._limit_bytes
        while limit is not None and self._kept and self._bytes > limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.bytes


class _Row(NamedTuple):
    """A chain's answer for an image."""

    outputs: dict[str, NDArray[Any]]
    exit: np.int64
    score: np.float32

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.outputs.values())


def _digest(chain: str, image: NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(f"{chain} {image.shape} {image.dtype}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


__all__ = ["FEATURES_BYTES", "FeatureCache"]
