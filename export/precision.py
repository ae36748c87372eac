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

from edgeexit.export.attention import FLOAT32_ATTENTION
from edgeexit.export.contract import CachedSegment, DecodeModel, ExitModel, Form, Segment
from edgeexit.export.graphs import TORCH_DTYPES
from edgeexit.manifest import Cache, Tensor

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
    copies: dict[int, object] = {}  # forms share their layers, and so do their copies
    half = functools.partial(_half, dtype=dtype)

    def convert(part: CachedSegment, *, carried: bool) -> CachedSegment:
        stays = [carried] * len(part.outputs) + [True] * len(part.caches)
        return dataclasses.replace(
            part,
            inputs=tuple(half(tensor) for tensor in part.inputs),
            outputs=tuple(half(t) for t in part.outputs) if carried else part.outputs,
            caches=tuple(half(cache) for cache in part.caches),
            forms=tuple(_form(form, stays, dtype, copies) for form in part.forms),
            adapter=None if part.adapter is None else convert(part.adapter, carried=True),
            projection=None
            if part.projection is None
            else _Half(part.projection, [True] * len(part.caches), dtype, copies),
        )

    return dataclasses.replace(
        model,
        embedding=model.embedding.to(dtype),
        embedded=half(model.embedded),
        segments=[convert(part, carried=True) for part in model.segments],
        head=dataclasses.replace(
            model.head,
            module=_Half(model.head.module, [False] * len(model.head.outputs), dtype, copies),
            inputs=tuple(half(tensor) for tensor in model.head.inputs),
        ),
        unsplit=convert(model.unsplit, carried=False),
    )


def _form(form: Form, stays: list[bool], dtype: torch.dtype, copies: dict[int, object]) -> Form:
    return dataclasses.replace(
        form,
        module=_Half(form.module, stays, dtype, copies),
        requires=tuple(name for name in form.requires if name != FLOAT32_ATTENTION),
    )


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
    name = next(name for name, known in TORCH_DTYPES.items() if known == dtype)
    return msgspec.structs.replace(tensor, dtype=name)


class _Half(nn.Module):
    """Runs a module in half precision; outputs not marked as carried come back as float32.

    Args:
        module: Copied, not changed.
        carried: Per output, whether it stays in half precision.
        dtype: float16 or bfloat16.
        copies: What was copied before, for modules that share weights.
    """

    def __init__(
        self,
        module: nn.Module,
        carried: list[bool],
        dtype: torch.dtype = torch.float16,
        copies: dict[int, object] | None = None,
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module, copies).to(dtype)
        self.carried = carried
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cast = [x.to(self.dtype) if x.dtype == torch.float32 else x for x in inputs]
        made = self.module(*cast)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(
            x if stays or x.dtype != self.dtype else x.float()
            for x, stays in zip(made, self.carried, strict=True)
        )
