"""Building the engines of a bundle: one per segment and head, each in a process of its own.

`work_of` says what there is to build, a pure function of the manifest; `build_engines` builds what
the cache does not have yet. A build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeexit.bundle.manifest import LENGTHS, Axis, Manifest, Segment, Variant
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.bundle.reader import WEIGHTS, Bundle, sha256_of
from edgeexit.errors import EngineError, UsageError
from edgeexit.runtime.build.profiles import (
    DRAFTED,
    Asked,
    Range,
    Ranges,
    Shapes,
    Sizes,
    decode_profiles,
    few_or_many,
    row_buckets,
    shapes_of,
    usual_ranges,
)
from edgeexit.runtime.build.worker import Built, Failed, Job
from edgeexit.runtime.child import child_command
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet, PlanFile
from edgeexit.runtime.engines.tensorrt.library import Library
from edgeexit.runtime.executor.session import CHUNK, Form
from edgeexit.runtime.memory import available_bytes

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, of)``."""

REFERENCE = "samples/reference.npz"

LONGEST_NAME = 120
"""Characters of a graph's name that its plan keeps; names of files have 255."""

BUILDER = 4
"""Raised when what is built of the same things becomes another engine: a part of every key."""


@dataclass(frozen=True)
class Work:
    """One engine to build.

    Attributes:
        where: What it is, for the user: a segment, a head, unsplit.
        variant: Which form of the graph.
        outputs: Outputs to keep.
        profiles: Per profile, shapes of the inputs.
        fixed: Named axes that get a number.
        largest: Named axis -> its largest size over all profiles.
    """

    where: str
    variant: Variant
    outputs: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    fixed: Sizes
    largest: Sizes

    @property
    def file(self) -> str:
        """Name of the plan."""
        name = Path(self.variant.graph).name.removesuffix(".onnx")
        if len(name) > LONGEST_NAME:
            name = hashlib.sha256(name.encode()).hexdigest()[:32]
        return f"{name}.plan"


@dataclass(frozen=True)
class Options:
    """How to build. None: as the library does by default."""

    memory_limit_bytes: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None


def work_of(
    manifest: Manifest,
    features: frozenset[str],
    asked: Asked,
    sample: Sizes,
    *,
    chunk: int = CHUNK,
    unsplit: bool = True,
    form: Form | None = None,
    tunes: bool = False,
) -> list[Work]:
    """What there is to build of a bundle.

    Args:
        manifest: The bundle's.
        features: What the engine library can do; see `Variant`.
        asked: Sizes that the user wants.
        sample: Sizes of the axes in the bundle's sample.
        chunk: Tokens that one run of prefill takes; decoders only.
        unsplit: Build the baseline too.
        form: Of the caches: ``fixed`` or ``append``. None: the first that the library can build.
        tunes: The library times kernels for the usual shape (`Library.tunes`): rows then have
            several profiles, unless the user says how many are usual.

    Raises:
        UsageError: Sizes do not fit the bundle.
        EngineError: A part has no form that the library can build.
    """
    tunes = tunes and "batch" not in asked.opt
    if manifest.program == "decode":
        return _decoder(manifest, features, asked, chunk, unsplit, form, tunes)
    ranges = usual_ranges(manifest, asked, sample)
    profiles: list[Ranges] = [ranges]
    if tunes and "batch" in ranges:
        profiles = [{**ranges, "batch": bucket} for bucket in row_buckets(ranges["batch"])]
    parts = [(s, s.name) for chain in manifest.chains.values() for s in chain.segments]
    parts += [(head, f"head {name}") for name, head in manifest.heads.items()]
    if unsplit:
        parts.append((_unsplit(manifest), "unsplit"))
    works = []
    for part, where in parts:
        variant = usable(part, features, where)
        axes = {tensor.name: tensor.axes for tensor in part.inputs}
        outputs = tuple(tensor.name for tensor in part.outputs)
        shapes = [shapes_of(axes, one, where) for one in profiles]
        # What has no axis of rows has one profile, not several alike.
        own = tuple(one for number, one in enumerate(shapes) if one not in shapes[:number])
        works.append(Work(where, variant, outputs, own, {}, _largest([ranges], axes)))
    return works


