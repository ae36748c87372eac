"""Sounds as inputs of `Model.generate`: reads them, and cuts them into windows.

A sound that is longer than a window, or whose text has times, is read window by window: the next
window begins where the last complete segment of the text ends (transformers' sequential long-form
generation, without its fallback to other temperatures).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import AudioPreprocessing, Timestamps
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.preprocessing.audio import Floats, Sound, log_mel, one_channel, open_sound

logger = logging.getLogger(__name__)

Audio = Any
"""A path, ``(samples, rate)`` or ``{"array": samples, "sampling_rate": rate}``; samples are
``[samples]`` or ``[samples, channels]``, floats from -1 to 1 or int16."""
MOST_CHANNELS = 64
LOUDEST = 16.0


def audio_input(bundle: Bundle) -> AudioPreprocessing:
    """How sounds become an input. Raises `InputError` if the model takes none."""
    preprocessing = bundle.manifest.audio_preprocessing
    if preprocessing is not None:
        return preprocessing
    reads = bundle.manifest.task == "automatic-speech-recognition"
    raise InputError(
        f"{bundle.path}: the model takes {'sounds only as features' if reads else 'no sounds'}",
        fix="Give inputs=... (edgeexit inspect), or export a checkpoint with a "
        "preprocessor_config.json."
        if reads
        else "Leave audio out.",
    )


def read_sounds(bundle: Bundle, audio: Audio | Sequence[Audio]) -> list[Floats]:
    """Sounds ``[samples]`` of one channel at the model's rate.

    Args:
        audio: A sound, or a list of several.

    Raises:
        InputError: The model takes no sounds, or a sound is empty or not made of numbers.
        DataError: A file cannot be read.
        EngineError: A library for the file or its rate is missing.
    """
    preprocessing = audio_input(bundle)
    several = list(audio) if isinstance(audio, list) else [audio]
    if not several:
        raise InputError("there is no sound", fix="Give at least one: audio=[...] (--audio).")
    found = []
    for number, one in enumerate(several, start=1):
        where = f"sound {number}"
        if isinstance(one, (str, os.PathLike)):
            where = f"{where}, {os.fsdecode(one)}"
        sound = _checked(_read(one, where), where)
        found.append(one_channel(sound, preprocessing.rate))
        if not found[-1].any():
            logger.warning("%s is silent, so its text means nothing", where)
    return found


def _read(sound: Audio, where: str) -> Sound:
    if isinstance(sound, (str, os.PathLike)):
        return open_sound(Path(os.fsdecode(sound)), where)
    if isinstance(sound, Mapping) and {"array", "sampling_rate"} <= sound.keys():
        sound = sound["array"], sound["sampling_rate"]
    if not isinstance(sound, tuple) or len(sound) != 2:
        bare = isinstance(sound, np.ndarray)
        what = "an array without its rate" if bare else f"a {type(sound).__name__}"
        raise InputError(
            f"{where} is {what}",
            fix="Give a path, or samples with their rate: audio=(samples, 16000).",
        )
    samples, rate = sound
    whole = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not whole or not 1 <= rate <= 10_000_000:
        raise InputError(
            f"{where}: the rate is {rate!r}", fix="Give samples per second, as in (samples, 16000)."
        )
    try:
        array = np.asarray(samples)
    except ValueError:  # lists of different lengths
        array = np.asarray(samples, dtype=object)
    if array.ndim not in (1, 2) or (array.dtype != np.int16 and array.dtype.kind != "f"):
        raise InputError(
            f"{where} is an array {array.dtype}{list(array.shape)}",
            fix="Give floats from -1 to 1, or int16: [samples] or [samples, channels].",
        )
    channels = array if array.ndim == 2 else array[:, None]
    if array.dtype == np.int16:
        return Sound(channels.astype(np.float32) / np.float32(32768), int(rate))
    return Sound(channels.astype(np.float32), int(rate))


def _checked(sound: Sound, where: str) -> Sound:
    """Refuses what is no sound."""
    samples, channels = sound.samples.shape
    if not sound.samples.size:
        raise InputError(f"{where} is empty", fix="Give a sound with at least one sample.")
    if channels > MOST_CHANNELS:
        raise InputError(
            f"{where} is an array {[samples, channels]}, of {channels} channels",
            fix="Give [samples] or [samples, channels]; an array [channels, samples] transposed.",
        )
    if not np.isfinite(sound.samples).all():
        raise InputError(
            f"{where} has samples that are not numbers (NaN or infinity)",
            fix="Correct the recording.",
        )
    if (peak := float(np.abs(sound.samples).max())) > LOUDEST:
        raise InputError(
            f"{where} has samples of up to {peak:g}, but floats are from -1 to 1",
            fix="Divide samples of 16 bits by 32768, or give them as int16.",
        )
    return sound


def is_long(preprocessing: AudioPreprocessing, sounds: Sequence[Floats]) -> bool:
    """Whether a sound is longer than a window."""
    return any(len(sound) > preprocessing.samples for sound in sounds)


def features_of(
    preprocessing: AudioPreprocessing, sounds: Sequence[Floats]
) -> dict[str, NDArray[np.float32]]:
    """The input for sounds that fit a window: ``[batch, mels, frames]``."""
    return {preprocessing.input: np.stack([log_mel(preprocessing, sound) for sound in sounds])}


def check_windows(
    preprocessing: AudioPreprocessing,
    sounds: Sequence[Floats],
    stops: Sequence[str],
    times: Timestamps | None,
) -> None:
    """Refuses sounds that cannot be read window by window.

    Raises:
        InputError: A sound is longer than a window, and the model writes no times.
        UsageError: Stop strings are given.
    """
    if times is None:
        longest = max(map(len, sounds)) / preprocessing.rate
        raise InputError(
            f"a sound of {longest:.1f} s is longer than the model's window of "
            f"{preprocessing.seconds:g} s, and the model writes no times, without which longer "
            "sounds cannot be read",
            fix="Cut it into parts.",
        )
    if stops:
        raise UsageError(
            "stop has no effect on sounds that are read window by window", fix="Leave it out."
        )


class Windows:
    """Sounds that are read window by window.

    Args:
        preprocessing: How a window becomes an input.
        times: The tokens that say times.
        sounds: ``[samples]`` each.

    Attributes:
        starts: Per sound, the frame at which its window begins.
    """

    def __init__(
        self, preprocessing: AudioPreprocessing, times: Timestamps, sounds: Sequence[Floats]
    ) -> None:
        self._preprocessing, self._times = preprocessing, times
        self._features = [
            log_mel(preprocessing, sound, whole=len(sound) > preprocessing.samples)
            for sound in sounds
        ]
        self._per_step = round(times.step_s * preprocessing.rate / preprocessing.hop)
        self.starts = [0] * len(sounds)

    @property
    def rows(self) -> list[int]:
        """The sounds that have not been read to their end."""
        ends = [features.shape[1] for features in self._features]
        return [n for n, (at, end) in enumerate(zip(self.starts, ends, strict=True)) if at < end]

    def offset_s(self, row: int) -> float:
        """Where a sound's window begins."""
        return self.starts[row] * self._preprocessing.hop / self._preprocessing.rate

    def inputs(self, rows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """The input for the windows of these sounds; behind a sound's end, features are 0."""
        p = self._preprocessing
        made = np.zeros((len(rows), p.mels, p.frames), np.float32)
        for number, row in enumerate(rows):
            part = self._features[row][:, self.starts[row] : self.starts[row] + p.frames]
            made[number, :, : part.shape[1]] = part
        return {p.input: made}

    def complete(self, tokens: Sequence[int]) -> int:
        """How many tokens of a window's text are final before the window has ended: those up to the
        first of the last two times in a row."""
        first = self._times.first
        places = range(len(tokens) - 1, 0, -1)
        return next((n for n in places if min(tokens[n - 1 : n + 1]) >= first), 0)

    def close(self, row: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """Ends a sound's window with its text, and moves on.

        Returns:
            How many of the tokens are kept, and whether the window's end cut a segment, which is
            then read again in the next window.
        """
        first, complete = self._times.first, self.complete(tokens)
        ends_alone = len(tokens) > 1 and tokens[-1] >= first > tokens[-2]
        cut = complete > 0 and not ends_alone
        step = (tokens[complete - 1] - first) * self._per_step if cut else 0
        self.starts[row] += step or self._preprocessing.frames
        return complete + 1 if cut else len(tokens), cut


__all__ = [
    "Audio",
    "Windows",
    "audio_input",
    "check_windows",
    "features_of",
    "is_long",
    "read_sounds",
]
