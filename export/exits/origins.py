"""What is known about the training of each exit of a model.

A model with exits has a mapping ``exit_origins``: exit name -> `Origin`. `from_pretrained` reads it
from the checkpoint, a training marks the exits that it trained, ``save_pretrained`` writes it, and
the provenance of a bundle has the least that is known about any exit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

Origin = Literal["trained", "untrained", "unknown"]
"""``unknown``: the exit shares the model's head, so it may have been trained (LayerSkip); or the
checkpoint is from a version that did not write it."""
ORIGINS: tuple[Origin, ...] = get_args(Origin)


def least(origins: Iterable[Origin]) -> Origin | None:
    """The least that is known about several exits; None if there are none.

    >>> least(["trained", "unknown"]), least(["unknown", "untrained"]), least([])
    ('unknown', 'untrained', None)
    """
    found = set(origins)
    order: tuple[Origin, ...] = ("untrained", "unknown", "trained")
    return next((origin for origin in order if origin in found), None)


def note_origins(model: Any, origins: Mapping[str, Origin]) -> None:
    """Records what is known about exits, in a model and in the provenance of its bundles."""
    model.exit_origins |= origins
    groups: dict[str, list[Origin]] = {"exits": [], "tower_exits": [], "gates": [], "adapters": []}
    for name, origin in model.exit_origins.items():
        kind = name.split("_")[0]
        groups[{"tower": "tower_exits", "gate": "gates"}.get(kind, "exits")].append(origin)
        if name in getattr(model, "adapters", ()):
            groups["adapters"].append(origin)
    for group, found in groups.items():
        if (origin := least(found)) is not None:
            model.provenance[group] = origin


def origins_of(
    layers: Iterable[int],
    saved: Iterable[int] | None,
    origins: Mapping[str, Origin],
    *,
    prefix: str,
    otherwise: Origin,
) -> dict[str, Origin]:
    """What is known about exits behind `layers`: of those in `saved`, what their checkpoint says.

    Args:
        origins: From the checkpoint.
        prefix: Of the exits' names.
        otherwise: What is known about exits that are not saved.
    """
    held = set(saved or ())
    names = {layer: f"{prefix}_{layer}" for layer in layers}
    return {
        name: origins.get(name, "unknown") if layer in held else otherwise
        for layer, name in names.items()
    }


__all__ = ["ORIGINS", "Origin", "least", "note_origins", "origins_of"]
