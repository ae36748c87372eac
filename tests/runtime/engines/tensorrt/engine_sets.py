"""Sets of engines for tests of the cache, which does not look into plans."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgeexit.runtime.engines.tensorrt.engine_cache import (
    EngineSet,
    PlanFile,
    building,
    folder_of,
    key_of,
    write_index,
)

MADE_FROM: dict[str, Any] = {
    "builder": 1,
    "library": "tensorrt_rtx",
    "version": "1.7.1",
    "target": {"ahead_of_time": True, "compute_capability": 86},
    "weights": "0" * 64,
    "options": {"opt_level": None},
    "engines": [{"graph": "graphs/s0.onnx", "profiles": [{"x": [[1, 6], [1, 6], [8, 6]]}]}],
}
PLAN = b"not a plan, but the store does not look inside"


def write_set(root: Path, digest: str, **changed: Any) -> Path:
    """A set of one engine."""
    source = MADE_FROM | changed
    key = key_of(source)
    plan = PlanFile(
        graph="graphs/s0.onnx",
        file="s0.plan",
        sha256=hashlib.sha256(PLAN).hexdigest(),
        bytes=len(PLAN),
        outputs=["logits"],
        profiles=[],
        precision={},
        largest={},
        seconds=0.1,
        peak_memory_bytes=1,
    )
    with building(folder_of(root, digest, key)) as folder:
        (folder / plan.file).write_bytes(PLAN)
        engines = EngineSet(format=1, bundle=digest, key=key, made_from=source, plans=[plan])
        write_index(folder, engines)
    return folder
