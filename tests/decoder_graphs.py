"""The graphs of `tests.decoder_toys`, node by node: opset 20, no operator of an engine's own, token
states in the form ``append``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeexit.bundle.manifest import (
    LENGTHS,
    Component,
    PromptState,
    Tensor,
    TokenState,
    Variant,
)
from tests.toys import SCORE_NAMES, score_constants, score_nodes

if TYPE_CHECKING:
    from tests.decoder_toys import DecoderToy

WIDTH, HEAD, HIDDEN, VOCABULARY = 8, 4, 12, 24
PIXELS, FEATURES, SEEN = 3, 2, 5
"""Numbers of an image, tokens that stand for it, width of the tower's states."""
MEAN = 6
"""Width of what the layer without keys and values reads of the prompt."""
LAYERS, ENCODERS = 4, 3
STATELESS = 2
"""The layer that may have no attention."""
SOURCE = 12
"""The longest text that the encoder takes."""
IMAGE, START = 1, 2
"""The placeholder token of images, and what a text begins with that an encoder prompts."""

POSITIONS = Tensor(name="positions", dtype="int64", axes=["batch", "new"])
IMAGE_MASK = Tensor(name="tokens/image", dtype="bool", axes=["batch", "new"])
EMBEDDED = Tensor(name="embedded", dtype="float32", axes=["batch", "new", WIDTH])
SOURCE_MASK = Tensor(name="source_mask", dtype="int64", axes=["batch", "source"])
SOURCE_EMBEDDED = Tensor(name="source_embedded", dtype="float32", axes=["batch", "source", WIDTH])
ENCODER_STATE = Tensor(name="encoder_state", dtype="float32", axes=["batch", "source", WIDTH])
PIXEL_VALUES = Tensor(name="pixel_values", dtype="float32", axes=["batch", PIXELS])
IMAGE_FEATURES = Tensor(name="features", dtype="float32", axes=["batch", FEATURES, WIDTH])
PROMPT_MEAN = Tensor(name="prompt_mean", dtype="float32", axes=["batch", MEAN])
OWN_MEAN = Tensor(name="own_mean", dtype="float32", axes=["batch", MEAN])
"""The same, made in the run of the component that reads it."""
ANSWERS = [
    Tensor(name="token", dtype="int64", axes=["batch"]),
    Tensor(name="logits", dtype="float32", axes=["batch", VOCABULARY]),
]

_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
_MASKED = -1e9
EPSILON = 0.1
"""Added to the mean square that states are divided by."""


