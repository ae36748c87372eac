"""A classifier with exits: layers, with a light head behind some of them.

A family's file describes its model as a `Trunk`: a stem, layers that map one state to the next, and
the model's own head. `ExitClassifier` adds exit heads behind chosen layers. It is one torch module
for training (`forward` gives the logits of every exit); `split_model` gives the contract for
export.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from edgeexit.bundle.manifest import Axis, Chain, Exit, Preprocessing, Run, Tensor
from edgeexit.export.contract import Component, Form, SplitModel
from edgeexit.export.exits.origins import Origin
from edgeexit.export.exits.saved import SavedExits, check_layers, save_exits
from edgeexit.export.stored_blocks import StoredRows


@dataclass(frozen=True)
class Trunk:
    """A family's description of its model.

    Attributes:
        inputs: The model's inputs.
        stem: ``(*inputs) -> (state, *context)``.
        layers: Each ``(state, *context) -> state``; any of them can have an exit.
        state_axes: Axes of the state behind the stem and behind each layer (``layers + 1``
            entries).
        context: What every layer reads besides the state (a mask); the stem computes it once.
        pool: ``state -> [batch, features]``, the input of an exit head.
        widths: Features that `pool` gives behind each layer.
        pre_norm: Whether the layers' outputs are unnormalised, so that exit heads need a norm.
        head: The model's own head, ``state -> logits [batch, classes]``: the last exit.
        classes: Number of labels.
        example: ``example(rows)`` makes a realistic input.
        limits: Largest sizes of symbolic axes.
    """

    inputs: tuple[Tensor, ...]
    stem: nn.Module
    layers: Sequence[nn.Module]
    state_axes: Sequence[Sequence[Axis]]
    pool: Callable[[torch.Tensor], torch.Tensor]
    widths: Sequence[int]
    head: nn.Module
    classes: int
    example: Callable[[int], dict[str, torch.Tensor]]
    context: tuple[Tensor, ...] = ()
    pre_norm: bool = False
    limits: dict[str, int] = field(default_factory=dict)


class PlainLayer(nn.Module):
    """A layer of transformers, whose older versions return a tuple and newer ones the state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        output = self.layer(state, *context)
        return output[0] if isinstance(output, tuple) else output


class ExitHead(nn.Module):
    """A light exit head: pool, LayerNorm where states are unnormalised, one Linear.

    A second dense layer (BERT's pooler) would be one more matrix of weights to read at each exit,
    whether or not a row stops there.
    """

    def __init__(
        self, pool: Callable[[torch.Tensor], torch.Tensor], width: int, classes: int, norm: bool
    ) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.classifier = nn.Linear(width, classes)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.pool(state)))


