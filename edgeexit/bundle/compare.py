"""Compares outputs with reference samples: `check` on the device, and export before it keeps a
bundle.

Rounding errors grow with the numbers that a model computes with, so tolerances are relative to
them: to the spread of an exit's outputs over the rows, which is what its answers depend on, and to
the value itself. Logits of 0.02 are compared as strictly as logits of 20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Manifest

TOLERANCES = {
    "float32": (1e-4, 1e-5),
    "float16": (4e-2, 2e-2),
    "bfloat16": (1e-1, 1e-1),
    "int8": (3e-1, 1e-1),
    "int4": (3e-1, 1e-1),
}
"""Precision -> default tolerances: allowed is the first times the spread of the outputs (scores: of
1) plus the second times the value.

Largest differences seen between torch and ONNX Runtime's CPU provider, in units of the spread, on
untrained and trained models of up to 24 layers: float32 4.5e-5, float16 2.3e-2 (a ResNet whose
logits hardly differ between rows: 5.3e-2), int8 0.15, int4 0.27 (30 layers; 0.045 as the root mean
square). With 4-bit weights activations are rounded to 8 bits as products run, so the slightest
difference changes how they are rounded."""
OUTLIERS = {"int4": 0.03}
"""Precision -> share of elements that may be further apart: where a model hardly knows what a token
means, a state may turn over (seen: 1 of 48 cosines of states, by 0.78)."""


@dataclass(frozen=True)
class Difference:
    """How far outputs are from their reference.

    Attributes:
        largest: Largest absolute difference; infinite for NaN against a number or another shape.
        allowed: What was allowed for the element that is furthest out.
        passed: Whether every element is within its tolerance, but for outliers; NaN is equal to
            NaN.
        same_shape: Whether the shapes are equal.
        nan: Number of elements of the reference that are NaN.
        infinite: Number of elements of the reference that are infinite.
    """

    largest: float
    allowed: float
    passed: bool
    same_shape: bool = True
    nan: int = 0
    infinite: int = 0


def tolerances(manifest: Manifest) -> tuple[float, float]:
    """Default tolerances for the lowest precision in a bundle."""
    components = manifest.components.values()
    found = {variant.precision for component in components for variant in component.variants}
    return max(TOLERANCES[precision] for precision in found)


def outliers(manifest: Manifest) -> float:
    """Share of elements that may be further apart than the tolerances, for a bundle's lowest
    precision."""
    components = manifest.components.values()
    found = {variant.precision for component in components for variant in component.variants}
    return max(OUTLIERS.get(precision, 0.0) for precision in found)


def spread(outputs: NDArray) -> float:
    """How much outputs ``[..., classes]`` differ from row to row: the root mean square of the
    distance to the mean row. If all rows are equal: the standard deviation over the classes.

    >>> spread(np.array([[1.0, 7.0], [3.0, 7.0]]))
    0.7071067811865476
    >>> spread(np.array([[1.0, 7.0], [1.0, 7.0]]))
    3.0
    """
    values = np.asarray(outputs, np.float64)
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)
    rows = rows[:, ~np.isneginf(rows).all(0)]  # beyond a draft vocabulary
    rows = rows[np.isfinite(rows).all(-1)]
    if not rows.size:
        return 0.0
    between = float(np.sqrt(np.mean((rows - rows.mean(0)) ** 2)))
    return between or float(rows.std())


def difference(
    found: NDArray, expected: NDArray, atol: float, rtol: float, outliers: float = 0.0
) -> Difference:
    """Compares two arrays: each element may differ by ``atol + rtol * abs(expected)``, but for this
    share of them, which must be finite where the reference is. With outliers, the root mean square
    of all differences must be within ``atol / 2``, so few elements cannot hide a wrong result.

    >>> difference(np.array([1.0, 2.5]), np.array([1.0, 2.0]), 0.1, 0.1).passed
    False
    >>> known, close = np.ones(100), np.append(np.ones(99), 2.0)
    >>> difference(close, known, 0.3, 0.1, outliers=0.03).passed
    True
    >>> difference(np.append(np.ones(99), 9.0), known, 0.3, 0.1, outliers=0.03).passed
    False
    """
    if found.shape != expected.shape:
        return Difference(math.inf, 0.0, passed=False, same_shape=False)
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    nan, infinite = int(np.isnan(b).sum()), int(np.isinf(b).sum())
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    apart = np.where(np.isnan(apart), np.inf, apart)
    allowed = atol + rtol * np.abs(np.where(np.isfinite(b), b, 0.0))
    beyond = apart > allowed
    passed = beyond.sum() <= outliers * beyond.size and not np.isinf(apart).any()
    if outliers and apart.size:
        passed = passed and np.sqrt(np.mean(apart**2)) <= atol / 2
    furthest = int(np.argmax(apart - allowed)) if apart.size else 0
    limit = float(allowed.flat[furthest]) if apart.size else atol
    largest = float(apart.max(initial=0.0))
    return Difference(largest, limit, bool(passed), nan=nan, infinite=infinite)


__all__ = ["Difference", "TOLERANCES", "difference", "outliers", "spread", "tolerances"]
