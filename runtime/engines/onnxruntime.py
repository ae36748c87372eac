"""ONNX Runtime: the CPU provider, and the CUDA and TensorRT providers on GPUs.

Five choices matter; benchmarks/README.md says what is known of each. Sessions share one arena, or a
chain of twelve works in twelve cold ones. Thread pools do not spin, or the pools of idle sessions
steal the cores of the one that runs. Two fusions are left out, for their kernels are slower than
what they replace. A graph is opened with the score that is asked for, not with all. The binding is
run through the compiled session, whose Python wrapper costs more than a small segment's hand-over.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import EngineError, UsageError
from edgeexit.graphfile import keep_outputs
from edgeexit.runtime.buffers import HostSlot
from edgeexit.runtime.engines import Bound, Slot

logger = logging.getLogger(__name__)

Threads = int | Literal["blocking", "spinning", "process"]
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
"""ONNX Runtime's optimizers whose fused CPU kernels are slower than the nodes they replace."""

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-provider": "TensorrtExecutionProvider",
}


def import_onnxruntime() -> Any:
    """Imports ONNX Runtime, or raises `EngineError` with the extra that brings it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime cannot be imported ({error})",
            fix='Install it: pip install "edgeexit[cpu]".',
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError(
            "onnxruntime is there but broken (two of its packages overwrote each other)",
            fix="Run `edgeexit doctor`, which names them and the command that repairs it.",
        )
    return onnxruntime


@functools.cache
def _share_arena() -> bool:
    """Registers the arena that edgeexit's sessions share. Other sessions do not use it."""
    ort = import_onnxruntime()
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    try:
        ort.create_and_register_allocator(memory, None)
    except Exception as error:
        if "already" not in str(error):
            logger.warning("sessions keep arenas of their own: %s", error)
            return False
    return True


_process_pool: list[int] = []


def install_process_pool(threads: int | None = None) -> None:
    """Installs ONNX Runtime's global thread pool for this whole process.

    Every session created later must use it: default sessions made elsewhere in the process then
    fail. Older versions of ONNX Runtime refuse once the process has made a session.
    """
    if _process_pool:
        return
    count = threads or available_cores()
    try:
        import_onnxruntime().set_global_thread_pool_sizes(count, 1)
    except Exception as error:
        raise EngineError(
            f'threads="process" cannot be installed ({str(error).splitlines()[0]})',
            fix="Ask for it before the first ONNX Runtime session of the process, or leave it out.",
        ) from error
    _process_pool.append(count)
    _share_arena.cache_clear()  # ONNX Runtime starts a new environment, without the arena


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


