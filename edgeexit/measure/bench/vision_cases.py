"""The cases of a vision-language model: exits of its tower, and layers behind which image tokens
leave. `edgeexit.measure.bench.vision` computes figures of them."""

from __future__ import annotations

from typing import Any

from edgeexit.bundle.manifest import Manifest
from edgeexit.bundle.policy import ALWAYS, Rule, forced

DROP, TOWER = "drop", "tower"


def vision_settings(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Cases of a vision-language model: name -> arguments as `edgeexit.measure.bench.cases.chain`
    takes them. ``tower:LAYER`` leaves the tower early, ``drop:LAYER`` leaves image tokens out."""
    name = manifest.vision_chain
    if name is None or manifest.decoding is None:
        return {}
    tower = manifest.chains[name]
    found: dict[str, dict[str, Any]] = {}
    for exit_ in tower.stops[:-1]:
        rule = forced(tower.stops, exit_.name)
        own = Rule(thresholds=rule.thresholds, score="saturation", first=rule.first, last=rule.last)
        found[f"{TOWER}:{layer_of(exit_.name)}"] = {"rules": {name: own}}
    main = manifest.decoding.chain
    for exit_ in manifest.chains[main].exits:
        if exit_.action == "drop" and not exit_.path:
            rule = Rule(thresholds={exit_.name: ALWAYS})
            found[f"{DROP}:{layer_of(exit_.name)}"] = {"rules": {main: rule}}
    return found


def layer_of(exit_name: str) -> int:
    """The layer in an exit's name: ``tower_exit_6``, ``drop_12``."""
    return int(exit_name.rpartition("_")[2])


__all__ = ["DROP", "TOWER", "layer_of", "vision_settings"]
