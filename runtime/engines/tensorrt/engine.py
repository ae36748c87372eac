"""The runtime's TensorRT engine: opens the plans of one set on one GPU and runs them in order on
one stream.

Not tested on a GPU yet; README.md, "What ran where", lists what was tested and how.
"""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError
from edgeexit.runtime.engines.base import Slot
from edgeexit.runtime.engines.cuda.device import Device, Waiting, require_room
from edgeexit.runtime.engines.cuda.driver import describe_device
from edgeexit.runtime.engines.cuda.replay import Replays
from edgeexit.runtime.engines.host import HostSlot
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.api import (
    ICudaEngine,
    IExecutionContext,
    IRuntimeCache,
    IRuntimeConfig,
)
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet, PlanFile
from edgeexit.runtime.engines.tensorrt.graph import TensorRtGraph
from edgeexit.runtime.engines.tensorrt.library import Library, find_library
from edgeexit.runtime.engines.tensorrt.selection import choose

logger = logging.getLogger(__name__)

RUNTIME_CACHE = "runtime.cache"
"""File next to the plans with the kernels that TensorRT-RTX compiled on this device."""


class TensorRtEngine:
    """Opens the plans of one set of engines.

    Args:
        library: The engine library.
        folder: The folder of the set.
        engines: Its index.
        device: The GPU.
    """

    name = "tensorrt"

    def __init__(self, library: Library, folder: Path, engines: EngineSet, device: Device) -> None:
        self.library, self.engines, self.device = library, engines, device
        self.features = library.features
        self.gpu: Device | None = device
        self._folder = folder
        self._plans = {plan.graph: plan for plan in engines.plans}
        self._opened: weakref.WeakValueDictionary[str, TensorRtGraph] = (
            weakref.WeakValueDictionary()
        )
        self.largest: Mapping[str, int] = _largest(engines.plans)
        trt = library.module
        self._log = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._log)
        # TensorRT-RTX records runs itself, because it replaces kernels by specialised ones later.
        self.replays = None if library.rtx else Replays(device)
        self._scratch = Scratch(device, self.replays)
        self._cache = _RuntimeCache(folder / RUNTIME_CACHE) if library.rtx else None
        if self._cache is not None:  # runs compile kernels, too
            weakref.finalize(self, self._cache.save)

    def describe(self) -> dict[str, str]:
        """Engine, library, version, key of the engines, and how the host waits."""
        return {
            "engine": self.name,
            "library": self.library.name,
            "version": self.library.version,
            "engines": self.engines.key,
            "waiting": self.device.waiting,
        }

    def offers(self, path: Path) -> bool:
        """Whether the set has a plan of this graph of the bundle."""
        return _name_of(path) in self._plans

    def open(self, path: Path, outputs: Collection[str] | None = None) -> TensorRtGraph:
        """Opens the plan that was built from a graph of the bundle.

        Raises:
            EngineError: There is no plan, it was changed after the build, it cannot be loaded, or
                it lacks one of the outputs.
        """
        name = _name_of(path)
        if (known := self._opened.get(name)) is not None:
            return known  # a plan always has all outputs
        plan = self._plans.get(name)
        if plan is None:
            raise EngineError(
                f"{name}: no engine was built for it (there are engines for "
                f"{', '.join(sorted(self._plans))})",
                fix="Build again, without --without-unsplit: edgeexit build.",
            )
        if missing := sorted(set(outputs or ()) - set(plan.outputs)):
            raise EngineError(
                f"{name}: its engine has no output {missing[0]}", fix="Build again: edgeexit build."
            )
        place = self._folder / plan.file
        require_room(self.device, plan.bytes, f"the engine of {name}")
        try:
            raw = place.read_bytes()
        except OSError as error:
            raise EngineError(
                f"{place}: cannot be read ({error.strerror})", fix="Build again: edgeexit build."
            ) from error
        if hashlib.sha256(raw).hexdigest() != plan.sha256:  # plans are executable code
            raise EngineError(
                f"{place}: was changed after the build", fix="Build again: edgeexit build."
            )
        engine = self._runtime.deserialize_cuda_engine(raw)
        del raw
        if engine is None:
            raise EngineError(
                f"{place}: {self.library.name} {self.library.version} cannot load it",
                fix="Remove the folder and build again: edgeexit build.",
            )
        opened = self._opened[name] = TensorRtGraph(self, name, plan, engine)
        return opened

    def open_all(
        self, graphs: Sequence[tuple[Path, Collection[str] | None]]
    ) -> Sequence[TensorRtGraph]:
        """Opens several plans, one after the other, so that host memory holds one at a time."""
        opened = [self.open(*graph) for graph in graphs]
        if self._cache is not None:
            self._cache.save()
        return opened

    def allocate(self, size_bytes: int, *, sparse: bool = False) -> Slot:
        """Memory on the GPU."""
        return self.device.allocate(size_bytes)

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Pinned memory."""
        return self.device.allocate_host(size_bytes)

    def settle(self) -> None:
        """Waits until earlier runs have read their host memory."""
        self.device.settle()

    def context(self, engine: ICudaEngine) -> IExecutionContext:
        """An execution context that uses the shared scratch memory."""
        trt = self.library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.set_runtime_cache(self._cache.of(config))
            if hasattr(trt, "CudaGraphStrategy"):  # from 1.2 on
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        if context is None:
            raise EngineError(
                "TensorRT could not create an execution context",
                fix="Free memory on the GPU and try again.",
            )
        self._scratch.lend(context, int(engine.device_memory_size_v2))
        return context


def _name_of(path: Path) -> str:
    """A graph's name in the bundle."""
    return f"{path.parent.name}/{path.name}"