def _decoder(
    manifest: Manifest,
    features: frozenset[str],
    asked: Asked,
    chunk: int,
    unsplit: bool,
    form: Form | None,
    tunes: bool,
) -> list[Work]:
    decoding = manifest.decoding
    assert decoding is not None
    limit = manifest.limits["positions"]
    capacity = asked.capacity or limit
    if capacity > limit:
        raise UsageError(
            f"--capacity {capacity}: the model was made for {limit} tokens",
            fix=f"Use at most {limit}.",
        )
    if not asked.min.get("new", 1) == asked.opt.get("new", 1) == 1:
        raise UsageError(
            "--min-shapes, --opt-shapes: engines of language models take from one new token on, "
            "and are tuned for one and for prompts",
            fix="Say how many rows, and 1 token: tokens:4x1.",
        )
    if (new := asked.max.get("new", 1)) > capacity:
        raise UsageError(
            f"--max-shapes: {new} new tokens, the caches hold {capacity}",
            fix=f"Give at most {capacity}, or a larger --capacity (the model takes {limit}).",
        )
    asked = Asked(asked.min, asked.opt, {"new": min(chunk, capacity), **asked.max}, capacity)
    ranges = usual_ranges(manifest, asked, {})
    rows, chunk = ranges["batch"], ranges["new"].max
    buckets = few_or_many(rows) if tunes else [rows]
    profiles = decode_profiles(rows, buckets, chunk, capacity)
    most = max(rows.max * min(DRAFTED, capacity), chunk)
    parts: list[tuple[Segment, str, Sequence[Ranges]]] = []
    for chain in manifest.chains.values():
        parts += [(segment, segment.name, profiles) for segment in chain.segments]
    for name, head in manifest.heads.items():
        # What has caches goes along with the segments; the head takes rows of any texts.
        any_rows = Range(1, rows.opt, most)
        own = profiles
        if not head.caches:
            buckets = few_or_many(any_rows) if tunes else [any_rows]
            own = [{"batch": bucket} for bucket in buckets]
        parts.append((head, f"head {name}", own))
    if unsplit:
        caches = [c for chain in manifest.chains.values() for s in chain.segments for c in s.caches]
        inputs = [decoding.embedding.output, decoding.positions]
        whole = msgspec.structs.replace(_unsplit(manifest), inputs=inputs, caches=caches)
        parts.append((whole, "unsplit", profiles))
    works = []
    for part, where, for_part in parts:
        variant = usable(part, features, where, form if part.caches else None)
        works.append(_cached(part, variant, where, for_part, capacity))
        if part.projection is not None:
            one = [{**profiles[0], "batch": rows, "new": Range(1, 1, 1)}]
            bare = msgspec.structs.replace(part, outputs=[])
            work = _cached(bare, part.projection, f"projection of {where}", one, capacity)
            # It is run for one token at a time, which is no limit to what the others take.
            limits = {axis: most for axis, most in work.largest.items() if axis != "new"}
            works.append(dataclasses.replace(work, largest=limits))
    return works


def _cached(
    part: Segment, variant: Variant, where: str, profiles: Sequence[Ranges], capacity: int
) -> Work:
    axes: dict[str, Sequence[Axis]] = {tensor.name: tensor.axes for tensor in part.inputs}
    outputs = [tensor.name for tensor in part.outputs]
    outputs += [cache.present for cache in part.caches]
    fixed: dict[str, int] = {}
    if variant is not part.projection:
        axes |= {cache.past: cache.axes for cache in part.caches}
        axes |= {f"lengths/{kind}": LENGTHS[kind][1] for kind in variant.lengths}
        if variant.caches == "fixed":
            fixed = {"past": capacity}
    ranges = [
        {**profile, **{axis: Range(size, size, size) for axis, size in fixed.items()}}
        for profile in profiles
    ]
    shapes = tuple(shapes_of(axes, one, where) for one in ranges)
    return Work(where, variant, tuple(outputs), shapes, fixed, _largest(ranges, axes))


def _largest(profiles: Sequence[Ranges], tensors: Mapping[str, Sequence[Axis]]) -> dict[str, int]:
    """The largest sizes of the named axes of these tensors over all profiles."""
    axes = {axis for own in tensors.values() for axis in own if isinstance(axis, str)}
    found: dict[str, int] = {}
    for ranges in profiles:
        for axis in axes & ranges.keys():
            found[axis] = max(ranges[axis].max, found.get(axis, 0))
    return dict(sorted(found.items()))


