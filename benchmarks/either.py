"""The jobs that `against.py` runs in new processes of either checkout. Supports the module names
before and after the unification.

    python benchmarks/either.py CHECKOUT export CHECKPOINT BUNDLE [EXITS]
    python benchmarks/either.py CHECKOUT policy FILE THRESHOLDS SCORE
    python benchmarks/either.py CHECKOUT load BUNDLE INPUTS POLICY THREADS
    python benchmarks/either.py CHECKOUT write BUNDLE PROMPTS CAPACITY THREADS

Thresholds and exits are JSON. Every job prints a JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXT_TOKENS = 32


def export(checkpoint: str, bundle: str, exits: str = "null") -> dict[str, float]:
    """Exports a checkpoint. Returns the seconds, without imports."""
    from models import warm_exporter

    from edgeexit import export as product

    try:
        from edgeexit.export.pretrained import from_pretrained
    except ImportError:
        from edgeexit.export.models import from_pretrained
    warm_exporter()
    started = time.perf_counter()
    model: Any = from_pretrained(checkpoint, exits=json.loads(exits))
    if hasattr(model, "split_model"):
        product.export(model.split_model(), bundle, overwrite=True)
    else:
        split = model.exit_model()
        writes = isinstance(split, product.DecodeModel)
        write = product.export_decoder if writes else product.export_model
        write(split, bundle, overwrite=True)
    return {"seconds": time.perf_counter() - started}


def policy(path: str, thresholds: str, score: str) -> dict[str, float]:
    """Writes a policy in the checkout's format."""
    from edgeexit import runtime

    found = json.loads(thresholds)
    if hasattr(runtime, "Rule"):
        rule = runtime.Rule(thresholds=found, score=score)
        runtime.write_policy(runtime.Policy(rules={"main": rule}), path)
    else:
        runtime.write_policy(runtime.Policy(thresholds=found, score=score), path)
    return {}


def load(bundle: str, inputs: str, policy: str, threads: str) -> dict[str, float]:
    """Loads a classifier and runs four rows."""
    from edgeexit import runtime

    with np.load(inputs) as file:
        rows = [
            {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{n}/")}
            for n in range(4)
        ]
    return _loading(
        lambda: runtime.load(bundle, policy=policy, threads=_threads(threads)),
        lambda model: [model(row) for row in rows],
    )


def write(bundle: str, prompts: str, capacity: str, threads: str) -> dict[str, float]:
    """Loads a language model and continues one prompt."""
    from edgeexit import runtime

    with np.load(prompts) as file:
        prompt = file["0/tokens"].tolist()
    opening = runtime.load_decoder if hasattr(runtime, "load_decoder") else runtime.load
    return _loading(
        lambda: opening(bundle, capacity=int(capacity), threads=_threads(threads)),
        lambda model: model.generate(prompt, max_new_tokens=TEXT_TOKENS, text=False).finish(),
    )


def _loading(opening: Callable[[], Any], run: Callable[[Any], object]) -> dict[str, float]:
    """Seconds of loading, and peak memory above the memory before it."""
    import onnxruntime  # noqa: F401, its import is not part of loading

    from edgeexit.runtime.memory import peak_bytes

    before = peak_bytes()
    started = time.perf_counter()
    model = opening()
    took = time.perf_counter() - started
    run(model)
    return {"load_s": took, "peak_bytes": peak_bytes() - before}


def _threads(setting: str) -> int | str:
    return int(setting) if setting.isdigit() else setting


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    "export": export,
    "policy": policy,
    "load": load,
    "write": write,
}


def main() -> None:
    """Command line of the child process."""
    import edgeexit

    checkout, job, *arguments = sys.argv[1:]
    found = Path(edgeexit.__file__ or "").resolve()
    if not found.is_relative_to(Path(checkout).resolve()):
        sys.exit(f"edgeexit was imported from {found}, not from {checkout}")
    print(json.dumps(JOBS[job](*arguments)))


if __name__ == "__main__":
    main()
