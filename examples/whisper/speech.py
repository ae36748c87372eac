"""Speech to train and measure a model with: sentences of an old book, spoken by synthetic voices,
with noise of several strengths; and a few recordings of a real reader.

Needs Debian's packages espeak-ng, flite, bible-kjv-text and pocketsphinx-testdata, and numpy, soxr
and soundfile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

RATE, LONGEST_S = 16000, 28.0
VOICES = [
    *(
        ("espeak-ng", f"{accent}+{voice}")
        for accent in ("en-us", "en-gb")
        for voice in ("m3", "f2")
    ),
    *(("flite", voice) for voice in ("slt", "rms", "awb", "kal16")),
]
"""Programs and their voices."""
NOISE_DB = (None, 20, 10, 5)
"""Signal over noise, in decibels; None: no noise."""
READER = Path("/usr/share/pocketsphinx/test/data/librivox")
"""Five recordings of a LibriVox reader, of Debian's package pocketsphinx-testdata (BSD-2)."""


@dataclass(frozen=True)
class Speech:
    """A sound with what was said.

    Attributes:
        samples: ``[samples]`` at `RATE`, float32 from -1 to 1.
        text: What was said.
        kind: ``reader``, or the program that spoke and the noise.
    """

    samples: NDArray[np.float32]
    text: str
    kind: str


def sentences() -> list[str]:
    """Verses of the King James Bible, without marks that nobody speaks."""
    made = subprocess.run(
        ["bible"], input="gen1:1-rev22:21\n", capture_output=True, text=True, check=True
    )
    found = []
    for line in made.stdout.splitlines():
        text = re.sub(r"^\S*\d+:\d+\s*", "", line).strip()
        text = re.sub(r"[^A-Za-z' ,.;:?!-]", "", text)
        if 40 <= len(text) <= 220:
            found.append(text)
    return found


def spoken(count: int, seed: int) -> Iterator[Speech]:
    """Sentences, one or two a sound, by all voices in turn, with noise of all strengths in turn."""
    rng = np.random.default_rng(seed)
    known = sentences()
    for number in range(count):
        program, voice = VOICES[number % len(VOICES)]
        chosen = rng.choice(len(known), int(rng.integers(1, 3)), replace=False)
        text = " ".join(known[n] for n in chosen)
        samples = _speak(program, voice, text)
        if len(samples) > LONGEST_S * RATE:
            text = known[chosen[0]]
            samples = _speak(program, voice, text)[: int(LONGEST_S * RATE)]
        noise_db = NOISE_DB[int(rng.integers(len(NOISE_DB)))]
        if noise_db is not None:
            strength = np.sqrt(np.mean(samples**2)) * 10 ** (-noise_db / 20)
            samples = samples + rng.normal(0, strength, len(samples)).astype(np.float32)
        noise = "clean" if noise_db is None else f"{noise_db} dB"
        yield Speech(np.clip(samples, -1, 1), text, f"{program}, {noise}")


def read_aloud() -> list[Speech]:
    """The recordings of a real reader."""
    texts = {}
    for line in (READER / "transcription").read_text().splitlines():
        if found := re.match(r"(.*)\((.*)\)", line):
            words = re.sub(r"</?s>|\(\d+\)", "", found[1])
            texts[found[2].strip()] = re.sub(r"\s+", " ", words).strip()
    made = []
    for path in sorted(READER.glob("*.wav")):
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        made.append(Speech(samples, texts[path.stem], "reader"))
    return made


def words(text: str) -> list[str]:
    """Words of a text as word error rates compare them: lower case, without punctuation."""
    return re.sub(r"[^a-z' ]", " ", text.lower().replace("-", " ")).split()


def word_errors(said: str, written: str) -> tuple[int, int]:
    """Words that must be changed, added or left out, and words that were said."""
    one, other = words(said), words(written)
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, written_word in enumerate(other, start=1):
            change = before + (word != written_word)
            before = row[place]
            row[place] = min(change, row[place] + 1, row[place - 1] + 1)
    return row[-1], len(one)


def _speak(program: str, voice: str, text: str) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/said.wav"
        option = ["-w", path] if program == "espeak-ng" else ["-o", path]
        kind = "-v" if program == "espeak-ng" else "-voice"
        given = [text] if program == "espeak-ng" else ["-t", text]
        subprocess.run([program, kind, voice, *option, *given], check=True, capture_output=True)
        samples, rate = soundfile.read(path, dtype="float32")
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, RATE).astype(np.float32)
    return resampled