def _unsplit(manifest: Manifest) -> Segment:
    return Segment(
        name="unsplit",
        variants=manifest.unsplit,
        inputs=manifest.inputs,
        outputs=list(manifest.outputs),
    )


def sample_sizes(bundle: Bundle) -> dict[str, int]:
    """Sizes of the named axes in the bundle's reference sample, which are usual ones; none where
    there is no sample."""
    if REFERENCE not in bundle.manifest.samples:
        return {}
    sizes: dict[str, int] = {}
    with np.load(bundle.file(REFERENCE), allow_pickle=False) as sample:
        for tensor in bundle.manifest.inputs:
            if (name := f"input/{tensor.name}") in sample:
                pairs = zip(tensor.axes, sample[name].shape, strict=False)
                sizes |= {axis: size for axis, size in pairs if isinstance(axis, str)}
    return sizes


@dataclass(frozen=True)
class Estimate:
    """What building will take: seconds of this processor, and memory of the largest process."""

    seconds: float
    peak_memory_bytes: int


def estimate(bundle: Bundle, works: Iterable[Work], library: Library) -> Estimate | None:
    """What building will take, from sizes of the graphs; None for TensorRT, which times kernels on
    the device: nobody knows before.

    Straight lines through what TensorRT-RTX 1.7 took for the digits and codelm examples on two
    cores: good to a factor of two.
    """
    if not library.rtx:
        return None
    seconds, most = 0.0, 0
    for work in works:
        graph = read_graph_file(bundle.file(work.variant.graph).read_bytes())
        weights = sum(one.length or 0 for one in graph.externals)
        profiles = max(1, len(work.profiles))
        seconds += _START_S + _NODE_S * graph.nodes * profiles
        memory = _START_BYTES + _NODE_BYTES * graph.nodes * profiles + 3 * weights
        most = max(most, memory)
    return Estimate(round(seconds, 1), most)


_START_S, _NODE_S = 0.9, 0.006
_START_BYTES, _NODE_BYTES = 280 << 20, 140 << 10


def usable(
    part: Segment, features: frozenset[str], where: str, form: Form | None = None
) -> Variant:
    """The first form of a part that the library can build, or the one asked for."""
    for variant in part.variants:
        if set(variant.requires) <= features and form in (None, variant.caches):
            return variant
    known = ", ".join(
        f"{one.caches} (needs {' and '.join(one.requires) or 'nothing'})" for one in part.variants
    )
    raise EngineError(
        f"{where} has no form {f'{form} ' if form else ''}that this TensorRT builds: {known}",
        fix="Use --caches append, which every version builds; fixed is for float16 and bfloat16, "
        "and for TensorRT from 10.15 on or TensorRT-RTX.",
    )


