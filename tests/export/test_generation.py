"""What a checkpoint says of how text is written is done, or said not to be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgeexit.bundle.manifest import GenerationDefaults
from edgeexit.export import export
from edgeexit.export.generation import generation_of
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import Rule, Sampling, load
from tests.decoders import make_decoder, random_prompts

NEW = 24


def model_with(**settings: Any) -> transformers.PreTrainedModel:
    model = make_decoder("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_mode_writes_what_generate_writes(family: str, tmp_path: Path) -> None:
    model = make_decoder(family)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.suppress_tokens = [5, 6, 17]
    model.save_pretrained(tmp_path / "checkpoint")
    prompts = random_prompts(3, [4, 9, 5], seed=2)
    made = from_pretrained(tmp_path / "checkpoint", exits=[1, 2]).split_model()
    bundle = export(made, tmp_path / "bundle")
    assert bundle.manifest.decoding is not None
    assert bundle.manifest.decoding.generation == GenerationDefaults(
        repetition_penalty=1.5, suppressed=[5, 6, 17]
    )
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    plain, changed = 0, 0
    with load(bundle, policy=Rule(thresholds=0.05)) as loaded:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            # A padding token is needed by generate only, for a prompt that stands alone.
            whole = own.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)
            expected = whole[0, len(prompt) :].tolist()
            expected = expected[: expected.index(0)] if 0 in expected else expected
            for mode in ("full", "exact"):
                found = loaded.generate(prompt, max_new_tokens=NEW, mode=mode).finish()  # type: ignore[arg-type]
                assert found.tokens[0] == expected, mode
            early = loaded.generate(prompt, max_new_tokens=NEW, mode="fast").finish().tokens[0]
            assert not {5, 6, 17} & set(early)
            greedy = loaded.generate(prompt, max_new_tokens=NEW, sampling=Sampling()).finish()
            plain += len(greedy.tokens[0])
            changed += greedy.tokens[0] != expected
    assert plain and changed


def test_drawing_is_as_transformers_means_it(caplog: pytest.LogCaptureFixture) -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_k": None, "top_p": 0.9}
    assert generation_of(model_with(**given), "m") == GenerationDefaults(
        temperature=0.6, top_k=50, top_p=0.9
    )
    # Where nothing is drawn, what only draws are for says nothing.
    assert generation_of(model_with(**given | {"do_sample": False}), "m") is None
    assert not caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"do_sample": True, "min_p": 0.1}],
)
def test_what_is_not_heeded_is_named(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        generation_of(model_with(**settings), "some/checkpoint")
    name, value = list(settings.items())[-1]
    assert f"{name}={value}" in caplog.text and "some/checkpoint" in caplog.text
