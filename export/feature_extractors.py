"""Converts a checkpoint's feature extractor to the audio preprocessing that the device executes,
with a sample. Its features are compared with those of transformers.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import transformers

from edgeexit.bundle.manifest import AudioPreprocessing
from edgeexit.errors import ExportError
from edgeexit.export.library_errors import translated
from edgeexit.preprocessing.audio import log_mel

FILES = ("preprocessor_config.json", "processor_config.json")
MEND = "Correct or remove the file; without it, the bundle takes features (.npz) only."
TOLERANCE = 1e-3
"""transformers computes in float32: far below a sound's peaks, its features have an error of that
size."""


def audio_preprocessing(
    folder: Path, mels: int, frames: int
) -> tuple[AudioPreprocessing, dict[str, np.ndarray]] | None:
    """From ``preprocessor_config.json`` or ``processor_config.json``; None if the checkpoint has
    neither.

    Args:
        folder: The checkpoint.
        mels, frames: Size of the features that the model takes.

    Returns:
        The schema and a sample ``{"sound", "expected/input_features"}``.

    Raises:
        ExportError: transformers cannot read the file, or the device cannot compute the same.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    with translated(path, "transformers cannot read it as a feature extractor", MEND):
        own = transformers.AutoFeatureExtractor.from_pretrained(folder)
    if type(own).__name__ != "WhisperFeatureExtractor":
        raise ExportError(f"{path}: a {type(own).__name__} is not supported", fix=MEND)
    if own.dither or own.padding_value:
        raise ExportError(
            f"{path}: dither {own.dither} and padding_value {own.padding_value} are not supported",
            fix="Set both to 0.",
        )
    with translated(path, "it has invalid values", MEND):
        schema = msgspec.convert(
            {
                "type": "audio",
                "input": "input_features",
                "rate": own.sampling_rate,
                "samples": own.n_samples,
                "fft": own.n_fft,
                "hop": own.hop_length,
                "mels": own.feature_size,
            },
            AudioPreprocessing,
        )
    if (schema.mels, schema.frames) != (mels, frames):
        raise ExportError(
            f"{path}: it makes features [{schema.mels}, {schema.frames}], the model takes "
            f"[{mels}, {frames}]",
            fix=MEND,
        )
    sound = _sample_sound(schema)
    with translated(path, "transformers cannot make features with it", MEND):
        expected = own(sound, sampling_rate=schema.rate, return_tensors="np")["input_features"][0]
    apart = float(np.abs(log_mel(schema, sound) - expected).max())
    if not apart <= TOLERANCE:
        raise ExportError(
            f"{path}: features on the device differ from those of transformers by {apart:.1e}",
            fix=MEND,
        )
    return schema, {"sound": sound, "expected/input_features": expected.astype(np.float32)}


def _sample_sound(schema: AudioPreprocessing) -> np.ndarray:
    """Half a window: a rising tone with overtones, and noise, which every filter hears."""
    count = schema.samples // 2
    seconds = np.arange(count) / schema.rate
    rising = 2 * np.pi * (100 + 40 * seconds) * seconds
    noise = np.random.default_rng(0).standard_normal(count)
    sound = sum(np.sin(n * rising) / n for n in (1, 2, 5)) * 0.2 + noise * 0.02
    return np.asarray(sound, np.float32)


__all__ = ["audio_preprocessing"]