class Store:
    """The weight store: every array once, wherever it is used.

    Attributes:
        places: Name of an array -> where it begins.
    """

    def __init__(self, weights: Mapping[str, NDArray]) -> None:
        self.places: dict[str, int] = {}
        self.bytes = bytearray()
        self._weights = weights
        for name, array in weights.items():
            self.places[name] = len(self.bytes)
            self.bytes += array.tobytes()

    def external(self, name: str) -> TensorProto:
        """An array as an initializer whose data is in the store."""
        array = self._weights[name]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": "weights.bin", "offset": self.places[name], "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """A graph being written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.lengths: list[str] = []
        self.states: list[TokenState | PromptState] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; returns its output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def weight(self, name: str) -> str:
        """An array of the store."""
        self.initializers.setdefault(name, self._store.external(name))
        return name

    def number(self, value: float | int | Sequence[int]) -> str:
        """A constant: float32, or int64."""
        kind = TensorProto.FLOAT if isinstance(value, float) else TensorProto.INT64
        values = list(value) if isinstance(value, Sequence) else [value]
        dims = [len(values)] if isinstance(value, Sequence) else []
        name = f"constant_{len(dims)}_{'_'.join(map(str, values))}"
        self.initializers.setdefault(name, helper.make_tensor(name, kind, dims, values))
        return name

    def take(self, tensor: Tensor) -> str:
        """An input of the graph."""
        self.inputs[tensor.name] = tensor
        return tensor.name

    def length(self, kind: str) -> str:
        """The input of lengths of a kind."""
        dtype, axes = LENGTHS[kind]
        if kind not in self.lengths:
            self.lengths.append(kind)
        row_axis = 0 if axes else None
        name = f"lengths/{kind}"
        return self.take(Tensor(name=name, dtype=dtype, axes=[*axes], row_axis=row_axis))  # type: ignore[arg-type]

    def give(self, tensor: Tensor, value: str) -> None:
        """An output of the graph."""
        self.nodes.append(helper.make_node("Identity", [value], [tensor.name]))
        self.outputs[tensor.name] = tensor

    def linear(self, state: str, weight: str) -> str:
        """``state @ weight``."""
        return self.op("MatMul", state, self.weight(weight))

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        """The tensor with new axes of size 1."""
        return self.op("Unsqueeze", tensor, self.number(axes))

    def count(self, tensor: str, axis: int) -> str:
        """``0, 1, ...`` up to the size of a tensor's axis."""
        size = self.op("Shape", tensor, start=axis, end=axis + 1)
        size = self.op("Squeeze", size, self.number([0]))
        return self.op("Range", self.number(0), size, self.number(1))

    def sum(self, tensor: str, axes: Sequence[int]) -> str:
        """The sum over some axes, which are gone then."""
        return self.op("ReduceSum", tensor, self.number(axes), keepdims=0)

    def attend(self, query: str, pieces: Sequence[tuple[str, str, str]]) -> str:
        """Attention of ``[batch, new, HEAD]`` to pieces, each of them keys and values ``[batch, 1,
        *, HEAD]`` and a mask that goes with ``[batch, 1, new, *]``."""
        query = self.unsqueeze(query, 1)
        scores = []
        for keys, _, mask in pieces:
            product = self.op("MatMul", query, self.op("Transpose", keys, perm=[0, 1, 3, 2]))
            scaled = self.op("Mul", product, self.number(HEAD**-0.5))
            scores.append(self.op("Where", mask, scaled, self.number(_MASKED)))
        weights = self.op("Softmax", self.op("Concat", *scores, axis=-1), axis=-1)
        values = self.op("Concat", *(values for _, values, _ in pieces), axis=2)
        return self.op("Squeeze", self.op("MatMul", weights, values), self.number([1]))

    def signature(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs that are neither states nor lengths."""
        own = {f"lengths/{kind}" for kind in self.lengths}
        for state in self.states:
            if isinstance(state, TokenState):
                own |= {state.past, state.present}
            else:
                own |= {state.tensor.name, state.made or ""}
        return (
            [tensor for name, tensor in self.inputs.items() if name not in own],
            [tensor for name, tensor in self.outputs.items() if name not in own],
        )

    def save(self, path: Path) -> None:
        """Writes the graph."""
        inputs, outputs = (
            [helper.make_tensor_value_info(t.name, _ONNX_TYPES[t.dtype], t.axes) for t in tensors]
            for tensors in (self.inputs.values(), self.outputs.values())
        )
        constants = list(self.initializers.values())
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, constants)
        opset = helper.make_opsetid("", 20)
        model = helper.make_model(graph, ir_version=10, opset_imports=[opset])
        path.write_bytes(model.SerializeToString())


def token_states(name: str) -> list[TokenState]:
    """Keys and values of a layer."""
    return [
        TokenState(
            name=f"{name}/{kind}",
            dtype="float32",
            axes=["batch", 1, "past", HEAD],
            past=f"past/{name}/{kind}",
            present=f"present/{name}/{kind}",
        )
        for kind in ("keys", "values")
    ]


def cross_tensors(name: str) -> list[Tensor]:
    """Keys and values of a layer, made of what the encoder hands on."""
    axes: list[str | int | None] = ["batch", 1, "source", HEAD]
    return [
        Tensor(name=f"{name}/cross_{kind}", dtype="float32", axes=axes)
        for kind in ("keys", "values")
    ]


class Components:
    """Writes the graphs of a toy's components into a folder.

    Attributes:
        found: What the manifest says of them, by name, once they are written.
    """

    def __init__(self, toy: DecoderToy, folder: Path) -> None:
        self._toy, self._folder = toy, folder
        self.store = Store(toy.weights)
        self.found: dict[str, Component] = {}

    def write(self) -> dict[str, Component]:
        """Writes all of them."""
        toy = self._toy
        self._folder.mkdir(exist_ok=True)
        (self._folder / "weights.bin").write_bytes(bytes(self.store.bytes))
        for number in range(len(toy.layers)):
            self._segment(number)
            if toy.encoder and any(map(toy.attends, toy.layers_of(number))):
                attending = filter(toy.attends, toy.layers_of(number))
                self._cross_maker(f"cross_{number}", [f"layer{layer}" for layer in attending])
        self._head()
        if toy.adapter is not None:
            self._adapter()
        if toy.stateless and not toy.own_mean:
            self._mean_maker()
        if toy.gate:
            self._gate()
        self._unsplit()
        if toy.prefix:
            self._vision()
        if toy.encoder:
            self._encoder()
        return self.found

    def _add(self, name: str, graph: Graph, projection: Variant | None = None) -> None:
        """Writes a component's graph."""
        inputs, outputs = graph.signature()
        self.found[name] = Component(
            variants=[self._variant(name, graph)],
            inputs=inputs,
            outputs=outputs,
            states=graph.states,
            projections=[] if projection is None else [projection],
        )

    def _variant(self, name: str, graph: Graph) -> Variant:
        graph.save(self._folder / f"{name}.onnx")
        return Variant(graph=f"graphs/{name}.onnx", lengths=graph.lengths)  # type: ignore[arg-type]

    def _state(self, number: int) -> Tensor:
        """What comes into a component."""
        if number == 0:
            return EMBEDDED
        return Tensor(name=f"h{number - 1}", dtype="float32", axes=["batch", "new", WIDTH])

    def _begin(self, number: int, layers: Sequence[int]) -> tuple[Graph, str]:
        """A graph that takes what a component takes, if it has these layers; and its state."""
        graph = Graph(self.store)
        state = graph.take(self._state(number))
        if any(map(self._toy.attends, layers)):
            graph.take(POSITIONS)
            if self._toy.encoder:
                graph.take(SOURCE_MASK)
        return graph, state

    def _segment(self, number: int) -> None:
        layers = self._toy.layers_of(number)
        graph, state = self._begin(number, layers)
        before = self._layers(graph, layers[:-1], state, f"s{number}")
        after = self._layers(graph, layers[-1:], before, f"s{number}")
        graph.give(self._state(number + 1), after)
        if self._toy.saturated and number in self._toy.stops.values():
            axes: list[str | int | None] = ["batch", "new"]
            score = Tensor(name=f"s{number}/saturation", dtype="float32", axes=axes)
            graph.give(score, _cosine(graph, before, after, [2]))
        projection = None
        if number and self._toy.projections and any(map(self._toy.attends, layers)):
            projection = self._projection(number, layers)
        self._add(f"s{number}", graph, projection)

    def _projection(self, number: int, layers: Sequence[int]) -> Variant:
        """What the component keeps of tokens that skip it: all of its layers see one state."""
        graph, state = self._begin(number, layers)
        for layer in filter(self._toy.attends, layers):
            name = f"layer{layer}"
            _keep(graph, name, _placed(graph, name, state))
        return self._variant(f"s{number}_projection", graph)

    def _layers(self, graph: Graph, layers: Sequence[int], state: str, component: str) -> str:
        """Layers of the decoder on top of each other, in a component."""
        for layer in layers:
            name = f"layer{layer}"
            if not self._toy.attends(layer):
                maker = component if self._toy.own_mean else "mean"
                state = _mean_layer(graph, name, state, maker)
                continue
            state = _self_attention(graph, name, state)
            if self._toy.encoder:
                state = _cross_attention(
                    graph, name, state, f"cross_{self._toy.component_of(layer)}"
                )
            state = _feed_forward(graph, name, state)
        return state

    def _cross_maker(self, maker: str, layers: Sequence[str]) -> None:
        graph = Graph(self.store)
        state = graph.take(ENCODER_STATE)
        for name in layers:
            for tensor, kind in zip(cross_tensors(name), ("key", "value"), strict=True):
                made = graph.linear(state, f"{name}/cross_{kind}")
                graph.give(tensor, graph.unsqueeze(made, 1))
        self._add(maker, graph)

    def _mean_maker(self) -> None:
        """The mean of the states of the prompt's tokens that come into the layer without keys."""
        graph = Graph(self.store)
        state = graph.take(self._state(self._toy.component_of(STATELESS)))
        mean = _mean_of(graph, state, _of_prompt(graph, state))
        graph.give(PROMPT_MEAN, graph.linear(mean, "mean"))
        self._add("mean", graph)

    def _gate(self) -> None:
        """A score of the mean state of the prompt's tokens that are text."""
        graph = Graph(self.store)
        state = graph.take(Tensor(name="state", dtype="float32", axes=["batch", "new", WIDTH]))
        text = graph.op("Not", graph.take(IMAGE_MASK))
        mean = _mean_of(graph, state, graph.op("And", _of_prompt(graph, state), text))
        score = graph.op("Sigmoid", graph.linear(mean, "gate"))
        tensor = Tensor(name="gate/score", dtype="float32", axes=["batch"])
        graph.give(tensor, graph.op("Squeeze", score, graph.number([1])))
        self._add("gate", graph)

    def _adapter(self) -> None:
        """A layer of its own, which attends to what came by its exit."""
        graph = Graph(self.store)
        tensor = Tensor(name="state", dtype="float32", axes=["batch", "new", WIDTH])
        state = _self_attention(graph, "adapter", graph.take(tensor))
        if self._toy.adapter_reads:
            state = _cross_attention(graph, "adapter", state, "cross_adapter")
            self._cross_maker("cross_adapter", ["adapter"])
        made = Tensor(name="adapted", dtype="float32", axes=["batch", "new", WIDTH])
        graph.give(made, _feed_forward(graph, "adapter", state))
        self._add("adapter", graph)

    def _head(self) -> None:
        """Token, logits and scores of chosen tokens, for all exits."""
        graph = Graph(self.store)
        state = graph.take(Tensor(name="state", dtype="float32", axes=["batch", WIDTH]))
        logits = _answer(graph, state, "head/{}")
        graph.nodes += score_nodes(logits, "head/{}")
        graph.initializers |= {one.name: one for one in score_constants(VOCABULARY)}
        for name in SCORE_NAMES:
            tensor = Tensor(name=f"head/{name}", dtype="float32", axes=["batch"])
            graph.outputs[tensor.name] = tensor
        self._add("head", graph)

    def _unsplit(self) -> None:
        """All layers, and the answer for the last place. Where a layer reads a mean of what comes
        into it, that is made between two graphs."""
        number, layers = 0, list(range(LAYERS))
        if self._toy.stateless and not self._toy.own_mean:
            number, front = self._toy.component_of(STATELESS), layers[:STATELESS]
            graph, state = self._begin(0, front)
            state = self._layers(graph, front, state, "unsplit_front")
            graph.give(self._state(number), state)
            self._add("unsplit_front", graph)
            layers = layers[STATELESS:]
        graph, state = self._begin(number, layers)
        state = self._layers(graph, layers, state, "unsplit")
        _answer(graph, graph.op("Gather", state, graph.number(-1), axis=1), "{}")
        self._add("unsplit", graph)

    def _vision(self) -> None:
        states = [
            Tensor(name=f"seen{number}", dtype="float32", axes=["batch", FEATURES, SEEN])
            for number in range(2)
        ]
        graph = Graph(self.store)
        graph.give(states[0], _look(graph, graph.take(PIXEL_VALUES)))
        self._add("v0", graph)
        graph = Graph(self.store)
        graph.give(states[1], _look_again(graph, graph.take(states[0])))
        self._add("v1", graph)
        graph = Graph(self.store)
        state = Tensor(name="state", dtype="float32", axes=["batch", FEATURES, SEEN])
        seen = graph.op("Abs", graph.take(state))
        confidence = Tensor(name="projector/confidence", dtype="float32", axes=["batch"])
        features = Tensor(
            name="projector/features", dtype="float32", axes=["batch", FEATURES, WIDTH]
        )
        graph.give(features, graph.linear("state", "projector"))
        graph.give(confidence, graph.op("ReduceMean", seen, graph.number([1, 2]), keepdims=0))
        self._add("projector", graph)
        graph = Graph(self.store)
        made = _look_again(graph, _look(graph, graph.take(PIXEL_VALUES)))
        graph.give(IMAGE_FEATURES, graph.linear(made, "projector"))
        self._add("vision_unsplit", graph)

    def _encoder(self) -> None:
        taken = SOURCE_EMBEDDED
        for number in range(ENCODERS):
            graph = Graph(self.store)
            made = _read(graph, number, graph.take(taken))
            saturation = Tensor(name=f"e{number}/saturation", dtype="float32", axes=["batch"])
            graph.give(saturation, _saturation(graph, taken.name, made))
            axes: list[str | int | None] = ["batch", "source", WIDTH]
            taken = Tensor(name=f"read{number}", dtype="float32", axes=axes)
            graph.give(taken, made)
            self._add(f"e{number}", graph)
        graph = Graph(self.store)
        state = graph.take(SOURCE_EMBEDDED)
        for number in range(ENCODERS):
            state = _read(graph, number, state)
        graph.give(ENCODER_STATE, state)
        self._add("encoder_unsplit", graph)


def _placed(graph: Graph, name: str, state: str) -> str:
    """States with the layer's own positions added."""
    places = graph.op("Gather", graph.weight(f"{name}/positions"), graph.take(POSITIONS), axis=0)
    return graph.op("Add", _norm(graph, state), places)


def _norm(graph: Graph, state: str) -> str:
    """States divided by their root mean square."""
    square = graph.op("Mul", state, state)
    mean = graph.op("ReduceMean", square, graph.number([-1]), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.number(EPSILON)))
    return graph.op("Div", state, root)