class OnnxRuntimeEngine:
    """Opens graphs as ONNX Runtime sessions on one provider.

    Args:
        name: ``cpu``, ``cuda`` or ``tensorrt-provider``.
        threads: A pool per session that blocks while idle (``blocking``) or spins, that many
            threads, or the pool of the process (see `install_process_pool`).
    """

    def __init__(self, name: str = "cpu", threads: Threads = "blocking") -> None:
        self._ort = import_onnxruntime()
        self.name = name
        self.features = features_of(name, self._ort.__version__)
        self.threads = threads
        if not (threads in ("blocking", "spinning", "process") or _is_count(threads)):
            raise UsageError(
                f"threads={threads!r} is not a thread setting",
                fix='Use a number from 1 up, "blocking", "spinning" or "process".',
            )
        if _process_pool and threads != "process":
            raise EngineError(
                f'threads={threads!r} cannot be had: this process took threads="process" before, '
                "and sessions with pools of their own then fail",
                fix='Load with threads="process" here too, or in another process.',
            )
        available = self._ort.get_available_providers()
        if PROVIDERS[name] not in available:
            raise EngineError(
                f"this onnxruntime has no {PROVIDERS[name]} (it has {', '.join(available)})",
                fix='For GPUs: pip uninstall onnxruntime, then pip install "edgeexit[cuda]". '
                "`edgeexit doctor` tells what is installed.",
            )
        self._device = "cpu" if name == "cpu" else "cuda"
        if threads == "process":
            install_process_pool()
        self._shared_arena = _share_arena()

    def describe(self) -> dict[str, str]:
        """Name, library, version and thread setting."""
        return {
            "engine": self.name,
            "library": "onnxruntime",
            "version": self._ort.__version__,
            "threads": str(self.threads),
        }

    def open(self, path: Path, outputs: Collection[str] | None = None) -> OnnxRuntimeGraph:
        """Opens one graph, with only the given outputs where there are more."""
        providers: list[Any] = [PROVIDERS[self.name]]
        if self.name != "cpu":
            providers.append(PROVIDERS["cpu"])
        options = self._options()
        model: str | bytes = str(path)
        try:
            if outputs is not None:
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent.absolute()))
                model = keep_outputs(path.read_bytes(), outputs)
            session = self._ort.InferenceSession(
                model,
                options,
                providers=providers,
                disabled_optimizers=SLOW_FUSIONS if self.name == "cpu" else None,
            )
        except Exception as error:
            raise EngineError(
                f"{path.parent.name}/{path.name}: ONNX Runtime {self._ort.__version__} cannot load "
                f"it: {str(error).splitlines()[0][:300]}",
                fix="`edgeexit check BUNDLE` tells whether the bundle is whole; an older opset "
                "(export --opset) suits an older library.",
            ) from error
        if session.get_providers()[0] != PROVIDERS[self.name]:
            raise EngineError(
                f"{PROVIDERS[self.name]} could not start; ONNX Runtime fell back to "
                f"{session.get_providers()[0]}",
                fix="Check the driver and CUDA libraries with `edgeexit doctor`.",
            )
        return OnnxRuntimeGraph(self._ort, session, self._device)

    def open_all(
        self, graphs: Sequence[tuple[Path, Collection[str] | None]]
    ) -> list[OnnxRuntimeGraph]:
        """Opens several graphs, side by side where cores allow: opening is mostly optimisation."""
        with ThreadPoolExecutor(min(len(graphs), available_cores())) as pool:
            return list(pool.map(lambda graph: self.open(*graph), graphs))

    def allocate(self, size_bytes: int) -> Slot:
        """Host memory for the CPU provider, device memory for the others."""
        if self._device == "cpu":
            return HostSlot(size_bytes)
        return DeviceSlot(self._ort, size_bytes)

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Ordinary memory."""
        return HostSlot(size_bytes)

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if self._shared_arena:
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if self.threads == "process":
            options.use_per_session_threads = False
        elif self.threads != "spinning":
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if _is_count(self.threads):
                options.intra_op_num_threads = self.threads
        return options


def features_of(name: str, version: str) -> frozenset[str]:
    """What graphs may use with a version. TensorScatter came to the CPU provider with 1.25, and
    copies nothing where its input and output are one buffer; on the others it was not tried."""
    found = {"onnxruntime-operators"}
    major, minor = (int(part) for part in version.split(".")[:2])
    if name == "cpu" and (major, minor) >= (1, 25):
        found |= {"opset-24", "cache-update", "float32-attention"}
    return frozenset(found)


def _is_count(threads: object) -> bool:
    return isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1


class OnnxRuntimeGraph:
    """One session."""

    def __init__(self, ort: Any, session: Any, device: str) -> None:
        self._ort = ort
        self._session = session
        self._device = device
        self._outputs = [output.name for output in session.get_outputs()]

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        """Binds buffers for one set of shapes, for all outputs or some."""
        binding = self._session.io_binding()
        for name, (slot, dtype, shape) in inputs.items():
            binding.bind_input(name, slot.device, 0, dtype.type, shape, slot.pointer)
        for name, (slot, dtype, shape) in outputs.items():
            binding.bind_output(name, slot.device, 0, dtype.type, shape, slot.pointer)
        options = self._ort.RunOptions()
        options.log_severity_level = 3
        return _runner(self._session, binding, options)

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Runs once with outputs that ONNX Runtime allocates, and reads their shapes."""
        binding = self._session.io_binding()
        for name, (slot, dtype, shape) in inputs.items():
            binding.bind_input(name, slot.device, 0, dtype.type, shape, slot.pointer)
        for name in self._outputs:
            binding.bind_output(name, self._device)
        _runner(self._session, binding, self._ort.RunOptions())()
        values = binding.get_outputs()
        return {n: tuple(v.shape()) for n, v in zip(self._outputs, values, strict=True)}


def _runner(session: Any, binding: Any, options: Any) -> Callable[[], object]:
    """A call of the session over bound buffers, with as little Python around it as there can be.

    The wrapper's own run_with_iobinding checks for WebGPU capture first; what that
    costs a chain is in benchmarks/results/choices.json.
    """
    inner = getattr(session, "_sess", None)
    inner_binding = getattr(binding, "_iobinding", None)
    if inner is None or inner_binding is None:
        return functools.partial(session.run_with_iobinding, binding, options)
    return functools.partial(inner.run_with_iobinding, inner_binding, options)


class DeviceSlot:
    """Memory on a CUDA device. Rows are compacted through the host: correct, not yet fast."""

    device = "cuda"

    def __init__(self, ort: Any, size_bytes: int) -> None:
        self._value = ort.OrtValue.ortvalue_from_shape_and_type([size_bytes], np.uint8, "cuda", 0)
        self.bytes = size_bytes
        self.pointer: int = self._value.data_ptr()

    def keep_rows(
        self, dtype: np.dtype, shape: tuple[int, ...], axis: int, rows: NDArray[np.intp]
    ) -> None:
        """Moves the given rows to the front."""
        host = self._value.numpy()
        size = int(np.prod(shape)) * dtype.itemsize
        kept = np.take(host[:size].view(dtype).reshape(shape), rows, axis=axis)
        host[: kept.nbytes] = np.ascontiguousarray(kept).reshape(-1).view(np.uint8)
        self._value.update_inplace(host)
