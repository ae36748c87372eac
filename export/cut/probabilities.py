"""Finds out whether exits give logits or probabilities (the output of a softmax).

Scores are computed from either. A second softmax would make every answer look uncertain.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.errors import ExportError, UsageError

logger = logging.getLogger(__name__)

Outputs = Literal["logits", "probabilities"]

_CARRIES = frozenset({"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def gives_probabilities(
    graph: ir.Graph, answers: Mapping[str, NDArray], outputs: Outputs | None, what: str
) -> bool:
    """Whether the outputs of a graph are probabilities: the result of a Softmax, or values of 0 and
    more whose rows add up to 1.

    Args:
        answers: Output -> its values for the samples.
        outputs: What the user says; None: find out.
        what: Name of the file, for messages.

    Raises:
        UsageError: `outputs` is neither.
        ExportError: Only some outputs are probabilities, or one is the result of a Sigmoid, whose
            classes are not exclusive.
    """
    if outputs not in (None, "logits", "probabilities"):
        raise UsageError(f"outputs={outputs!r}", fix='Use "logits" or "probabilities".')
    if outputs is not None:
        return outputs == "probabilities"
    makers = {value.name: _maker(value) for value in graph.outputs}
    if by_sigmoid := [name for name, kind in makers.items() if kind == "Sigmoid"]:
        raise ExportError(
            f"{what}: exit {by_sigmoid[0]} is the output of a Sigmoid, so classes are not "
            "exclusive; scores are only defined for models that choose one class",
            fix="Name the tensor of class logits, or use this one as it is: --outputs logits.",
        )
    soft = [
        name for name, kind in makers.items() if kind == "Softmax" or _adds_up(answers[name or ""])
    ]
    if not soft:
        return False
    if other := [name for name in makers if name not in soft]:
        raise ExportError(
            f"{what}: exit {soft[0]} gives probabilities, {other[0]} does not",
            fix="Name the tensors before the Softmax, or set --outputs.",
        )
    logger.warning(
        "%s: the exits give probabilities (%s); if they are logits, pass --outputs logits",
        what,
        "output of a Softmax" if "Softmax" in makers.values() else "rows add up to 1",
    )
    return True


def _adds_up(answers: NDArray) -> bool:
    rows = answers.astype(np.float64)
    return bool(np.all(rows >= 0) and np.allclose(rows.sum(-1), 1, atol=1e-3))


def _maker(value: ir.Value) -> str:
    """The operator that computes a value, before those that only pass it on."""
    node = value.producer()
    while node is not None and node.op_type in _CARRIES and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        if before is None:
            break
        node = before
    return "" if node is None else node.op_type


__all__ = ["Outputs", "gives_probabilities"]