def _keep(graph: Graph, name: str, seen: str) -> list[str]:
    """Keys and values of new tokens, which the graph gives; ``[batch, 1, new, HEAD]``."""
    made = []
    for state, kind in zip(token_states(name), ("key", "value"), strict=True):
        new = graph.unsqueeze(graph.linear(seen, f"{name}/{kind}"), 1)
        axes = ["new" if axis == "past" else axis for axis in state.axes]
        graph.give(Tensor(name=state.present, dtype="float32", axes=axes), new)
        made.append(new)
    return made


def _self_attention(graph: Graph, name: str, state: str) -> str:
    """Attention to what is kept and to the new tokens before and at each; adds its result."""
    seen = _placed(graph, name, state)
    own = token_states(name)
    graph.states += own
    keys, values = (
        graph.take(Tensor(name=one.past, dtype="float32", axes=one.axes)) for one in own
    )
    counts = graph.unsqueeze(graph.length("past"), 1)
    there = graph.unsqueeze(graph.op("Less", graph.count(keys, 2), counts), 1, 2)
    numbers = graph.count(state, 1)
    causal = graph.op("LessOrEqual", numbers, graph.unsqueeze(numbers, 1))
    new_keys, new_values = _keep(graph, name, seen)
    pieces = [(keys, values, there), (new_keys, new_values, causal)]
    mixed = graph.attend(graph.linear(seen, f"{name}/query"), pieces)
    return graph.op("Add", state, graph.linear(mixed, f"{name}/out"))


