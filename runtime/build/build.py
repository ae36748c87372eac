"""Builds the engines of a bundle: one per component, each in its own process.

`build_engines` builds the engines that `edgeexit.runtime.build.work_list` lists and that are not in
the cache. An interrupted build continues where it stopped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeexit.bundle.documents import decode
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.bundle.reader import WEIGHTS, Bundle, sha256_of
from edgeexit.runtime.build.profiles import Shapes
from edgeexit.runtime.build.run_worker import run_worker
from edgeexit.runtime.build.work_list import Work
from edgeexit.runtime.build.worker import Job
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet, PlanFile
from edgeexit.runtime.engines.tensorrt.library import Library

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, of)``."""

BUILDER = 4
"""Part of every key. Increase it when the same inputs give a different engine."""


@dataclass(frozen=True)
class Options:
    """How to build. None means the library's default."""

    memory_limit_bytes: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Estimate:
    """What a build needs: seconds on this processor, and memory of the largest process."""

    seconds: float
    peak_memory_bytes: int


def estimate(bundle: Bundle, works: Iterable[Work], library: Library) -> Estimate | None:
    """What a build needs, estimated from the sizes of the graphs. None for TensorRT, which times
    kernels on the device: its time cannot be estimated.

    Linear fits to builds of the digits and codelm examples with TensorRT-RTX 1.7 on two cores;
    accurate to a factor of two.
    """
    if not library.rtx:
        return None
    seconds, most = 0.0, 0
    for work in works:
        graph = read_graph_file(bundle.file(work.variant.graph).read_bytes())
        weights = sum(external.length or 0 for external in graph.externals)
        profiles = max(1, len(work.profiles))
        seconds += _START_S + _NODE_S * graph.nodes * profiles
        memory = _START_BYTES + _NODE_BYTES * graph.nodes * profiles + 3 * weights
        most = max(most, memory)
    return Estimate(round(seconds, 1), most)


_START_S, _NODE_S = 0.9, 0.006
_START_BYTES, _NODE_BYTES = 280 << 20, 140 << 10


