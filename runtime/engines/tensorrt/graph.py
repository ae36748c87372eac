"""One opened plan, bound to shapes and addresses and run on the engine's stream.

A binding is a list of shapes and addresses, which are set in a context before a run. A run without
outputs on the host only puts its work on the stream, so the next component can follow at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeexit.errors import EngineError, InputError
from edgeexit.runtime.engines.base import Bound
from edgeexit.runtime.engines.cuda.device import DeviceSlot
from edgeexit.runtime.engines.cuda.staging import Staging
from edgeexit.runtime.engines.tensorrt.api import ICudaEngine, IExecutionContext
from edgeexit.runtime.engines.tensorrt.engine_cache import PlanFile

if TYPE_CHECKING:
    from edgeexit.runtime.engines.tensorrt.engine import TensorRtEngine


@dataclass
class _Binding:
    """Shapes and addresses of a graph's tensors.

    Attributes:
        context: Its own context if it is recorded; None: the graph's shared context.
        unread: Memory of outputs that the caller did not bind.
    """

    profile: int
    shapes: list[tuple[str, tuple[int, ...]]]
    addresses: dict[str, int]
    context: IExecutionContext | None = None
    unread: list[DeviceSlot] = field(default_factory=list)


class TensorRtGraph:
    """An opened plan and its context."""

    def __init__(
        self, owner: TensorRtEngine, name: str, plan: PlanFile, engine: ICudaEngine
    ) -> None:
        self._owner, self._name, self._plan, self._engine = owner, name, plan, engine
        trt = owner.library.module
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == inputs]
        self._outputs = [name for name in names if name not in self._inputs]
        self._context = owner.context(engine)
        self._bound: _Binding | None = None
        self._staging = Staging(owner.device)

    def bind(
        self, inputs: Mapping[str, Bound], outputs: Mapping[str, Bound]
    ) -> Callable[[], object]:
        """Binds buffers for one set of shapes.

        Raises:
            InputError: The engine was not built for these shapes.
        """
        shapes = [(name, inputs[name][2]) for name in self._inputs]
        profile = self._profile(dict(shapes))
        layout = self._staging.lay_out(
            {name: inputs[name] for name in self._inputs},
            {name: outputs[name] for name in self._outputs if name in outputs},
        )
        binding = _Binding(profile, shapes, layout.addresses)
        if unread := [name for name in self._outputs if name not in outputs]:
            self._shape(self._context, binding)
            for name in unread:
                slot = self._owner.device.allocate(self._size(name))
                binding.unread.append(slot)
                binding.addresses[name] = slot.pointer
        replays, record = self._owner.replays, None
        if replays is not None:
            record = functools.partial(replays.of, prepare=lambda: self._set_apart(binding))
        return self._staging.around(layout, lambda: self._execute(binding), record)

    def output_shapes(self, inputs: Mapping[str, Bound]) -> dict[str, tuple[int, ...]]:
        """Shapes of all outputs, from the context; nothing runs."""
        shapes = [(name, inputs[name][2]) for name in self._inputs]
        self._owner.device.enter()
        self._shape(self._context, _Binding(self._profile(dict(shapes)), shapes, {}))
        outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in outputs.items():
            self._require_known(name, shape)
        return outputs

    def _size(self, name: str) -> int:
        """Size of an output in bytes, for the shapes that were set last."""
        shape = tuple(self._context.get_tensor_shape(name))
        self._require_known(name, shape)
        item_bytes = int(self._engine.get_tensor_dtype(name).itemsize)
        return int(math.prod(shape)) * item_bytes

    def _require_known(self, name: str, shape: tuple[int, ...]) -> None:
        if min(shape, default=0) < 0:
            raise EngineError(
                f"{self._name}: the shape of {name} depends on the values of its inputs",
                fix="Run this bundle with ONNX Runtime (--engine cuda).",
            )

    def _set_apart(self, binding: _Binding) -> None:
        """Gives a binding its own context before it is recorded: setting other shapes in the shared
        context would invalidate the recording."""
        binding.context = context = self._owner.context(self._engine)
        self._shape(context, binding)
        self._place(context, binding)

    def _execute(self, binding: _Binding) -> None:
        context = binding.context
        if context is None:
            context = self._context
            if self._bound is not binding:
                self._shape(context, binding)
                self._place(context, binding)
                self._bound = binding
        if not context.execute_async_v3(self._owner.device.stream):
            raise EngineError(
                f"{self._name}: TensorRT could not run it", fix="See TensorRT's messages above."
            )

    def _shape(self, context: IExecutionContext, binding: _Binding) -> None:
        """Sets a context's profile and shapes."""
        self._bound = None
        stream = self._owner.device.stream
        if context.active_optimization_profile != binding.profile and not (
            context.set_optimization_profile_async(binding.profile, stream)
        ):
            raise EngineError(
                f"{self._name}: TensorRT did not accept profile {binding.profile}",
                fix="See TensorRT's messages above.",
            )
        for name, shape in binding.shapes:
            if not context.set_input_shape(name, shape):
                raise InputError(
                    f"{self._name}: TensorRT did not accept the shape {list(shape)} of {name}",
                    fix="Build with other --min-shapes or --max-shapes.",
                )

    def _place(self, context: IExecutionContext, binding: _Binding) -> None:
        """Sets the addresses of tensors in a context."""
        for name, address in binding.addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(
                    f"{self._name}: TensorRT did not accept the address of {name}",
                    fix="See TensorRT's messages above.",
                )

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that accepts these shapes."""
        worst = ""
        for number, profile in enumerate(self._plan.profiles):
            outside = [name for name in profile if not _within(shapes[name], profile[name])]
            if not outside:
                return number
            low, _, high = profile[outside[0]]
            worst = f"{outside[0]} is {list(shapes[outside[0]])}, the engine takes {low} to {high}"
        if not self._plan.profiles:
            return 0
        raise InputError(
            f"{self._name}: {worst}",
            fix="Use a smaller input, or build for it: edgeexit build --max-shapes, --capacity.",
        )


def _within(shape: tuple[int, ...], profile: list[list[int]]) -> bool:
    low, _, high = profile
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


__all__ = ["TensorRtGraph"]
