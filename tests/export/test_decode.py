"""Decoders into bundles: adapters equal to transformers, forms equal to each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from edgeexit.bundle import Bundle, open_bundle
from edgeexit.errors import EdgeExitError
from edgeexit.export.models import ExitDecoder, from_pretrained
from tests.decoders import EXITS, FAMILIES, LAYERS, VOCABULARY, make_decoder

Families = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_computes_what_transformers_does(family: str, decoder_folder: Families) -> None:
    decoder = from_pretrained(decoder_folder(family), exits=EXITS)
    assert isinstance(decoder, ExitDecoder)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = make_decoder(family)(ids).logits
        found = decoder(ids)
    assert sorted(found) == [*EXITS, LAYERS]
    torch.testing.assert_close(found[LAYERS], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_stored_once(
    family: str, decoder_folder: Families, decoder_bundle: Callable[[str], Bundle]
) -> None:
    decoder = from_pretrained(decoder_folder(family), exits=EXITS)
    bundle = decoder_bundle(family)
    rotary = 2 * 96 * 8 * 4  # the tables of sines and cosines are constants of the graphs
    parameters = 4 * sum(p.numel() for p in decoder.model.parameters())
    assert bundle.weights_bytes <= parameters + rotary + 4096 * (LAYERS * 4 + 8)
    opened = open_bundle(bundle.path, verify="full")
    assert [leave.name for leave in opened.exits()] == ["exit_1", "exit_2", f"exit_{LAYERS}"]
    assert opened.manifest.tokenizer is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_form_takes_caches_of_any_length(
    family: str, decoder_bundle: Callable[[str], Bundle]
) -> None:
    """Tokens in two runs, rows with caches of unlike length, give what one run gives."""
    bundle = decoder_bundle(family)
    (chain,) = bundle.manifest.chains.values()
    segment = chain.segments[0]
    session = ort.InferenceSession(str(bundle.file(segment.variants[-1].graph)))
    rng = np.random.default_rng(0)
    width = segment.inputs[0].axes[-1]
    state = rng.normal(size=(2, 7, width)).astype(np.float32)  # type: ignore[arg-type]
    capacity = 12
    shape = (2, segment.caches[0].axes[1], capacity, segment.caches[0].axes[3])
    empty = {cache.past: np.full(shape, 7.0, np.float32) for cache in segment.caches}

    def run(x: np.ndarray, past: dict[str, np.ndarray], lengths: list[int]) -> list[np.ndarray]:
        places = np.array(lengths)[:, None] + np.arange(x.shape[1])
        feeds = {segment.inputs[0].name: x, "positions": places, **past}
        return session.run(None, feeds | {"lengths/past": np.array(lengths)})

    whole = run(state, empty, [0, 0])
    first = run(state[:, :4], empty, [0, 0])
    caches = {name: value.copy() for name, value in empty.items()}
    for cache, made in zip(segment.caches, first[1:], strict=True):
        caches[cache.past][:, :, :4] = made
    # Row 1 forgets its last token: it goes on from three, with the fourth token again.
    shifted = np.stack([state[0, 4:7], state[1, 3:6]])
    second = run(shifted, caches, [4, 3])
    np.testing.assert_allclose(second[0][0], whole[0][0, 4:7], atol=1e-4)
    np.testing.assert_allclose(second[0][1], whole[0][1, 3:6], atol=1e-4)


def test_a_decoder_without_exits_says_how_to_name_them(decoder_folder: Families) -> None:
    with pytest.raises(EdgeExitError, match="where its exits are.*--exits 2,4"):
        from_pretrained(decoder_folder("llama"))


@pytest.mark.parametrize("exits", [[0], [LAYERS + 1], [2, 1], [1, 1]])
def test_layers_that_cannot_have_an_exit_are_refused(
    decoder_folder: Families, exits: list[int]
) -> None:
    with pytest.raises(EdgeExitError, match="exits"):
        from_pretrained(decoder_folder("llama"), exits=exits)
