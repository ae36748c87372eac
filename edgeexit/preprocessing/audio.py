"""Sound to log-mel features with numpy, as Whisper takes them (`AudioPreprocessing`), and sounds
from files.

WAV files with whole numbers need only the standard library. Other files need soundfile, other rates
than the model's soxr; both are imported when they are needed.
"""

from __future__ import annotations

import functools
import io
import logging
import stat
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.manifest import AudioPreprocessing
from edgeexit.errors import DataError, EngineError, first_line

logger = logging.getLogger(__name__)

RATES = (1_000, 384_000)
"""Lowest and highest rate of a file, in Hz."""
UNKNOWN = 1 << 29
"""Samples from which on a header says that its writer, a pipe, did not know their number."""
FILE_LIMIT_BYTES = 4 << 30
FRAMES_AT_ONCE = 4096
LOWEST, RANGE = 1e-10, 8.0
"""Of powers, and of their logarithms below the largest."""
_FIX = "Give a readable sound file: WAV, or with soundfile FLAC, OGG or MP3."

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sound:
    """A sound as it was recorded.

    Attributes:
        samples: ``[samples, channels]`` float32, from -1 to 1.
        rate: Samples per second.
    """

    samples: Floats
    rate: int


def log_mel(preprocessing: AudioPreprocessing, sound: Floats, *, whole: bool = False) -> Floats:
    """Features ``[mels, frames]`` of a sound of one channel at the rate of `preprocessing`.

    Args:
        sound: ``[samples]``, at most as many as a window has.
        whole: Features of the sound alone, of any length, without the silence behind it.
    """
    p = preprocessing
    frames = len(sound) // p.hop if whole else p.frames
    behind = 0 if whole else max(p.samples - len(sound), 0)
    half = p.fft // 2
    # Frames beyond the sound are silent. What the padding reflects stands at its very end.
    heard = frames if behind <= p.fft else min(frames, (len(sound) + half) // p.hop + 1)
    near = min(behind, p.fft)
    padded = np.pad(np.pad(sound.astype(np.float64), (0, near)), half, mode="reflect")
    padded = np.pad(padded, (0, max(heard * p.hop + p.fft - len(padded), 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, p.fft)[:: p.hop][:heard]
    filters = mel_filters(p.mels, p.fft, p.rate, p.highest_hz)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(p.fft) / p.fft)
    log = np.full((p.mels, frames), np.log10(LOWEST))
    for start in range(0, heard, FRAMES_AT_ONCE):
        spectrum = np.fft.rfft(views[start : start + FRAMES_AT_ONCE] * window)
        power = filters @ (spectrum.real**2 + spectrum.imag**2).T
        log[:, start : start + power.shape[1]] = np.log10(np.maximum(power, LOWEST))
    log = np.maximum(log, log.max(initial=np.log10(LOWEST)) - RANGE)
    return ((log + 4.0) / 4.0).astype(np.float32)


@functools.lru_cache(maxsize=4)
def mel_filters(mels: int, fft: int, rate: int, highest_hz: float) -> NDArray[np.float64]:
    """Triangular filters ``[mels, fft // 2 + 1]`` between 0 Hz and `highest_hz`, evenly spaced on
    Slaney's mel scale, each with an area of one."""
    edges = _hertz(np.linspace(0.0, _mel(np.array(highest_hz)), mels + 2))
    bins = np.linspace(0, rate // 2, fft // 2 + 1)
    widths = np.diff(edges)
    slopes = edges[:, None] - bins
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(filters * (2.0 / (edges[2:] - edges[:-2]))[:, None])


def _mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney's scale: linear up to 1000 Hz, then logarithmic."""
    above = 15.0 + np.log(np.maximum(hertz, 1000.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(hertz >= 1000.0, above, 3.0 * hertz / 200.0)


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 1000.0 * np.exp((np.log(6.4) / 27.0) * (mel - 15.0))
    return np.where(mel >= 15.0, above, 200.0 * mel / 3.0)


def one_channel(sound: Sound, rate: int) -> Floats:
    """The mean of a sound's channels ``[samples]``, at another rate.

    Raises:
        EngineError: The rate differs, and soxr is not installed.
    """
    mono = sound.samples.mean(axis=1, dtype=np.float32)
    if sound.rate == rate:
        return mono
    soxr = _import("soxr", f"a sound of {sound.rate} Hz, where the model takes {rate} Hz,")
    return np.asarray(soxr.resample(mono, sound.rate, rate), np.float32)


def open_sound(path: Path, where: str) -> Sound:
    """Reads a sound file.

    Args:
        path: The file.
        where: Its name in messages.

    Raises:
        DataError: The file cannot be read, or is not a sound.
        EngineError: It is not a WAV file of whole numbers, and soundfile is not installed.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{where}: not a regular file", fix=_FIX)
        if status.st_size > FILE_LIMIT_BYTES:
            raise DataError(
                f"{where}: {status.st_size} bytes, more than the {FILE_LIMIT_BYTES} allowed",
                fix="Cut it into several files.",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})", fix=_FIX) from error
    except ValueError as error:  # NUL or lone surrogates, invalid in file names
        raise DataError(f"{where}: {str(path)!a} is not a file name", fix=_FIX) from error
    if not raw:
        raise DataError(f"{where}: the file is empty", fix=_FIX)
    sound = _plain_wav(raw, where) or _with_soundfile(raw, where)
    low, high = RATES
    if not low <= sound.rate <= high:
        raise DataError(
            f"{where}: a rate of {sound.rate} Hz, which no sound of speech has",
            fix=f"Give a sound of {low} to {high} Hz.",
        )
    return sound


def _plain_wav(raw: bytes, where: str) -> Sound | None:
    """The sound of a WAV file of whole numbers; None: it is something else."""
    try:
        with wave.open(io.BytesIO(raw)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            count = file.getnframes()
            data = file.readframes(count)
    except (wave.Error, EOFError):
        return None
    if width not in (1, 2, 3, 4) or channels < 1 or rate < 1:
        return None
    frames = len(data) // (width * channels)
    if frames < count < UNKNOWN:
        logger.warning("%s: the file is cut off: it has %d of %d samples", where, frames, count)
    values = np.frombuffer(data[: len(data) // (width * channels) * width * channels], np.uint8)
    if width == 1:
        samples = (values.astype(np.float32) - 128.0) / 128.0
    else:  # shifted up to 32 bits
        wide = np.zeros((values.size // width, 4), np.uint8)
        wide[:, 4 - width :] = values.reshape(-1, width)
        samples = wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    return Sound(samples.reshape(-1, channels), rate)


def _with_soundfile(raw: bytes, where: str) -> Sound:
    soundfile = _import("soundfile", f"{where}: no plain WAV file, which")
    try:
        samples, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except Exception as error:  # its own types, and those of io
        reason = first_line(error).split("<_io")[0].strip()
        raise DataError(
            f"{where}: not a sound that soundfile reads ({reason})", fix=_FIX
        ) from error
    return Sound(samples, int(rate))


def _import(name: str, what: str) -> Any:
    """Imports a library of the extra `audio`. `what` needs it."""
    try:
        return __import__(name)
    except (ImportError, OSError) as error:  # soundfile: OSError where libsndfile is missing
        raise EngineError(
            f"{what} needs {name}, which cannot be imported ({first_line(error)})",
            fix='Install it: pip install "edgeexit[audio]"; or convert the sound to WAV at the '
            "model's rate.",
        ) from error


__all__ = ["Sound", "log_mel", "mel_filters", "one_channel", "open_sound"]
