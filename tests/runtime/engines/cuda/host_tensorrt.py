"""A stand-in for the TensorRT library on machines without a GPU: its interface (api.py), computing
with ONNX Runtime on the memory of driver.c. It refuses what TensorRT refuses: shapes outside the
profile, a run without addresses or scratch memory, shapes set before the profile.

A plan is a line of JSON with the profiles, and an ONNX file with its weights.

Run by test_device_memory.py in processes of its own, as host_gpu.py is.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from edgeexit.bundle.onnx_wire import fix_axes, keep_outputs
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import EdgeExitError, EngineError, InputError
from edgeexit.runtime import Rule, load
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import sample_sizes, work_of
from edgeexit.runtime.engines.cuda.device import Device
from edgeexit.runtime.engines.cuda.driver import ask, describe_device, import_driver
from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from edgeexit.runtime.engines.tensorrt import engine_cache
from edgeexit.runtime.engines.tensorrt.engine import TensorRtEngine
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet, PlanFile
from edgeexit.runtime.engines.tensorrt.library import Library
from edgeexit.runtime.programs.sampling import Sampling
from tests.runtime.engines.cuda.host_gpu import CALLBACK, CALLBACKS, NEW, PROMPTS
from tests.runtime.engines.cuda.on_engine import model_on
from tests.toys import make_inputs

DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip
SCRATCH = 4096
"""Scratch memory that every engine asks for, and as much again for each of its inputs."""


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.active_optimization_profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._scratch = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < max(1, len(self._engine.profiles)):
            return False
        self.active_optimization_profile = profile_index
        self._shapes.clear()  # shapes are set for a profile
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if self._engine.profiles:
            profile = self._engine.profiles[self.active_optimization_profile]
            if name in profile:
                low, _, high = profile[name]
                if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                    return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for one in self._engine.session.get_inputs():
            if one.name in self._shapes:
                sizes |= {
                    axis: size
                    for axis, size in zip(one.shape, self._shapes[one.name], strict=True)
                    if isinstance(axis, str)
                }
        for one in [*self._engine.session.get_inputs(), *self._engine.session.get_outputs()]:
            if one.name == name:
                return tuple(
                    sizes.get(axis, -1) if isinstance(axis, str) else axis for axis in one.shape
                )
        raise AssertionError(f"no tensor {name}")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, session = self._engine, self._engine.session
        known = [one.name for one in session.get_inputs() if one.name in self._shapes]
        if len(known) < len(session.get_inputs()) or not self._scratch:
            return False
        binding = session.io_binding()
        for one in session.get_inputs():
            shape, address = self._shapes[one.name], self._addresses[one.name]
            binding.bind_input(one.name, "cpu", 0, DTYPES[one.type], shape, address)
        for one in session.get_outputs():
            shape, address = self.get_tensor_shape(one.name), self._addresses[one.name]
            binding.bind_output(one.name, "cpu", 0, DTYPES[one.type], shape, address)
        scratch = self._scratch

        def work(_: object) -> None:
            engine.open_memory(1)
            ctypes.memset(scratch, 0x5A, engine.device_memory_size_v2)
            session.run_with_iobinding(binding)
            engine.open_memory(0)

        callback = CALLBACK(work)
        CALLBACKS.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        driver = engine.driver
        ask(driver.cuLaunchHostFunc(driver.CUstream(stream_handle), driver.CUhostFn(address), 0))
        return True


class Engine:
    """`ICudaEngine`."""

    def __init__(self, raw: bytes) -> None:
        header, graph = raw.split(b"\n", 1)
        self.profiles = json.loads(header)
        with tempfile.TemporaryDirectory() as folder:  # the settings of the host's own engine
            path = Path(folder) / "plan.onnx"
            path.write_bytes(graph)
            self.session = OnnxRuntimeEngine("cpu").open(path)._session
        tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self._types = {one.name: DTYPES[one.type] for one in tensors}
        self._inputs = {one.name for one in self.session.get_inputs()}
        self.num_io_tensors = len(tensors)
        self.device_memory_size_v2 = SCRATCH * (1 + len(self._inputs))
        self.driver = import_driver()
        self.open_memory: Any = ctypes.CDLL("libcuda.so.1").device_memory

    def get_tensor_name(self, index: int) -> str:
        return list(self._types)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(itemsize=np.dtype(self._types[name]).itemsize)

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        return Context(self)


class Runtime:
    """`Runtime`."""

    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine:
        return Engine(bytes(serialized_engine))


class Logger:
    """`Logger`."""

    WARNING = 1

    def __init__(self, severity: int) -> None:
        pass


MODULE: Any = SimpleNamespace(
    Runtime=Runtime,
    Logger=Logger,
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    TensorIOMode=SimpleNamespace(INPUT="input"),
)


def built(bundle: Bundle, root: Path, asked: Asked) -> TensorRtEngine:
    """The engines of a bundle, "built" by writing its graphs down."""
    library = Library("tensorrt", MODULE, "10.3.0")
    works = work_of(bundle.manifest, library.features, asked, sample_sizes(bundle), tunes=True)
    made_from = {"library": "tensorrt", "version": "10.3.0", "target": describe_device()}
    key = engine_cache.key_of(made_from)
    with engine_cache.building(engine_cache.folder_of(root, bundle.digest, key)) as folder:
        plans = []
        for work in works:
            path = bundle.file(work.variant.graph)
            model = onnx.load_model_from_string(
                fix_axes(keep_outputs(path.read_bytes(), list(work.outputs)), dict(work.fixed))
            )
            onnx.load_external_data_for_model(model, str(path.parent))
            profiles = [
                {n: [list(s) for s in three] for n, three in p.items()} for p in work.profiles
            ]
            raw = json.dumps(profiles).encode() + b"\n" + model.SerializeToString()
            engine_cache.write_whole(folder / work.file, raw)
            plans.append(
                PlanFile(
                    graph=work.variant.graph,
                    file=work.file,
                    sha256=hashlib.sha256(raw).hexdigest(),
                    bytes=len(raw),
                    outputs=list(work.outputs),
                    profiles=profiles,
                    largest=dict(work.largest),
                    precision={},
                    seconds=0.0,
                    peak_memory_bytes=0,
                )
            )
        engines = EngineSet(
            format=engine_cache.FORMAT,
            bundle=bundle.digest,
            key=key,
            made_from=made_from,
            plans=plans,
        )
        engine_cache.write_index(folder, engines)
    return TensorRtEngine(library, folder, engines, Device())


def _refused(call: Any, kind: type[EdgeExitError], words: str) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError("not refused")


def one_pass_on_tensorrt(bundle: Bundle, root: Path) -> None:
    """All numbers of rows, again and again, so that runs are recorded and rows change profiles."""
    engine, rule = built(bundle, root, Asked({}, {}, {})), Rule(thresholds=0.7)
    counts = engine.device.counts
    model = model_on(bundle, engine, rule, all_scores=True)
    with load(bundle, policy=rule) as host, model:
        assert model.largest == {"batch": 8}
        for turn in range(5):
            if turn == 4:
                warm = counts.allocations
            for rows in (1, 2, 3, 5, 8, 4, 1):
                inputs = make_inputs(rows, seed=turn)
                theirs, ours = host(inputs), model(inputs)
                np.testing.assert_array_equal(ours.exits, theirs.exits)
                np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
                for name, value in theirs.outputs.items():
                    np.testing.assert_allclose(ours.outputs[name], value, rtol=1e-5, atol=1e-6)
        assert engine.replays is not None and counts.allocations == warm
        traced, known = model.trace(make_inputs(3)), host.trace(make_inputs(3))
        for ours_there, theirs_there in zip(traced.scores, known.scores, strict=True):
            np.testing.assert_allclose(ours_there["margin"], theirs_there["margin"], rtol=1e-4)
        _refused(lambda: model(make_inputs(9)), InputError, "--max-shapes")
        inputs = make_inputs(8)
        np.testing.assert_array_equal(model(inputs).exits, host(inputs).exits)


def a_row_launched_ahead_on_tensorrt(bundle: Bundle, root: Path) -> None:
    engine, rule = built(bundle, root, Asked({}, {}, {})), Rule(thresholds=0.6)
    model = model_on(bundle, engine, rule, launch_ahead="always", all_scores=True)
    with load(bundle, policy=rule) as host, model:
        for turn in range(40):
            inputs = make_inputs(1, seed=turn)
            theirs, ours = host(inputs), model(inputs)
            assert ours.exit_names == theirs.exit_names
            np.testing.assert_allclose(
                ours.outputs["logits"], theirs.outputs["logits"], rtol=1e-5, atol=1e-6
            )


def plans_that_are_not_as_built_are_not_loaded(bundle: Bundle, root: Path) -> None:
    engine = built(bundle, root, Asked({}, {}, {}))
    first = bundle.file("graphs/s0.onnx")
    plan = next(root.glob("*/*/s0.plan"))
    raw = plan.read_bytes()
    plan.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    _refused(lambda: engine.open(first), EngineError, "was changed after the build")
    plan.write_bytes(raw)
    engine.open(first)
    _refused(lambda: engine.open(first, ["nothing"]), EngineError, "has no output nothing")
    _refused(
        lambda: engine.open(first.with_name("s9.onnx")), EngineError, "no engine was built for it"
    )
    assert engine.offers(first) and not engine.offers(first.with_name("s9.onnx"))


def decoders_on_tensorrt(bundle: Bundle, root: Path) -> None:
    engine = built(bundle, root, Asked({}, {}, {"batch": 3}, capacity=96))
    rule = Rule(thresholds=0.05)
    decoder = model_on(bundle, engine, rule)
    assert decoder.describe_engine()["states"] == "append"
    assert engine.largest == {"batch": 3, "new": 96, "past": 96}
    with decoder, load(bundle, policy=rule, states="append", capacity=96) as host:
        first = decoder.exits[0].name
        for mode in ("full", "exact", "fast", "approximate"):
            for prompts in ([PROMPTS[0]], PROMPTS, PROMPTS[:2]):
                for sampling in (None, Sampling(temperature=1.0, top_k=20, seed=3)):
                    arguments: dict[str, Any] = {
                        "max_new_tokens": NEW,
                        "mode": mode,
                        "sampling": sampling,
                        "text": False,
                    } | ({"drafts": 3, "draft_exit": first} if mode == "exact" else {})
                    ours = decoder.generate(prompts, **arguments).finish()
                    theirs = host.generate(prompts, **arguments).finish()
                    assert ours.tokens == theirs.tokens, (mode, len(prompts), sampling)
                    assert ours.statistics == theirs.statistics


if __name__ == "__main__":
    globals()[sys.argv[1]](open_bundle(sys.argv[2]), Path(sys.argv[3]))
