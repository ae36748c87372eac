"""scikit-learn's handwritten digits (1797 images of 8 x 8 pixels) in fixed splits.

``examples/digits/data.py:train``, ``:validation`` and ``:test`` are data sources for the command
line; they need numpy and scikit-learn, not torch. The splits never change: 1000 images train, 400
choose thresholds, 397 are for figures only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

SPLIT_SEED = 0
TRAIN, VALIDATION = 1000, 400
MEAN, STD = 0.5, 0.5
"""What preprocessor_config.json says, so that images from files give the same numbers."""


def indices(split: str) -> NDArray[np.int64]:
    """Positions of a split (``train``, ``validation`` or ``test``) in scikit-learn's data set.

    >>> [len(indices(split)) for split in ("train", "validation", "test")]
    [1000, 400, 397]
    """
    order = np.random.RandomState(SPLIT_SEED).permutation(1797)
    border = TRAIN + VALIDATION
    return {"train": order[:TRAIN], "validation": order[TRAIN:border], "test": order[border:]}[
        split
    ]


def images(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``[n, 8, 8]`` of 0 to 255 (scikit-learn's 0 to 16, scaled), and their labels."""
    digits = load_digits()
    chosen = indices(split)
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return pixels, digits.target[chosen].astype(np.int64)


def inputs(split: str) -> tuple[dict[str, NDArray], NDArray[np.int64]]:
    """Model inputs ``{"pixel_values": [n, 1, 8, 8]}`` and labels ``[n]`` of a split."""
    pixels, labels = images(split)
    scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - MEAN) / STD
    return {"pixel_values": scaled[:, None].astype(np.float32)}, labels


def train() -> tuple[dict[str, NDArray], NDArray[np.int64]]:
    """The images that the model was trained on, which set the ranges of int8 activations."""
    return inputs("train")


def validation() -> tuple[dict[str, NDArray], NDArray[np.int64]]:
    """The images that thresholds are calibrated on."""
    return inputs("validation")


def test() -> tuple[dict[str, NDArray], NDArray[np.int64]]:
    """The images that figures are measured on; nothing is chosen by them."""
    return inputs("test")


# pytest would take test() for a test wherever this module is collected.
test.__test__ = False  # type: ignore[attr-defined]
