"""Traces a stack of layers in pieces, each piece once, and joins copies of them to one graph.

torch needs seconds to trace a layer, and as long again for every layer that computes the same with
other weights. So the entry, one layer of each kind and the head are traced separately, with a
layer's weights as inputs, and `Pieces.graph` joins copies of them. Components of a model that have
equal layers share one `Pieces`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import nn
from torch.func import functional_call

from edgeexit.bundle.manifest import Tensor
from edgeexit.export.contract import Layer, Stack
from edgeexit.export.trace import torch_graph


class Pieces:
    """Cache of traced pieces."""

    def __init__(self) -> None:
        self._traced: dict[tuple[int, int], tuple[nn.Module, ir.Model]] = {}

    def graph(
        self,
        stack: Stack,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        own: Sequence[Tensor],
        made: Sequence[Tensor],
        values: Mapping[str, torch.Tensor],
        *,
        opset: int,
        what: str,
    ) -> ir.Model:
        """Returns the graph of a stack.

        Args:
            stack: What to trace.
            inputs: Inputs of its entry.
            outputs: Outputs of the stack besides those of layers; may be empty.
            own: Inputs of layers besides state and shared tensors, layer by layer.
            made: Outputs of layers besides the state, likewise.
            values: An example of every input, with two rows or more.
            what: The graph's name.
        """
        with torch.no_grad():
            state, *shared = stack.entry(*(values[tensor.name] for tensor in inputs))
        known = dict(values) | {stack.state.name: state}
        known |= {tensor.name: x for tensor, x in zip(stack.shared, shared, strict=True)}
        join = _Join([*inputs, *(tensor for tensor in own if tensor not in inputs)], what)
        entry = self._trace(
            stack.entry,
            inputs,
            [stack.state, *stack.shared],
            known,
            opset=opset,
            what=f"{what}, entry",
        )
        carried, *values_of = join.add(
            entry, "entry", [join.values[tensor.name] for tensor in inputs]
        )
        common = {tensor.name: x for tensor, x in zip(stack.shared, values_of, strict=True)}
        of_layers: list[ir.Value] = []
        taken = given = 0
        before = carried
        for number, layer in enumerate(stack.layers):
            name = f"layer_{number + 1}"
            before = carried
            takes = own[taken : taken + layer.states]
            gives = made[given : given + layer.updated]
            taken, given = taken + layer.states, given + layer.updated
            piece = self._trace_layer(
                stack, layer, takes, gives, known, opset=opset, what=f"{what}, {name}"
            )
            carried, *more = join.add(
                piece,
                name,
                [
                    carried,
                    *(join.values[tensor.name] for tensor in takes),
                    *(common[shared] for shared in layer.shared),
                ],
                layer.weights,
            )
            of_layers += more
        of_stack = [carried] if outputs else []
        if stack.head is not None:
            head = self._trace(
                stack.head, [stack.state], outputs, known, opset=opset, what=f"{what}, head"
            )
            of_stack = join.add(head, "head", [carried])
        if stack.closing is not None:
            pair = [msgspec.structs.replace(stack.state, name=n) for n in ("before", "after")]
            closing = self._trace(
                stack.closing,
                pair,
                outputs[1:],
                {"before": state, "after": state.clone()},  # one tensor would be one input
                opset=opset,
                what=f"{what}, closing",
            )
            of_stack += join.add(closing, "closing", [before, carried])
        return join.finish([*of_stack, *of_layers], [*outputs, *made], opset)

    def _trace_layer(
        self,
        stack: Stack,
        layer: Layer,
        takes: Sequence[Tensor],
        gives: Sequence[Tensor],
        known: Mapping[str, torch.Tensor],
        *,
        opset: int,
        what: str,
    ) -> ir.Model:
        weights = [_described(key, value) for key, value in layer.weights.items()]
        own = {t.name: x for t, x in zip(weights, layer.weights.values(), strict=True)}
        described = {tensor.name: tensor for tensor in stack.shared}
        shared = [described[name] for name in layer.shared]
        return self._trace(
            layer.module,
            [stack.state, *takes, *shared, *weights],
            [msgspec.structs.replace(stack.state, name="state_after"), *gives],
            {**known, **own},
            weights=list(layer.weights),
            opset=opset,
            what=what,
        )

    def _trace(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        values: Mapping[str, torch.Tensor],
        *,
        opset: int,
        what: str,
        weights: Sequence[str] = (),
    ) -> ir.Model:
        """A copy of the piece's graph, which is traced at the first call."""
        known = self._traced.get((id(module), opset))
        if known is None:
            called = _WithWeights(module, weights) if weights else module
            model = torch_graph.graph_from_module(
                called, inputs, outputs, values, opset=opset, what=what
            )
            model.graph.name = f"piece_{len(self._traced)}"
            known = self._traced[id(module), opset] = (module, model)
        return known[1].clone()


