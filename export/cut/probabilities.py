"""Whether what exits give are logits, or probabilities that a softmax has made of them.

Scores are computed of either; a softmax of probabilities would make everything look unsure.
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
    """Says whether the outputs of a graph are probabilities: a Softmax makes them, or whatever
    makes them, they are none below 0 and every row adds up to 1.

    Args:
        answers: Output -> what it gave for the samples.
        outputs: What the user says; None: what the operators say.
        what: The file, for messages.

    Raises:
        UsageError: `outputs` is neither.
        ExportError: Some are, others are not, or a sigmoid makes them: then each class stands for
            itself.
    """
    if outputs not in (None, "logits", "probabilities"):
        raise UsageError(f"outputs={outputs!r}", fix='Use "logits" or "probabilities".')
    if outputs is not None:
        return outputs == "probabilities"
    made = {value.name: _maker(value) for value in graph.outputs}
    if by_sigmoid := [name for name, kind in made.items() if kind == "Sigmoid"]:
        raise ExportError(
            f"{what}: exit {by_sigmoid[0]} comes out of a Sigmoid, so classes are not exclusive, "
            "and scores here are those of models that choose one class",
            fix="Name the tensor of class logits; --outputs logits takes it as it is.",
        )
    soft = [
        name for name, kind in made.items() if kind == "Softmax" or _adds_up(answers[name or ""])
    ]
    if not soft:
        return False
    if other := [name for name in made if name not in soft]:
        raise ExportError(
            f"{what}: exit {soft[0]} gives probabilities, {other[0]} does not",
            fix="Name the tensors before the Softmax, or say what they are: --outputs.",
        )
    logger.warning(
        "%s: %s what the exits give: taken as probabilities (--outputs logits: not)",
        what,
        "a Softmax makes" if "Softmax" in made.values() else "rows add up to 1 in",
    )
    return True


def _adds_up(answers: NDArray) -> bool:
    rows = answers.astype(np.float64)
    return bool(np.all(rows >= 0) and np.allclose(rows.sum(-1), 1, atol=1e-3))


def _maker(value: ir.Value) -> str:
    """The operator that makes a value, past those that only carry it."""
    node = value.producer()
    while node is not None and node.op_type in _CARRIES and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        if before is None:
            break
        node = before
    return "" if node is None else node.op_type


__all__ = ["Outputs", "gives_probabilities"]
