"""The segment contract: what the exporter needs to know of a model, and all it knows.

A model is a mapping from chain name to a list of segments. A segment is a module, the named tensors
that enter and leave it, the caches it owns, and its exits. An adapter for a new architecture
returns an `ExitModel` (or, for classifiers, a `edgeexit.export.exits.classifier.Trunk`, from which
one is made); a user's own model does the same through ``edgeexit export -m module:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from edgeexit.bundle.manifest import Cache, Preprocessing, Tensor
from edgeexit.errors import ExportError


@dataclass(frozen=True)
class Exit:
    """A place where the model may answer.

    Attributes:
        name: Unique among all exits of the model, e.g. ``exit_3``.
        outputs: Program output -> the segment's tensor that holds it here. The scores that follow
            from ``logits`` (`edgeexit.bundle.manifest.SCORES`) are added to the graph by the
            exporter.
        scores: Further scores that the module computes itself: score -> float32 tensor ``[batch]``.
    """

    name: str
    outputs: Mapping[str, str]
    scores: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """The layers between two boundaries.

    Attributes:
        name: Unique in its chain; the graph's file name.
        module: ``forward(*inputs)`` returns a tuple, in the order of `outputs`.
        inputs: Program inputs or outputs of earlier segments of the chain, by name.
        outputs: Tensors made here: those carried on and those that exits answer with.
        exits: Exits whose outputs are among `outputs`.
        caches: Keys and values that this segment keeps from token to token.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    exits: tuple[Exit, ...] = ()
    caches: tuple[Cache, ...] = ()


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
        head: ``forward(state)`` gives the output; None if that is the state itself.
    """

    entry: nn.Module
    state: Tensor
    shared: tuple[Tensor, ...]
    layers: Sequence[Layer]
    head: nn.Module | None = None


@dataclass(frozen=True)
class Form:
    """One way to write the graph of a part with caches.

    Attributes:
        stack: Its layers. The entry takes ``(*inputs, *lengths, past)`` with the past of the first
            cache, which tells how much it can hold; each layer takes its share of the part's past
            caches and makes its share of the present ones.
        requires: Features that an engine must offer to run it.
        caches: Whether it gives the new keys and values (``append``) or whole caches that are the
            very buffers of the past (``in-place``; ``fixed`` where an engine may fix their size).
        lengths: Kinds of `edgeexit.bundle.manifest.LENGTHS` that it takes.
        opset: The lowest ONNX opset that its graph can have.
    """

    stack: Stack
    requires: tuple[str, ...] = ()
    caches: Literal["append", "in-place", "fixed"] = "append"
    lengths: tuple[Literal["past", "last", "most"], ...] = ()
    opset: int = 18


@dataclass(frozen=True)
class CachedSegment:
    """A part of a decoder: layers that keep caches, in one form per kind of engine.

    Attributes:
        name: Unique in the model; the graphs' file name.
        inputs, outputs: Tensors besides caches, as in `Segment`.
        caches: Keys and values of its layers, two per layer.
        forms: Fastest first; the last one runs on every engine.
        exit: Name of the exit behind it, if there is one; its head looks at the last output.
        projection: Layers that take nothing of their own and make the new keys and values
            ``[batch, heads, new, size]`` of their caches from the state that comes into the
            segment: what a token that skips it leaves there (``approximate`` decoding).
        adapter: Layers that this exit has for itself: they take the last output and the positions
            and give a state of the same form, which the head looks at instead. They have no exit.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    caches: tuple[Cache, ...]
    forms: tuple[Form, ...]
    exit: str | None = None
    projection: Stack | None = None
    adapter: CachedSegment | None = None


