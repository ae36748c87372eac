"""Measures how fast ONNX Runtime reads weights, which limits the speed of decoding.

    python benchmarks/reading.py

One row is multiplied by the matrices of `decode.py`'s twelve layers, one after the other, with each
of ONNX Runtime's operators for this. The operators take turns on one thread pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from results import save, say

from edgeexit.measure import environment
from edgeexit.runtime.engines.onnxruntime import available_cores

LAYERS = 12
MATRICES = [(512, 1024), (1024, 512), (512, 1408), (1408, 1408), (1408, 512)]
"""Matrices of one layer, one directly after the other: attention is left out."""

ROUNDS, CALLS = 30, 6
UNPACKED = {"session.disable_prepacking": "1"}


def main() -> None:
    """Measures and writes one result."""
    watch = environment.Watch()
    ort.set_global_thread_pool_sizes(available_cores(), 1)
    row = np.random.default_rng(1).standard_normal((1, MATRICES[0][0])).astype(np.float32)
    total = 4 * LAYERS * sum(height * width for height, width in MATRICES)
    ways: dict[str, Callable[[], Any]] = {
        "MatMul": _runner("MatMul", row),
        "MatMul, unpacked": _runner("MatMul", row, UNPACKED),
        "Gemm, transposed": _runner("Gemm", row),
        "Gemm, transposed, unpacked": _runner("Gemm", row, UNPACKED),
        "Conv, blocked": _runner("Conv", row),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        for place in np.random.default_rng(number).permutation(len(ways)):
            name, call = list(ways.items())[place]
            call()
            for _ in range(CALLS):
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    found = {name: round(total / 1e9 / float(np.median(took)), 2) for name, took in times.items()}
    say(f"  GB/s: {found}")
    result = {
        "bytes": total,
        "gb_per_s": found,
        "of_matmul": {name: round(rate / found["MatMul"], 3) for name, rate in found.items()},
        "environment": environment.describe() | {"machine": watch.stop(0.0)},
    }
    result["environment"]["machine"].pop("other_load_cores")
    save("reading", result, quick=False)


def _runner(kind: str, row: np.ndarray, settings: dict[str, str] | None = None) -> Callable:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(_graph(kind), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": row})


def _graph(kind: str) -> bytes:
    """Multiplies a row by all matrices, one after the other."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    if kind == "Conv":
        weights.append(numpy_helper.from_array(np.array([1, MATRICES[0][0], 1, 1]), "shape"))
        nodes.append(helper.make_node("Reshape", ["x", "shape"], ["x4"]))
        value = "x4"
    for number, (height, width) in enumerate(MATRICES * LAYERS):
        matrix = (rng.standard_normal((height, width)) / np.sqrt(height)).astype(np.float32)
        attributes: dict[str, Any] = {}
        if kind == "Gemm":
            matrix, attributes = matrix.T, {"transB": 1}
        elif kind == "Conv":
            matrix, attributes = matrix.T[:, :, None, None], {"kernel_shape": [1, 1]}
        weights.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"w{number}"))
        nodes.append(helper.make_node(kind, [value, f"w{number}"], [f"y{number}"], **attributes))
        value = f"y{number}"
    graph = helper.make_graph(
        nodes,
        "reading",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, MATRICES[0][0]])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


if __name__ == "__main__":
    main()