def made_from(
    bundle: Bundle,
    works: Iterable[Work],
    library: Library,
    target: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Everything that could make engines others, by name: what the key is made of.

    Args:
        target: What the engines run on: ``{"compute_capability": ...}`` ahead of time, or what
            tells one device from another.
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
    """Builds what the cache does not have yet.

    Returns:
        The folder, and what it holds.

    Raises:
        EngineError: The library refuses a graph or fails, memory runs out, or the cache cannot be
            written. What was built before stays and is not built again.
        OutputBusyError: The same is being built already.
    """
    options = options or Options()
    source = made_from(bundle, works, library, target, options)
    key = engine_cache.key_of(source)
    folder = engine_cache.folder_of(root, bundle.digest, key)
    if (engines := _complete(folder, bundle, key, works)) is not None:
        with contextlib.suppress(OSError):  # asked for last, so taken first; where it can be said
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
        (folder / engine_cache.SIGNATURE).unlink(missing_ok=True)  # it was made for other plans
        engine_cache.write_index(folder, engines)
        for work in works:
            _note(folder, work).unlink(missing_ok=True)
    progress("", 100, 100)
    return folder, engines


def _complete(folder: Path, bundle: Bundle, key: str, works: Sequence[Work]) -> EngineSet | None:
    """The finished set in a folder, if it has every plan, as it was built."""
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
    """What `build_engines` would have to build: what the cache does not have, or damaged."""
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
    """What is known of a plan while others are still being built."""
    return folder / f"{work.file}.json"


def _finished(folder: Path, work: Work) -> PlanFile | None:
    """A plan that an earlier, interrupted build made: whole, or as if it were not there."""
    note, path = _note(folder, work), folder / work.file
    if not (note.is_file() and path.is_file()):
        return None
    try:
        plan = msgspec.json.decode(note.read_bytes(), type=PlanFile)
    except (msgspec.MsgspecError, UnicodeDecodeError):
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
    built = _run(job, work, say)
    made = PlanFile(
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
    engine_cache.write_whole(_note(folder, work), msgspec.json.encode(made))
    return made


def _run(job: Job, work: Work, say: Callable[[float, str], None]) -> Built:
    """Runs the job in a process of its own."""
    free = available_bytes()
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as complaints:
        with subprocess.Popen(
            child_command(f"{__package__}.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
        ) as child:
            try:
                assert child.stdin is not None and child.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # it died; its end says of what
                    child.stdin.write(msgspec.json.encode(job))
                    child.stdin.close()
                outer: str | None = None
                for line in child.stdout:
                    last = msgspec.json.decode(line)
                    if "phase" in last:
                        outer = outer or last["phase"]  # the others are parts of the first one
                        if last["phase"] == outer and last["of"]:
                            say(last["done"] / last["of"], last["phase"])
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        complaints.seek(0)
        said = complaints.read().decode(errors="replace").strip().splitlines()
    if "built" in last:
        return msgspec.convert(last["built"], Built)
    if "failed" in last:
        raise _failure(msgspec.convert(last["failed"], Failed), work, free)
    if code == -signal.SIGKILL:
        raise EngineError(
            f"{work.where}: its build was killed (signal 9), as the system does when memory runs "
            f"out; {_mib(free)} were free when it began",
            fix=_LESS_MEMORY,
        )
    reason = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise EngineError(
        f"{work.where}: its build ended with {reason}: {said[-1][:300] if said else 'no message'}",
        fix="Run it again: what was built is kept. If it stays so, it is a bug; please report it.",
    )


_LESS_MEMORY = (
    "Close other programs, or lower what it needs: --memory-limit 512MiB (scratch memory), smaller "
    "--max-shapes, or --opt-level 1. What was built is kept."
)


def _failure(failed: Failed, work: Work, free: int) -> EngineError:
    graph = work.variant.graph
    if failed.fix is not None:
        return EngineError(f"{work.where}: {failed.what}", fix=failed.fix)
    if failed.memory:
        return EngineError(
            f"{work.where} ({graph}): there is not enough memory ({failed.what[:200]}); "
            f"{_mib(free)} were free when it began",
            fix=_LESS_MEMORY,
        )
    if failed.nodes:
        name, operator, reason = map(plain_text, failed.nodes[0])
        module = name.rpartition("/")[0]  # export names nodes after the modules they came from
        came = f", from the torch module {module}" if module else ""
        return EngineError(
            f"{work.where} ({graph}): TensorRT refuses the node {name} ({operator}{came}): "
            f"{reason[:300]}",
            fix="Run this bundle with ONNX Runtime (--engine cuda), or export it without that "
            "operator.",
        )
    return EngineError(
        f"{work.where} ({graph}): TensorRT builds no engine of it: {plain_text(failed.what)[:400]}",
        fix="Its message names what it lacks: for a precision, export --dtype fp16; for room, a "
        "larger --memory-limit or smaller --max-shapes. Or run this bundle with ONNX Runtime "
        "(--engine cuda).",
    )


def _overall(
    progress: Progress, where: str, number: int, count: int
) -> Callable[[float, str], None]:
    """Turns progress within one engine into that of the whole build, in hundredths."""

    def say(share: float, phase: str) -> None:
        progress(f"{where} ({number + 1} of {count})", int(100 * (number + share) / count), 100)

    say(0.0, "")
    return say


def plain_text(text: str) -> str:
    """A message of the library's, or a name from a graph, as one line that leaves a terminal alone.

    >>> plain_text("a\\n  b" + chr(27) + "[2J")
    'a b?[2J'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


__all__ = [
    "Estimate",
    "Options",
    "Work",
    "build_engines",
    "estimate",
    "missing_works",
    "made_from",
    "sample_sizes",
    "work_of",
]