def _cross_attention(graph: Graph, name: str, state: str, maker: str) -> str:
    """Attention to what the encoder handed on; adds its result."""
    keys, values = cross_tensors(name)
    graph.states += [PromptState(tensor=tensor, maker=maker) for tensor in (keys, values)]
    pieces = [(graph.take(keys), graph.take(values), _source_mask(graph))]
    query = graph.linear(_norm(graph, state), f"{name}/cross_query")
    mixed = graph.attend(query, pieces)
    return graph.op("Add", state, graph.linear(mixed, f"{name}/cross_out"))


def _feed_forward(graph: Graph, name: str, state: str, more: str = "") -> str:
    up = graph.linear(_norm(graph, state), f"{name}/up")
    up = graph.op("Add", up, more) if more else up
    made = graph.linear(graph.op("Tanh", up), f"{name}/down")
    return graph.op("Add", state, made)


def _mean_layer(graph: Graph, name: str, state: str, maker: str) -> str:
    """The layer without attention, in the component that makes its mean or in another."""
    given = graph.take(PROMPT_MEAN)
    if maker == "mean":
        graph.states.append(PromptState(tensor=PROMPT_MEAN, maker=maker))
    else:
        made = graph.linear(_mean_of(graph, state, _of_prompt(graph, state)), "mean")
        begins = graph.op("Greater", graph.unsqueeze(graph.length("prompt"), 1), graph.number(0))
        given = graph.op("Where", begins, made, given)
        graph.give(OWN_MEAN, given)
        state_of = PromptState(tensor=PROMPT_MEAN, maker=maker, made=OWN_MEAN.name)
        graph.states.append(state_of)
    mean = graph.linear(given, f"{name}/mean")
    return _feed_forward(graph, name, state, graph.unsqueeze(mean, 1))


