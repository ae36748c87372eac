"""ONNX Runtime: the CPU provider, and the CUDA and TensorRT providers on GPUs.

Five choices matter for speed; benchmarks/README.md has the measurements:

- Sessions share one arena. Otherwise a chain of twelve components uses twelve cold arenas.
- Thread pools spin briefly or not at all. Otherwise idle sessions take cores from the running one.
- Two fusions are disabled, because their kernels are slower than the nodes they replace.
- A graph is opened only with the outputs that are needed.
- Bindings run through the compiled session, because its Python wrapper takes longer than the
  transfer between small components.

On GPUs, all sessions compute on one stream and in buffers of `edgeexit.runtime.engines.cuda`. Runs
do not wait for the stream; reading a result does.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexit.bundle.onnx_wire import keep_outputs
from edgeexit.errors import EngineError, UsageError, first_line
from edgeexit.runtime.engines.base import POOLS, Bound, Slot, Threads
from edgeexit.runtime.engines.host import HostSlot, Window

if TYPE_CHECKING:
    from edgeexit.runtime.engines.cuda.device import Device
    from edgeexit.runtime.engines.cuda.staging import Staging

logger = logging.getLogger(__name__)

BRIEF = {"session.intra_op.spin_duration_us": "1000", "session.force_spinning_stop": "1"}
"""Settings of ``brief`` pools: idle threads spin for 1 ms at most, and only while a graph runs:
they take no core from the next graph (benchmarks/results/threads.json)."""
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
"""ONNX Runtime's optimizers whose fused CPU kernels are slower than the nodes they replace."""

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-provider": "TensorrtExecutionProvider",
}


