"""Layers traced once and joined: which share a trace, and that joined graphs compute the model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgeexit.export import SplitModel, Stack
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families.llama import trunk
from edgeexit.export.trace.component_graphs import graph_of_form
from edgeexit.export.trace.layer_graphs import Pieces
from tests.decoders import LAYERS, VOCABULARY, make_decoder


def _model(change: str) -> ExitDecoder:
    """A Llama; one of its layers differs by a setting that it shows, or by one that it hides."""
    model = make_decoder("llama")
    odd = model.model.layers[2]
    if change == "shown":
        odd.mlp.act_fn = nn.GELU()
    elif change == "hidden":
        odd.mlp.act_fn.forward = torch.tanh
    return ExitDecoder(model, trunk(model), [2])  # type: ignore[arg-type]


def _stacks(model: SplitModel, number: int) -> dict[str, Stack]:
    """Component -> the layers of one of its forms."""
    found = {}
    for component in model.components:
        if component.states:
            body = component.forms[number].body
            assert isinstance(body, Stack)
            found[component.name] = body
    return found


@pytest.mark.parametrize("change", ["none", "shown", "hidden"])
def test_layers_share_a_module_unless_they_compute_otherwise(change: str) -> None:
    model = _model(change).split_model()
    for number in range(len(model.component("unsplit").forms)):
        stacks = _stacks(model, number)
        modules = [id(layer.module) for layer in stacks.pop("unsplit").layers]
        assert len(set(modules)) == (1 if change == "none" else 2)
        assert modules[0] == modules[1] == modules[3]
        segments = stacks.values()
        assert [id(one.module) for stack in segments for one in stack.layers] == modules
        assert len({id(stack.entry) for stack in segments}) == 1


def test_a_graph_with_an_odd_layer_computes_the_model() -> None:
    decoder = _model("hidden")
    model = decoder.split_model()
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(ids)[LAYERS][:, -1]
    unsplit, pieces = model.component("unsplit"), Pieces()
    graph = graph_of_form(unsplit, unsplit.forms[-1], pieces=pieces)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    states = unsplit.token_states
    shape = (2, states[0].axes[1], 5, states[0].axes[3])
    feeds = {state.past: np.zeros(shape, np.float32) for state in states}
    feeds["embedded"] = decoder.trunk.embedding[ids].detach().numpy()
    feeds["positions"] = np.arange(7)[None].repeat(2, axis=0)
    feeds["lengths/past"] = np.zeros(2, np.int64)
    [logits, *_] = session.run(None, feeds)
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=2e-4)
    again = graph_of_form(unsplit, unsplit.forms[-1], pieces=pieces)
    names = [[node.name for node in one.graph] for one in (graph, again)]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])