class _WithWeights(nn.Module):
    """A module that takes its weights as its last inputs."""

    def __init__(self, module: nn.Module, weights: Sequence[str]) -> None:
        super().__init__()
        self._module = (module,)  # not a submodule, or tracing would make its weights constants
        self.weights = list(weights)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(inputs) - len(self.weights)
        given = dict(zip(self.weights, inputs[count:], strict=True))
        return functional_call(self._module[0], given, inputs[:count])


class _Join:
    """A graph under construction, to which copies of pieces are appended."""

    def __init__(self, inputs: Sequence[Tensor], what: str) -> None:
        self.what = what
        self.values = {tensor.name: _value(tensor) for tensor in inputs}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.opsets: dict[str, int] = {}
        self._weights: dict[str, torch.Tensor] = {}

    def add(
        self,
        piece: ir.Model,
        name: str,
        inputs: Sequence[ir.Value],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> list[ir.Value]:
        """Appends a piece, whose nodes move here. Returns its outputs."""
        graph = piece.graph
        self.opsets |= piece.opset_imports
        of_layer = [self._weight(f"{name}/{key}", x) for key, x in (weights or {}).items()]
        for value, given in zip(list(graph.inputs), [*inputs, *of_layer], strict=True):
            value.replace_all_uses_with(given)
        outputs = list(graph.outputs)
        graph.inputs.clear()
        graph.outputs.clear()
        for value in list(graph.initializers.values()):
            # All copies of a piece share its initializers (tables, small constants).
            kept = self.initializers.setdefault(f"{graph.name}/{value.name}", value)
            del graph.initializers[str(value.name)]
            if kept is value:
                value.name = f"{graph.name}/{value.name}"
            else:
                value.replace_all_uses_with(kept)
        for node in list(graph):
            graph.remove(node)
            node.name = f"{name}/{node.name}"
            for value in node.outputs:
                value.name = f"{name}/{value.name}"
            if not self._transposed(node):
                self.nodes.append(node)
        return outputs

    def finish(self, values: Sequence[ir.Value], outputs: Sequence[Tensor], opset: int) -> ir.Model:
        """Returns the graph, with these values as its named outputs."""
        graph = ir.Graph(
            list(self.values.values()),
            list(values),
            nodes=self.nodes,
            initializers=[value for value in self.initializers.values() if value.uses()],
            opset_imports=self.opsets | {"": opset},
            name=self.what,
        )
        model = ir.Model(graph, ir_version=torch_graph.IR_VERSION)
        passes.IdentityEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        torch_graph.name_outputs(graph, outputs)
        return model

    def _weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        # Transposed copies of all layers take the model's memory once more: each is made when it is
        # written.
        dtype, shape = from_torch_dtype(tensor.dtype), ir.Shape(tensor.shape)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(tensor.detach().contiguous()), dtype, shape, name=name
        )
        self._weights[name], self.initializers[name] = tensor, value
        return value

    def _transposed(self, node: ir.Node) -> bool:
        """Whether a node transposes a weight; then the weight is stored transposed instead."""
        [weight] = node.inputs[:1]
        if node.op_type != "Transpose" or weight is None or weight.name not in self._weights:
            return False
        order = node.attributes["perm"].as_ints()
        turned = self._weights[weight.name].permute(*order)
        node.outputs[0].replace_all_uses_with(self._weight(f"{weight.name}/transposed", turned))
        node.replace_input_with(0, None)
        return True


def _value(tensor: Tensor) -> ir.Value:
    kind = from_torch_dtype(torch_graph.TORCH_DTYPES[tensor.dtype])
    return ir.Value(name=tensor.name, shape=ir.Shape(tensor.axes), type=ir.TensorType(kind))


def _described(name: str, value: torch.Tensor) -> Tensor:
    dtype = torch_graph.dtype_name(value.dtype)
    return Tensor(name=name, dtype=dtype, axes=list(value.shape))  # type: ignore[arg-type]


__all__ = ["Pieces"]
