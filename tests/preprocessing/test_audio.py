"""Sounds: features held against transformers, files held against what was written."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from edgeexit.bundle.manifest import AudioPreprocessing
from edgeexit.errors import DataError, EngineError
from edgeexit.preprocessing.audio import Sound, log_mel, mel_filters, one_channel, open_sound
from tests.speech_models import MELS, RATE, make_extractor, make_sound, write_wav

WHISPER = AudioPreprocessing(input="x")
SECONDS = np.arange(RATE * 4) / RATE
RANDOM = np.random.default_rng(0)
SOUNDS: dict[str, np.ndarray] = {
    "tones": make_sound(4),
    "noise": RANDOM.standard_normal(RATE * 3) * 0.1,
    "silence": np.zeros(RATE),
    "click": np.eye(1, 5000, 2500)[0],
    "one sample": np.ones(1),
    "tone": np.sin(2 * np.pi * 440 * SECONDS) / 2,
    "sweep": np.sin(2 * np.pi * (50 + 500 * SECONDS) * SECONDS),
    "a window": RANDOM.standard_normal(RATE * 30) * 0.1,
    "nearly a window": RANDOM.standard_normal(RATE * 30 - 150) * 0.1,
}


@pytest.fixture(scope="module")
def extractor() -> transformers.WhisperFeatureExtractor:
    return transformers.WhisperFeatureExtractor()


@pytest.mark.parametrize("name", SOUNDS)
def test_features_are_those_of_transformers(
    name: str, extractor: transformers.WhisperFeatureExtractor
) -> None:
    """transformers computes with torch in float32, whose error shows where pure tones are next to
    silence, and without torch in float64."""
    sound = SOUNDS[name].astype(np.float32)
    found = log_mel(WHISPER, sound)
    padded = np.pad(sound, (0, RATE * 30 - len(sound)))
    [exact] = extractor._np_extract_fbank_features([padded], "cpu")
    np.testing.assert_allclose(found, exact, atol=1e-6)
    torchs = extractor(sound, sampling_rate=RATE, return_tensors="np").input_features[0]
    pure = name in ("tone", "sweep")
    np.testing.assert_allclose(found, torchs, atol=1e-4 if pure else 1e-5)


def test_features_of_a_long_sound_are_those_of_transformers(
    extractor: transformers.WhisperFeatureExtractor,
) -> None:
    sound = make_sound(61.3, seed=3)
    found = log_mel(WHISPER, sound, whole=True)
    expected = extractor(
        sound, sampling_rate=RATE, return_tensors="np", truncation=False, padding="longest"
    ).input_features[0]
    [exact] = extractor._np_extract_fbank_features([sound], "cpu")
    np.testing.assert_allclose(found, exact, atol=1e-6)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"feature_size": 24, "n_fft": 512, "hop_length": 200}, {"sampling_rate": 22050}]
)
def test_features_have_every_size_that_an_extractor_can_have(options: dict[str, int]) -> None:
    own = make_extractor(**options)
    made = AudioPreprocessing(
        input="x",
        rate=own.sampling_rate,
        samples=own.n_samples,
        fft=own.n_fft,
        hop=own.hop_length,
        mels=own.feature_size,
    )
    sound = make_sound(0.7, rate=own.sampling_rate)
    expected = own(sound, sampling_rate=own.sampling_rate, return_tensors="np").input_features[0]
    np.testing.assert_allclose(log_mel(made, sound), expected, atol=1e-5)


def test_filters_are_those_of_transformers() -> None:
    own = make_extractor()
    np.testing.assert_allclose(mel_filters(MELS, 400, RATE, 8000.0), own.mel_filters.T, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_are_read_without_libraries(
    tmp_path: Path, width: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_libraries(monkeypatch)
    samples = np.stack([make_sound(0.1, seed) for seed in range(channels)], axis=1)
    sound = open_sound(write_wav(tmp_path / "a.wav", samples, width=width), "a.wav")
    assert sound.rate == RATE
    np.testing.assert_allclose(sound.samples, samples, atol=2.0 ** (1 - 8 * width))
    np.testing.assert_allclose(one_channel(sound, RATE), sound.samples.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_are_read_as_soundfile_reads_them(tmp_path: Path, width: int) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = write_wav(tmp_path / "a.wav", make_sound(0.1)[:, None], width=width)
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    np.testing.assert_array_equal(open_sound(path, "a.wav").samples, expected)


@pytest.mark.parametrize("ending, kind", [("flac", "PCM_16"), ("ogg", "VORBIS"), ("wav", "FLOAT")])
def test_other_files_are_read_with_soundfile(tmp_path: Path, ending: str, kind: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    path, samples = tmp_path / f"a.{ending}", make_sound(0.5)
    soundfile.write(path, samples, RATE, subtype=kind)
    sound = open_sound(path, path.name)
    assert sound.rate == RATE and sound.samples.shape == (len(samples), 1)
    assert np.corrcoef(sound.samples[:, 0], samples)[0, 1] > 0.95


def test_a_sound_gets_the_models_rate() -> None:
    pytest.importorskip("soxr")
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    found = one_channel(Sound(tone[:, None], 44100), RATE)
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert len(found) == RATE
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=2e-3)


def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra were not installed."""
    real: Callable[..., Any] = builtins.__import__

    def importing(name: str, *more: Any, **options: Any) -> Any:
        if name in ("soundfile", "soxr"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_a_missing_library_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_libraries(monkeypatch)
    (tmp_path / "a.flac").write_bytes(b"fLaC and more")
    with pytest.raises(EngineError, match=r"a.flac.*needs soundfile.*edgeexit\[audio\]"):
        open_sound(tmp_path / "a.flac", "a.flac")
    with pytest.raises(EngineError, match=r"44100 Hz.*16000 Hz, needs soxr.*edgeexit\[audio\]"):
        one_channel(Sound(np.zeros((10, 1), np.float32), 44100), RATE)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"this is a text", "not a sound that soundfile reads"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not a sound that soundfile reads"),
    ],
)
def test_a_file_that_is_no_sound_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    pytest.importorskip("soundfile")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=f"a.wav: {reason}"):
        open_sound(tmp_path / "a.wav", "a.wav")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read .No such file"):
        open_sound(tmp_path / "none.wav", "none.wav")
    with pytest.raises(DataError, match="not a regular file"):
        open_sound(tmp_path, "folder")


def test_a_file_that_is_cut_off_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_wav(tmp_path / "a.wav", make_sound(0.5)[:, None])
    whole = open_sound(path, "a.wav")
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        path.write_bytes(path.read_bytes()[:5001])
        cut = open_sound(path, "a.wav")
    assert f"it has {len(cut.samples)} of {len(whole.samples)} samples" in caplog.text


@pytest.mark.parametrize("rate", [1, 4_000_000])
def test_rates_that_no_sound_has_are_refused(tmp_path: Path, rate: int) -> None:
    path = write_wav(tmp_path / "a.wav", make_sound(0.5)[:, None], rate=rate)
    with pytest.raises(DataError, match=f"a rate of {rate} Hz"):
        open_sound(path, "a.wav")
