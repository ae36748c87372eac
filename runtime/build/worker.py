"""The child process that builds one engine.

TensorRT frees memory only when its process ends, and on a small device the system kills the process
when memory runs out. So `build_engines` starts one process per graph. It reads the job as JSON from
stdin and writes one JSON object per line to stdout: ``phase``, ``done`` and ``of`` during the
build, ``built`` or ``failed`` at the end.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import msgspec

from edgeexit.bundle.onnx_wire import fix_axes, keep_outputs, sign_numbers
from edgeexit.errors import EdgeExitError, EngineError
from edgeexit.runtime.engines.tensorrt import precision
from edgeexit.runtime.engines.tensorrt.api import (
    Builder,
    IBuilderConfig,
    IHostMemory,
    OnnxParser,
    TensorRt,
)
from edgeexit.runtime.engines.tensorrt.engine_cache import write_whole
from edgeexit.runtime.engines.tensorrt.library import Library, import_library
from edgeexit.runtime.memory import peak_bytes

logger = logging.getLogger(__name__)

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to build.

    Attributes:
        library: Module of the engine library.
        graph: Path of the ONNX file; its weights are stored next to it.
        outputs: Outputs to keep.
        fixed: Named axis -> the size that it is fixed to (`edgeexit.bundle.onnx_wire.fix_axes`).
        profiles: Per profile, input -> smallest, usual and largest shape.
        targets: Compute capabilities (86 for 8.6) of other machines; empty: this device.
        plan: Path of the plan to write.
    """

    library: str
    graph: str
    outputs: list[str]
    fixed: dict[str, int]
    profiles: list[dict[str, list[list[int]]]]
    targets: list[int]
    plan: str
    timing_cache: str | None = None
    memory_limit_bytes: int | None = None
    opt_level: int | None = None


class Built(msgspec.Struct, kw_only=True):
    """A finished engine: size of the plan, types of its network's layers, types in which the engine
    multiplies (None if it could not be inspected), seconds, and peak memory."""

    bytes: int
    precision: precision.Types
    inspected: dict[str, int] | None
    seconds: float
    peak_memory_bytes: int


class Failed(msgspec.Struct, kw_only=True):
    """Why a build failed. `nodes` lists the nodes that the parser rejected: name, operator, reason.
    `fix` is set if the cause is not the library."""

    what: str
    nodes: list[tuple[str, str, str]] = []
    memory: bool = False
    fix: str | None = None


def main() -> None:
    """Builds the job on stdin."""
    # Without this, an orphaned process could write into the folder of a second build.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    # The library may print to stdout, so messages use a copy of it.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        result: dict[str, Any] = {"built": build(import_library(job.library), job, messages)}
    except Refused as error:
        result = {"failed": error.failed}
    except EdgeExitError as error:
        result = {"failed": Failed(what=error.what, fix=error.fix)}
    _send(messages, result)


class Refused(Exception):
    """The library rejected the job."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.what)
        self.failed = failed


def build(library: Library, job: Job, messages: TextIO) -> Built:
    """Builds an engine and writes its plan. Raises `Refused`."""
    started = time.monotonic()
    log = _logger(library.module)
    plan, types = _make(library, job, log, messages)
    write_whole(Path(job.plan), memoryview(plan))
    return Built(
        bytes=plan.nbytes,
        precision=types,
        inspected=None if job.targets else _inspect(library.module, log, plan),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_bytes(),
    )


def _make(
    library: Library, job: Job, log: Any, messages: TextIO
) -> tuple[IHostMemory, precision.Types]:
    """Builds the plan. Returns it with the types of its network; builder and network are freed."""
    trt = library.module
    builder = trt.Builder(log)
    if builder is None:
        raise Refused(Failed(what=log.reason("the library created no builder")))
    flags = (
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if library.has_typing_flag else 0
    )
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    path = Path(job.graph)
    raw = fix_axes(keep_outputs(path.read_bytes(), job.outputs), job.fixed)
    raw = sign_numbers(raw, path.parent)
    if not parser.parse(raw, str(path)):
        raise Refused(_parser_failure(parser, log))
    config = _configure(trt, builder, job, log)
    cache = None
    if job.timing_cache is not None:
        known = Path(job.timing_cache)
        cache = config.create_timing_cache(known.read_bytes() if known.exists() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise EngineError(
                f"--timing-cache {known}: {library.name} {library.version} does not accept it "
                f"({log.reason('it is for another version or GPU')})",
                fix="Remove the file, or name another: a new file is created.",
            )
    config.progress_monitor = monitor = _monitor(trt, messages)
    types = precision.of_network(trt, network)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(
            Failed(what=log.reason("the library built no engine"), memory=log.out_of_memory)
        )
    del monitor
    if cache is not None and job.timing_cache is not None:
        write_whole(Path(job.timing_cache), memoryview(config.get_timing_cache().serialize()))
    return plan, types


def _configure(trt: TensorRt, builder: Builder, job: Job, log: Any) -> IBuilderConfig:
    """The builder's configuration: profiles, targets, limits."""
    config = builder.create_builder_config()
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise Refused(Failed(what=log.reason(f"invalid profile: {shapes}")))
    if job.targets:
        config.num_compute_capabilities = len(job.targets)
        for place, target in enumerate(job.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target}"), place)
    else:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
    config.clear_flag(trt.BuilderFlag.TF32)  # compute float32 in full precision
    if job.memory_limit_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.memory_limit_bytes)
    if job.opt_level is not None:
        config.builder_optimization_level = job.opt_level
    return config


def _inspect(trt: TensorRt, log: Any, plan: IHostMemory) -> dict[str, int] | None:
    """Loads the engine on this device and returns the types in which it multiplies, from the
    inspector. None if the engine cannot be loaded now (not enough memory) or the report cannot be
    read; the build still succeeds."""
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    report = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return precision.of_engine(report)
    except ValueError as error:
        logger.warning("the inspector's report cannot be read: %s", error)
        return None


def _parser_failure(parser: OnnxParser, log: Any) -> Failed:
    nodes = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        name = error.node_name() or f"number {error.node()}"
        nodes.append((name, error.node_operator(), error.desc()))
    return Failed(what=log.reason("the parser rejected the graph"), nodes=nodes)


def _logger(trt: TensorRt) -> Any:
    """A logger that keeps error messages: the library's functions only return that they failed."""

    base: Any = trt.ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def reason(self, default: str) -> str:
            return self.errors[0] if self.errors else default

        @property
        def out_of_memory(self) -> bool:
            text = " ".join(self.errors).lower()
            return "out of memory" in text or "outofmemory" in text or "insufficient memory" in text

    return Log()


def _monitor(trt: TensorRt, messages: TextIO) -> Any:
    """A progress monitor that sends messages to the parent."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.steps: dict[str, int] = {}
            self.parent = os.getppid()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            _send(messages, {"phase": phase, "done": 0, "of": steps})

        def step_complete(self, phase: str, step: int) -> bool:
            _send(messages, {"phase": phase, "done": step + 1, "of": self.steps.get(phase, 0)})
            return os.getppid() == self.parent  # stop if the parent has ended

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _send(messages: TextIO, message: dict[str, Any]) -> None:
    messages.write(msgspec.json.encode(message).decode() + "\n")
    messages.flush()
