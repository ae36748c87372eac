"""The contract of a model: what the exporter needs to know of it, and all it knows.

A `SplitModel` is a bundle's manifest with torch modules in the place of graphs: components, the
chains that run them, and the steps of the program, the last two in the manifest's own structs. The
classes of `edgeexit.export.exits` return one; a user's own model does the same through ``edgeexit
export -m module:function``. `edgeexit.export.describe` checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from edgeexit.bundle.manifest import (
    LENGTHS,
    Chain,
    Decoding,
    Exit,
    Gather,
    Place,
    Preprocessing,
    PromptState,
    Run,
    StateForm,
    Tensor,
    TokenState,
    When,
)
from edgeexit.errors import ExportError

Length = Literal["past", "last", "most", "prompt"]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One of the layers of a `Stack`.

    Attributes:
        module: ``forward(state, *own, *shared)`` returns ``(state, *made)``. Layers that compute
            alike have one module in common, which is traced once.
        weights: What is the layer's own: parameters and buffers, by their names in the module.
    """

    module: nn.Module
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Stack:
    """Layers on top of each other, in the pieces that they are exported in.

    Attributes:
        entry: ``forward(*inputs)`` returns ``(state, *shared)``: the first state, and what all
            layers share (masks, rotations).
        state: What goes from layer to layer.
        shared: What they share.
        layers: From the first to the last.
        head: ``forward(state)`` gives the outputs; None if that is the state itself.
    """

    entry: nn.Module
    state: Tensor
    shared: tuple[Tensor, ...]
    layers: Sequence[Layer]
    head: nn.Module | None = None


@dataclass(frozen=True)
class Form:
    """One way to write the graph of a component, for engines that offer every feature in
    `requires`.

    Attributes:
        body: A module, which is traced whole, or a `Stack`, which is traced layer by layer.
            ``forward(*inputs, *lengths, *states)`` of a module returns ``(*outputs, *present)``; a
            token state enters as its past. The entry of a stack takes ``(*inputs, *lengths)`` and
            the first state, whose past says how much it can hold; each layer takes its share of the
            states and makes its share of the present ones.
        requires, states, lengths: As in `edgeexit.bundle.manifest.Variant`.
        opset: The lowest ONNX opset that its graph can have.
    """

    body: nn.Module | Stack
    requires: tuple[str, ...] = ()
    states: StateForm = "append"
    lengths: tuple[Length, ...] = ()
    opset: int = 18


@dataclass(frozen=True)
class Component:
    """Everything that runs is one: a segment, a head, an adapter, a gate, the unsplit model.

    Attributes:
        name: Unique in the model; the graph's file name.
        inputs, outputs: Tensors besides states and lengths. The exporter adds what it derives from
            class logits (`SplitModel`).
        forms: Fastest first; the last one runs on every engine.
        states: What it keeps of every token, or reads of a prompt.
        projection: Layers that take nothing of their own and make of the state that comes in what
            the token states keep: for tokens that skip the component (``approximate`` decoding).
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    forms: tuple[Form, ...]
    states: tuple[TokenState | PromptState, ...] = ()
    projection: Stack | None = None

    @property
    def token_states(self) -> list[TokenState]:
        """The states that grow with every token."""
        return [state for state in self.states if isinstance(state, TokenState)]

    def taken(self, form: Form) -> tuple[list[Tensor], list[Tensor]]:
        """What a form's graph takes: inputs and lengths, and the states."""
        lengths = [length(kind, f"lengths/{kind}") for kind in form.lengths]
        states = [
            _tensor(state, state.past, "past") if isinstance(state, TokenState) else state.tensor
            for state in self.states
        ]
        return [*self.inputs, *lengths], states

    def present(self, form: StateForm) -> list[Tensor]:
        """What a graph gives of the token states: what is ``new``, or whole ones (``past``)."""
        grown = "new" if form == "append" else "past"
        return [_tensor(state, state.present, grown) for state in self.token_states]


