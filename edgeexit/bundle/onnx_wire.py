"""Reads and edits ONNX files without onnx: names, external tensors, outputs, axis sizes, signs.

An ONNX file is a protocol-buffer message. The device has no onnx package, and a graph is checked
before an engine opens it, so this module parses the wire format: the names of the graph's inputs
and outputs, and where the data of its tensors is stored. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_GRAPH_VALUE = 13
_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_AXIS, _AXIS_SIZE, _AXIS_NAME = 2, 1, 2, 1, 1, 2
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE, _FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 1, 2, 5, 7, 11
_NODE_KIND, _ATTRIBUTE_NAME = 4, 1
_ATTRIBUTE_T, _ATTRIBUTE_G, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_TENSOR_TYPE, _TENSOR_RAW, _TENSOR_DATA = 2, 9, (4, 5, 7, 9, 10, 11)
_SIGNED = {21: (22, 0x88), 2: (3, 0x80)}
"""Types of unsigned numbers -> signed ones, and the bits to turn in each byte: uint4, uint8."""
_NO_WEIGHTS = (7, 8, 9, 12, 13)  # int64, string, bool, uint32, uint64
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
_MAX_DEPTH = 16


@dataclass(frozen=True)
class External:
    """Where a tensor's data is stored: `length` bytes at `offset` of the file `location`."""

    tensor: str
    location: str
    offset: int
    length: int | None