def _of_prompt(graph: Graph, state: str) -> str:
    """Which new tokens are of the prompt, ``[batch, new]``."""
    counts = graph.unsqueeze(graph.length("prompt"), 1)
    return graph.op("Less", graph.count(state, 1), counts)


def _mean_of(graph: Graph, state: str, chosen: str) -> str:
    """The mean state of chosen tokens, ``[batch, WIDTH]``."""
    kept = graph.op("Where", graph.unsqueeze(chosen, 2), state, graph.number(0.0))
    count = graph.sum(graph.op("Cast", graph.unsqueeze(chosen, 2), to=TensorProto.FLOAT), [1])
    return graph.op("Div", graph.sum(kept, [1]), graph.op("Max", count, graph.number(1.0)))


def _answer(graph: Graph, state: str, pattern: str) -> str:
    """Token and logits of states ``[batch, WIDTH]``, under names that the pattern makes."""
    logits = graph.linear(_norm(graph, state), "head")
    token = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    for tensor, value in zip(ANSWERS, (token, logits), strict=True):
        name = pattern.format(tensor.name)
        graph.give(Tensor(name=name, dtype=tensor.dtype, axes=tensor.axes), value)
    return pattern.format("logits")


def _look(graph: Graph, pixels: str) -> str:
    state = graph.op("Tanh", graph.linear(pixels, "pixels"))
    return graph.op("Reshape", state, graph.number([-1, FEATURES, SEEN]))


