"""A classifier with exits: any trunk of layers, a light head behind some of them.

A family's file describes its model as a `Trunk`: a stem, layers that map a state to the next, and
the model's own head. `ExitClassifier` puts exit heads behind chosen layers, runs as one torch
module for training (`forward` gives the logits of every exit), and offers the segment contract for
export.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeexit.bundle.manifest import Axis, Preprocessing, Tensor
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.contract import Exit, ExitModel, Segment

EXITS_CONFIG = "edgeexit.json"
EXITS_WEIGHTS = "exits.safetensors"


@dataclass(frozen=True)
class Trunk:
    """What a family says of its model.

    Attributes:
        inputs: What the model takes.
        stem: ``(*inputs) -> (state, *context)``.
        layers: Each ``(state, *context) -> state``; an exit can stand behind any of them.
        state_axes: Axes of the state behind the stem and behind each layer (``layers + 1``
            entries).
        context: What every layer reads besides the state (a mask); made by the stem once.
        pool: ``state -> [batch, features]``, what an exit head looks at.
        widths: Features that `pool` gives behind each layer.
        pre_norm: Whether states leave the layers unnormalised, so that exit heads need a norm.
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


class ExitHead(nn.Module):
    """A light exit head: pool, LayerNorm where the trunk leaves states unnormalised, one Linear.

    A second dense layer (BERT's pooler) in every exit would be one more matrix of weights to
    read at each exit, whether or not a row leaves there.
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
        exits: Layers (1 = behind the first) that get an exit head, the last one excepted: there the
            model's own head answers.

    Attributes:
        trained: Whether the exit heads' weights came from a checkpoint or from training.
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
        self.trained = False
        self.name = type(model).__name__
        self.task = "classification"
        self.labels: tuple[str, ...] = ()
        self.preprocessing: Preprocessing | None = None
        self.tokenizer_file: str | None = None
        self.preprocessing_sample: dict[str, np.ndarray] | None = None
        self.provenance: dict[str, str] = {}

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

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model as transformers does, and the exits beside it as safetensors."""
        folder = Path(folder)
        self.model.save_pretrained(folder)  # type: ignore[operator]
        save_exits(self, folder)

    def exit_model(self) -> ExitModel:
        """The segment contract: one segment per exit, from the boundary before it to its own."""
        trunk = self.trunk
        borders = [0, *self.exit_layers, self.depth]
        logits_axes: list[Axis] = ["batch", trunk.classes]
        segments, known = [], {tensor.name for tensor in trunk.inputs}
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            last = stop == self.depth
            inputs = trunk.inputs if start == 0 else (self._state(start), *trunk.context)
            outputs = [] if last else [self._state(stop)]
            if start == 0 and not last:
                outputs += [tensor for tensor in trunk.context if tensor.name not in known]
            name = f"exit_{stop}"
            answer = Tensor(name=f"{name}/logits", dtype="float32", axes=logits_axes)
            segments.append(
                Segment(
                    name=f"segment_{number}",
                    module=_Layers(
                        trunk.stem if start == 0 else None,
                        trunk.layers[start:stop],
                        trunk.head if last else self.heads[name],
                        carry=not last,
                        context=len(trunk.context) if start == 0 and not last else 0,
                    ).eval(),
                    inputs=tuple(inputs),
                    outputs=(*outputs, answer),
                    exits=(Exit(name=name, outputs={"logits": answer.name}),),
                )
            )
        return ExitModel(
            name=self.name,
            task=self.task,
            inputs=trunk.inputs,
            outputs=(Tensor(name="logits", dtype="float32", axes=logits_axes),),
            chains={"main": segments},
            unsplit=_Layers(trunk.stem, trunk.layers, trunk.head, carry=False, context=0).eval(),
            example=trunk.example,
            limits=trunk.limits,
            labels=self.labels,
            preprocessing=self.preprocessing,
            tokenizer_file=self.tokenizer_file,
            preprocessing_sample=self.preprocessing_sample,
            provenance=self.provenance,
        )

    def _state(self, layer: int) -> Tensor:
        return Tensor(
            name=f"state_{layer}", dtype="float32", axes=list(self.trunk.state_axes[layer])
        )


class _Layers(nn.Module):
    """Stem (or not), some layers, a head: a segment, or the whole model without exits."""

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


def check_layers(exits: Iterable[int], depth: int) -> list[int]:
    """Exit layers in order, without the last layer. Raises `UsageError` for ones that cannot be."""
    layers = list(exits)
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer <= depth:
            raise UsageError(
                f"exits: there is no layer {layer!r}; the model has layers 1 to {depth}",
                fix=f"Give layer numbers from 1 to {depth - 1}; the last layer always has an exit.",
            )
    if repeated := sorted({layer for layer in layers if layers.count(layer) > 1}):
        raise UsageError(f"exits: layer {repeated[0]} is given twice", fix="Name each layer once.")
    if layers != sorted(layers):
        raise UsageError(f"exits: {layers} are not in order", fix="Give them from shallow to deep.")
    return [layer for layer in layers if layer != depth]


def save_exits(classifier: ExitClassifier, folder: Path) -> None:
    """Writes the exit heads into a checkpoint directory."""
    weights = {k: v.detach().contiguous() for k, v in classifier.heads.state_dict().items()}
    save_file(weights, folder / EXITS_WEIGHTS)
    save_exit_layers(classifier.exit_layers, folder)


def save_exit_layers(
    layers: Sequence[int], folder: Path, adapters: Mapping[int, int] | None = None
) -> None:
    """Writes into a checkpoint directory behind which layers there are exits, and how many layers
    of its own an exit of a decoder has."""
    config: dict[str, object] = {"format": 1, "exits": list(layers)}
    if adapters:
        config["adapters"] = {str(layer): count for layer, count in adapters.items()}
    (folder / EXITS_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def saved_exits(folder: Path) -> list[int] | None:
    """Layers whose exits a checkpoint holds; None when it holds none."""
    found = _read_config(folder)
    return None if found is None else found[0]


def saved_adapters(folder: Path) -> dict[int, int]:
    """Exits of a decoder that have layers of their own in a checkpoint: layer -> how many."""
    found = _read_config(folder)
    return {} if found is None else found[1]


def _read_config(folder: Path) -> tuple[list[int], dict[int, int]] | None:
    config = folder / EXITS_CONFIG
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text())
        exits, adapters = found["exits"], found.get("adapters", {})
        if not all(isinstance(layer, int) for layer in exits):
            raise ValueError("exits is not a list of layer numbers")
        if not all(isinstance(count, int) and count > 0 for count in adapters.values()):
            raise ValueError("adapters does not map layer numbers to numbers of layers")
        return list(exits), {int(layer): count for layer, count in adapters.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{config}: cannot be read ({error})", fix="Save the exits again with save_pretrained."
        ) from error


def load_exits(classifier: ExitClassifier, folder: Path) -> None:
    """Loads exit heads from a checkpoint; those not among the classifier's exits stay unread."""
    weights = load_file(folder / EXITS_WEIGHTS)
    chosen = {k: v for k, v in weights.items() if k.split(".")[0] in classifier.heads}
    try:
        classifier.heads.load_state_dict(chosen)
    except RuntimeError as error:
        raise ExportError(
            f"{folder / EXITS_WEIGHTS}: does not fit the model: "
            f"{str(error).splitlines()[-1].strip()}",
            fix="Use exits saved with this very checkpoint.",
        ) from error
    classifier.trained = True
