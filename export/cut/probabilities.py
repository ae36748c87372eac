"""Finds out whether exits give logits or probabilities (the output of a softmax).

Scores are computed from either. A second softmax would make every answer look uncertain, and logits
taken for probabilities would give scores without meaning. So the values for the samples decide, and
what the user says (``--outputs``) is compared with them.
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
_SIGMOIDS = ("Sigmoid", "HardSigmoid")
SUM_TOLERANCE = 1e-3
"""How far a row's probabilities may add up to something else than 1, to be found as such."""
ROUNDED_SUM_TOLERANCE = 2e-2
"""The same where the graph or the user says that they are probabilities: float16 and int8 round
every class."""


def gives_probabilities(
    graph: ir.Graph, answers: Mapping[str, NDArray], outputs: Outputs | None, what: str
) -> bool:
    """Whether the outputs of a graph are probabilities: values of 0 and more whose rows add up to
    1.

    Args:
        answers: Output -> its values for the samples, ``[rows, classes]``.
        outputs: What the user says; None: find out.
        what: Name of the file, for messages.

    Raises:
        UsageError: `outputs` is neither.
        ExportError: `outputs` is probabilities and the values are not; or, without `outputs`, only
            some outputs are probabilities, or one is the result of a Softmax over another axis than
            the classes, or of a Sigmoid, whose classes are not exclusive.
    """
    if outputs not in (None, "logits", "probabilities"):
        raise UsageError(f"outputs={outputs!r}", fix='Use "logits" or "probabilities".')
    makers = {value.name or "": _maker(value) for value in graph.outputs}
    if outputs == "probabilities":
        for name, kind in makers.items():
            _examine(name, kind, answers[name], what)
        return True
    if outputs == "logits":
        _warn_of_shares(answers, what, told=True)
        return False
    if by_sigmoid := [name for name, kind in makers.items() if kind in _SIGMOIDS]:
        raise ExportError(
            f"{what}: exit {by_sigmoid[0]} is the output of a {makers[by_sigmoid[0]]}, so classes "
            "are not exclusive; scores are only defined for models that choose one class",
            fix="Name the tensor of class logits. If the largest value is the answer, say how it "
            "is scored: --outputs probabilities or --outputs logits.",
        )
    for name, kind in makers.items():
        if kind == "Softmax" and not _adds_up(answers[name], ROUNDED_SUM_TOLERANCE):
            raise _not_over_classes(name, answers[name], what)
    soft = [
        name
        for name, kind in makers.items()
        if kind == "Softmax" or _adds_up(answers[name], SUM_TOLERANCE)
    ]
    if not soft:
        _warn_of_shares(answers, what, told=False)
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


def _examine(name: str, kind: str, answers: NDArray, what: str) -> None:
    """Refuses values that the user calls probabilities and that are not."""
    fix = (
        "Leave --outputs out if these are logits; else name the tensor that the Softmax gives, "
        "before it is scaled."
    )
    if not _is_share(answers):
        raise ExportError(
            f"{what}: exit {name} gives values from {answers.min():.4g} to {answers.max():.4g} for "
            "the samples, which are not probabilities (--outputs)",
            fix=fix,
        )
    if _adds_up(answers, ROUNDED_SUM_TOLERANCE):
        return
    if kind == "Softmax":
        raise _not_over_classes(name, answers, what)
    logger.warning(
        "%s: exit %s: the probabilities of a row add up to %s, as after a Sigmoid: its classes are "
        "not exclusive, so use the score max_prob or margin, not entropy",
        what,
        name,
        _sums(answers),
    )


def _not_over_classes(name: str, answers: NDArray, what: str) -> ExportError:
    return ExportError(
        f"{what}: exit {name} is the output of a Softmax over another axis than the classes: its "
        f"rows add up to {_sums(answers)}, not to 1",
        fix="Name the tensor of class logits before the Softmax, or use this one as it is: "
        "--outputs logits.",
    )


def _warn_of_shares(answers: Mapping[str, NDArray], what: str, *, told: bool) -> None:
    """Warns of logits that are all between 0 and 1, because no operator shows a sigmoid that is
    written out, and of logits whose rows add up to the same number, such as 100 %."""
    for name, values in answers.items():
        if _is_percentage(values):
            logger.warning(
                "%s: exit %s gives values of 0 and more that add up to %s in every row, which "
                "look like scaled probabilities; they are taken for logits. Name the tensor "
                "before it is scaled",
                what,
                name,
                _sums(values),
            )
            return
    shares = [name for name, values in answers.items() if _is_share(values)]
    if shares:
        values = answers[shares[0]]
        logger.warning(
            "%s: exit %s gives values from %.3g to %.3g, which look like probabilities; they are "
            "taken for logits%s",
            what,
            shares[0],
            values.min(),
            values.max(),
            "" if told else ". If they are probabilities, pass --outputs probabilities",
        )


def _is_share(answers: NDArray) -> bool:
    """Whether all values are between 0 and 1, but for rounding."""
    return bool(answers.min() >= -SUM_TOLERANCE and answers.max() <= 1 + SUM_TOLERANCE)


def _is_percentage(answers: NDArray) -> bool:
    """Whether rows that differ add up to the same number, which is not 1."""
    if not answers.min() >= 0 or not np.ptp(answers, 0).any():
        return False
    sums = answers.astype(np.float64).sum(-1)
    return bool(sums.min() > 1 + ROUNDED_SUM_TOLERANCE and np.ptp(sums) <= 1e-3 * sums.max())


def _adds_up(answers: NDArray, tolerance: float) -> bool:
    sums = answers.astype(np.float64).sum(-1)
    return bool(np.all(answers >= 0) and np.allclose(sums, 1, rtol=0, atol=tolerance))


def _sums(answers: NDArray) -> str:
    sums = answers.astype(np.float64).sum(-1)
    low, high = f"{sums.min():.3g}", f"{sums.max():.3g}"
    return low if low == high else f"{low} to {high}"


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
