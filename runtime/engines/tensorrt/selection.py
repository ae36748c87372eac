"""Chooses the engines in the cache that fit this device, and says why others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeexit.errors import EngineError
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet
from edgeexit.runtime.engines.tensorrt.library import Library


def choose(
    sets: Sequence[tuple[Path, EngineSet]],
    library: Library,
    here: Mapping[str, Any],
    root: Path,
    bundle: Path,
) -> tuple[Path, EngineSet]:
    """The newest set of engines that fits a library and a device.

    Args:
        bundle: Where the bundle is, for messages.

    Raises:
        EngineError: No set fits; the message gives the reasons.
    """
    reasons = []
    for folder, engines in reversed(sets):
        reason = misfit(engines, library, here)
        if reason is None:
            return folder, engines
        reasons.append(f"{folder.name[:8]} {reason}")
    why = "; ".join(reasons[:4]) if reasons else "there are none"
    raise EngineError(
        f"{root}: no engines of this bundle for this device: {why}",
        fix=f"Build them on this device: edgeexit build {bundle}; or import engines from another "
        f"machine: edgeexit build {bundle} --import DIR.",
    )


def misfit(engines: EngineSet, library: Library, here: Mapping[str, Any]) -> str | None:
    """Why engines cannot run on a device; None if they can."""
    source = engines.made_from
    if (source["library"], source["version"]) != (library.name, library.version):
        return (
            f"was built by {source['library']} {source['version']}, this device has {library.name} "
            f"{library.version}"
        )
    target = source["target"]
    if target.get("ahead_of_time"):
        built, own = target["compute_capability"], here["compute_capability"]
        return None if built == own else f"is for sm{built}, this device is sm{own}"
    names = [name for name in target if target[name] != here.get(name)]
    if names:
        return f"is for {names[0]} {target[names[0]]}, this device has {here.get(names[0])}"
    return None


__all__ = ["choose", "misfit"]