@dataclass
class GraphFile:
    """Names and external references found in one ONNX file, the bytes of weights that the file
    itself holds, and how many nodes the graph has."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    initializers: set[str] = field(default_factory=set)
    externals: list[External] = field(default_factory=list)
    inline_bytes: int = 0
    nodes: int = 0


def read_graph_file(data: bytes) -> GraphFile:
    """Parses an ONNX model. Raises ValueError, with the reason, if `data` is not a model."""
    found = GraphFile()
    graphs = 0
    for number, value in _fields(data):
        if number == _MODEL_GRAPH:
            graphs += 1
            _read_graph(_message(value), found, depth=0)
        elif number == _MODEL_TRAINING:
            raise ValueError("it contains training information, which a bundle never has")
        elif number == _MODEL_FUNCTIONS:
            for inner, node in _fields(_message(value)):
                if inner == _FUNCTION_NODE:
                    _read_node(_message(node), found, depth=0)
                elif inner == _FUNCTION_ATTRIBUTE:
                    _read_attribute(_message(node), found, depth=0)
    if graphs != 1:
        raise ValueError("it has no graph" if graphs == 0 else "it has more than one graph")
    found.inputs = [name for name in found.inputs if name not in found.initializers]
    return found


def _read_graph(data: bytes, found: GraphFile, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"graphs are nested deeper than {_MAX_DEPTH}")
    for number, value in _fields(data):
        if number == _GRAPH_NODE:
            found.nodes += depth == 0
            _read_node(_message(value), found, depth)
        elif number == _GRAPH_INITIALIZER:
            name = _read_tensor(_message(value), found)
            found.inline_bytes += _data_bytes(_message(value))
            if depth == 0:
                found.initializers.add(name)
        elif number == _GRAPH_SPARSE:
            _read_sparse(_message(value), found)
        elif number == _GRAPH_INPUT and depth == 0:
            found.inputs.append(_name_of_value(_message(value)))
        elif number == _GRAPH_OUTPUT and depth == 0:
            found.outputs.append(_name_of_value(_message(value)))


def _read_node(data: bytes, found: GraphFile, depth: int) -> None:
    for number, value in _fields(data):
        if number == _NODE_ATTRIBUTE:
            _read_attribute(_message(value), found, depth)


def _read_attribute(data: bytes, found: GraphFile, depth: int) -> None:
    for number, value in _fields(data):
        if number in (_ATTRIBUTE_T, _ATTRIBUTE_TENSORS):
            _read_tensor(_message(value), found)
        elif number in (_ATTRIBUTE_G, _ATTRIBUTE_GRAPHS):
            _read_graph(_message(value), found, depth + 1)
        elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
            _read_sparse(_message(value), found)


def _read_sparse(data: bytes, found: GraphFile) -> None:
    for number, value in _fields(data):
        if number in (_SPARSE_VALUES, _SPARSE_INDICES):
            _read_tensor(_message(value), found)


def _read_tensor(data: bytes, found: GraphFile) -> str:
    name, external, entries = "", False, {}
    for number, value in _fields(data):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_LOCATION:
            external = value == 1
        elif number == _TENSOR_EXTERNAL:
            pair = dict(_fields(_message(value)))
            entries[_text(pair.get(1, b""))] = _text(pair.get(2, b""))
    if external or entries:
        length = entries.get("length")
        found.externals.append(
            External(
                tensor=name,
                location=entries.get("location", ""),
                offset=_count(entries.get("offset", "0")),
                length=None if length is None else _count(length),
            )
        )
    return name


def _data_bytes(data: bytes) -> int:
    """Bytes of the data in a tensor's message; 0 for shapes, axes and the like, which are no
    weights."""
    fields = [(number, value) for number, value in _fields(data)]
    if any(number == _TENSOR_TYPE and value in _NO_WEIGHTS for number, value in fields):
        return 0
    return sum(
        len(value)
        for number, value in fields
        if number in _TENSOR_DATA and isinstance(value, bytes)
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ValueError(f"an external tensor has {text[:40]!r} instead of a byte count")
    return int(text)


def _name_of_value(data: bytes) -> str:
    return next((_text(value) for number, value in _fields(data) if number == 1), "")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it has a number instead of a message")
    return value


def _text(value: int | bytes) -> str:
    return _message(value).decode("utf-8", errors="strict")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of one message; fixed-width values come as bytes."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if key >> 32:
            raise ValueError("it is not a protocol-buffer message (field number too large)")
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"it is not a protocol-buffer message (wire type {wire})")
        if position + size > end:
            raise ValueError("it ends in the middle of a field")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("it ends in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7


def keep_outputs(data: bytes, outputs: Collection[str]) -> bytes:
    """The same ONNX model with only these outputs, without nodes that only other outputs need.

    An exit has every cheap score, so that choosing a score needs no new export. A run needs one
    score; on a small model the other scores cost some percent (benchmarks/results/choices.json).

    Args:
        data: A model that `read_graph_file` accepts, with its nodes in topological order.
        outputs: Names of graph outputs to keep.
    """
    parts = []
    for number, value in _fields(data):
        if number == _MODEL_GRAPH:
            value = _keep_graph_outputs(_message(value), set(outputs))
        parts.append(_encode(number, value))
    return b"".join(parts)


def _keep_graph_outputs(data: bytes, outputs: set[str]) -> bytes:
    fields = [(number, value) for number, value in _fields(data)]
    needed, kept = set(outputs), set()
    for place in range(len(fields) - 1, -1, -1):
        number, value = fields[place]
        if number == _GRAPH_NODE:
            inputs, made = _node_names(_message(value))
            if not needed.isdisjoint(made):
                needed |= inputs
                kept.add(place)
    initial = {
        _tensor_name(_message(value)) for number, value in fields if number == _GRAPH_INITIALIZER
    }
    parts = []
    for place, (number, value) in enumerate(fields):
        if number == _GRAPH_NODE and place not in kept:
            continue
        if number == _GRAPH_INPUT and _name_of_value(_message(value)) in initial - needed:
            continue
        if number == _GRAPH_OUTPUT and _name_of_value(_message(value)) not in outputs:
            continue
        if number == _GRAPH_INITIALIZER and _tensor_name(_message(value)) not in needed:
            continue
        parts.append(_encode(number, value))
    return b"".join(parts)


def fix_axes(data: bytes, sizes: Mapping[str, int]) -> bytes:
    """The same ONNX model with fixed sizes for some of its named axes.

    Engines that fix a size at build time read it from the file: TensorRT refuses a cache whose axis
    ``past`` has only a name.

    Args:
        data: A model that `read_graph_file` accepts.
        sizes: Axis -> its size.
    """

    def axis(data: bytes) -> bytes:
        names = [_text(value) for number, value in _fields(data) if number == _AXIS_NAME]
        if not names or names[-1] not in sizes:
            return data
        return _encode(_AXIS_SIZE, sizes[names[-1]])

    def shape(data: bytes) -> bytes:
        path = (_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_AXIS)
        return _rewrite(data, path, axis)

    def graph(data: bytes) -> bytes:
        for values in (_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE):
            data = _rewrite(data, (values,), shape)
        return data

    return _rewrite(data, (_MODEL_GRAPH,), graph)


def sign_numbers(data: bytes, folder: Path) -> bytes:
    """The same ONNX model with signed numbers in place of unsigned ones, for what
    ``DequantizeLinear`` reads in blocks: numbers and zero points become less by half of the range.
    TensorRT reads only such. The new tensors are in the file itself.

    Args:
        data: A model that `read_graph_file` accepts.
        folder: The folder of its external data.
    """
    read: set[str] = set()

    def node(data: bytes) -> bytes:
        kind = next((_text(value) for number, value in _fields(data) if number == _NODE_KIND), "")
        attributes = [_message(v) for number, v in _fields(data) if number == _NODE_ATTRIBUTE]
        names = [_text(v) for one in attributes for n, v in _fields(one) if n == _ATTRIBUTE_NAME]
        if kind == "DequantizeLinear" and "block_size" in names:
            inputs = [_text(value) for number, value in _fields(data) if number == _NODE_INPUT]
            read.update(inputs[::2])
        return data

    def tensor(data: bytes) -> bytes:
        fields = [(number, value) for number, value in _fields(data)]
        kind = next((value for number, value in fields if number == _TENSOR_TYPE), 0)
        if _tensor_name(data) not in read or kind not in _SIGNED:
            return data
        signed, turned = _SIGNED[int(kind)]
        numbers = bytes(byte ^ turned for byte in _tensor_bytes(data, folder))
        moved = (_TENSOR_TYPE, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION)
        kept = [_encode(number, value) for number, value in fields if number not in moved]
        return b"".join([*kept, _encode(_TENSOR_TYPE, signed), _encode(_TENSOR_RAW, numbers)])

    _rewrite(data, (_MODEL_GRAPH, _GRAPH_NODE), node)
    return _rewrite(data, (_MODEL_GRAPH, _GRAPH_INITIALIZER), tensor)


def _tensor_bytes(data: bytes, folder: Path) -> bytes:
    """The raw data of a tensor's message."""
    found = GraphFile()
    _read_tensor(data, found)
    if not found.externals:
        return next((_message(v) for number, v in _fields(data) if number == _TENSOR_RAW), b"")
    [external] = found.externals
    with (folder / external.location).open("rb") as file:
        file.seek(external.offset)
        return file.read(-1 if external.length is None else external.length)


