"""Reference samples: what they say of every token, and what they keep in memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from edgeexit.export.describe import manifest_of
from edgeexit.export.samples import reference_sample, torch_reference
from tests.decoders import EXITS, LAYERS, VOCABULARY, make_adapted
from tests.toys import score_values


def test_a_sample_holds_every_token_of_a_text_that_is_computed_in_parts() -> None:
    decoder = make_adapted("llama")
    tokens = torch.randint(1, VOCABULARY, (2, 71), generator=torch.Generator().manual_seed(1))
    model = dataclasses.replace(decoder.split_model(), example=lambda rows: {"tokens": tokens})
    with torch.no_grad():
        sample, _ = torch_reference(model, manifest_of(model, "float32"))
        expected = decoder(tokens)
    assert sorted(expected) == [*EXITS, LAYERS]
    for layer, answers in expected.items():
        logits = answers.double().numpy()
        ordered = np.sort(logits, -1)
        wanted = {"token": logits.argmax(-1), "gap": ordered[..., -1] - ordered[..., -2]}
        for name, values in (wanted | score_values(logits)).items():
            found = sample[f"exit_{layer}/{name}"]
            np.testing.assert_allclose(found, values, atol=1e-5, err_msg=f"{layer} {name}")
        np.testing.assert_allclose(sample[f"exit_{layer}/logits"], logits[:, -1], atol=1e-5)


def test_scores_are_those_of_their_token_when_the_vocabulary_is_large() -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(2, 3, 150_000)).astype(np.float32)
    sample = reference_sample({}, {"exit": {"logits": logits}}, every_token=True)
    for name, values in score_values(logits.astype(np.float64)).items():
        np.testing.assert_allclose(sample[f"exit/{name}"], values, atol=1e-6, err_msg=name)


def test_a_sample_keeps_only_the_last_token_of_the_logits() -> None:
    logits = np.zeros((2, 5, 7), np.float32)
    sample = reference_sample({}, {"exit": {"logits": logits}}, every_token=True)
    assert not any(np.shares_memory(value, logits) for value in sample.values())
