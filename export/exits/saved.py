"""Writes and reads exits in a checkpoint's folder: ``edgeexit.json`` lists their layers
and what is known about their training,
``exits.safetensors`` has their weights; and checks layers that are chosen for exits."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.origins import Origin
from edgeexit.export.library_errors import translated

EXITS_CONFIG = "edgeexit.json"
EXITS_WEIGHTS = "exits.safetensors"
SAVE_AGAIN = "Save the exits again with save_pretrained."
FORMAT = 1
"""Of ``edgeexit.json``."""
KEYS = {
    "adapters": "adapters",
    "encoder_exits": "encoder",
    "image_encoder_exits": "image_encoder",
    "tower_exits": "tower",
    "gates": "gates",
    "removed_attention": "removed",
    "pia": "pia",
    "draft_vocabularies": "vocabularies",
}
"""Keys of ``edgeexit.json`` that only some models can have -> attributes of `SavedExits`."""

_Layer = Annotated[int, msgspec.Meta(ge=1)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class SavedExits:
    """The exits of a checkpoint.

    Attributes:
        layers: Layers with an exit; None if the checkpoint does not list exits.
        adapters: Decoder exits with an adapter: exit layer -> number of adapter layers.
        encoder: Encoder layers with an exit.
        image_encoder: Of an encoder that reads images and texts apart: layers with an exit for
            images; `encoder` then has those for texts. None: it reads them together.
        tower: Layers of a vision tower with an exit.
        gates: Layers with a gate that drops image tokens -> width of the gate.
        removed: Layers of a decoder without attention.
        pia: Of these, layers with an adapter in its place -> its rank.
        vocabularies: Decoder exits with a draft vocabulary: exit layer -> its token ids.
        origins: Exit name -> what is known about its training. Exits that are missing, as in files
            of older versions: unknown.
    """

    layers: list[int] | None = None
    adapters: dict[int, int] = field(default_factory=dict)
    encoder: list[int] | None = None
    image_encoder: list[int] | None = None
    tower: list[int] | None = None
    gates: dict[int, int] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)
    pia: dict[int, int] = field(default_factory=dict)
    vocabularies: Mapping[int, Sequence[int]] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)


def save_exits(
    folder: Path,
    model: nn.Module,
    exits: SavedExits,
    modules: Mapping[str, nn.ModuleDict],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a model as transformers does, and its exits in the same folder.

    Args:
        model: The transformers model inside the model with exits.
        modules: The exits' heads, adapters and projectors, by their place in the model with exits.
        state_dict: Weights of the model with exits, to write instead of the modules' own.
    """
    own = None if state_dict is None else weights_of(state_dict, "model.")
    model.save_pretrained(folder, state_dict=own)  # type: ignore[operator]
    config: dict[str, object] = {"format": FORMAT, "exits": exits.layers}
    if exits.adapters:
        config["adapters"] = {str(layer): count for layer, count in exits.adapters.items()}
    if exits.encoder is not None:
        config["encoder_exits"] = exits.encoder
    if exits.image_encoder is not None:
        config["image_encoder_exits"] = exits.image_encoder
    if exits.tower is not None:
        config["tower_exits"] = exits.tower
    if exits.gates:
        config["gates"] = {str(layer): width for layer, width in exits.gates.items()}
    if exits.removed:
        config["removed_attention"] = exits.removed
        config["pia"] = {str(layer): rank for layer, rank in exits.pia.items()}
    if exits.vocabularies:
        config["draft_vocabularies"] = {str(n): list(ids) for n, ids in exits.vocabularies.items()}
    config["origins"] = dict(exits.origins)
    (folder / EXITS_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    weights: dict[str, torch.Tensor] = {}
    for place, part in modules.items():
        weights |= part.state_dict() if state_dict is None else weights_of(state_dict, f"{place}.")
    if weights:
        save_file({k: v.detach().contiguous() for k, v in weights.items()}, folder / EXITS_WEIGHTS)
    elif not any(len(part) for part in modules.values()):
        (folder / EXITS_WEIGHTS).unlink(missing_ok=True)  # of a model that was saved there before


class _File(msgspec.Struct):
    """The content of ``edgeexit.json``."""

    format: int
    exits: list[_Layer]
    adapters: dict[_Layer, _Size] = {}
    encoder_exits: list[_Layer] | None = None
    image_encoder_exits: list[_Layer] | None = None
    tower_exits: list[_Layer] | None = None
    gates: dict[_Layer, _Size] = {}
    removed_attention: list[_Layer] = []
    pia: dict[_Layer, _Size] = {}
    draft_vocabularies: dict[_Layer, list[int]] = {}
    origins: dict[str, Origin] = {}

    def __post_init__(self) -> None:
        if self.format > FORMAT:
            raise ValueError(
                f"format {self.format} is of a newer edgeexit, this one reads {FORMAT}"
            )
        for name, given, of in (
            ("adapters", self.adapters, self.exits),
            ("draft_vocabularies", self.draft_vocabularies, self.exits),
            ("pia", self.pia, self.removed_attention),
        ):
            if more := sorted(set(given) - set(of)):
                what = "its attention removed" if name == "pia" else "an exit"
                raise ValueError(f"{name} names layer {more[0]}, which does not have {what}")


def read_exits(folder: Path) -> SavedExits:
    """Reads the list of a checkpoint's exits."""
    config = folder / EXITS_CONFIG
    if not config.is_file():
        return SavedExits()
    with translated(config, "cannot be read", SAVE_AGAIN):
        saved = msgspec.json.decode(config.read_bytes(), type=_File)
    return SavedExits(
        saved.exits,
        saved.adapters,
        saved.encoder_exits,
        saved.image_encoder_exits,
        saved.tower_exits,
        gates=saved.gates,
        removed=saved.removed_attention,
        pia=saved.pia,
        vocabularies=saved.draft_vocabularies,
        origins=saved.origins,
    )


def check_keys(folder: Path, saved: SavedExits, can_have: Collection[str], model_type: str) -> None:
    """Raises `ExportError` if ``edgeexit.json`` lists something that the model cannot have.

    Args:
        folder: The checkpoint's.
        can_have: Attributes of `SavedExits`, besides its exits.
        model_type: For the message.
    """
    for key, attribute in KEYS.items():
        if attribute not in can_have and (value := getattr(saved, attribute)):
            raise ExportError(
                f"{folder / EXITS_CONFIG}: {key} ({listed(value)}) is not for a {model_type}",
                fix=f"Use the {EXITS_CONFIG} that was saved with this checkpoint.",
            )


def unlisted(folder: Path, modules: Collection[str]) -> list[str]:
    """Names of modules whose weights are in ``exits.safetensors``, besides these."""
    path = folder / EXITS_WEIGHTS
    if not path.is_file():
        return []
    with (
        translated(path, "cannot be read", "Download the file again, or delete it."),
        safe_open(path, framework="pt") as weights,
    ):
        names = {name.partition(".")[0] for name in weights.keys()}  # noqa: SIM118, no dictionary
    return sorted(names.difference(modules), key=lambda name: (len(name), name))


def load_exits(
    modules: nn.ModuleDict, layers: Sequence[int], folder: Path, prefix: str = "exit"
) -> None:
    """Loads the heads, adapters, projectors or gates behind these layers, and no others."""
    load_named(modules, [f"{prefix}_{layer}" for layer in layers], folder)


def load_named(modules: nn.ModuleDict, names: Iterable[str], folder: Path) -> None:
    """Loads modules of exits by their names."""
    path = folder / EXITS_WEIGHTS
    fix = "Use exits that were saved with this checkpoint."
    with translated(path, "does not fit the model", fix):
        weights = load_file(path)
        for name in names:
            modules[name].load_state_dict(weights_of(weights, f"{name}."))


def weights_of(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a module in a state dict, by their names in the module."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def check_layers(exits: Iterable[int], depth: int, part: str = "model") -> list[int]:
    """Exit layers in order, without the last layer. Raises `UsageError` for invalid ones.

    Args:
        part: The part of the model that has the layers, for messages.
    """
    layers = list(exits)
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer <= depth:
            raise UsageError(
                f"exits: there is no layer {layer!r}; the {part} has layers 1 to {depth}",
                fix=f"{name_layers(depth)}; the last layer always has an exit.",
            )
    check_repeated(layers, f"exits of the {part}")
    if layers != sorted(layers):
        raise UsageError(
            f"exits of the {part}: {listed(layers)} are not in order",
            fix="Give them from shallow to deep.",
        )
    return [layer for layer in layers if layer != depth]


def check_repeated(layers: Sequence[int], what: str) -> None:
    """Raises `UsageError` if a layer is given twice."""
    if repeated := sorted({layer for layer in layers if layers.count(layer) > 1}):
        raise UsageError(f"{what}: layer {repeated[0]} is given twice", fix="Name each layer once.")


def check_adapters(
    given: Iterable[int] | Mapping[int, int], exits: Sequence[int], depth: int
) -> dict[int, int]:
    """Exits with an adapter: exit layer -> number of adapter layers, from shallow to deep. Raises
    `UsageError` for invalid ones."""
    if not isinstance(given, Mapping):
        given = list(given)
        check_repeated(given, "adapters")
    sizes = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1)
    for layer, count in sizes.items():
        if layer not in exits:
            raise UsageError(
                f"adapters: there is no early exit behind layer {layer!r} (exits: "
                f"{listed(exits) or 'none'})",
                fix="Give layers that have an exit.",
            )
        if not isinstance(count, int) or not 1 <= count <= depth:
            raise UsageError(
                f"adapters: {count!r} layers for the exit behind layer {layer} are out of range "
                f"(1 to {depth})",
                fix="Give 1, the usual number, or more.",
            )
    return {layer: sizes[layer] for layer in exits if layer in sizes}


def name_layers(depth: int) -> str:
    """How to name exits of a model, with layers that it has.

    >>> name_layers(12)
    'Name layers from 1 to 11, as in 4,8'
    >>> name_layers(2)
    'Name layer 1'
    """
    if depth < 3:
        return "Name layer 1" if depth == 2 else "Use a model with more than one layer"
    return f"Name layers from 1 to {depth - 1}, as in {listed(example_layers(depth))}"


def example_layers(depth: int) -> list[int]:
    """Layers for an example: about a third and two thirds of the depth."""
    return sorted({max(depth // 3, 1), max(2 * depth // 3, 1)})


def listed(layers: Iterable[int]) -> str:
    """Layers as the command line takes them."""
    return ",".join(map(str, layers))


__all__ = [
    "SAVE_AGAIN",
    "SavedExits",
    "check_adapters",
    "check_keys",
    "check_layers",
    "example_layers",
    "listed",
    "load_exits",
    "load_named",
    "name_layers",
    "read_exits",
    "save_exits",
    "unlisted",
    "weights_of",
]
