"""Exits in a checkpoint's folder: where they stand in ``edgeexit.json``, their weights as
safetensors beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.library_errors import translated

EXITS_CONFIG = "edgeexit.json"
EXITS_WEIGHTS = "exits.safetensors"


@dataclass(frozen=True)
class SavedExits:
    """What a checkpoint says of its exits.

    Attributes:
        layers: Those that have an exit; None when it says nothing.
        adapters: Exits of a decoder with layers of their own: layer -> how many.
        encoder: Layers of an encoder before the decoder that have an exit.
    """

    layers: list[int] | None = None
    adapters: dict[int, int] = field(default_factory=dict)
    encoder: list[int] | None = None


def save_model(
    model: nn.Module, folder: Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes a model with exits' own model as transformers does.

    Args:
        state_dict: Weights of the whole in place of what the model holds.
    """
    weights = None if state_dict is None else weights_of(state_dict, "model.")
    model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]


def save_exits(
    folder: Path,
    exits: SavedExits,
    modules: nn.ModuleDict,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes exits into a checkpoint's folder, with the weights of what they have for
    themselves.

    Args:
        weights: Of these modules, in place of what the modules hold.
    """
    config: dict[str, object] = {"format": 1, "exits": exits.layers}
    if exits.adapters:
        config["adapters"] = {str(layer): count for layer, count in exits.adapters.items()}
    if exits.encoder is not None:
        config["encoder_exits"] = exits.encoder
    (folder / EXITS_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    if len(modules):
        held = modules.state_dict() if weights is None else weights
        save_file({k: v.detach().contiguous() for k, v in held.items()}, folder / EXITS_WEIGHTS)


def read_exits(folder: Path) -> SavedExits:
    """Reads what a checkpoint says of its exits."""
    config = folder / EXITS_CONFIG
    if not config.is_file():
        return SavedExits()
    with translated(config, "cannot be read", "Save the exits again with save_pretrained."):
        found = json.loads(config.read_text(encoding="utf-8"))
        layers, adapters = found["exits"], found.get("adapters", {})
        if not all(isinstance(layer, int) for layer in layers):
            raise ValueError("exits is not a list of layer numbers")
        if not all(isinstance(count, int) and count > 0 for count in adapters.values()):
            raise ValueError("adapters does not map layer numbers to numbers of layers")
        encoder = found.get("encoder_exits")
        if encoder is not None and not all(isinstance(layer, int) for layer in encoder):
            raise ValueError("encoder_exits is not a list of layer numbers")
        return SavedExits(list(layers), {int(layer): n for layer, n in adapters.items()}, encoder)


def load_exits(modules: nn.ModuleDict, layers: Sequence[int], folder: Path) -> None:
    """Loads what the exits of some layers have for themselves; others that a checkpoint holds stay
    unread."""
    path = folder / EXITS_WEIGHTS
    fix = "Use exits saved with this very checkpoint."
    with translated(path, "does not fit the model", fix):
        weights = load_file(path)
        for name in (f"exit_{layer}" for layer in layers):
            modules[name].load_state_dict(weights_of(weights, f"{name}."))


def weights_of(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those of one module of a state dict, by their names in the module."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def check_layers(exits: Iterable[int], depth: int, name: str = "exits") -> list[int]:
    """Exit layers in order, without the last layer. Raises `UsageError` for ones that cannot be.

    Args:
        name: What to call them in messages.
    """
    layers = list(exits)
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer <= depth:
            raise UsageError(
                f"{name}: there is no layer {layer!r}; the model has layers 1 to {depth}",
                fix=f"Give layer numbers from 1 to {depth - 1}; the last layer always has an exit.",
            )
    if repeated := sorted({layer for layer in layers if layers.count(layer) > 1}):
        raise UsageError(f"{name}: layer {repeated[0]} is given twice", fix="Name each layer once.")
    if layers != sorted(layers):
        raise UsageError(
            f"{name}: {layers} are not in order", fix="Give them from shallow to deep."
        )
    return [layer for layer in layers if layer != depth]


__all__ = [
    "SavedExits",
    "check_layers",
    "load_exits",
    "read_exits",
    "save_exits",
    "save_model",
    "weights_of",
]
