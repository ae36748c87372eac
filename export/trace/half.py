"""Converts a model to half precision before export.

Float32 weights, states and tensors between components become float16 or bfloat16. The program's
inputs and outputs and all scores stay float32; components contain the casts, so callers and
policies see no difference. Modules that would overflow (`SplitModel.float32`) also stay float32,
and so do the states that their outputs are added to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import torch
from torch import nn

from edgeexit.bundle.manifest import PromptState, Tensor, TokenState
from edgeexit.export.contract import Component, Form, SplitModel, Stack, Table
from edgeexit.export.trace.attention import FLOAT32_ATTENTION
from edgeexit.export.trace.torch_graph import dtype_name

Described = TypeVar("Described", Tensor, TokenState)


def to_half(model: SplitModel, dtype: torch.dtype = torch.float16) -> SplitModel:
    """A copy of a model that computes in float16 or bfloat16, states included. The original's
    weights do not change, and `reference` still uses them."""
    halves = _Halves(dtype, _kept(model), model.float32)
    steps = [
        dataclasses.replace(step, output=halves.tensor(step.output), weight=step.weight.to(dtype))
        if isinstance(step, Table)
        else step
        for step in model.steps
    ]
    chains = {
        name: chain
        if chain is model.last_chain
        else msgspec.structs.replace(chain, outputs=[halves.tensor(t) for t in chain.outputs])
        for name, chain in model.chains.items()
    }
    components = [halves.component(component) for component in model.components]
    return dataclasses.replace(model, components=components, chains=chains, steps=steps)


def _kept(model: SplitModel) -> set[str]:
    """Names of tensors that stay in float32: the program's inputs and outputs, and scores."""
    kept = {tensor.name for tensor in [*model.inputs, *model.last_chain.outputs]}
    for chain in model.chains.values():
        for exit_ in chain.exits:
            kept |= set(exit_.scores.values())
            kept |= set(exit_.outputs.values()) if chain is model.last_chain else set()
    kept |= {component.scored for component in model.components if component.scored}
    if model.float32:
        own = [state for component in model.components for state in component.states]
        of_prompts = {state.tensor.name for state in own if isinstance(state, PromptState)}
        made = {tensor.name for component in model.components for tensor in component.outputs}
        kept |= {"state"} | made - of_prompts
    return kept


class _Halves:
    """Converts components to half precision. Modules and weights that the originals share are
    converted once and shared again."""

    def __init__(self, dtype: torch.dtype, kept: set[str], float32: Sequence[str]) -> None:
        self.dtype, self.kept, self.float32 = dtype, kept, float32
        self._modules: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._weights: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]] = {}

    def component(self, component: Component) -> Component:
        carried = [tensor.name not in self.kept for tensor in component.outputs]
        projection = component.projection
        return dataclasses.replace(
            component,
            inputs=tuple(self.tensor(tensor) for tensor in component.inputs),
            outputs=tuple(self.tensor(tensor) for tensor in component.outputs),
            states=tuple(self._state(state) for state in component.states),
            forms=tuple(self._form(form, carried) for form in component.forms),
            projection=None if projection is None else self._stack(projection, []),
        )

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.name in self.kept else self._described(tensor)

    def _described(self, tensor: Described) -> Described:
        if tensor.dtype != "float32":
            return tensor
        return msgspec.structs.replace(tensor, dtype=dtype_name(self.dtype))

    def _state(self, state: TokenState | PromptState) -> TokenState | PromptState:
        if isinstance(state, TokenState):
            return self._described(state)
        return msgspec.structs.replace(state, tensor=self.tensor(state.tensor))

    def _form(self, form: Form, carried: list[bool]) -> Form:
        return dataclasses.replace(
            form,
            body=self._stack(form.body, carried)
            if isinstance(form.body, Stack)
            else self._module(form.body, carried),
            requires=tuple(name for name in form.requires if name != FLOAT32_ATTENTION),
        )

    def _stack(self, stack: Stack, carried: list[bool]) -> Stack:
        return Stack(
            entry=self._module(stack.entry, [False] if self.float32 else None),
            state=self.tensor(stack.state),
            shared=tuple(self._described(tensor) for tensor in stack.shared),
            layers=[
                dataclasses.replace(
                    layer,
                    module=self._module(layer.module),
                    weights={
                        f"module.{name}": x if self._stays(name) else self._weight(x)
                        for name, x in layer.weights.items()
                    },
                )
                for layer in stack.layers
            ],
            head=None if stack.head is None else self._module(stack.head, carried),
            closing=None if stack.closing is None else self._module(stack.closing),
        )

    def _module(self, module: nn.Module, carried: list[bool] | None = None) -> nn.Module:
        if id(module) not in self._modules:
            half = _Half(module, carried or [], self.dtype, self.float32)
            self._modules[id(module)] = (module, half)
        return self._modules[id(module)][1]

    def _stays(self, weight: str) -> bool:
        """Whether a weight belongs to a module that stays in float32."""
        return not set(self.float32).isdisjoint(weight.split(".")[:-1])

    def _weight(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        place = (tensor.data_ptr(), tensor.shape)
        if place not in self._weights:
            self._weights[place] = (tensor, tensor.to(self.dtype))
        return self._weights[place][1]


class _Half(nn.Module):
    """Runs a module in half precision; outputs that are not carried are cast to float32.

    Args:
        module: Copied, not changed.
        carried: Per output, whether it stays in half precision; further outputs do.
        dtype: float16 or bfloat16.
        float32: Names of submodules that stay in float32; if there are any, inputs are not cast.
    """

    def __init__(
        self, module: nn.Module, carried: list[bool], dtype: torch.dtype, float32: Sequence[str]
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to(dtype)
        for path, own in module.named_modules():
            parent, _, name = path.rpartition(".")
            if name in float32:
                setattr(self.module.get_submodule(parent), name, copy.deepcopy(own))
        self.carried = carried
        self.dtype = dtype
        self.casts = not float32

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.casts:
            inputs = tuple(x.to(self.dtype) if x.dtype == torch.float32 else x for x in inputs)
        outputs = self.module(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        carried = [*self.carried, *[True] * (len(outputs) - len(self.carried))]
        return tuple(
            x if stays or x.dtype != self.dtype else x.float()
            for x, stays in zip(outputs, carried, strict=True)
        )