def _rewrite(data: bytes, path: Sequence[int], change: Callable[[bytes], bytes]) -> bytes:
    """The same message with `change` applied to every message at a path of field numbers."""
    if not path:
        return change(data)
    parts = []
    for number, value in _fields(data):
        if number == path[0]:
            value = _rewrite(_message(value), path[1:], change)
        parts.append(_encode(number, value))
    return b"".join(parts)


def _node_names(data: bytes) -> tuple[set[str], set[str]]:
    """The names of a node's inputs, those of its subgraphs included, and of its outputs."""
    inputs: set[str] = set()
    outputs: set[str] = set()
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            inputs.add(_text(value))
        elif number == _NODE_OUTPUT:
            outputs.add(_text(value))
        elif number == _NODE_ATTRIBUTE:
            for inner, graph in _fields(_message(value)):
                if inner in (_ATTRIBUTE_G, _ATTRIBUTE_GRAPHS):
                    inputs |= _graph_names(_message(graph))
    return inputs, outputs - {""}


def _graph_names(data: bytes) -> set[str]:
    """All names of inputs of a subgraph's nodes and of its outputs, outer names included."""
    names: set[str] = set()
    for number, value in _fields(data):
        if number == _GRAPH_NODE:
            names |= _node_names(_message(value))[0]
        elif number == _GRAPH_OUTPUT:
            names.add(_name_of_value(_message(value)))
    return names


def _tensor_name(data: bytes) -> str:
    return next((_text(value) for number, value in _fields(data) if number == _TENSOR_NAME), "")


def _encode(number: int, value: int | bytes) -> bytes:
    """One field of a message. Models have no fixed-width fields at the levels rewritten here."""
    if isinstance(value, int):
        return _encode_varint(number << 3) + _encode_varint(value)
    return _encode_varint(number << 3 | 2) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
