"""Checkpoints of a training, to resume from."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from edgeexit.errors import ExportError, UsageError, first_line
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.saved import load_named, read_exits

METHOD = "method.txt"
"""File in a checkpoint: the training method and its settings."""

STATE = "trainer_state.json"
"""File that `Trainer` writes last into a checkpoint: without it a checkpoint is incomplete."""

COMPANIONS = "companions.safetensors"
"""File in a checkpoint: modules that are trained beside the model (`Method.companions`)."""


def load_weights(model: ExitClassifier | ExitDecoder, folder: Path) -> None:
    """Loads a checkpoint of `save_pretrained` into a model with the same exits.

    Raises:
        ExportError: A file is damaged, or belongs to another model or other exits.
    """
    saved, own = read_exits(folder), model.saved_exits()
    pairs = [
        ("exits behind layers", saved.layers, own.layers),
        ("adapters (layer: layers of its own)", saved.adapters, own.adapters),
        ("exits behind layers of the encoder", saved.encoder, own.encoder),
        ("exits for images behind layers", saved.image_encoder, own.image_encoder),
        ("exits behind layers of the tower", saved.tower, own.tower),
        ("gates (layer: width)", saved.gates, own.gates),
    ]
    for what, those, ours in pairs:
        if (those or None) != (ours or None):
            raise ExportError(
                f"{folder}: the checkpoint has {what} {those or 'none'}, the model "
                f"{ours or 'none'}",
                fix="Resume with the checkpoint's exits, or train into another output_dir.",
            )
    try:
        # transformers' own reader supports shards, tied weights and renamed weights.
        read = type(model.model).from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
        model.model.load_state_dict(read.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"{folder}: not a checkpoint of this model ({first_line(error)})",
            fix="Resume from another checkpoint, or delete this one.",
        ) from error
    for modules in model.saved_modules().values():
        if len(modules):
            load_named(modules, modules, folder)


def save_companions(companions: nn.ModuleDict, folder: Path) -> None:
    """Writes what is trained beside the model."""
    if len(companions):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(companions.state_dict(), folder / COMPANIONS)


def load_companions(companions: nn.ModuleDict, folder: Path) -> None:
    """Reads what was trained beside the model. Raises `ExportError` for a damaged file."""
    if not len(companions):
        return
    try:
        companions.load_state_dict(load_file(folder / COMPANIONS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"{folder / COMPANIONS}: does not belong to this training ({first_line(error)})",
            fix="Resume from another checkpoint, or delete this one.",
        ) from error


def checkpoint_to_resume(
    output_dir: str, given: str | os.PathLike[str] | bool | None
) -> Path | None:
    """The checkpoint to resume from."""
    if given is None or given is False:
        return None
    if given is not True:
        if not (Path(given) / STATE).is_file():
            raise UsageError(
                f"{given}: not a checkpoint to resume from (it has no {STATE})",
                fix="Give a folder checkpoint-N that a training wrote.",
            )
        return Path(given)
    if (found := last_checkpoint(output_dir)) is None:
        raise UsageError(
            f"{output_dir}: there is no checkpoint to resume from",
            fix="Train without resume_from_checkpoint first; save_steps sets how often "
            "checkpoints are written.",
        )
    return found


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The last complete checkpoint of a training; None if there is none. A checkpoint whose writing
    was interrupted does not count."""
    states = Path(output_dir).glob(f"checkpoint-*/{STATE}")
    steps = {int(n): file.parent for file in states if (n := file.parent.name[11:]).isdecimal()}
    return steps[max(steps)] if steps else None


def trained_before(folder: Path) -> set[str]:
    """Exits that a checkpoint's training has trained so far."""
    origins = read_exits(folder).origins
    return {name for name, origin in origins.items() if origin == "trained"}


__all__ = [
    "METHOD",
    "STATE",
    "checkpoint_to_resume",
    "last_checkpoint",
    "load_companions",
    "load_weights",
    "save_companions",
    "trained_before",
]