def length(kind: Length, name: str) -> Tensor:
    """A graph's input of one of the kinds of `edgeexit.bundle.manifest.LENGTHS`."""
    dtype, axes = LENGTHS[kind]
    return Tensor(name=name, dtype=dtype, axes=list(axes), row_axis=0 if axes else None)  # type: ignore[arg-type]


def _tensor(state: TokenState, name: str, grown: str) -> Tensor:
    axes = [grown if axis == "past" else axis for axis in state.axes]
    return Tensor(name=name, dtype=state.dtype, axes=axes, row_axis=state.row_axis)


@dataclass(frozen=True)
class Table:
    """A step that looks ids up in a table: an embedding, whose rows the runtime gathers.

    Attributes:
        ids: The tensor of ids.
        output: What is found, ``[batch, new, width]``.
        weight: The table, ``[size, width]``.
        when: As in `edgeexit.bundle.manifest.Gather`.
    """

    ids: str
    output: Tensor
    weight: torch.Tensor
    when: When = "token"

    def step(self, offset: int) -> Gather:
        """The manifest's step, for a table that begins at this byte of the store."""
        size = self.weight.shape[0]
        return Gather(ids=self.ids, output=self.output, size=size, offset=offset, when=self.when)


@dataclass(frozen=True)
class SplitModel:
    """A model that can be split.

    An exit whose outputs have ``logits`` ``[batch, classes]`` gets the scores that follow from them
    (`edgeexit.bundle.manifest.SCORES`): the exporter adds them to the graph, and ``token``, the
    greedy one, where a chain's outputs have it and no module makes it. `scores` of a contract's
    exit are further ones that a module computes itself.

    Attributes:
        name: For people; the bundle's name.
        task: e.g. ``text-classification``.
        inputs: What a caller gives. The symbolic axes of all tensors are those of the inputs and of
            the token states.
        components: In an order in which each comes behind those that make what it takes.
        chains, steps: As in the manifest; the last chain that runs gives the answer.
        example: ``example(rows)`` makes a realistic input of that many rows, ``{name: tensor}``. It
            is what reference samples are computed from.
        reference: ``reference(inputs)`` gives, per exit, logits ``[rows, seq, classes]`` of every
            token of an example. None: the modules are run one after the other.
        decoding: How it writes text, if it does; the tokenizer's own stop token is added.
        limits: Symbolic axis (or ``positions``) -> the largest size that the model was made for.
        float32: Modules that overflow in half precision, by the last part of their names
            (transformers' ``_keep_in_fp32_modules``): there they compute in float32, and what
            components hand on, to which their outputs were added, is float32.
        tokenizer: What stands in a ``tokenizer.json``, for text preprocessing.
        tokenizer_folder: Where a tokenizer's files and chat templates are, if there are any.
        preprocessing_sample: Raw data and what the model's own preprocessing makes of it, so that a
            device can check that it does the same: ``image`` uint8 ``[height, width(, 3)]``, or
            ``text`` strings ``[n]``; and ``expected/<input>`` for every input.
    """

    name: str
    task: str
    inputs: tuple[Tensor, ...]
    components: Sequence[Component]
    chains: Mapping[str, Chain]
    steps: Sequence[Run | Table | Place]
    example: Callable[[int], Values]
    reference: Callable[[Values], Values] | None = None
    decoding: Decoding | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    tokenizer: bytes | None = None
    tokenizer_folder: str | None = None
    preprocessing_sample: Mapping[str, np.ndarray] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def component(self, name: str) -> Component:
        """A component by its name."""
        for component in self.components:
            if component.name == name:
                return component
        raise ExportError(
            f"{self.name}: there is no component {name}",
            fix=f"The model has {', '.join(component.name for component in self.components)}.",
        )

    @property
    def last_chain(self) -> Chain:
        """The chain that answers: of the last step that runs one."""
        runs = [step.chain for step in self.steps if isinstance(step, Run)]
        return self.chains[runs[-1]]


def exit_giver(exit_: Exit) -> str:
    """The component that gives an exit's answer."""
    return exit_.path[-1].component if exit_.path else exit_.behind