def import_onnxruntime() -> Any:
    """Imports ONNX Runtime; raises `EngineError` with the extra that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime cannot be imported ({error})",
            fix='Install it: pip install "edgeexit[cpu]".',
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError(
            "onnxruntime is installed but broken (two of its packages overwrote each other)",
            fix="Run `edgeexit doctor`; it names them and the command that repairs them.",
        )
    return onnxruntime


@functools.cache
def _share_arena() -> bool:
    """Registers the arena that edgeexit's sessions share. Other sessions do not use it.

    Returns:
        Whether it was registered.
    """
    ort = import_onnxruntime()
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    try:
        ort.create_and_register_allocator(memory, None)
    except Exception as error:
        if "already" not in str(error):
            logger.warning("sessions use separate arenas (more memory): %s", error)
            return False
    return True


_process_pool: list[int] = []


def install_process_pool(threads: int | None = None) -> None:
    """Installs ONNX Runtime's global thread pool for the whole process.

    Every session created later must use it: default sessions created elsewhere in the process
    fail. Older versions of ONNX Runtime refuse it after the process has created a session.
    """
    if _process_pool:
        return
    count = threads or available_cores()
    try:
        import_onnxruntime().set_global_thread_pool_sizes(count, 1)
    except Exception as error:
        raise EngineError(
            f'threads="process" cannot be installed ({first_line(error)})',
            fix="Request it before the first ONNX Runtime session of the process, or leave it out.",
        ) from error
    _process_pool.append(count)
    _share_arena.cache_clear()  # ONNX Runtime starts a new environment, without the arena


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class OnnxRuntimeEngine:
    """Opens graphs as ONNX Runtime sessions on one provider.

    Args:
        name: ``cpu``, ``cuda`` or ``tensorrt-provider``.
        threads: One pool per session that spins briefly while a graph runs (``brief``: `BRIEF`;
            before ONNX Runtime 1.26 the same as ``blocking``), sleeps at once (``blocking``) or
            spins (``spinning``) while idle; a number of threads; or one pool per process
            (``process``, see `install_process_pool`). With a GPU: the host sleeps (``blocking``) or
            spins (any other value) while it waits.
    """

    def __init__(self, name: str = "cpu", threads: Threads = "brief") -> None:
        self._ort = import_onnxruntime()
        self.name = name
        self.features = features_of(name, self._ort.__version__)
        self.threads = threads
        self._spins_briefly = _version(self._ort.__version__) >= (1, 26)
        if not (threads in POOLS or _is_count(threads)):
            raise UsageError(
                f"threads={threads!r} is invalid",
                fix='Use a number from 1 up, "brief", "blocking", "spinning" or "process".',
            )
        if _is_count(threads) and int(threads) > (most := max(64, 8 * available_cores())):
            raise UsageError(
                f"threads={threads} is out of range (1 to {most})",
                fix=f"This process may use {available_cores()} cores: use at most as many threads.",
            )
        if _process_pool and threads != "process" and name == "cpu":
            raise EngineError(
                f"threads={threads!r} is not possible: this process already uses "
                'threads="process", with which sessions that have their own pools fail',
                fix='Load with threads="process", or in another process.',
            )
        available = self._ort.get_available_providers()
        if PROVIDERS[name] not in available:
            raise EngineError(
                f"this onnxruntime has no {PROVIDERS[name]} (it has {', '.join(available)})",
                fix='For GPUs: pip uninstall onnxruntime, then pip install "edgeexit[cuda]". '
                "`edgeexit doctor` shows what is installed.",
            )
        self.largest: Mapping[str, int] = {}
        self.gpu: Device | None = None
        if name != "cpu":
            from edgeexit.runtime.engines.cuda.device import Device

            self.gpu = Device(waiting="block" if threads == "blocking" else "spin")
        if threads == "process" and self.gpu is None:
            install_process_pool()
        self._shared_arena = _share_arena()

    def describe(self) -> dict[str, str]:
        """Engine, library, version, thread setting and, with a GPU, how the host waits for it."""
        about = {
            "engine": self.name,
            "library": "onnxruntime",
            "version": self._ort.__version__,
            "threads": str(self.threads),
        }
        return about if self.gpu is None else about | {"waiting": self.gpu.waiting}

    def offers(self, path: Path) -> bool:
        """Always True: ONNX Runtime needs no built engines."""
        return True

    def open(self, path: Path, outputs: Collection[str] | None = None) -> OnnxRuntimeGraph:
        """Opens one graph, with all outputs or only the given ones.

        Raises:
            EngineError: ONNX Runtime cannot load it, or fell back to another provider.
        """
        providers: list[Any] = [PROVIDERS[self.name]]
        if self.gpu is not None:
            own = {"user_compute_stream": str(self.gpu.stream), "device_id": "0"}
            precise = {"use_tf32": "0"}  # CUDA provider: compute float32 in full precision
            names = dict.fromkeys([PROVIDERS[self.name], PROVIDERS["cuda"]])
            known = self._ort.get_available_providers()
            options_of = {PROVIDERS["cuda"]: own | precise}
            providers = [(name, options_of.get(name, own)) for name in names if name in known]
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
                enable_fallback=False,  # it would print a message and repeat the same attempt
                disabled_optimizers=SLOW_FUSIONS if self.name == "cpu" else None,
            )
        except Exception as error:
            raise EngineError(
                f"{path.parent.name}/{path.name}: ONNX Runtime {self._ort.__version__} cannot load "
                f"it: {first_line(error)}",
                fix=f"Run `edgeexit check {path.parent.parent}` to see whether the bundle is "
                "intact. Older versions of ONNX Runtime need an older opset (export --opset).",
            ) from error
        if session.get_providers()[0] != PROVIDERS[self.name]:
            raise EngineError(
                f"{PROVIDERS[self.name]} could not start; ONNX Runtime fell back to "
                f"{session.get_providers()[0]}",
                fix="Check the driver and CUDA libraries with `edgeexit doctor`.",
            )
        return OnnxRuntimeGraph(self._ort, session, self.gpu)

    def open_all(
        self, graphs: Sequence[tuple[Path, Collection[str] | None]]
    ) -> list[OnnxRuntimeGraph]:
        """Opens several graphs in parallel: most of the time is graph optimisation."""
        with ThreadPoolExecutor(min(len(graphs), available_cores())) as pool:
            return list(pool.map(lambda graph: self.open(*graph), graphs))

    def allocate(self, size_bytes: int, *, sparse: bool = False) -> Slot:
        """Host memory for the CPU provider, device memory for the others."""
        if self.gpu is None:
            return HostSlot(size_bytes, sparse=sparse)
        return self.gpu.allocate(size_bytes)

    def allocate_host(self, size_bytes: int) -> HostSlot:
        """Ordinary memory; pinned memory if there is a GPU."""
        return HostSlot(size_bytes) if self.gpu is None else self.gpu.allocate_host(size_bytes)

    def settle(self) -> None:
        """Waits for the GPU if necessary; on the host, runs are complete when they return."""
        if self.gpu is not None:
            self.gpu.settle()

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        # int8 graphs have signed activations, for TensorRT; without this option they run in float.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        if self._shared_arena:
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if _process_pool:  # every session of the process must use it
            options.use_per_session_threads = False
        elif self.threads == "brief" and self.gpu is None and self._spins_briefly:
            for entry, value in BRIEF.items():
                options.add_session_config_entry(entry, value)
        elif self.threads != "spinning" or self.gpu is not None:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if _is_count(self.threads):
                options.intra_op_num_threads = self.threads
        return options


def features_of(name: str, version: str) -> frozenset[str]:
    """The features that a provider offers in a version of ONNX Runtime.

    From version 1.25 on, the CPU provider has TensorScatter, which does not copy if its input and
    output are the same buffer; on other providers it is untested. GPU providers have
    GroupQueryAttention in half precision only; in float32 it would run on the host, and not in
    place. The TensorRT provider has none of these operators and would run each of them on the host.
    Fused attention with a bias is tested on the CPU only.
    """
    features = set() if name == "tensorrt-provider" else {"onnxruntime-operators"}
    if name != "tensorrt-provider" and _version(version) >= (1, 20):
        features.add("blocked-weights")
    if name == "cpu":
        features |= {"float32-attention", "attention-bias"}
        if _version(version) >= (1, 25):
            features |= {"opset-24", "cache-update"}
    return frozenset(features)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _is_count(threads: object) -> bool:
    return isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1


class OnnxRuntimeGraph:
    """A graph opened as one session."""

    def __init__(self, ort: Any, session: Any, gpu: Device | None) -> None:
        self._ort, self._session, self._gpu = ort, session, gpu
        self._outputs = [output.name for output in session.get_outputs()]
        self._staging: Staging | None = None
        self._read_on_host: set[str] = set()
        if gpu is not None:
            from edgeexit.runtime.engines.cuda.staging import Staging

            self._staging = Staging(gpu)
            self._read_on_host = _inputs_on_host(session)

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        """Binds buffers for one set of shapes, for all outputs or some."""
        options = self._ort.RunOptions()
        options.log_severity_level = 3
        if self._staging is None:
            return _runner(self._session, self._binding(inputs, outputs), options)
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        host = {name: inputs[name] for name in inputs.keys() & self._read_on_host}
        for name, (place, _, _) in host.items():
            if place.device != "cpu":  # ONNX Runtime would copy it only once, when binding
                raise EngineError(
                    f"ONNX Runtime reads {name} on the host, but this model keeps it on the GPU",
                    fix="Export again in another precision, or use --engine cpu.",
                )
        layout = self._staging.lay_out(
            {name: bound for name, bound in inputs.items() if name not in host}, outputs
        )
        layout.writes |= bool(host)
        places = {name: Window("cuda", address) for name, address in layout.addresses.items()}
        binding = self._binding(
            host | {n: (places[n], *inputs[n][1:]) for n in inputs if n not in host},
            {name: (places[name], *bound[1:]) for name, bound in outputs.items()},
        )
        return self._staging.around(layout, _runner(self._session, binding, options))

    def _binding(self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]) -> Any:
        binding = self._session.io_binding()
        for name, (slot, dtype, shape) in inputs.items():
            binding.bind_input(name, slot.device, 0, dtype.type, shape, slot.pointer)
        for name, (slot, dtype, shape) in outputs.items():
            binding.bind_output(name, slot.device, 0, dtype.type, shape, slot.pointer)
        return binding

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Runs once with outputs that ONNX Runtime allocates, and reads their shapes."""
        if self._gpu is not None:
            self._gpu.wait()  # also makes its context current
        binding = self._binding(inputs, {})
        for name in self._outputs:
            binding.bind_output(name, "cpu" if self._gpu is None else "cuda")
        _runner(self._session, binding, self._ort.RunOptions())()
        values = binding.get_outputs()
        return {n: tuple(v.shape()) for n, v in zip(self._outputs, values, strict=True)}


def _inputs_on_host(session: Any) -> set[str]:
    """Inputs that operators read on the host, such as lengths; they must stay on the host."""
    if not hasattr(session, "get_input_memory_infos"):
        raise EngineError(
            "this onnxruntime does not report on which device it reads inputs, which GPUs need",
            fix="Install onnxruntime 1.23 or newer.",
        )
    pairs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return {value.name for value, memory in pairs if "cpu" in memory.name.lower()}


def _runner(session: Any, binding: Any, options: Any) -> Callable[[], object]:
    """A call that runs the session over bound buffers, with as little Python as possible.

    The Python wrapper's run_with_iobinding first checks for WebGPU capture;
    benchmarks/results/choices.json has the cost.
    """
    inner = getattr(session, "_sess", None)
    inner_binding = getattr(binding, "_iobinding", None)
    if inner is None or inner_binding is None:
        return functools.partial(session.run_with_iobinding, binding, options)
    return functools.partial(inner.run_with_iobinding, inner_binding, options)
