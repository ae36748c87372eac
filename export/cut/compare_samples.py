"""Compares the finished segments with the samples, as `check` does on the device.

`prove_rows` runs graphs with unfused operators, to find every tensor's row axis. This runs them as
a device does, and compares logits and scores of every exit, for all rows and for each row alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.compare import TOLERANCES, difference, spread
from edgeexit.errors import ExportError
from edgeexit.export.cut.cut import ANSWER, Cut
from edgeexit.export.cut.prove_rows import Proof, take_rows
from edgeexit.export.evaluate import open_graph

logger = logging.getLogger(__name__)

ON_ONE_MACHINE = {"int4": (1e-1, 5e-2)}
"""Stricter tolerances than those for a device: ONNX Runtime multiplies 4-bit weights in float32 or
in int8, as the operators around allow, up to 1.4 % of the largest logit apart."""

Arrays = dict[str, NDArray]


def compare_samples(
    pieces: Cut,
    paths: Sequence[Path],
    inputs: Mapping[str, NDArray],
    sample: Mapping[str, NDArray],
    proof: Proof,
    precision: str,
    what: str,
) -> Proof:
    """Compares logits and scores of every exit with the samples.

    Args:
        pieces: The cut.
        paths: The segments' graph files.
        inputs: Program inputs.
        sample: The bundle's samples (`edgeexit.export.samples.reference_sample`).
        proof: Result of `prove_rows`.
        precision: Precision of the graphs; sets the tolerances, as in `check`.
        what: Name of the file, for messages.

    Returns:
        The proof; its rows depend on each other if a row alone gives other logits or scores.

    Raises:
        ExportError: The segments give other logits or scores for all rows.
    """
    runs = [open_graph(path, optimised=True) for path in paths]
    if differs := _first_difference(_run(pieces, runs, inputs), sample, precision):
        raise ExportError(
            f"{what}: {differs} from the original model",
            fix="Please report it, with the tool that wrote the file and the version of ONNX "
            "Runtime: without its optimisations, the logits are equal.",
        )
    if not proof.independent:
        return proof
    axes = {name: proof.tensors[name].row_axis for name in pieces.inputs}
    rows = next(inputs[name].shape[axis] for name, axis in axes.items() if axis is not None)
    parts = []
    for row in range(rows):
        alone = {k: take_rows(v, np.array([row]), axes[k]) for k, v in inputs.items()}
        parts.append(_run(pieces, runs, alone))
    made = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if differs := _first_difference(made, sample, precision):
        logger.warning(
            "%s: exits apply to the whole batch: for rows alone, %s from those of the batch",
            what,
            differs,
        )
        return replace(proof, independent=False)
    return proof


def _run(pieces: Cut, runs: Sequence, inputs: Mapping[str, NDArray]) -> Arrays:
    """Logits and scores of every exit, named as in the samples."""
    known, made = dict(inputs), {}
    for piece, run in zip(pieces.pieces, runs, strict=True):
        known |= run({name: known[name] for name in piece.inputs})
        made[f"{piece.exit}/{ANSWER}"] = known[piece.exit]
        made |= {f"{piece.exit}/{score}": known[name] for score, name in piece.scores.items()}
    return made


def _first_difference(made: Arrays, sample: Mapping[str, NDArray], precision: str) -> str:
    """Says which exit's logits or scores differ from the samples, and by how much; empty if none
    do."""
    atol, rtol = ON_ONE_MACHINE.get(precision, TOLERANCES[precision])
    for name, found in made.items():
        exit_, _, output = name.rpartition("/")
        expected = sample[name]
        scale = spread(expected) if output == ANSWER else 1.0
        result = difference(found, expected, atol * scale, rtol)
        if not result.passed:
            kind = output if output == ANSWER else f"score {output}"
            off = f"by {result.largest:.3g}" if result.same_shape else f"in shape {found.shape}"
            return f"exit {exit_}: {kind} differ {off} (allowed: {result.allowed:.3g})"
    return ""


__all__ = ["compare_samples"]
