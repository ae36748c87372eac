"""Exports a torch module to an ONNX graph with ``torch.onnx.export``.

`graph_from_module` returns an `onnx_ir` model whose inputs, outputs and axes have the contract's
names, without torch's shape arithmetic (`simplify`; benchmarks/README.md has its effect). Weights
stay in torch's memory until the weight store writes them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import nn

from edgeexit.bundle.manifest import Tensor
from edgeexit.errors import ExportError, first_line
from edgeexit.export.passes.simplify import simplify
from edgeexit.export.quiet import quiet

DEFAULT_OPSET = 20
IR_VERSION = 10
"""The IR version that ONNX Runtime 1.23 and TensorRT 10.3 can read."""

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def graph_from_module(
    module: nn.Module,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    values: Mapping[str, torch.Tensor],
    *,
    opset: int = DEFAULT_OPSET,
    what: str = "model",
) -> ir.Model:
    """Exports a module that maps `inputs` to a tuple of `outputs`, keeping the contract's names."""
    axes = sorted({a for tensor in inputs for a in tensor.axes if isinstance(a, str)})
    dims = {axis: torch.export.Dim(axis, min=1) for axis in axes}
    shapes = tuple(
        {i: dims[axis] for i, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in inputs
    )
    try:
        with _quiet(), _one_table(), torch.no_grad():
            program = torch.onnx.export(
                _Positional(module, len(inputs)),
                tuple(values[tensor.name] for tensor in inputs),
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in inputs],
                output_names=[tensor.name for tensor in outputs],
                dynamic_shapes=(shapes,),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"{what}: torch.onnx could not export it: {_reason(error)}",
            fix="The module must trace with torch.export for any size of "
            f"{', '.join(axes) or 'its inputs'}; run again with -vv for torch's own report.",
        ) from error
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    for value, tensor in zip(model.graph.inputs, inputs, strict=True):
        value.shape = ir.Shape(tensor.axes)
    name_outputs(model.graph, outputs)
    simplify(model)
    _name_nodes(model.graph)
    passes.ClearMetadataAndDocStringPass()(model)
    model.graph.name = what
    return model


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a torch type."""
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)


def save_graph(model: ir.Model, path: str) -> None:
    """Writes a graph whose large tensors the weight store has already written."""
    model.producer_name = "edgeexit"
    model.producer_version = None
    with open(path, "wb") as file:
        file.write(ir.to_proto(model).SerializeToString(deterministic=True))


class _Positional(nn.Module):
    """Gives a module the signature ``(*inputs)``, whatever its arguments are named."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.module = module
        self.count = count

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.module(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def name_outputs(graph: ir.Graph, outputs: Sequence[Tensor]) -> None:
    """Gives every output its contract name and axes. Adds an Identity node to an output that is
    also an input."""
    if len(graph.outputs) != len(outputs):
        raise ExportError(
            f"{graph.name}: the module returns {len(graph.outputs)} tensors, its component lists "
            f"{len(outputs)}",
            fix="List every tensor that forward returns in the component's outputs, in order.",
        )
    for position, (value, tensor) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        if value.is_graph_input() or value.is_initializer() or value in graph.outputs[:position]:
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].type = value.type
            value = graph.outputs[position] = node.outputs[0]
        value.name = tensor.name
        value.shape = ir.Shape(tensor.axes)


def _name_nodes(graph: ir.Graph) -> None:
    """Names every node after its torch module, for example ``self_attn.q_proj/MatMul_3``: engines
    print these names in errors and profiles."""
    for number, node in enumerate(graph.all_nodes()):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        module = module.removeprefix("module").removeprefix(".")  # its name in `_Positional`
        node.name = f"{module}/{node.op_type}_{number}".removeprefix("/")


def _reason(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)


@contextlib.contextmanager
def _one_table() -> Iterator[None]:
    """Caches torch's table of operators during an export.

    torch builds the table for every graph, which takes longer than the export of most segments.
    Versions of torch that work differently are left alone.
    """
    where = "torch.onnx._internal.exporter._registration"
    spec = importlib.util.find_spec(where)
    registry = getattr(importlib.import_module(where), "ONNXRegistry", None) if spec else None
    build = getattr(registry, "from_torchlib", None)
    if registry is None or build is None:
        yield
        return
    original = registry.__dict__["from_torchlib"]
    registry.from_torchlib = staticmethod(functools.partial(_table, build))
    try:
        yield
    finally:
        registry.from_torchlib = original


_tables: dict[tuple[Any, ...], Any] = {}


def _table(build: Any, *arguments: Any, **named: Any) -> Any:
    key = (*arguments, *sorted(named.items()))
    if key not in _tables:
        _tables[key] = build(*arguments, **named)
    return _tables[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences messages of the exporter that do not matter to a user (missing torchvision,
    renamings)."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(quiet("torch.onnx", "torch.export", "onnxscript", "onnx_ir"))
        yield
