"""Traces components to ONNX graphs, and adds scores and greedy tokens.

Graphs use the manifest's names: inputs, lengths and past states are inputs; outputs and present
states are outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from edgeexit.bundle.manifest import Tensor, TokenState
from edgeexit.export.contract import Component, Form, Stack
from edgeexit.export.describe import Derived
from edgeexit.export.passes.ort_fusions import fuse
from edgeexit.export.trace.layer_graphs import Pieces
from edgeexit.export.trace.scores import append_scores, append_token
from edgeexit.export.trace.torch_graph import DEFAULT_OPSET, TORCH_DTYPES, graph_from_module

_EXAMPLE_SIZES = {"batch": 2, "new": 3, "past": 16}


def graph_of_form(
    component: Component,
    form: Form,
    *,
    opset: int = DEFAULT_OPSET,
    pieces: Pieces | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
    derived: Sequence[Derived] = (),
) -> ir.Model:
    """The graph of one form of a component.

    Args:
        component, form: What to trace.
        opset: Opset of the graph, unless the form needs a newer one.
        pieces: Cache of traced layers, shared by components with equal layers.
        values: An example of every input, with two rows or more (the exporter would fix a size of
            1); None: zeros.
        derived: What to compute from logits.
    """
    pieces = Pieces() if pieces is None else pieces
    inputs, states = component.taken(form)
    outputs, present = component.outputs, component.present(form.states)
    known = {tensor.name: _zeros(tensor) for tensor in [*inputs, *states]} | dict(values or {})
    options = {"opset": max(opset, form.opset), "what": component.name}
    if isinstance(form.body, Stack):
        first = [
            tensor
            for state, tensor in zip(component.states, states, strict=True)
            if isinstance(state, TokenState)
        ][:1]
        entry = [*inputs, *first]
        model = pieces.graph(form.body, entry, outputs, states, present, known, **options)  # type: ignore[arg-type]
    else:
        taken, made = [*inputs, *states], [*outputs, *present]
        model = graph_from_module(form.body, taken, made, known, **options)  # type: ignore[arg-type]
    if "onnxruntime-operators" in form.requires:
        fuse(model)
    for addition in derived:
        logits = next(value for value in model.graph.outputs if value.name == addition.logits)
        position = 1 + list(model.graph.outputs).index(logits)
        if addition.scores is not None:
            scores = append_scores(model.graph, logits, addition.scores)
            model.graph.outputs.extend(scores.values())
        if addition.token is not None:
            model.graph.outputs.insert(position, append_token(model.graph, logits, addition.token))
    return model


def graph_of_projection(component: Component, *, opset: int, pieces: Pieces) -> ir.Model:
    """The graph that computes a component's token states for tokens that skip the component."""
    assert component.projection is not None
    values = {tensor.name: _zeros(tensor) for tensor in component.inputs}
    kept = {state.present for state in component.token_states}
    what = f"{component.name}, projection"
    made = [tensor for tensor in component.present("append") if tensor.name in kept]
    return pieces.graph(
        component.projection, component.inputs, [], [], made, values, opset=opset, what=what
    )


def _zeros(tensor: Tensor) -> torch.Tensor:
    """A small example of a tensor."""
    sizes = [_EXAMPLE_SIZES.get(a, 8) if isinstance(a, str) else int(a or 1) for a in tensor.axes]
    return torch.zeros(sizes, dtype=TORCH_DTYPES[tensor.dtype])


__all__ = ["graph_of_form", "graph_of_projection"]