def _look_again(graph: Graph, state: str) -> str:
    return graph.op("Tanh", graph.linear(state, "tower"))


def _source_mask(graph: Graph) -> str:
    """Which places of a source are no padding, ``[batch, 1, 1, source]``."""
    mask = graph.op("Cast", graph.take(SOURCE_MASK), to=TensorProto.BOOL)
    return graph.unsqueeze(mask, 1, 2)


def _read(graph: Graph, number: int, state: str) -> str:
    """A layer of the encoder: every place attends to all that are no padding."""
    name = f"encoder{number}"
    places = graph.op("Gather", graph.weight(f"{name}/positions"), graph.count(state, 1), axis=0)
    seen = graph.op("Add", _norm(graph, state), places)
    query, keys, values = (graph.linear(seen, f"{name}/{k}") for k in ("query", "key", "value"))
    pieces = [(graph.unsqueeze(keys, 1), graph.unsqueeze(values, 1), _source_mask(graph))]
    mixed = graph.attend(query, pieces)
    return _feed_forward(graph, name, graph.op("Add", state, graph.linear(mixed, f"{name}/out")))


def _saturation(graph: Graph, before: str, after: str) -> str:
    """Cosine of two states over the places that are no padding, ``[batch]``."""
    mask = graph.op("Cast", graph.take(SOURCE_MASK), to=TensorProto.FLOAT)
    kept = [graph.op("Mul", one, graph.unsqueeze(mask, 2)) for one in (before, after)]
    return _cosine(graph, *kept, [1, 2])


def _cosine(graph: Graph, one: str, other: str, axes: list[int]) -> str:
    """Cosine of two tensors over some axes."""
    products = [(one, other), (one, one), (other, other)]
    inner, *squares = (graph.sum(graph.op("Mul", a, b), axes) for a, b in products)
    return graph.op("Div", inner, graph.op("Sqrt", graph.op("Mul", *squares)))


__all__ = ["ANSWERS", "Components", "Graph", "Store"]
