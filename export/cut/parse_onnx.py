"""Reads an ONNX file into an `onnx_ir` model, and replaces what `onnx_ir` does not support.

Classifiers of other libraries end in ``ZipMap``, which gives a list of maps instead of a tensor;
such nodes are removed. Sparse weights become dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from edgeexit.errors import ExportError

_MADE_OF = "edgeexit.made_of/"
"""Prefix of metadata keys: output that is a list of maps -> the tensor it was computed from."""


def parse_onnx(path: Path) -> ir.Model:
    """Reads a model; external weights stay in their files."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in _tensors(proto):
        _check_place(tensor, path)
    made_of = _drop_maps(proto.graph)
    for sparse in proto.graph.sparse_initializer:
        proto.graph.initializer.append(_dense(sparse))
    del proto.graph.sparse_initializer[:]
    model = ir.from_proto(proto)
    model.metadata_props.update({_MADE_OF + name: source for name, source in made_of.items()})
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def made_of(model: ir.Model, name: str) -> str | None:
    """The tensor that an output, a list of maps, was computed from; None for other outputs."""
    return model.metadata_props.get(_MADE_OF + name)


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """The graphs in an attribute (branches of an If, body of a Loop)."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors(message: onnx.ModelProto | onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constant tensors, those in branches and functions too."""
    nodes: list[onnx.NodeProto] = []
    if isinstance(message, onnx.ModelProto):
        yield from _tensors(message.graph)
        for function in message.functions:
            nodes += function.node
    else:
        yield from message.initializer
        nodes += message.node
    for node in nodes:
        for attribute in node.attribute:
            yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
            for graph in _graphs(attribute):
                yield from _tensors(graph)


def _check_place(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuses a place in an external file that is not a number of bytes."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    given = {entry.key: entry.value for entry in tensor.external_data}
    fix = "The file is damaged; copy or export it again."
    if not given.get("location"):
        raise ExportError(
            f"{path}: {tensor.name!r} is stored in another file, which is not named", fix=fix
        )
    for key in ("offset", "length"):
        text = given.get(key, "0")
        if not (text.isascii() and text.isdigit()):
            raise ExportError(
                f"{path}: {tensor.name!r} is stored in {given['location']} with the {key} "
                f"{text!r}, which is not a number of bytes",
                fix=fix,
            )


def _drop_maps(graph: onnx.GraphProto) -> dict[str, str]:
    """Removes nodes that give maps. Returns output -> the tensor it was computed from."""
    sources: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type == "ZipMap" and node.domain == "ai.onnx.ml":
            sources |= dict.fromkeys(node.output, node.input[0])
            graph.node.remove(node)
    for values in (graph.output, graph.value_info):
        kept = [value for value in values if value.name not in sources]
        del values[:]
        values.extend(kept)
    return sources


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return numpy_helper.from_array(dense, sparse.values.name)


__all__ = ["made_of", "parse_onnx"]
