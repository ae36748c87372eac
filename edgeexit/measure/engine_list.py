"""The engines of a bundle in the engine cache, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeexit.bundle.reader import Bundle
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet
from edgeexit.runtime.engines.tensorrt.precision import Types, built_otherwise, products


def describe_cache(bundle: Bundle, root: Path | None = None) -> list[dict[str, Any]]:
    """Lists the finished engines of a bundle. If several fit a device, the last is used."""
    found = engine_cache.list_engines(
        engine_cache.default_root() if root is None else root, bundle.digest
    )
    return [describe_engines(folder, engines) for folder, engines in found]


def describe_engines(folder: Path, engines: EngineSet) -> dict[str, Any]:
    """A set of engines: its folder, target and plans."""
    source = engines.made_from
    target = source["target"]
    return {
        "path": str(folder),
        "key": engines.key,
        "library": source["library"],
        "version": source["version"],
        "target": target,
        "for": target.get("gpu") or f"sm{target['compute_capability']}",
        "sizes": ", ".join(f"{axis} up to {most}" for axis, most in _largest(engines).items()),
        "bytes": sum(plan.bytes for plan in engines.plans),
        "plans": [
            {
                "graph": plan.graph,
                "file": plan.file,
                "bytes": plan.bytes,
                "seconds": plan.seconds,
                "peak_memory_bytes": plan.peak_memory_bytes,
                "precision": plan.precision,
                "computes_in": _computes_in(plan.precision),
                "inspected": plan.inspected,
                "built_otherwise": built_otherwise(plan.precision, plan.inspected or {}),
            }
            for plan in engines.plans
        ],
    }


def _largest(engines: EngineSet) -> dict[str, int]:
    """The largest size of every named axis."""
    found: dict[str, int] = {}
    for plan in engines.plans:
        for axis, most in plan.largest.items():
            found[axis] = max(most, found.get(axis, 0))
    return dict(sorted(found.items()))


def _computes_in(types: Types) -> str:
    """Types of the layers that multiply, as ``FLOAT 2, HALF 24``."""
    return ", ".join(f"{dtype} {count}" for dtype, count in sorted(products(types).items()))


__all__ = ["describe_cache", "describe_engines"]