def made_from(
    bundle: Bundle,
    works: Iterable[Work],
    library: Library,
    target: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Everything that determines the engines. The key of the engines is a digest of it.

    Args:
        target: The target: ``{"compute_capability": ...}`` for other machines, or a description of
            this device (`edgeexit.runtime.engines.cuda.driver.describe_device`).
    """
    files = bundle.manifest.files
    return {
        "builder": BUILDER,
        "library": library.name,
        "version": library.version,
        "target": dict(target),
        "weights": files[WEIGHTS].sha256 if WEIGHTS in files else None,
        "options": {
            "memory_limit_bytes": options.memory_limit_bytes,
            "opt_level": options.opt_level,
        },
        "engines": [
            {
                "graph": work.variant.graph,
                "sha256": files[work.variant.graph].sha256,
                "precision": work.variant.precision,
                "outputs": list(work.outputs),
                "fixed": dict(work.fixed),
                "profiles": [_plain(shapes) for shapes in work.profiles],
            }
            for work in works
        ],
    }


def build_engines(
    bundle: Bundle,
    works: Sequence[Work],
    library: Library,
    target: Mapping[str, Any],
    root: Path,
    *,
    options: Options | None = None,
    progress: Progress = lambda what, done, of: None,
) -> tuple[Path, EngineSet]:
    """Builds the engines that are not in the cache.

    Returns:
        The folder and its index.

    Raises:
        EngineError: The library rejects a graph or fails, memory runs out, or the cache cannot be
            written. Finished engines are kept and not built again.
        OutputBusyError: Another process is building the same engines.
    """
    options = options or Options()
    source = made_from(bundle, works, library, target, options)
    key = engine_cache.key_of(source)
    folder = engine_cache.folder_of(root, bundle.digest, key)
    if (engines := _complete(folder, bundle, key, works)) is not None:
        with contextlib.suppress(OSError):  # `load` uses the most recently requested set
            os.utime(folder / engine_cache.INDEX)
        return folder, engines
    with engine_cache.building(folder):
        known = engine_cache.whole_plans(folder, bundle.digest, key)
        plans = []
        for number, work in enumerate(works):
            plan = known.get(work.variant.graph) or _finished(folder, work)
            if plan is None:
                say = _overall(progress, work.where, number, len(works))
                plan = _build(bundle, work, library, target, folder, options, say)
            plans.append(plan)
        engines = EngineSet(
            format=engine_cache.FORMAT, bundle=bundle.digest, key=key, made_from=source, plans=plans
        )
        (folder / engine_cache.SIGNATURE).unlink(missing_ok=True)  # it is for older plans
        engine_cache.write_index(folder, engines)
        for work in works:
            _note(folder, work).unlink(missing_ok=True)
    progress("", 100, 100)
    return folder, engines


def _complete(folder: Path, bundle: Bundle, key: str, works: Sequence[Work]) -> EngineSet | None:
    """The set in a folder if it is complete and undamaged, else None."""
    known = engine_cache.whole_plans(folder, bundle.digest, key)
    if any(work.variant.graph not in known for work in works):
        return None
    return engine_cache.read_index(folder)


def missing_works(
    bundle: Bundle,
    works: Sequence[Work],
    library: Library,
    target: Mapping[str, Any],
    root: Path,
    options: Options,
) -> list[Work]:
    """What `build_engines` would build: missing and damaged engines."""
    key = engine_cache.key_of(made_from(bundle, works, library, target, options))
    folder = engine_cache.folder_of(root, bundle.digest, key)
    known = engine_cache.whole_plans(folder, bundle.digest, key)
    return [
        work
        for work in works
        if work.variant.graph not in known and _finished(folder, work) is None
    ]


def _plain(shapes: Shapes) -> dict[str, list[list[int]]]:
    return {name: [list(shape) for shape in three] for name, three in shapes.items()}


def _note(folder: Path, work: Work) -> Path:
    """File with the description of a finished plan while other plans are being built."""
    return folder / f"{work.file}.json"


def _finished(folder: Path, work: Work) -> PlanFile | None:
    """A plan that an interrupted build finished; None if it is missing or damaged."""
    note, path = _note(folder, work), folder / work.file
    if not (note.is_file() and path.is_file()):
        return None
    try:
        plan = decode(note.read_bytes(), PlanFile)
    except ValueError:
        return None
    fits = (plan.graph, plan.file) == (work.variant.graph, work.file)
    return plan if fits and engine_cache.is_whole(folder, plan) else None


def _build(
    bundle: Bundle,
    work: Work,
    library: Library,
    target: Mapping[str, Any],
    folder: Path,
    options: Options,
    say: Callable[[float, str], None],
) -> PlanFile:
    """Builds one engine. Writes its plan and, next to it, its description."""
    capability = target.get("compute_capability") if target.get("ahead_of_time") else None
    plan = folder / work.file
    job = Job(
        library=library.name,
        graph=str(bundle.file(work.variant.graph).absolute()),
        outputs=list(work.outputs),
        fixed=dict(work.fixed),
        profiles=[_plain(shapes) for shapes in work.profiles],
        targets=[] if capability is None else [capability],
        plan=str(plan.absolute()),
        timing_cache=None if options.timing_cache is None else str(options.timing_cache),
        memory_limit_bytes=options.memory_limit_bytes,
        opt_level=options.opt_level,
    )
    built = run_worker(job, work, say)
    finished = PlanFile(
        graph=work.variant.graph,
        file=work.file,
        sha256=sha256_of(plan),
        bytes=built.bytes,
        outputs=list(work.outputs),
        profiles=job.profiles,
        largest=dict(work.largest),
        precision=built.precision,
        inspected=built.inspected,
        seconds=round(built.seconds, 3),
        peak_memory_bytes=built.peak_memory_bytes,
    )
    engine_cache.write_whole(_note(folder, work), msgspec.json.encode(finished))
    return finished


def _overall(
    progress: Progress, where: str, number: int, count: int
) -> Callable[[float, str], None]:
    """Converts the progress of one engine to that of the whole build, in percent."""

    def say(share: float, phase: str) -> None:
        progress(f"{where} ({number + 1} of {count})", int(100 * (number + share) / count), 100)

    say(0.0, "")
    return say


__all__ = ["Estimate", "Options", "build_engines", "estimate", "made_from", "missing_works"]
