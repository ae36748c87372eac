"""Precision as a property of the graph: a float16 form of a model, made before export.

Every float32 weight and boundary becomes float16; program inputs, exit outputs and scores stay
float32, with the casts inside the first and the answering segments, so that callers and policies
see no difference.
"""

from __future__ import annotations

import copy
import dataclasses

import msgspec
import torch
from torch import nn

from edgeexit.export.contract import ExitModel, Segment
from edgeexit.manifest import Tensor


def to_float16(model: ExitModel) -> ExitModel:
    """A copy of `model` that computes in float16. The original's weights are left as they are."""
    program_inputs = {tensor.name for tensor in model.inputs}
    chains = {
        name: [_segment(segment, program_inputs) for segment in segments]
        for name, segments in model.chains.items()
    }
    unsplit = _Half(model.unsplit, [False] * len(model.outputs))
    return dataclasses.replace(model, chains=chains, unsplit=unsplit)


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


def _half(tensor: Tensor) -> Tensor:
    if tensor.dtype != "float32":
        return tensor
    return msgspec.structs.replace(tensor, dtype="float16")


class _Half(nn.Module):
    """Runs a module in float16; outputs not marked as carried come back as float32."""

    def __init__(self, module: nn.Module, carried: list[bool]) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()
        self.carried = carried

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cast = [x.half() if x.dtype == torch.float32 else x for x in inputs]
        made = self.module(*cast)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(
            x if stays or x.dtype != torch.float16 else x.float()
            for x, stays in zip(made, self.carried, strict=True)
        )
