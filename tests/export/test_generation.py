"""What a checkpoint says of how text is written is done, or said not to be."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgeexit.bundle.manifest import GenerationDefaults
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export
from edgeexit.export.families.llama import stop_tokens
from edgeexit.export.generation import UNHEEDED, UNHEEDED_DRAWING, generation_of
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import Rule, Sampling, load
from tests import encoder_decoders
from tests.decoders import VOCABULARY, make_decoder, random_prompts

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


def test_a_forced_first_token_is_the_first_of_the_result(tmp_path: Path) -> None:
    """Older checkpoints have it in config.json, without a file for generation."""
    folder = encoder_decoders.save_checkpoint(encoder_decoders.make_bart(), tmp_path / "c")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"forced_bos_token_id": 7}))
    (folder / "generation_config.json").unlink()
    own = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("abcj", return_tensors="pt")
    bundle = export(from_pretrained(folder, exits=[1]).split_model(), tmp_path / "bundle")
    with load(bundle) as loaded:
        for count in (1, 9):
            whole = own.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=count,
                do_sample=False,
            )[0, 1:]
            assert int(whole[0]) == 7
            for mode in ("full", "exact"):
                found = loaded.generate("abcj", max_new_tokens=count, mode=mode).finish()  # type: ignore[arg-type]
                ended = int(whole[-1]) == own.config.eos_token_id
                assert found.tokens[0] == whole.tolist()[: -1 if ended else None], mode
                assert found.texts[0] == tokenizer.decode(whole, skip_special_tokens=True), mode
        # Token ids beside inputs are the start of the text, which then is not forced.
        given = {name: value.numpy() for name, value in inputs.items() if name != "token_type_ids"}
        assert loaded.generate([[2, 9]], inputs=given, max_new_tokens=1).finish().tokens[0] != [7]


FIELDS_WITHOUT_EFFECT_ON_TEXT = {
    # Memory, speed and outputs of generate.
    "use_cache", "cache_config", "max_cache_len", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "renormalize_logits", "pad_token_id", "bos_token_id",
    # Drafting: the same text, faster.
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type",
    "assistant_ensemble_weight", "use_mtp",
    # Only with beams, which are told.
    "early_stopping", "length_penalty", "diversity_penalty",
    # About the file.
    "transformers_version", "generation_kwargs",
}  # fmt: skip
OBEYED = {
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "suppress_tokens",
    "begin_suppress_tokens", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id",
}  # fmt: skip


def test_every_setting_of_transformers_is_obeyed_told_or_without_effect() -> None:
    known = FIELDS_WITHOUT_EFFECT_ON_TEXT | OBEYED | set(UNHEEDED) | set(UNHEEDED_DRAWING)
    fields = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert fields - known == set()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True, "top_k": -5}, r"top_k is -5, out of range \(0 \(all\) or more\)"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5, out of range"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan, out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0, out of range"),
        ({"repetition_penalty": "much"}, "its settings cannot be used"),
        ({"suppress_tokens": list(range(VOCABULARY))}, "suppress_tokens holds every token"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_with_its_file(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        generation_of(model_with(**settings), "some/checkpoint")
    assert caught.value.what.startswith("some/checkpoint/generation_config.json: ")
    assert caught.value.fix


def test_token_ids_that_the_model_lacks_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_with(eos_token_id=[5, -1], suppress_tokens=[7, 999, -3])
    assert stop_tokens(model) == (0, 5)
    defaults = generation_of(model, tmp_path)
    assert defaults == GenerationDefaults(suppressed=[7])
    assert "eos_token_id: the model has no token -1" in caplog.text
    assert "suppress_tokens: the model has no token 999 and 1 more" in caplog.text
    assert str(tmp_path / "generation_config.json") in caplog.text


@pytest.mark.parametrize("name", ["decoder_start_token_id", "forced_bos_token_id"])
@pytest.mark.parametrize("value", [-1, 64, [2, 3]])
def test_a_start_that_the_model_lacks_is_refused(name: str, value: object, tmp_path: Path) -> None:
    folder = encoder_decoders.save_checkpoint(encoder_decoders.make_bart(), tmp_path / "c")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ExportError, match=f"{name} is .*, not a token id of the model") as caught:
        from_pretrained(folder, exits=[1])
    assert str(folder) in caught.value.what


def test_suppressing_every_token_is_refused(decoder_bundle: Callable[[str], Bundle]) -> None:
    with load(decoder_bundle("llama")) as loaded:
        with pytest.raises(UsageError, match=f"all {VOCABULARY} tokens"):
            loaded.generate([5], sampling=Sampling(suppressed=tuple(range(VOCABULARY))))
        few = Sampling(suppressed=tuple(range(VOCABULARY - 1)))
        found = loaded.generate([5], sampling=few, max_new_tokens=1).finish()
        assert found.tokens == [[VOCABULARY - 1]]
