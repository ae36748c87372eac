"""The contract between a model and the exporter: `SplitModel`, everything that the exporter knows
of a model.

A `SplitModel` is a bundle's manifest with torch modules instead of graphs: components, the chains
that run them, and the steps of the program. Chains and steps are the manifest's own structs. The
classes of `edgeexit.export.exits` return a `SplitModel`; for a model of your own, a function does
(``edgeexit export -m module:function``). `edgeexit.export.describe` checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
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
from edgeexit.export.stored_blocks import StoredRows

Length = Literal["past", "last", "most", "prompt"]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer of a `Stack`.

    Attributes:
        module: ``forward(state, *states, *shared)`` returns ``(state, *updated)``. Layers that
            compute the same share one module, which is traced once.
        weights: The layer's parameters and buffers, by their names in the module.
        shared: Names of the stack's shared tensors that it takes.
        states: How many of the component's states it takes.
        updated: How many of the updated states it returns.
    """

    module: nn.Module
    weights: Mapping[str, torch.Tensor]
    shared: tuple[str, ...] = ()
    states: int = 0
    updated: int = 0


@dataclass(frozen=True)
class Stack:
    """A stack of layers, in the pieces that are traced.

    Attributes:
        entry: ``forward(*inputs)`` returns ``(state, *shared)``: the first state, and the tensors
            that all layers share (masks, rotations).
        state: The tensor passed from layer to layer.
        shared: The shared tensors.
        layers: From the first to the last.
        head: ``forward(state)`` returns the outputs; None if the state is the output.
        closing: ``forward(before, state)`` of the last layer's input and output returns the outputs
            behind the state, of a stack without a head; None: there are none.
    """

    entry: nn.Module
    state: Tensor
    shared: tuple[Tensor, ...]
    layers: Sequence[Layer]
    head: nn.Module | None = None
    closing: nn.Module | None = None


@dataclass(frozen=True)
class Form:
    """One form of a component's graph, for engines that have every feature in `requires`.

    Attributes:
        body: A module, which is traced whole, or a `Stack`, which is traced layer by layer.
            ``forward(*inputs, *lengths, *states)`` of a module returns ``(*outputs, *present)``,
            where a token state is given by its past; prompt states that the component makes itself
            are among the present ones. The entry of a stack takes ``(*inputs, *lengths)`` and the
            past of the first token state, if there is one, whose shape has the capacity; each layer
            takes its share of the states and returns its share of the present states.
        requires, states, lengths: As in `edgeexit.bundle.manifest.Variant`.
        opset: Lowest ONNX opset of its graph.
    """

    body: nn.Module | Stack
    requires: tuple[str, ...] = ()
    states: StateForm = "append"
    lengths: tuple[Length, ...] = ()
    opset: int = 18


@dataclass(frozen=True)
class Component:
    """A part of the model that runs: a segment, a head, an adapter, a gate, the unsplit model.

    Attributes:
        name: Unique in the model; also the name of the graph's file.
        inputs, outputs: Tensors, without states and lengths. The exporter adds the outputs that
            follow from class logits (`SplitModel`).
        forms: Fastest first; the last form runs on every engine.
        states: What the component stores per token, or reads of a prompt.
        projection: Layers that compute the token states from the component's input only, for tokens
            that skip the component (``approximate`` decoding). That of an adapter must give what
            the component gives: prompt tokens that nobody asks pass by it.
        scored: The output that scores are computed from, instead of the exit's logits: those of a
            draft vocabulary, which the exit's logits have among -inf. A module computes ``token``.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    forms: tuple[Form, ...]
    states: tuple[TokenState | PromptState, ...] = ()
    projection: Stack | None = None
    scored: str | None = None

    @property
    def token_states(self) -> list[TokenState]:
        """The states that grow with every token."""
        return [state for state in self.states if isinstance(state, TokenState)]

    def taken(self, form: Form) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of a form's graph: inputs and lengths, and the states."""
        lengths = [length(kind, f"lengths/{kind}") for kind in form.lengths]
        states = [
            _tensor(state, state.past, "past") if isinstance(state, TokenState) else state.tensor
            for state in self.states
        ]
        return [*self.inputs, *lengths], states

    def present(self, form: StateForm) -> list[Tensor]:
        """States that a graph returns: of token states the ``new`` entries, or the whole state
        (``past``), and prompt states that it makes itself."""
        grown = "new" if form == "append" else "past"
        return [
            _tensor(state, state.present, grown)
            if isinstance(state, TokenState)
            else msgspec.structs.replace(state.tensor, name=state.made)
            for state in self.states
            if isinstance(state, TokenState) or state.made is not None
        ]


