"""Products of weights and activations in 8 bits, by ONNX Runtime's static quantiser.

Ranges of activations are measured. Exit heads, adapters, scores, normalisations, products of two
activations (in attention) and states stay in float32. Scales are symmetric, and per channel for
weights, as TensorRT requires.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeexit.errors import ExportError, first_line
from edgeexit.export.evaluate import host_session
from edgeexit.export.passes.calibration import Rows

QUANTISED = ["MatMul", "Gemm", "Conv"]


def quantise(
    source: Path, target: Path, batches: Sequence[Rows], excluded: list[str], what: str
) -> None:
    """Quantises an ONNX file, with ranges of activations measured on these batches.

    Args:
        source: The file, in float32; names of its nodes are unique.
        target: Path of the new file; its weights are written beside it.
        batches: Inputs.
        excluded: Names of nodes to leave in float32, besides products of two activations.
        what: The component, for messages.

    Raises:
        ExportError: The quantiser fails.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Rows] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(batch)

    try:
        with _hushed(), _any_pool():
            quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTISED,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*excluded, *_of_activations(source)],
                use_external_data_format=True,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
    except Exception as error:
        raise ExportError(
            f"{what}: the quantiser fails ({first_line(error)})",
            fix="Export it in float32 or float16.",
        ) from error


def _of_activations(source: Path) -> list[str]:
    """Names of the products without a weight: those in attention."""
    graph = ir.load(source).graph
    return [
        str(node.name)
        for node in graph
        if node.op_type in QUANTISED
        and not any(value is not None and value.is_initializer() for value in node.inputs[:2])
    ]


@contextlib.contextmanager
def _any_pool() -> Iterator[None]:
    """Lets the quantiser run in a process that has installed ONNX Runtime's global thread pool: its
    sessions ask for their own pools, which ONNX Runtime then refuses."""
    import onnxruntime
    from onnxruntime.quantization.calibrate import CalibraterBase

    def create(self: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.infer_session = host_session(self.augmented_model_path, options)

    original = CalibraterBase.create_inference_session
    CalibraterBase.create_inference_session = create
    try:
        yield
    finally:
        CalibraterBase.create_inference_session = original


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Hides the quantiser's advice, which it writes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


__all__ = ["QUANTISED", "quantise"]
