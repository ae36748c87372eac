"""Layers traced once and joined: which share a trace, and that joined graphs compute the model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgeexit.export import DecodeModel
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families.llama import trunk
from edgeexit.export.trace.layer_graphs import Pieces
from edgeexit.export.write_decode import graph_of_form
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


@pytest.mark.parametrize("change", ["none", "shown", "hidden"])
def test_layers_share_a_module_unless_they_compute_otherwise(change: str) -> None:
    exits = _model(change).exit_model()
    assert isinstance(exits, DecodeModel)
    for number, form in enumerate(exits.unsplit.forms):
        modules = [id(layer.module) for layer in form.stack.layers]
        assert len(set(modules)) == (1 if change == "none" else 2)
        assert modules[0] == modules[1] == modules[3]
        parts = [part.forms[number].stack for part in exits.segments]
        assert [id(one.module) for part in parts for one in part.layers] == modules
        assert len({id(stack.entry) for stack in parts}) == 1


def test_a_graph_with_an_odd_layer_computes_the_model() -> None:
    decoder = _model("hidden")
    exits = decoder.exit_model()
    assert isinstance(exits, DecodeModel)
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(ids)[LAYERS][:, -1]
    part, pieces = exits.unsplit, Pieces()
    graph = graph_of_form(part, part.forms[-1], 20, pieces)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    shape = (2, part.caches[0].axes[1], 5, part.caches[0].axes[3])
    feeds = {cache.past: np.zeros(shape, np.float32) for cache in part.caches}
    feeds[exits.embedded.name] = exits.embedding[ids].numpy()
    feeds["positions"] = np.arange(7)[None].repeat(2, axis=0)
    feeds["lengths/past"] = np.zeros(2, np.int64)
    [logits, *_] = session.run(None, feeds)
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=2e-4)
    again = graph_of_form(part, part.forms[-1], 20, pieces)
    names = [[node.name for node in model.graph] for model in (graph, again)]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])