def length(kind: Length, name: str) -> Tensor:
    """A graph's input for a kind of length (`edgeexit.bundle.manifest.LENGTHS`)."""
    dtype, axes = LENGTHS[kind]
    return Tensor(name=name, dtype=dtype, axes=list(axes), row_axis=0 if axes else None)  # type: ignore[arg-type]


def _tensor(state: TokenState, name: str, grown: str) -> Tensor:
    axes = [grown if axis == "past" else axis for axis in state.axes]
    return Tensor(name=name, dtype=state.dtype, axes=axes, row_axis=state.row_axis)


@dataclass(frozen=True)
class Table:
    """A step that looks up ids in a table, an embedding for example; the runtime gathers the rows.

    Attributes:
        ids: Name of the tensor of ids.
        output: The gathered rows, ``[batch, new, width]``.
        weight: The table, ``[size, width]``.
        when: As in `edgeexit.bundle.manifest.Gather`.
    """

    ids: str
    output: Tensor
    weight: torch.Tensor
    when: When = "token"

    def step(self, offset: int) -> Gather:
        """The manifest's step, for a table that begins at this byte of the weight store."""
        size = self.weight.shape[0]
        return Gather(ids=self.ids, output=self.output, size=size, offset=offset, when=self.when)


@dataclass(frozen=True)
class SplitModel:
    """A model that can be split.

    If an exit's outputs have ``logits`` ``[batch, classes]``, the exporter adds the scores that
    follow from them to the graph (`edgeexit.bundle.manifest.SCORES`). It also adds ``token``, the
    greedy token, if a chain's outputs have it and no module computes it. `scores` of an exit are
    further scores, which a module computes.

    Attributes:
        name: Name of the bundle.
        task: e.g. ``text-classification``.
        inputs: Inputs of the program. Symbolic axes of other tensors must be axes of the inputs or
            of the token states, or be in `limits`.
        components: Each after those whose outputs it takes.
        chains, steps: As in the manifest; the last chain that runs gives the model's output.
        example: ``example(rows)`` returns a realistic input of that many rows, ``{name: tensor}``.
            The reference samples are computed from it.
        reference: ``reference(inputs)`` returns, per exit, logits ``[rows, seq, classes]`` of every
            token of an example. For the exits of an earlier chain it may return ``EXIT/OUTPUT`` and
            ``EXIT/SCORE``, and ``EARLIER_EXIT/EXIT``, the logits behind an early one. It may yield
            them in parts, so that memory holds one at a time; logits also in parts of their tokens,
            in order. None: run the modules one after the other.
        decoding: Settings of text generation, if the model writes text; the tokenizer's stop token
            is added.
        limits: Symbolic axis (or ``positions``) -> the largest size that the model supports.
        float32: Modules that overflow in half precision, by the last part of their names
            (transformers' ``_keep_in_fp32_modules``). They compute in float32, and so do the states
            between components that their outputs are added to.
        tokenizer: Content of a ``tokenizer.json``, for text preprocessing.
        tokenizer_folder: Folder of the tokenizer's files and chat templates, if there are any.
        preprocessing: How images and texts become inputs; at most one of each.
        stored: Rows of weights that the checkpoint has in few bits, whose integers are kept.
        preprocessing_sample: Raw data and the result of the model's own preprocessing, so that a
            device can check its own: ``image`` uint8 ``[height, width(, 3)]``, or ``text`` strings
            ``[n]``; and ``expected/<input>`` for every input.
    """

    name: str
    task: str
    inputs: tuple[Tensor, ...]
    components: Sequence[Component]
    chains: Mapping[str, Chain]
    steps: Sequence[Run | Table | Place]
    example: Callable[[int], Values]
    reference: Callable[[Values], Values | Iterator[Values]] | None = None
    decoding: Decoding | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    preprocessing: Sequence[Preprocessing] = ()
    tokenizer: bytes | None = None
    tokenizer_folder: str | None = None
    preprocessing_sample: Mapping[str, np.ndarray] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    stored: StoredRows | None = None

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
        """The chain that gives the model's output: that of the last step that runs a chain."""
        runs = [step.chain for step in self.steps if isinstance(step, Run)]
        return self.chains[runs[-1]]


def exit_giver(exit_: Exit) -> str:
    """The component that computes an exit's outputs."""
    return exit_.path[-1].component if exit_.path else exit_.behind