class ExitClassifier(nn.Module):
    """A trunk with exit heads behind some layers.

    Args:
        model: The transformers (or other) model that owns the weights.
        trunk: Its description; modules are shared with `model`, not copied.
        exits: Layers (1 = behind the first) that get an exit head; the last layer has the model's
            own head.

    Attributes:
        exit_origins: What is known about the training of each exit head.
    """

    def __init__(self, model: nn.Module, trunk: Trunk, exits: Iterable[int]) -> None:
        super().__init__()
        self.model = model
        self.trunk = trunk
        self.depth = len(trunk.layers)
        self.exit_layers = check_layers(exits, self.depth)
        self.heads = nn.ModuleDict(
            {
                f"exit_{layer}": ExitHead(
                    trunk.pool, trunk.widths[layer - 1], trunk.classes, trunk.pre_norm
                )
                for layer in self.exit_layers
            }
        )
        self.exit_origins: dict[str, Origin] = dict.fromkeys(self.heads, "untrained")
        self.name = type(model).__name__
        self.task = "classification"
        self.labels: tuple[str, ...] = ()
        self.preprocessing: tuple[Preprocessing, ...] = ()
        self.tokenizer: bytes | None = None
        self.preprocessing_sample: dict[str, np.ndarray] | None = None
        self.provenance: dict[str, str] = {}
        self.stored: StoredRows | None = None

    @property
    def trained(self) -> bool:
        """Whether all exit heads were trained."""
        return all(origin == "trained" for origin in self.exit_origins.values())

    @property
    def exit_names(self) -> list[str]:
        """Names of all exits in order; the last is the model's own head."""
        return [*self.heads, f"exit_{self.depth}"]

    def forward(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        """Logits of every exit, shallow to deep, each ``[batch, classes]``."""
        state, *context = self.trunk.stem(*(inputs[tensor.name] for tensor in self.trunk.inputs))
        logits = []
        for number, layer in enumerate(self.trunk.layers, start=1):
            state = layer(state, *context)
            if (name := f"exit_{number}") in self.heads:
                logits.append(self.heads[name](state))
        return [*logits, self.trunk.head(state)]

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Writes the model as transformers does, and the exits as safetensors in the same folder.

        Args:
            state_dict: Weights to write instead of this module's own, which may be distributed over
                several devices during training.
        """
        save_exits(Path(folder), self.model, self.saved_exits(), self.saved_modules(), state_dict)

    def saved_exits(self) -> SavedExits:
        """The exits, as the checkpoint lists them."""
        return SavedExits(self.exit_layers, origins=self.exit_origins)

    def saved_modules(self) -> dict[str, nn.ModuleDict]:
        """Modules of exits, by their place in this module."""
        return {"heads": self.heads}

    def split_model(self) -> SplitModel:
        """The contract for export: one component per exit, with the layers since the exit before
        it, and the unsplit model."""
        trunk = self.trunk
        borders = [0, *self.exit_layers, self.depth]
        logits = Tensor(name="logits", dtype="float32", axes=["batch", trunk.classes])
        given = {tensor.name for tensor in trunk.inputs}
        context = [tensor for tensor in trunk.context if tensor.name not in given]
        segments, exits = [], []
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            first, last, name = start == 0, stop == self.depth, f"exit_{stop}"
            carried = [] if last else [self._state(stop), *(context if first else [])]
            answer = msgspec.structs.replace(logits, name=f"{name}/logits")
            module = _Layers(
                trunk.stem if first else None,
                trunk.layers[start:stop],
                trunk.head if last else self.heads[name],
                carry=not last,
                context=len(trunk.context) if first and not last else 0,
            )
            segments.append(
                Component(
                    name=f"segment_{number}",
                    inputs=trunk.inputs if first else (self._state(start), *trunk.context),
                    outputs=(*carried, answer),
                    forms=(Form(module.eval()),),
                )
            )
            exits.append(
                Exit(name=name, behind=f"segment_{number}", outputs={"logits": answer.name})
            )
        whole = _Layers(trunk.stem, trunk.layers, trunk.head, carry=False, context=0)
        unsplit = Component("unsplit", trunk.inputs, (logits,), (Form(whole.eval()),))
        chain = Chain(
            components=[segment.name for segment in segments],
            outputs=[logits],
            exits=exits,
            unsplit=[unsplit.name],
        )
        return SplitModel(
            name=self.name,
            task=self.task,
            inputs=trunk.inputs,
            components=[*segments, unsplit],
            chains={"main": chain},
            steps=[Run(chain="main")],
            example=trunk.example,
            limits=trunk.limits,
            labels=self.labels,
            preprocessing=self.preprocessing,
            tokenizer=self.tokenizer,
            preprocessing_sample=self.preprocessing_sample,
            provenance=self.provenance,
            stored=self.stored,
        )

    def _state(self, layer: int) -> Tensor:
        return Tensor(
            name=f"state_{layer}", dtype="float32", axes=list(self.trunk.state_axes[layer])
        )


class _Layers(nn.Module):
    """A segment (stem if it is the first, layers, head), or the whole model without exits."""

    def __init__(
        self,
        stem: nn.Module | None,
        layers: Sequence[nn.Module],
        head: nn.Module,
        *,
        carry: bool,
        context: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.carry = carry
        self.context = context

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, *context = inputs if self.stem is None else self.stem(*inputs)
        for layer in self.layers:
            state = layer(state, *context)
        carried = (state, *context[: self.context]) if self.carry else ()
        return (*carried, self.head(state))
