"""The TensorRT engine of the runtime: plans opened on one GPU, run in order on one stream.

A bound graph is a list of addresses and shapes. A run that gives nothing to the host only puts its
work on the stream: the next segment can be put behind it at once.

Not yet run anywhere: no machine with a GPU that TensorRT supports was at hand. What is tested is
said in README.md, "What ran where".
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError, InputError
from edgeexit.runtime.engines.base import Bound, Slot
from edgeexit.runtime.engines.cuda.device import (
    Device,
    DeviceSlot,
    Waiting,
    require_room,
)
from edgeexit.runtime.engines.cuda.driver import describe_device
from edgeexit.runtime.engines.cuda.replay import Replays
from edgeexit.runtime.engines.cuda.staging import Staging
from edgeexit.runtime.engines.host import HostSlot
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.api import (
    ICudaEngine,
    IExecutionContext,
    IRuntimeCache,
    IRuntimeConfig,
)
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet, PlanFile
from edgeexit.runtime.engines.tensorrt.library import Library, find_library

logger = logging.getLogger(__name__)

RUNTIME_CACHE = "runtime.cache"
"""Kernels that TensorRT-RTX compiled when plans were loaded here, beside the plans."""


class TensorRtEngine:
    """Opens the plans of one set of engines.

    Args:
        library: Which library.
        folder: Where the set lies.
        engines: What it holds.
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
        # TensorRT-RTX records by itself, for its kernels change while it specialises them.
        self.replays = None if library.rtx else Replays(device)
        self._scratch = Scratch(device, self.replays)
        self._cache = _RuntimeCache(folder / RUNTIME_CACHE) if library.rtx else None
        if self._cache is not None:  # kernels are also made while graphs run
            weakref.finalize(self, self._cache.save)

    def describe(self) -> dict[str, str]:
        """Name, library, version, key of the engines, and how the host waits."""
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
        """Opens the plan that was built from a graph of the bundle."""
        name = _name_of(path)
        if (known := self._opened.get(name)) is not None:
            return known  # a plan has every output, whatever is asked of it
        plan = self._plans.get(name)
        if plan is None:
            raise EngineError(
                f"{name}: no engine of it was built (there are {', '.join(sorted(self._plans))})",
                fix="Build again, without --without-unsplit: edgeexit build.",
            )
        if missing := sorted(set(outputs or ()) - set(plan.outputs)):
            raise EngineError(
                f"{name}: its engine does not give {missing[0]}", fix="Build again: edgeexit build."
            )
        place = self._folder / plan.file
        require_room(self.device, plan.bytes, f"the engine of {name}")
        try:
            raw = place.read_bytes()
        except OSError as error:
            raise EngineError(
                f"{place}: cannot be read ({error.strerror})", fix="Build again: edgeexit build."
            ) from error
        if hashlib.sha256(raw).hexdigest() != plan.sha256:  # a plan is code: what is run is hashed
            raise EngineError(
                f"{place}: not as it was built", fix="Build again (it is mended): edgeexit build."
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
        """Opens several, one after the other: each plan's bytes leave the host before the next."""
        opened = [self.open(*graph) for graph in graphs]
        if self._cache is not None:
            self._cache.save()
        return opened

    def allocate(self, size_bytes: int) -> Slot:
        """Memory on the GPU."""
        return self.device.allocate(size_bytes)

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Pinned memory."""
        return self.device.allocate_host(size_bytes)

    def settle(self) -> None:
        """Waits for runs that may still have to read memory of the host."""
        self.device.settle()

    def context(self, engine: ICudaEngine) -> IExecutionContext:
        """An execution context whose scratch memory is the one that all of this engine share."""
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
                "TensorRT made no execution context", fix="Free memory on the GPU, and try again."
            )
        self._scratch.lend(context, int(engine.device_memory_size_v2))
        return context


def _name_of(path: Path) -> str:
    """A graph's name in the bundle."""
    return f"{path.parent.name}/{path.name}"


def _largest(plans: Sequence[PlanFile]) -> dict[str, int]:
    """The largest sizes that every plan takes which has the axis."""
    found: dict[str, int] = {}
    for plan in plans:
        for axis, size in plan.largest.items():
            found[axis] = min(size, found.get(axis, size))
    return found


class Scratch:
    """Scratch memory that contexts share which run one after the other: as much as the largest of
    them needs, not their sum."""

    def __init__(self, device: Device, replays: Replays | None = None) -> None:
        self._device, self._replays = device, replays
        self._contexts: list[weakref.ref[IExecutionContext]] = []
        self._slot: Any = None

    def lend(self, context: IExecutionContext, size_bytes: int) -> None:
        """Gives a context its scratch memory; if it needs more than there is, all get a larger."""
        self._contexts = [one for one in self._contexts if one() is not None]
        self._contexts.append(weakref.ref(context))
        if self._slot is None or self._slot.bytes < size_bytes:
            self._device.wait()  # somebody may still be using the old one
            self._slot = self._device.allocate(size_bytes)
            if self._replays is not None:
                self._replays.forget()
            for one in (held() for held in self._contexts):
                if one is not None:
                    one.set_device_memory(self._slot.pointer, self._slot.bytes)
        else:
            context.set_device_memory(self._slot.pointer, self._slot.bytes)


class _RuntimeCache:
    """Kernels compiled for this GPU, kept in a file between processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: IRuntimeCache | None = None
        self._known = b""

    def of(self, config: IRuntimeConfig) -> IRuntimeCache:
        """The one cache of all contexts."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._path.is_file():
                self._known = self._path.read_bytes()
                if not self._cache.deserialize(self._known):
                    logger.info("%s is of another GPU or driver; kernels are made anew", self._path)
        return self._cache

    def save(self) -> None:
        """Writes the file, if there is anything new. Where it cannot be written, kernels are made
        anew in the next process."""
        if self._cache is None or not os.access(self._path.parent, os.W_OK):
            return
        blob = bytes(memoryview(self._cache.serialize()))
        if blob == self._known:
            return
        try:
            engine_cache.write_whole(self._path, blob)
            self._known = blob
        except EngineError as error:
            logger.warning("compiled kernels are not kept: %s", error)


@dataclass
class _Binding:
    """One set of shapes, and where tensors lie.

    Attributes:
        context: Its own, once it is to be recorded; else all take turns in the graph's.
        unread: Memory of outputs that nobody reads.
    """

    profile: int
    shapes: list[tuple[str, tuple[int, ...]]]
    addresses: dict[str, int]
    context: IExecutionContext | None = None
    unread: list[DeviceSlot] = field(default_factory=list)


class TensorRtGraph:
    """One engine, with one context."""

    def __init__(
        self, owner: TensorRtEngine, name: str, plan: PlanFile, engine: ICudaEngine
    ) -> None:
        self._owner, self._name, self._plan, self._engine = owner, name, plan, engine
        trt = owner.library.module
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        self._inputs = [one for one in names if engine.get_tensor_mode(one) == inputs]
        self._outputs = [one for one in names if one not in self._inputs]
        self._context = owner.context(engine)
        self._bound: _Binding | None = None
        self._staging = Staging(owner.device)

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        """Binds buffers for one set of shapes.

        Raises:
            InputError: The shapes are outside of what the engine was built for.
        """
        shapes = [(name, inputs[name][2]) for name in self._inputs]
        profile = self._profile(dict(shapes))
        layout = self._staging.lay_out(
            {name: inputs[name] for name in self._inputs},
            {name: outputs[name] for name in self._outputs if name in outputs},
        )
        binding = _Binding(profile, shapes, layout.addresses)
        if unread := [name for name in self._outputs if name not in outputs]:
            self._shape(self._context, binding)
            for name in unread:
                slot = self._owner.device.allocate(self._size(name))
                binding.unread.append(slot)
                binding.addresses[name] = slot.pointer
        replays, record = self._owner.replays, None
        if replays is not None:
            record = functools.partial(replays.of, prepare=lambda: self._set_apart(binding))
        return self._staging.around(layout, lambda: self._execute(binding), record)

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Asks the context, which needs no run for it."""
        shapes = [(name, inputs[name][2]) for name in self._inputs]
        self._owner.device.enter()
        self._shape(self._context, _Binding(self._profile(dict(shapes)), shapes, {}))
        found = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in found.items():
            self._require_known(name, shape)
        return found

    def _size(self, name: str) -> int:
        """Bytes of an output, for the shapes that the context was told."""
        shape = tuple(self._context.get_tensor_shape(name))
        self._require_known(name, shape)
        item_bytes = int(self._engine.get_tensor_dtype(name).itemsize)
        return int(math.prod(shape)) * item_bytes

    def _require_known(self, name: str, shape: tuple[int, ...]) -> None:
        if min(shape, default=0) < 0:
            raise EngineError(
                f"{self._name}: the shape of {name} depends on values",
                fix="Run this bundle with ONNX Runtime (--engine cuda).",
            )

    def _set_apart(self, binding: _Binding) -> None:
        """Gives a binding that is about to be recorded a context of its own: other shapes would
        change what the recording was made of."""
        binding.context = context = self._owner.context(self._engine)
        self._shape(context, binding)
        self._place(context, binding)

    def _execute(self, binding: _Binding) -> None:
        context = binding.context
        if context is None:
            context = self._context
            if self._bound is not binding:
                self._shape(context, binding)
                self._place(context, binding)
                self._bound = binding
        if not context.execute_async_v3(self._owner.device.stream):
            raise EngineError(
                f"{self._name}: TensorRT did not run it", fix="See its messages above."
            )

    def _shape(self, context: IExecutionContext, binding: _Binding) -> None:
        """Tells a context profile and shapes."""
        self._bound = None
        stream = self._owner.device.stream
        if context.active_optimization_profile != binding.profile and not (
            context.set_optimization_profile_async(binding.profile, stream)
        ):
            raise EngineError(
                f"{self._name}: TensorRT did not take profile {binding.profile}",
                fix="See its messages above.",
            )
        for name, shape in binding.shapes:
            if not context.set_input_shape(name, shape):
                raise InputError(
                    f"{self._name}: TensorRT takes no {name} of {list(shape)}",
                    fix="Build with other --min-shapes or --max-shapes.",
                )

    def _place(self, context: IExecutionContext, binding: _Binding) -> None:
        """Tells a context where tensors lie."""
        for name, address in binding.addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(
                    f"{self._name}: TensorRT did not take the address of {name}",
                    fix="See its messages above.",
                )

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that takes these shapes."""
        worst = ""
        for number, profile in enumerate(self._plan.profiles):
            outside = [name for name in profile if not _within(shapes[name], profile[name])]
            if not outside:
                return number
            low, _, high = profile[outside[0]]
            worst = f"{outside[0]} is {list(shapes[outside[0]])}, engines take {low} to {high}"
        if not self._plan.profiles:
            return 0
        raise InputError(
            f"{self._name}: {worst}",
            fix="Give less at a time, or build for it: --min-shapes, --max-shapes, --capacity.",
        )


def _within(shape: tuple[int, ...], profile: list[list[int]]) -> bool:
    low, _, high = profile
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def open_tensorrt(
    bundle: Bundle, engine_dir: Path | None = None, waiting: Waiting = "spin"
) -> TensorRtEngine:
    """Opens the newest engines of a bundle that were built for this device.

    Raises:
        EngineError: There are none, saying what there is and why it does not fit.
    """
    here = describe_device()
    library = find_library()
    root = engine_cache.default_root() if engine_dir is None else engine_dir
    folder, engines = choose(engine_cache.list_engines(root, bundle.digest), library, here, root)
    return TensorRtEngine(library, folder, engines, Device(waiting=waiting))


def choose(
    sets: Sequence[tuple[Path, EngineSet]],
    library: Library,
    here: Mapping[str, Any],
    root: Path,
) -> tuple[Path, EngineSet]:
    """The newest of these engines that fits a library and a device.

    Raises:
        EngineError: None fits; it says why.
    """
    reasons = []
    for folder, engines in reversed(sets):
        reason = misfit(engines, library, here)
        if reason is None:
            return folder, engines
        reasons.append(f"{folder.name[:8]} {reason}")
    found = "; ".join(reasons[:4]) if reasons else "there are none"
    raise EngineError(
        f"{root}: no engines of this bundle for this device: {found}",
        fix="Build them here: edgeexit build BUNDLE; or take in some that were built elsewhere: "
        "edgeexit build BUNDLE --import DIR.",
    )


def misfit(engines: EngineSet, library: Library, here: Mapping[str, Any]) -> str | None:
    """Why engines cannot run on a device; None where they can."""
    source = engines.made_from
    if (source["library"], source["version"]) != (library.name, library.version):
        return (
            f"was built by {source['library']} {source['version']}, here is {library.name} "
            f"{library.version}"
        )
    target = source["target"]
    if target.get("ahead_of_time"):
        built, found = target["compute_capability"], here["compute_capability"]
        return None if built == found else f"is for sm{built}, here is sm{found}"
    names = [name for name in target if target[name] != here.get(name)]
    if names:
        return f"is for {names[0]} {target[names[0]]}, here is {here.get(names[0])}"
    return None


__all__ = ["TensorRtEngine", "choose", "misfit", "open_tensorrt"]
