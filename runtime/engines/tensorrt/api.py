"""The part of TensorRT's Python interface that edgeexit uses, declared for the type checker.

The libraries have no type information. This module declares every class, method and parameter that
is used, with the library's names. tests/runtime/engines/tensorrt/test_api.py compares it with the
installed libraries, so that renamed or removed methods are detected without a GPU. Enumerations
are `Any`; the same test checks their members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class IHostMemory(Protocol):
    """A buffer of the library."""

    nbytes: int

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITensor(Protocol):
    """A tensor of a network."""

    name: str
    dtype: Any


class ILayer(Protocol):
    """A layer of a network."""

    type: Any
    num_outputs: int

    def get_input(self, index: int) -> ITensor | None: ...
    def get_output(self, index: int) -> ITensor | None: ...


class INetworkDefinition(Protocol):
    """A parsed network."""

    num_layers: int

    def get_layer(self, index: int) -> ILayer: ...


class ParserError(Protocol):
    """Why the parser rejected a node."""

    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...
    def desc(self) -> str: ...
    def node(self) -> int: ...


class OnnxParser(Protocol):
    """Parses ONNX into a network."""

    num_errors: int

    def parse(self, model: bytes, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class IOptimizationProfile(Protocol):
    """Shapes that an engine accepts."""

    def set_shape(
        self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]
    ) -> None: ...


class ITimingCache(Protocol):
    """Times of kernels, stored for the next build."""

    def serialize(self) -> IHostMemory: ...


class IBuilderConfig(Protocol):
    """How to build."""

    progress_monitor: Any
    builder_optimization_level: int
    num_compute_capabilities: int
    profiling_verbosity: Any

    def clear_flag(self, flag: Any) -> None: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache: ...


class Builder(Protocol):
    """Builds engines."""

    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None: ...


class IRuntimeCache(Protocol):
    """TensorRT-RTX: kernels compiled for this GPU."""

    def serialize(self) -> IHostMemory: ...
    def deserialize(self, blob: bytes) -> bool: ...


class IRuntimeConfig(Protocol):
    """TensorRT-RTX: how contexts run. `cuda_graph_strategy` from 1.2 on."""

    cuda_graph_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...
    def create_runtime_cache(self) -> IRuntimeCache: ...
    def set_runtime_cache(self, cache: IRuntimeCache) -> bool: ...


class IExecutionContext(Protocol):
    """The state of an engine's runs."""

    active_optimization_profile: int

    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class EngineInspector(Protocol):
    """Reports an engine's layers."""

    def get_engine_information(self, format: Any) -> str: ...


class ICudaEngine(Protocol):
    """A loaded engine. Contexts are created with a strategy or, in TensorRT-RTX, a config."""

    num_io_tensors: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def create_execution_context(self, strategy: Any) -> IExecutionContext | None: ...
    def create_runtime_config(self) -> IRuntimeConfig: ...
    def create_engine_inspector(self) -> EngineInspector: ...


class Runtime(Protocol):
    """Loads plans."""

    def deserialize_cuda_engine(
        self, serialized_engine: bytes | IHostMemory
    ) -> ICudaEngine | None: ...


class _Builders(Protocol):
    def __call__(self, logger: Any) -> Builder | None: ...


class _Parsers(Protocol):
    def __call__(self, network: INetworkDefinition, logger: Any) -> OnnxParser: ...


class _Runtimes(Protocol):
    def __call__(self, logger: Any) -> Runtime: ...


class TensorRt(Protocol):
    """The module itself, ``tensorrt`` or ``tensorrt_rtx``."""

    __version__: str
    Builder: _Builders
    OnnxParser: _Parsers
    Runtime: _Runtimes
    BuilderFlag: Any
    Logger: Any
    ILogger: Any
    IProgressMonitor: Any
    ComputeCapability: Any
    CudaGraphStrategy: Any
    ExecutionContextAllocationStrategy: Any
    LayerInformationFormat: Any
    LayerType: Any
    MemoryPoolType: Any
    NetworkDefinitionCreationFlag: Any
    ProfilingVerbosity: Any
    TensorIOMode: Any


ENUMERATIONS = {
    "BuilderFlag": ["TF32"],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    "LayerInformationFormat": ["JSON"],
    "LayerType": ["DEQUANTIZE", "MATRIX_MULTIPLY", "CONVOLUTION"],
    "MemoryPoolType": ["WORKSPACE"],
    "ProfilingVerbosity": ["DETAILED"],
    "TensorIOMode": ["INPUT"],
}
"""Members that are used with both libraries."""

RTX_ENUMERATIONS = {
    "BuilderFlag": ["TF32"],
    "ComputeCapability": ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"],
    "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE"],
}
"""Members that are used with TensorRT-RTX only."""

RTX_CLASSES = ["IRuntimeCache", "IRuntimeConfig"]
"""Classes that TensorRT may lack, in whole or in part."""
