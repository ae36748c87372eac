"""`FeatureCache`: image tokens of images that were seen before.

A conversation sends the same images with every question, so their tower need not run again. Images
are known by a digest of their pixels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES_BYTES = 64 << 20
"""Default bound of kept image tokens."""

Run = Callable[[NDArray[Any]], tuple[Mapping[str, NDArray[Any]], list[str]]]
"""Runs the tower over images. Returns its outputs and the exit of each image."""


class FeatureCache:
    """Outputs of a vision chain, one entry per image.

    Attributes:
        limit_bytes: Most bytes that are kept; the oldest go first.
        hits, misses: Images that were known, and images that ran through the tower.
    """

    def __init__(self, limit_bytes: int = FEATURES_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, tuple[dict[str, NDArray[Any]], str]] = OrderedDict()
        self._bytes = 0

    def clear(self) -> None:
        """Forgets all images: another policy may leave the tower at another exit."""
        self._kept.clear()
        self._bytes = 0

    def features(
        self, images: NDArray[Any], run: Run, *, together: int = 1
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Outputs and exits for images ``[image, ...]``, in order.

        Args:
            run: Runs the tower over images that are not known.
            together: Images that run at a time.
        """
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        rows = {digest: self._kept[digest] for digest in digests if digest in self._kept}
        new = [digest for digest in dict.fromkeys(digests) if digest not in rows]
        self.hits += len(digests) - len(new)
        self.misses += len(new)
        for start in range(0, len(new), together):
            chosen = new[start : start + together]
            outputs, exits = run(images[[digests.index(digest) for digest in chosen]])
            for number, digest in enumerate(chosen):
                own = {name: value[number].copy() for name, value in outputs.items()}
                rows[digest] = own, exits[number]
        for digest in dict.fromkeys(digests):
            self._keep(digest, rows[digest])
        first, _ = rows[digests[0]]
        stacked = {name: np.stack([rows[d][0][name] for d in digests]) for name in first}
        return stacked, [rows[digest][1] for digest in digests]

    def _keep(self, digest: bytes, row: tuple[dict[str, NDArray[Any]], str]) -> None:
        """Keeps an image as the newest, and drops the oldest beyond the bound."""
        if self._kept.pop(digest, None) is None:
            self._bytes += _size(row)
        self._kept[digest] = row
        while self._kept and self._bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(row: tuple[dict[str, NDArray[Any]], str]) -> int:
    return sum(value.nbytes for value in row[0].values())


__all__ = ["FEATURES_BYTES", "FeatureCache"]
