"""Exits for files that have none: a head behind a tensor in the middle, and one row of classes out
of whatever the file's own output is.

A head is what somebody would train: the mean over all positions of a tensor, then one layer. Its
weights are random, which is all the same to what is tried here. `last_exit` only rearranges the
file's output, and `rearranged` does the same in numpy, so that the bundle's last answer can be held
against what ONNX Runtime says of the untouched file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAST = "real_last"
EARLY = "real_exit"


def graft(
    model: onnx.ModelProto,
    early: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    output: str,
    how: str,
    classes: int,
    *,
    soft: bool = False,
) -> list[str]:
    """Adds exits to a model in place. Returns their names, from shallow to deep.

    Args:
        early: Tensors that get a head.
        shapes: Their shapes; rows are along the first axis, features along the second of four
            axes and along the last of others.
        output: The file's own output.
        how: See `rearranged`.
        classes: How many classes `rearranged` gives.
        soft: Whether heads end in a Softmax, as the file does.
    """
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    seed, names = np.random.default_rng(5), []
    for number, (tensor, shape) in enumerate(zip(early, shapes, strict=True), start=1):
        feature_axis = 1 if len(shape) == 4 else len(shape) - 1
        others = [axis for axis in range(1, len(shape)) if axis != feature_axis]
        features = shape[feature_axis]
        weights = (seed.standard_normal((features, classes)) / features).astype(np.float32)
        name = f"{EARLY}_{number}"
        model.graph.initializer.append(numpy_helper.from_array(weights, f"{name}_w"))
        flat = _reduce(model.graph, opset, "ReduceMean", tensor, others, f"{name}_mean")
        logits = f"{name}_logits" if soft else name
        model.graph.node.append(helper.make_node("MatMul", [flat, f"{name}_w"], [logits]))
        if soft:
            model.graph.node.append(helper.make_node("Softmax", [logits], [name], axis=1))
        names.append(name)
    names.append(_last_exit(model.graph, opset, output, how))
    for name in names:
        if name != output:
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", classes])
            model.graph.output.append(info)
    return names


def rearranged(answer: np.ndarray, how: str) -> np.ndarray:
    """A file's answer as ``[rows, classes]``.

    Args:
        how: ``as it is``; ``of one class``: p becomes 1 - p, p; ``mean`` or ``largest`` over
            everything but rows and classes, which are the last axis, or ``middle mean`` and
            ``middle largest`` where classes are the second axis; ``flat``: all but rows in one.
    """
    if how == "as it is":
        return answer
    if how == "flat":
        return answer.reshape(answer.shape[0], -1)
    if how == "mean over the first axis":
        return answer.mean(axis=0)
    if how == "of one class":
        flat = answer.reshape(answer.shape[0], 1)
        return np.concatenate([1 - flat, flat], axis=1)
    if how == "largest of one class":
        flat = answer.max(axis=tuple(range(1, answer.ndim))).reshape(-1, 1)
        return np.concatenate([1 - flat, flat], axis=1)
    axis = 1 if how.startswith("middle ") else answer.ndim - 1
    others = tuple(a for a in range(1, answer.ndim) if a != axis)
    if not others:
        return answer
    return answer.mean(axis=others) if how.endswith("mean") else answer.max(axis=others)


def _last_exit(graph: onnx.GraphProto, opset: int, output: str, how: str) -> str:
    if how == "as it is":
        return output
    rank = next(len(v.type.tensor_type.shape.dim) for v in graph.output if v.name == output)
    if how == "flat":
        graph.node.append(helper.make_node("Flatten", [output], [LAST], axis=1))
        return LAST
    if how == "mean over the first axis":
        return _reduce(graph, opset, "ReduceMean", output, [0], LAST)
    if how.endswith("of one class"):
        flat = f"{LAST}_flat"
        if how.startswith("largest"):
            everything = list(range(1, rank))
            _reduce(graph, opset, "ReduceMax", output, everything, flat, keep=False)
            flat = _node(graph, "Reshape", [flat, _constant(graph, [-1, 1], "column")], "column")
        else:
            flat = _node(graph, "Reshape", [output, _constant(graph, [-1, 1], "column")], "column")
        one = f"{LAST}_one"
        graph.initializer.append(numpy_helper.from_array(np.float32(1), one))
        rest = _node(graph, "Sub", [one, flat], "rest")
        graph.node.append(helper.make_node("Concat", [rest, flat], [LAST], axis=1))
        return LAST
    axis = 1 if how.startswith("middle ") else rank - 1
    others = [a for a in range(1, rank) if a != axis]
    kind = "ReduceMean" if how.endswith("mean") else "ReduceMax"
    return _reduce(graph, opset, kind, output, others, LAST)


def _node(graph: onnx.GraphProto, kind: str, inputs: Sequence[str], name: str) -> str:
    graph.node.append(helper.make_node(kind, inputs, [f"{LAST}_{name}"]))
    return f"{LAST}_{name}"


def _constant(graph: onnx.GraphProto, value: Sequence[int], name: str) -> str:
    name = f"{LAST}_{name}_c"
    graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    return name


def _reduce(
    graph: onnx.GraphProto,
    opset: int,
    kind: str,
    tensor: str,
    axes: Sequence[int],
    name: str,
    *,
    keep: bool = False,
) -> str:
    """A reduction as its opset writes it; nothing where there are no axes."""
    if not axes:
        return tensor
    if opset >= 18:
        graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{name}_axes"))
        node = helper.make_node(kind, [tensor, f"{name}_axes"], [name], keepdims=int(keep))
    else:
        node = helper.make_node(kind, [tensor], [name], axes=list(axes), keepdims=int(keep))
    graph.node.append(node)
    return name