@dataclass(frozen=True)
class DecodeModel:
    """A decoder that can be split: token by token, with caches, one head for all exits.

    Attributes:
        embedding: ``[vocabulary, width]``, whose rows the runtime gathers.
        embedded: What the first segment takes, ``[batch, new, width]``.
        positions: The input that says where tokens stand, ``[batch, new]``.
        segments: In order; the last one's exit is the model's own answer and has no adapter.
        head: The shared head: ``state [batch, width]`` to ``logits [batch, vocabulary]``.
        unsplit: All layers and the head as one part; gives ``logits`` of each row's last token.
        tokens: ``tokens(rows)`` makes token ids ``[rows, seq]`` that reference samples are computed
            from.
        reference: ``reference(tokens) -> {exit: logits [rows, seq, vocabulary]}``.
        limits: ``positions`` -> the most tokens that the model was made for.
        stop_tokens: Token ids that end a text; the tokenizer's own end is added to them.
        tokenizer_folder: Where ``tokenizer.json`` and chat templates lie, if there are any.
    """

    name: str
    embedding: torch.Tensor
    embedded: Tensor
    positions: Tensor
    segments: Sequence[CachedSegment]
    head: Segment
    unsplit: CachedSegment
    tokens: Callable[[int], torch.Tensor]
    reference: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    limits: Mapping[str, int]
    stop_tokens: tuple[int, ...] = ()
    task: str = "text-generation"
    tokenizer_folder: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExitModel:
    """A model that can be split.

    Attributes:
        name: For people; the bundle's name.
        task: e.g. ``text-classification``.
        inputs: What the whole model takes; every symbolic axis of the segments appears here.
        outputs: What every exit and the unsplit model give.
        chains: Chain name -> its segments in order.
        unsplit: The model's own forward without exits: ``(*inputs) -> tuple(outputs)``.
        example: ``example(rows)`` makes a realistic input of that many rows, ``{name: tensor}``.
            It is what reference samples are computed from.
        limits: Symbolic axis -> the largest size that the model was made for.
        preprocessing_sample: Raw data and what the model's own preprocessing makes of it, so that a
            device can check that it does the same: ``image`` uint8 ``[height, width(, 3)]``, or
            ``text`` strings ``[n]``; and ``expected/<input>`` for every input.
    """

    name: str
    task: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    chains: Mapping[str, Sequence[Segment]]
    unsplit: nn.Module
    example: Callable[[int], dict[str, torch.Tensor]]
    program: Literal["forward", "decode", "encode-decode"] = "forward"
    limits: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    tokenizer_file: str | None = None
    preprocessing_sample: Mapping[str, np.ndarray] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `ExportError` naming the first thing that no exporter could make sense of."""
        if not any(segment.exits for chain in self.chains.values() for segment in chain):
            raise ExportError(
                f"{self.name}: the model has no exits",
                fix="Attach some with edgeexit.export.pretrained.from_pretrained(path, "
                "exits=[...]) and train them with edgeexit.export.methods.joint; a model without "
                "exits needs no edgeexit.",
            )
        axes = {axis for tensor in self.inputs for axis in tensor.axes if isinstance(axis, str)}
        names: set[str] = set()
        for chain, segments in self.chains.items():
            known = {tensor.name for tensor in self.inputs}
            for segment in segments:
                where = f"{self.name}: segment {segment.name} of chain {chain}"
                for tensor in segment.inputs:
                    if tensor.name not in known:
                        raise ExportError(
                            f"{where} takes {tensor.name}, which nothing before it makes",
                            fix="Segments take program inputs and outputs of earlier segments.",
                        )
                for tensor in segment.outputs:
                    if tensor.name in known:
                        raise ExportError(
                            f"{where} makes {tensor.name} a second time",
                            fix="Give each tensor of a chain a name of its own.",
                        )
                    if unknown := {a for a in tensor.axes if isinstance(a, str)} - axes:
                        raise ExportError(
                            f"{where}: {tensor.name} has the axis {sorted(unknown)[0]!r}, which no "
                            "input of the model has",
                            fix="Use the axis names of the model's inputs.",
                        )
                    known.add(tensor.name)
                for leave in segment.exits:
                    if leave.name in names:
                        raise ExportError(
                            f"{where}: there are two exits named {leave.name}",
                            fix="Exit names are unique in a model.",
                        )
                    names.add(leave.name)
                    made = {tensor.name for tensor in segment.outputs}
                    for tensor_name in [*leave.outputs.values(), *leave.scores.values()]:
                        if tensor_name not in made:
                            raise ExportError(
                                f"{where}: exit {leave.name} answers with {tensor_name}, which the "
                                "segment does not make",
                                fix="An exit's tensors are outputs of its segment.",
                            )
            if not segments or not segments[-1].exits:
                raise ExportError(
                    f"{self.name}: chain {chain} does not end with an exit",
                    fix="The model's own head is the exit of the last segment.",
                )