def _largest(plans: Sequence[PlanFile]) -> dict[str, int]:
    """Per axis, the largest size that all plans with that axis accept."""
    largest: dict[str, int] = {}
    for plan in plans:
        for axis, size in plan.largest.items():
            largest[axis] = min(size, largest.get(axis, size))
    return largest


class Scratch:
    """Scratch memory shared by contexts that run one after the other. Its size is what the largest
    needs, not the sum."""

    def __init__(self, device: Device, replays: Replays | None = None) -> None:
        self._device, self._replays = device, replays
        self._contexts: list[weakref.ref[IExecutionContext]] = []
        self._slot: Any = None

    def lend(self, context: IExecutionContext, size_bytes: int) -> None:
        """Gives a context scratch memory. If it needs more than is allocated, all contexts get a
        larger block."""
        self._contexts = [held for held in self._contexts if held() is not None]
        self._contexts.append(weakref.ref(context))
        if self._slot is None or self._slot.bytes < size_bytes:
            self._device.wait()  # runs may still use the old one
            self._slot = self._device.allocate(size_bytes)
            if self._replays is not None:
                self._replays.forget()
            for known in (held() for held in self._contexts):
                if known is not None:
                    known.set_device_memory(self._slot.pointer, self._slot.bytes)
        else:
            context.set_device_memory(self._slot.pointer, self._slot.bytes)


class _RuntimeCache:
    """Kernels compiled for this GPU, stored in a file for the next process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: IRuntimeCache | None = None
        self._known = b""

    def of(self, config: IRuntimeConfig) -> IRuntimeCache:
        """The cache that all contexts share."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._path.is_file():
                self._known = self._path.read_bytes()
                if not self._cache.deserialize(self._known):
                    logger.info("%s is for another GPU or driver: compiling again", self._path)
        return self._cache

    def save(self) -> None:
        """Writes the file if there are new kernels. If that fails, the next process compiles them
        again."""
        if self._cache is None or not os.access(self._path.parent, os.W_OK):
            return
        blob = bytes(memoryview(self._cache.serialize()))
        if blob == self._known:
            return
        try:
            engine_cache.write_whole(self._path, blob)
            self._known = blob
        except EngineError as error:
            logger.warning("compiled kernels cannot be stored: %s", error)


def open_tensorrt(
    bundle: Bundle, engine_dir: Path | None = None, waiting: Waiting = "spin"
) -> TensorRtEngine:
    """Opens the newest engines of a bundle that were built for this device.

    Raises:
        EngineError: No engines fit; the message gives the reasons.
    """
    here = describe_device()
    library = find_library()
    root = engine_cache.default_root() if engine_dir is None else engine_dir
    folder, engines = choose(
        engine_cache.list_engines(root, bundle.digest), library, here, root, bundle.path
    )
    return TensorRtEngine(library, folder, engines, Device(waiting=waiting))


__all__ = ["TensorRtEngine", "open_tensorrt"]
