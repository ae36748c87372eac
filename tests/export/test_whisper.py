"""Whisper with exits, held against transformers' own generation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgeexit.bundle.manifest import StateForm
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError, InputError, UsageError
from edgeexit.export import export
from edgeexit.export.exits.speech_encoder_decoder import ExitSpeechEncoderDecoder
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import Model, Policy, Rule, load
from edgeexit.runtime.programs.generate import ModeName
from tests.encoder_decoders import shortened
from tests.speech_models import (
    END,
    ENGLISH,
    FIRST_TIME,
    GERMAN,
    LAYERS,
    NO_TIMES,
    RATE,
    START,
    TRANSCRIBE,
    TRANSLATE,
    make_extractor,
    make_sound,
    make_tokenizer,
    make_whisper,
    save_checkpoint,
)

NEW = 30
ALWAYS, NEVER = float("-inf"), float("inf")
SOUNDS = [make_sound(0.8, seed) for seed in range(3)]
LONG = make_sound(3.3, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(make_whisper(), tmp_path_factory.mktemp("whisper") / "checkpoint")


@pytest.fixture(scope="module")
def split(folder: Path) -> ExitSpeechEncoderDecoder:
    return read_split(folder)


def read_split(folder: Path) -> ExitSpeechEncoderDecoder:
    split = from_pretrained(folder, exits=[1, 2], encoder_exits=[1, 2])
    assert isinstance(split, ExitSpeechEncoderDecoder)
    return split


@pytest.fixture(scope="module")
def bundle(split: ExitSpeechEncoderDecoder, folder: Path) -> Bundle:
    return export(split.split_model(), folder.parent / "bundle")


@pytest.fixture
def model(bundle: Bundle) -> Iterator[Model]:
    with load(bundle) as model:
        model.policy = policy()
        yield model


def policy(encoder: float | dict[str, float] = NEVER, decoder: float = NEVER) -> Policy:
    rules = {
        "encoder": Rule(score="saturation", thresholds=encoder),
        "main": Rule(thresholds=decoder),
    }
    return Policy(rules=rules)


def features(sounds: Sequence[np.ndarray], *, long: bool = False) -> torch.Tensor:
    options = {"truncation": False, "padding": "longest"} if long else {}
    own = make_extractor()
    made = [own(s, sampling_rate=RATE, return_tensors="np", **options) for s in sounds]
    return torch.tensor(np.concatenate([one.input_features for one in made]))


def expected(
    folder: Path,
    given: torch.Tensor,
    *,
    times: bool = False,
    encoder: int = LAYERS,
    decoder: int = LAYERS,
    **options: Any,
) -> list[list[int]]:
    """What transformers writes greedily, ends and start tokens left out."""
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    model = shortened(whole, encoder=encoder, decoder=decoder)
    made = model.generate(
        input_features=given,
        return_timestamps=times,
        # Else it reads a window again where the text has two times in a row, asked for or not.
        force_unique_generate_call=None if times else True,
        max_length=None,
        max_new_tokens=NEW,
        **options,
    ).tolist()
    rows = [row if times else row[4:] for row in made]
    return [row[: row.index(END)] if END in row else row for row in rows]


def heard(sounds: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    return [(sound, RATE) for sound in sounds]


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("mode", ["full", "exact", "fast", "approximate"])
def test_every_mode_writes_what_transformers_writes_where_no_exit_is_taken(
    model: Model, folder: Path, mode: ModeName, times: bool
) -> None:
    for sounds in ([SOUNDS[0]], SOUNDS):
        wanted = expected(folder, features(sounds), times=times)
        found = model.generate(
            audio=heard(sounds), timestamps=times, mode=mode, max_new_tokens=NEW
        ).finish()
        assert found.tokens == wanted
        assert min(map(len, wanted)) > 5 and len({*wanted[0]}) > 3


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_a_long_sound_is_read_window_by_window_as_in_transformers(
    model: Model, folder: Path, mode: ModeName
) -> None:
    wanted = expected(folder, features([LONG], long=True), times=True)
    pieces = []
    found = model.generate(
        audio=(LONG, RATE), timestamps=True, mode=mode, max_new_tokens=NEW, on_piece=pieces.append
    ).finish()
    assert found.tokens == wanted
    assert [token for piece in pieces for token in piece.tokens] == wanted[0]
    assert "".join(piece.text for piece in pieces) == found.texts[0]
    assert len(pieces) > 4 and found.statistics.tokens >= len(wanted[0])
    assert len(found.statistics.earlier["encoder"]) > 3
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    made = whole.generate(
        features([LONG], long=True),
        return_timestamps=True,
        max_length=None,
        max_new_tokens=NEW,
        return_segments=True,
    )
    segments = made["segments"][0]
    for segment in segments[:-1]:
        assert f"<|{float(segment['start']):.2f}|>" in found.texts[0]
        assert f"<|{float(segment['end']):.2f}|>" in found.texts[0]


def test_long_sounds_without_printed_times_and_together_with_short_ones(model: Model) -> None:
    given = heard([LONG, SOUNDS[0]])
    with_times = model.generate(audio=given, timestamps=True, max_new_tokens=NEW).finish()
    plain = model.generate(audio=given, max_new_tokens=NEW).finish()
    alone = model.generate(audio=given[0], max_new_tokens=NEW).finish()
    assert plain.tokens == with_times.tokens and alone.tokens[0] == plain.tokens[0]
    assert "<|" in with_times.texts[0] and "<|" not in plain.texts[0]


def test_texts_are_those_that_transformers_decodes(model: Model, folder: Path) -> None:
    own = make_tokenizer()
    for times in (False, True):
        found = model.generate(audio=heard(SOUNDS), timestamps=times, max_new_tokens=NEW)
        for text, tokens in zip(found.finish().texts, found.tokens, strict=True):
            decoded = own.decode(tokens, skip_special_tokens=True, decode_with_timestamps=times)
            # transformers takes windows for 30 s where a text has several.
            assert text.split("<|1.0")[0] == decoded.split("<|1.0")[0]


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("mode", ["full", "exact"])
def test_an_exit_of_the_encoder_hands_its_state_on(
    model: Model, folder: Path, layer: int, mode: ModeName
) -> None:
    model.policy = policy({f"encoder_exit_{layer}": ALWAYS})
    found = model.generate(audio=heard(SOUNDS), mode=mode, max_new_tokens=NEW).finish()
    assert found.tokens == expected(folder, features(SOUNDS), encoder=layer)
    assert found.statistics.earlier == {"encoder": [f"encoder_exit_{layer}"] * len(SOUNDS)}


@pytest.mark.parametrize("layer", [1, 2])
def test_leaving_at_an_exit_of_the_decoder_is_the_decoder_cut_there(
    model: Model, folder: Path, layer: int
) -> None:
    rules = {
        "encoder": Rule(score="saturation"),
        "main": Rule(thresholds={f"exit_{layer}": ALWAYS}),
    }
    model.policy = Policy(rules=rules)
    for times in (False, True):
        found = model.generate(
            audio=heard(SOUNDS), mode="fast", timestamps=times, max_new_tokens=NEW
        ).finish()
        assert found.tokens == expected(folder, features(SOUNDS), times=times, decoder=layer)


@pytest.mark.parametrize("layer", [1, 2, LAYERS])
def test_torch_and_transformers_agree_behind_every_exit(
    split: ExitSpeechEncoderDecoder, folder: Path, layer: int
) -> None:
    inputs = split.split_model().example(3)
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    names = {"encoder": f"encoder_exit_{layer}/exit_{LAYERS}", "decoder": f"exit_{layer}"}
    if layer == LAYERS:
        del names["encoder"]
    with torch.no_grad():
        found = {k: v for part in split._reference(inputs) for k, v in part.items()}
        encoded = split.encode(inputs["input_features"])
        again = split(inputs["tokens"], exits=[layer], source=encoded)[layer]
        for half, name in names.items():
            model = shortened(
                transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval(),
                **{half: layer},
            )
            logits = model(
                input_features=inputs["input_features"], decoder_input_ids=inputs["tokens"]
            ).logits
            torch.testing.assert_close(found[name], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again, found[f"exit_{layer}"], atol=1e-4, rtol=1e-4)
    assert whole.config.decoder_layers == LAYERS


def test_the_bundle_says_what_the_model_says(bundle: Bundle) -> None:
    with load(bundle) as model:
        report = check(model, policy=policy(encoder=0.9, decoder=0.3))
    report.require()
    assert not report.notes
    compared = {(one.where, one.what) for one in report.comparisons}
    assert ("preprocessing", "input_features") in compared
    assert ("encoder_exit_1", "encoder_state, batch of 4") in compared


def test_unsplit_writes_the_same(bundle: Bundle, folder: Path) -> None:
    with load(bundle, unsplit=True) as model:
        for times in (False, True):
            found = model.generate(audio=heard(SOUNDS), timestamps=times, max_new_tokens=NEW)
            assert found.finish().tokens == expected(folder, features(SOUNDS), times=times)


@pytest.mark.parametrize("states", ["in-place", "fixed", "append"])
def test_every_form_of_states_writes_the_same(
    bundle: Bundle, folder: Path, states: StateForm
) -> None:
    with load(bundle, states=states) as model:
        model.policy = policy()
        found = model.generate(audio=heard(SOUNDS), mode="exact", max_new_tokens=NEW).finish()
        assert found.tokens == expected(folder, features(SOUNDS))


def test_half_precision_holds(split: ExitSpeechEncoderDecoder, tmp_path: Path) -> None:
    with load(export(split.split_model(), tmp_path / "half", dtype="float16")) as model:
        check(model).require()
        [state] = model.bundle.manifest.chains["encoder"].outputs
        assert state.dtype == "float16"


def test_language_and_task_are_chosen_per_call(model: Model, folder: Path) -> None:
    given = features(SOUNDS)
    for language, task in (("de", "transcribe"), ("German", "translate"), ("<|en|>", "translate")):
        wanted = expected(folder, given, language=language.strip("<|>").lower(), task=task)
        choices = {"language": language, "task": task}
        found = model.generate(audio=heard(SOUNDS), choices=choices, max_new_tokens=NEW).finish()
        assert found.tokens == wanted
    inputs = {"input_features": given.numpy()}
    for start in ([START, GERMAN, TRANSLATE, NO_TIMES], [START, ENGLISH, TRANSCRIBE]):
        model.generate([start] * 3, inputs=inputs, max_new_tokens=NEW).finish()
    again = model.generate(inputs=inputs, max_new_tokens=NEW).finish()
    assert again.tokens == expected(folder, given)


def test_wrong_choices_are_refused(model: Model) -> None:
    for choices, said in (
        ({"language": "fr"}, "'fr' is no language of the model. Use de, en"),
        ({"tone": "kind"}, "no choice of 'tone' .it has language, task"),
        ({"task": 3}, "3 is no task of the model"),
        (["en"], "choices are a list, not a mapping"),
    ):
        with pytest.raises(UsageError, match=said):
            model.generate(audio=(SOUNDS[0], RATE), choices=choices)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="choices and token ids"):
        inputs = {"input_features": features(SOUNDS[:1]).numpy()}
        model.generate([[START]], inputs=inputs, choices={"task": "translate"})


def remade(folder: Path, tmp_path: Path, **settings: Any) -> ExitSpeechEncoderDecoder:
    """The checkpoint with other generation settings; None removes one."""
    model = make_whisper(**settings)
    for name, value in settings.items():
        if value is None and hasattr(model.generation_config, name):
            delattr(model.generation_config, name)
    return read_split(save_checkpoint(model, tmp_path / "other"))


def test_a_language_without_a_default_must_be_chosen(folder: Path, tmp_path: Path) -> None:
    forced = [[1, None], [2, TRANSLATE]]
    split = remade(folder, tmp_path, language=None, task=None, forced_decoder_ids=forced)
    assert split.whole.choices["language"].default is None
    assert split.whole.choices["task"].default == "translate"
    with load(export(split.split_model(), tmp_path / "bundle")) as model:
        with pytest.raises(
            InputError, match="must be told the language.*choices=.*--language.*de, en"
        ):
            model.generate(audio=(SOUNDS[0], RATE))
        model.generate(audio=(SOUNDS[0], RATE), choices={"language": "de"}, max_new_tokens=3)


def test_defaults_are_those_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    split = remade(
        folder, tmp_path, language=None, task=None, forced_decoder_ids=[[1, GERMAN], [2, TRANSLATE]]
    )
    defaults = {name: choice.default for name, choice in split.whole.choices.items()}
    assert defaults == {"language": "de", "task": "translate"}


def test_a_model_of_one_language_has_no_choices(folder: Path, tmp_path: Path) -> None:
    forced = [[1, NO_TIMES]]
    split = remade(
        folder,
        tmp_path,
        is_multilingual=False,
        lang_to_id=None,
        task_to_id=None,
        language=None,
        task=None,
        forced_decoder_ids=forced,
    )
    assert split.whole.choices == {} and split.encoder.trunk.start_tokens == (START,)
    wanted = expected(tmp_path / "other", features(SOUNDS), times=True)
    with load(export(split.split_model(), tmp_path / "bundle")) as model:
        found = model.generate(audio=heard(SOUNDS), timestamps=True, max_new_tokens=NEW).finish()
        assert found.tokens == wanted


def test_settings_that_cannot_be_heeded_are_refused_or_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExportError, match="language 'fr', for which lang_to_id has no token"):
        remade(folder, tmp_path, language="fr")
    with pytest.raises(ExportError, match="no lang_to_id, so the language cannot be chosen"):
        remade(folder, tmp_path, lang_to_id=None, task_to_id=None, is_multilingual=None)
    with caplog.at_level(logging.WARNING):
        remade(folder, tmp_path, no_speech_threshold=0.6)
    assert "have no effect: no_speech_threshold=0.6" in caplog.text


def test_a_model_without_times_refuses_them_and_long_sounds(folder: Path, tmp_path: Path) -> None:
    split = remade(folder, tmp_path, no_timestamps_token_id=None)
    assert split.whole.timestamps is None
    with load(export(split.split_model(), tmp_path / "bundle")) as model:
        model.generate(audio=(SOUNDS[0], RATE), max_new_tokens=3).finish()
        with pytest.raises(UsageError, match="the model writes no times"):
            model.generate(audio=(SOUNDS[0], RATE), timestamps=True)
        with pytest.raises(InputError, match="3.3 s is longer than the model's window of 1 s"):
            model.generate(audio=(LONG, RATE))


def test_a_checkpoint_without_an_extractor_takes_features(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(make_whisper(), tmp_path / "checkpoint")
    (checkpoint / "preprocessor_config.json").unlink()
    split = read_split(checkpoint)
    with load(export(split.split_model(), tmp_path / "bundle")) as model:
        inputs = {"input_features": features(SOUNDS).numpy()}
        model.generate(inputs=inputs, max_new_tokens=3).finish()
        with pytest.raises(InputError, match="takes sounds only as features"):
            model.generate(audio=(SOUNDS[0], RATE))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"feature_size": 24}, r"makes features \[24, 100\], the model takes \[16, 100\]"),
        ({"dither": 0.1}, "dither 0.1 .* not supported"),
    ],
)
def test_an_extractor_that_does_not_fit_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    checkpoint = save_checkpoint(make_whisper(), tmp_path / "checkpoint")
    make_extractor(**options).save_pretrained(checkpoint)
    with pytest.raises(ExportError, match=said):
        read_split(checkpoint)


def test_times_are_tokens_from_the_first_on(bundle: Bundle) -> None:
    decoding = bundle.manifest.decoding
    assert decoding is not None and decoding.timestamps is not None
    times = decoding.timestamps
    assert (times.first, times.without, times.end, times.latest) == (FIRST_TIME, NO_TIMES, END, 10)
