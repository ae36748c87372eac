"""Precision as a property of the graph: a float16 form of a model, made before export.

Every float32 weight, boundary and cache becomes float16; program inputs, exit outputs and scores
stay float32, with the casts inside the first and the answering segments, so that callers and
policies see no difference.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TypeVar

import msgspec
import torch
from torch import nn

from edgeexit.bundle.manifest import Cache, Tensor
from edgeexit.export.contract import CachedSegment, DecodeModel, ExitModel, Layer, Segment, Stack
from edgeexit.export.trace.attention import FLOAT32_ATTENTION
from edgeexit.export.trace.torch_graph import dtype_name

Described = TypeVar("Described", Tensor, Cache)


def to_float16(model: ExitModel) -> ExitModel:
    """A copy of `model` that computes in float16. The original's weights are left as they are."""
    program_inputs = {tensor.name for tensor in model.inputs}
    chains = {
        name: [_segment(segment, program_inputs) for segment in segments]
        for name, segments in model.chains.items()
    }
    unsplit = _Half(model.unsplit, [False] * len(model.outputs))
    return dataclasses.replace(model, chains=chains, unsplit=unsplit)


def decoder_to_half(model: DecodeModel, dtype: torch.dtype) -> DecodeModel:
    """A copy of a decoder that computes in float16 or bfloat16, its caches included. What it is
    compared with stays in float32, and the original's weights are left as they are."""
    half = functools.partial(_half, dtype=dtype)
    stacks = _HalfStacks(dtype)

    def convert(part: CachedSegment, *, carried: bool) -> CachedSegment:
        return dataclasses.replace(
            part,
            inputs=tuple(half(tensor) for tensor in part.inputs),
            outputs=tuple(half(t) for t in part.outputs) if carried else part.outputs,
            caches=tuple(half(cache) for cache in part.caches),
            forms=tuple(
                dataclasses.replace(
                    form,
                    stack=stacks.convert(form.stack),
                    requires=tuple(name for name in form.requires if name != FLOAT32_ATTENTION),
                )
                for form in part.forms
            ),
            adapter=None if part.adapter is None else convert(part.adapter, carried=True),
            projection=None if part.projection is None else stacks.convert(part.projection),
        )

    return dataclasses.replace(
        model,
        embedding=model.embedding.to(dtype),
        embedded=half(model.embedded),
        segments=[convert(part, carried=True) for part in model.segments],
        head=dataclasses.replace(
            model.head,
            module=_Half(model.head.module, [False] * len(model.head.outputs), dtype),
            inputs=tuple(half(tensor) for tensor in model.head.inputs),
        ),
        unsplit=convert(model.unsplit, carried=False),
    )


class _HalfStacks:
    """Stacks in half precision, which have modules and weights in common as their originals do."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._modules: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._weights: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]] = {}

    def convert(self, stack: Stack) -> Stack:
        return Stack(
            entry=self._module(stack.entry, [True] * (1 + len(stack.shared))),
            state=_half(stack.state, self.dtype),
            shared=tuple(_half(tensor, self.dtype) for tensor in stack.shared),
            layers=[
                Layer(
                    self._module(layer.module, None),
                    {f"module.{name}": self._weight(x) for name, x in layer.weights.items()},
                )
                for layer in stack.layers
            ],
            head=None if stack.head is None else self._module(stack.head, [False]),
        )

    def _module(self, module: nn.Module, carried: list[bool] | None) -> nn.Module:
        if id(module) not in self._modules:
            self._modules[id(module)] = (module, _Half(module, carried, self.dtype))
        return self._modules[id(module)][1]

    def _weight(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        place = (tensor.data_ptr(), tensor.shape)
        if place not in self._weights:
            self._weights[place] = (tensor, tensor.to(self.dtype))
        return self._weights[place][1]


def _segment(segment: Segment, program_inputs: set[str]) -> Segment:
    answers = {name for leave in segment.exits for name in leave.outputs.values()}
    answers |= {name for leave in segment.exits for name in leave.scores.values()}
    carried = [tensor.name not in answers for tensor in segment.outputs]
    return dataclasses.replace(
        segment,
        module=_Half(segment.module, carried),
        inputs=tuple(t if t.name in program_inputs else _half(t) for t in segment.inputs),
        outputs=tuple(
            _half(tensor) if stays else tensor
            for tensor, stays in zip(segment.outputs, carried, strict=True)
        ),
    )


def _half(tensor: Described, dtype: torch.dtype = torch.float16) -> Described:
    if tensor.dtype != "float32":
        return tensor
    return msgspec.structs.replace(tensor, dtype=dtype_name(dtype))


class _Half(nn.Module):
    """Runs a module in half precision; outputs not marked as carried come back as float32.

    Args:
        module: Copied, not changed.
        carried: Per output, whether it stays in half precision; None: all do.
        dtype: float16 or bfloat16.
    """

    def __init__(
        self, module: nn.Module, carried: list[bool] | None, dtype: torch.dtype = torch.float16
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to(dtype)
        self.carried = carried
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cast = [x.to(self.dtype) if x.dtype == torch.float32 else x for x in inputs]
        made = self.module(*cast)
        made = made if isinstance(made, tuple) else (made,)
        carried = [True] * len(made) if self.carried is None else self.carried
        return tuple(
            x if stays or x.dtype != self.dtype else x.float()
            for x, stays in zip(made, carried, strict=True)
        )
