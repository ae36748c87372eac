"""Computes scores, which show how safe it is to stop, and the greedy token from an exit's logits.

`append_scores` and `append_token` add nodes to a graph, for components from torch and for cut ONNX
graphs; `reference_scores` computes the scores in float64, for samples and tests. z = logits, p =
softmax(z) over N classes; every score is float32 ``[batch]``, higher = safer:

- ``max_prob``: max p;
- ``margin``: the largest p minus the second largest;
- ``entropy``: 1 - H / log N, with H = -sum p log p from log-softmax, which stays finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgeexit.bundle.manifest import SCORES
from edgeexit.errors import ExportError

TINY = 1e-30
"""Smallest probability whose logarithm is taken; a probability of 0 counts as this."""


def append_scores(
    graph: ir.Graph, logits: ir.Value, prefix: str, *, probabilities: bool = False
) -> dict[str, ir.Value]:
    """Adds nodes that compute every score of `SCORES` from `logits` ``[batch, classes]``.

    Scores share few nodes, so that an engine that computes one score runs as few as possible (two
    for ``max_prob``). The new values do not become graph outputs.

    Args:
        probabilities: Whether `logits` are probabilities instead.
    """
    classes = logits.shape[-1] if logits.shape is not None and len(logits.shape) == 2 else None
    if not isinstance(classes, int) or classes < 2:
        raise ExportError(
            f"{logits.name}: logits have the shape {logits.shape}; scores need [batch, classes] "
            "with a fixed number of two or more classes",
            fix="Name an exit output that holds one row of class logits per input.",
        )
    build = _Builder(graph, prefix)
    z = logits
    if z.dtype != ir.DataType.FLOAT:
        z = build("Cast", [z], to=int(ir.DataType.FLOAT))
    last = build.constant("last_axis", np.array([-1], np.int64))
    p = z if probabilities else build("Softmax", [z], axis=-1)
    scores = {"max_prob": build("ReduceMax", [p, last], keepdims=0, name="max_prob")}
    top = build("TopK", [p, build.constant("two", np.array([2], np.int64))], outputs=2, axis=-1)
    signed = build("Mul", [top, build.constant("signs", np.array([[1, -1]], np.float32))])
    scores["margin"] = build("ReduceSum", [signed, last], keepdims=0, name="margin")
    if probabilities:
        log = build("Log", [build("Max", [z, build.constant("tiny", np.float32(TINY))])])
    else:
        log = build("LogSoftmax", [z], axis=-1)
    weighted = build("Mul", [p, log])
    negative = build("ReduceSum", [weighted, last], keepdims=0)
    scaled = build("Mul", [negative, build.constant("scale", np.float32(1 / math.log(classes)))])
    one = build.constant("one", np.float32(1))
    scores["entropy"] = build("Add", [scaled, one], name="entropy")
    assert tuple(scores) == SCORES
    batch = logits.shape[0] if logits.shape is not None else None
    for value in scores.values():
        value.shape = ir.Shape([batch])
        value.dtype = ir.DataType.FLOAT
    return scores


def append_token(graph: ir.Graph, logits: ir.Value, name: str) -> ir.Value:
    """Adds the greedy token ``[batch]``, so that logits need not be copied to the host. It does not
    become a graph output."""
    node = ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0})
    node.name = name
    graph.append(node)
    [token] = node.outputs
    token.name, token.dtype, token.shape = name, ir.DataType.INT64, ir.Shape(["batch"])
    return token


def reference_scores(
    logits: np.ndarray, *, probabilities: bool = False
) -> Mapping[str, np.ndarray]:
    """The scores of `logits` (or probabilities) ``[batch, classes]``, computed in float64 and
    rounded to float32 at the end.

    >>> {name: float(score[0]) for name, score in reference_scores(np.zeros((1, 4))).items()}
    {'max_prob': 0.25, 'margin': 0.0, 'entropy': 0.0}
    """
    z = np.array(logits, np.float64)  # changed in place: copies of many logits take long
    with np.errstate(invalid="ignore"):  # scores of NaN logits are NaN
        if probabilities:  # not scaled to add up to 1: the graph does not do that either
            p, total = z, np.ones(z.shape[:-1])
            entropy = -(p * np.log(np.maximum(p, TINY))).sum(-1)
        else:
            z -= z.max(-1, keepdims=True)
            p = np.exp(z)
            total = p.sum(-1)
            z *= p
            entropy = np.log(total) - z.sum(-1) / total
        p.partition(p.shape[-1] - 2, axis=-1)
        second, first = p[..., -2] / total, p[..., -1] / total
    return {
        "max_prob": first.astype(np.float32),
        "margin": (first - second).astype(np.float32),
        "entropy": (1 - entropy / math.log(p.shape[-1])).astype(np.float32),
    }


class _Builder:
    """Adds named nodes and constants to a graph."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self.count = 0

    def __call__(
        self,
        kind: str,
        inputs: list[ir.Value],
        *,
        name: str = "",
        outputs: int = 1,
        **attributes: int,
    ) -> ir.Value:
        self.count += 1
        node = ir.node(kind, inputs, attributes, num_outputs=outputs)
        node.name = f"{self.prefix}/{kind}_{self.count}"
        for number, value in enumerate(node.outputs):
            own = name or f"{kind}_{self.count}"
            value.name = f"{self.prefix}/{own}" + (f"_{number}" if number else "")
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        name = f"edgeexit/{name}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(np.asarray(array), name=name)
        shape = ir.Shape(np.shape(array))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value
