"""Sounds on the command line and in Python: what is written; and what is refused, with one line
that names the thing and the remedy, and the right code."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.cli.export import _about_exits
from edgeexit.errors import DataError, InputError, UsageError
from edgeexit.measure.texts import read_texts
from edgeexit.runtime import Model, Sampling, load
from tests.e2e.conftest import Ran
from tests.speech_models import END, RATE, make_sound, write_wav

Run = Callable[..., Ran]
WRITES = ("--max-new-tokens", "4", "--threads", "1")  # other tests of this process load models, too


@pytest.fixture
def model(speech_bundle: Bundle) -> Iterator[Model]:
    with load(speech_bundle, threads=1) as model:
        yield model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sounds, and files that are none, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.wav", "b.wav")):
        write_wav(Path(name), make_sound(0.8, number)[:, None])
    write_wav(Path("long.wav"), make_sound(2.5)[:, None])
    Path("words.wav").write_text("no sound")
    Path("empty.wav").write_bytes(b"")
    write_wav(Path("none.wav"), np.zeros((0, 1), np.float32))
    return tmp_path


def refused(ran: Ran, code: int, *parts: str) -> None:
    """One error without a traceback, and nothing on stdout."""
    assert ran.code == code, ran
    assert ran.out == "" and "Traceback" not in ran.err
    assert ran.err.count("rror: ") == 1
    for part in parts:
        assert part in ran.err, ran.err


def test_sounds_are_written(run_here: Run, folder: Path, speech_bundle: Bundle) -> None:
    sounds = ("--audio", "a.wav", "--audio", "b.wav")
    ran = run_here("run", speech_bundle.path, *sounds, *WRITES, "--json", "--language", "de")
    assert ran.code == 0, ran.err
    assert [text["prompt"] for text in ran.json["texts"]] == ["a.wav", "b.wav"]
    assert [len(text["tokens"]) for text in ran.json["texts"]] == [4, 4]
    assert ran.json["statistics"]["earlier"] == {"encoder": ["encoder_exit_3"] * 2}


@pytest.mark.parametrize("sound", ["a.wav", "long.wav"])
def test_times_are_printed_while_a_text_is_written(
    run_here: Run, folder: Path, speech_bundle: Bundle, sound: str
) -> None:
    options = ("--audio", sound, "--timestamps", "--stream", "--task", "transcribe")
    ran = run_here("run", speech_bundle.path, *options, "--threads", "1")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("<|0.") and ran.out.count("|>") > 1
    again = run_here("run", speech_bundle.path, "--audio", sound, "--timestamps", "--threads", "1")
    assert again.out.strip() == ran.out.strip()


RUNS: dict[str, tuple[list[str], int, list[str]]] = {
    "no file": (["--audio", "c.wav"], 1, ["sound 1, c.wav: cannot be read"]),
    "a text": (["--audio", "words.wav"], 1, ["words.wav: not a sound that soundfile reads"]),
    "an empty file": (["--audio", "empty.wav"], 1, ["empty.wav: the file is empty"]),
    "a sound without samples": (["--audio", "none.wav"], 1, ["none.wav is empty"]),
    "a prompt": (["--prompt", "Say it"], 1, ["reads sounds, not prompts", "--audio"]),
    "a prompt beside it": (
        ["--audio", "a.wav", "--prompt", "Say it"],
        2,
        ["--prompt and --audio exclude each other: run needs one kind of input. Give --audio."],
    ),
    "an image": (["--image", "a.wav"], 2, ["--image: ", "writes text. Give --audio."]),
    "a text of its own": (["--text", "a"], 2, ["--text: ", "writes text. Give --audio."]),
    "a language that it does not know": (
        ["--audio", "a.wav", "--language", "fr"],
        2,
        ["'fr' is no language of the model", "Use de, en"],
    ),
    "a language without a sound": (
        ["--prompt", "a", "--language", "de"],
        2,
        ["--language is for --audio"],
    ),
    "times without a sound": (
        ["--prompt", "a", "--timestamps"],
        2,
        ["--timestamps is for --audio"],
    ),
    "a stream of two": (
        ["--audio", "a.wav", "--audio", "b.wav", "--stream"],
        2,
        ["--stream is for one text", "Give one --audio"],
    ),
    "a stop string for windows": (
        ["--audio", "long.wav", "--stop", "x"],
        2,
        ["stop has no effect on sounds that are read window by window"],
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_what_does_not_fit_is_refused(
    run_here: Run, folder: Path, speech_bundle: Bundle, case: str
) -> None:
    pytest.importorskip("soundfile")
    options, code, parts = RUNS[case]
    refused(run_here("run", speech_bundle.path, *options, *WRITES), code, *parts)


def test_a_model_of_texts_takes_no_sounds(
    run_here: Run, folder: Path, decoder_bundle: Callable[[str], Bundle]
) -> None:
    bundle = decoder_bundle("llama")
    ran = run_here("run", bundle.path, "--audio", "a.wav", *WRITES)
    refused(ran, 2, f"--audio: {bundle.path} takes no sounds. Give --prompt.")
    ran = run_here("run", bundle.path, "--audio", "a.wav", "--prompt", "a", *WRITES)
    refused(ran, 2, "run needs one kind of input. Give --prompt.")
    with load(bundle, threads=1) as model:
        with pytest.raises(InputError, match="the model takes no sounds"):
            model.generate(audio="a.wav")
        with pytest.raises(UsageError, match="the model writes no times"):
            model.generate("a", timestamps=True)
        with pytest.raises(UsageError, match="no choice of 'language' .it has none"):
            model.generate("a", choices={"language": "en"})


SOUND = make_sound(0.8)
ARRAYS: dict[str, tuple[Any, str]] = {
    "without a rate": (SOUND, "sound 1 is an array without its rate.*audio=.samples, 16000"),
    "of a rate that is none": ((SOUND, 0), "the rate is 0"),
    "of a rate that is no number": ((SOUND, "16k"), "the rate is '16k'"),
    "empty": ((np.zeros(0, np.float32), RATE), "sound 1 is empty"),
    "not numbers": ((np.full(10, np.nan, np.float32), RATE), "not numbers .NaN or infinity"),
    "whole numbers as floats": ((SOUND * 32768, RATE), "floats are from -1 to 1.*int16"),
    "of another type": ((np.zeros(10, np.int64), RATE), r"an array int64\[10\]"),
    "of three axes": ((np.zeros((1, 1, 1)), RATE), r"an array float64\[1, 1, 1\]"),
    "channels first": ((np.zeros((2, 16000), np.float32), RATE), "of 16000 channels.*transposed"),
    "ragged": (([[0.1], [0.2, 0.3]], RATE), "an array object"),
    "a number": (3, "sound 1 is a int"),
    "no sound": ([], "there is no sound"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_is_no_sound_is_refused(model: Model, case: str) -> None:
    audio, said = ARRAYS[case]
    with pytest.raises(InputError, match=said):
        model.generate(audio=audio)


def test_what_excludes_a_sound_is_refused(model: Model, folder: Path) -> None:
    audio = (SOUND, RATE)
    with pytest.raises(UsageError, match="audio and prompts exclude each other"):
        model.generate("say it", audio=audio)
    with pytest.raises(UsageError, match="audio and inputs exclude each other"):
        model.generate(audio=audio, inputs={})
    with pytest.raises(UsageError, match="audio and images exclude each other"):
        model.generate(audio=audio, images="a.png")
    with pytest.raises(InputError, match="the model reads sounds, not prompts"):
        model.generate("say it")
    with pytest.raises(DataError, match="sound 2, words.wav: not a sound"):
        model.generate(audio=["a.wav", "words.wav"])
    with pytest.raises(InputError, match="61 new tokens exceed the capacity of 64"):
        model.generate(audio=audio, max_new_tokens=61)


def test_every_form_of_a_sound_gives_the_same(model: Model, folder: Path) -> None:
    whole = np.round(SOUND * 32768).astype(np.int16)
    floats = whole / np.float32(32768)
    forms: list[Any] = [
        (whole, RATE),
        (floats, RATE),
        (floats.astype(np.float64), np.int64(RATE)),
        (np.stack([floats, floats], axis=1), RATE),
        (floats.tolist(), RATE),
        {"array": floats, "sampling_rate": RATE},
        "a.wav",
        Path("a.wav"),
    ]
    write_wav(Path("a.wav"), floats[:, None])
    found = [model.generate(audio=form, max_new_tokens=8).finish().tokens for form in forms]
    assert found == found[:1] * len(forms)
    together = model.generate(audio=forms, max_new_tokens=8).finish()
    assert together.tokens == [found[0][0]] * len(forms)


def test_a_sound_of_another_rate_is_resampled(model: Model) -> None:
    pytest.importorskip("soxr")
    fast = np.repeat(SOUND, 3)
    found = model.generate(audio=(fast, 3 * RATE), max_new_tokens=8).finish()
    assert len(found.tokens[0]) == 8


def test_silence_is_written_with_a_warning(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model.generate(audio=(np.zeros(1000, np.float32), RATE), max_new_tokens=4).finish()
    assert "sound 1 is silent" in caplog.text


def test_as_many_tokens_as_fit_are_written_by_default(model: Model) -> None:
    endless = Sampling(suppressed=(END,))
    made = model.generate(audio=(SOUND, RATE), sampling=endless).finish()
    assert len(made.tokens[0]) == model.capacity - 4  # four start tokens


def test_exits_of_speech_models_are_traced_and_calibrated(
    run_here: Run, folder: Path, speech_bundle: Bundle
) -> None:
    lines = [{"audio": name, "target": "ab", "language": "de"} for name in ("a.wav", "b.wav")] * 20
    Path("said.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = speech_bundle.path
    for chain, policy in (("encoder", "encoder.json"), ("main", "main.json")):
        options = ("--data", "said.jsonl", "--chain", chain, "--threads", "1")
        ran = run_here("trace", path, *options, "-o", f"{chain}.npz")
        assert ran.code == 0, ran.err
        ran = run_here("calibrate", f"{chain}.npz", "--max-risk", "50%", "-o", policy)
        assert ran.code == 0, ran.err
    ran = run_here("run", path, "--audio", "a.wav", "--policy", "encoder.json", *WRITES)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    "line, said",
    [
        (
            {"audio": "long.wav", "target": "a"},
            "line 1: the sound is longer than the model's window",
        ),
        ({"audio": "words.wav", "target": "a"}, "line 1: sound 1, "),
        ({"audio": "a.wav"}, "line 1: there is no 'target', what is said"),
        ({"audio": "a.wav", "target": "a", "language": "fr"}, "'fr' is no language"),
        ({"text": "a", "target": "a"}, 'Write lines like {"audio": "a.wav"'),
    ],
)
def test_lines_that_do_not_fit_are_refused(
    run_here: Run, folder: Path, speech_bundle: Bundle, line: dict[str, str], said: str
) -> None:
    Path("said.jsonl").write_text(json.dumps(line))
    options = ("--data", "said.jsonl", "-o", "t.npz", "--threads", "1")
    ran = run_here("trace", speech_bundle.path, *options)
    refused(ran, 1, said)


@pytest.mark.parametrize("name, option", [("language", "en"), ("task", "transcribe")])
def test_a_line_with_a_choice_that_the_model_does_not_have_is_refused(
    folder: Path, speech_bundle: Bundle, name: str, option: str
) -> None:
    """As ``run`` does: English-only checkpoints have neither."""
    manifest = speech_bundle.manifest
    assert manifest.decoding is not None
    decoding = msgspec.structs.replace(manifest.decoding, choices={})
    english = dataclasses.replace(
        speech_bundle, manifest=msgspec.structs.replace(manifest, decoding=decoding)
    )
    Path("said.jsonl").write_text(json.dumps({"audio": "a.wav", "target": "a", name: option}))
    with pytest.raises(DataError, match=f"line 1: the model has no choice of '{name}'"):
        read_texts("said.jsonl", english, targets=True)


def test_export_says_what_lines_of_data_hold(speech_bundle: Bundle) -> None:
    said = _about_exits(speech_bundle, Path("speech"))
    assert 'edgeexit bench speech --data TEXTS (lines with "audio"), or' in said
    assert 'trace speech --data TEXTS (lines with "audio" and "target") -o' in said


def test_choices_are_listed(run_here: Run, speech_bundle: Bundle) -> None:
    ran = run_here("inspect", speech_bundle.path)
    assert "language: de, en (default: en)" in ran.out
    assert "task: transcribe, translate (default: transcribe)" in ran.out
