"""Writes a split of the digits as rows for `exits.cpp`: float32 in NumPy's format.

python examples/cpp/rows.py test digits.npy
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))
import data


def main() -> None:
    split, file = sys.argv[1:]
    inputs, _ = data.inputs(split)
    np.save(file, inputs["pixel_values"])


if __name__ == "__main__":
    main()
