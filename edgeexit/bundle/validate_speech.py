"""Checks how sounds become inputs, and the tokens that a text begins with by choice."""

from __future__ import annotations

from edgeexit.bundle.layout import EXPORT_AGAIN, MANIFEST, RECOPY
from edgeexit.bundle.manifest import AudioPreprocessing, Decoding, Manifest
from edgeexit.errors import BundleError

LONGEST_WINDOW = 1 << 26
"""Samples of a window."""


def check_audio(manifest: Manifest) -> None:
    """Refuses preprocessing that no feature extractor has, or that does not fit its input.

    Raises:
        BundleError: With the field and its value.
    """
    preprocessing = manifest.audio_preprocessing
    if preprocessing is None:
        return
    where = f"{MANIFEST}: audio preprocessing"
    if (fault := _fault(preprocessing)) is not None:
        raise BundleError(f"{where}: {fault}", fix=RECOPY)
    [tensor] = [tensor for tensor in manifest.inputs if tensor.name == preprocessing.input]
    made = ["batch", preprocessing.mels, preprocessing.frames]
    if tensor.axes != made or tensor.dtype != "float32":
        raise BundleError(
            f"{where} makes float32{made}, but the input {tensor.name} is "
            f"{tensor.dtype}{tensor.axes}",
            fix=RECOPY,
        )


def _fault(preprocessing: AudioPreprocessing) -> str | None:
    p = preprocessing
    if p.samples > LONGEST_WINDOW or p.samples < p.fft:
        return f"samples {p.samples} is out of range ({p.fft} to {LONGEST_WINDOW})"
    if p.hop > p.fft:
        return f"hop {p.hop} is more than fft {p.fft}"
    if p.highest_hz > p.rate / 2:
        return f"highest_hz {p.highest_hz:g} is more than half of rate {p.rate}"
    return None


def check_choices(decoding: Decoding) -> None:
    """Refuses choices of start tokens that do not fit together.

    Raises:
        BundleError: With the choice and its value.
    """
    chosen = bool(decoding.choices) or decoding.timestamps is not None
    if chosen and not decoding.start_tokens:
        raise BundleError(
            f"{MANIFEST}: tokens behind the start token are chosen, but there is no start token",
            fix=EXPORT_AGAIN,
        )
    for name, choice in decoding.choices.items():
        where = f"{MANIFEST}: the choice {name}"
        named = [("default", choice.default)] if choice.default is not None else []
        named += [(f"alias {alias}", option) for alias, option in choice.aliases.items()]
        for what, option in named:
            if option not in choice.options:
                raise BundleError(
                    f"{where}: {what} is {option!r}, not one of its options", fix=RECOPY
                )


def special_tokens(decoding: Decoding) -> list[tuple[str, int]]:
    """Tokens of choices and times, each with its role, for the check of the vocabulary."""
    found = [
        (f"token of the {name} {option}", token)
        for name, choice in decoding.choices.items()
        for option, tokens in choice.options.items()
        for token in tokens
    ]
    if (times := decoding.timestamps) is not None:
        found += [("first time", times.first), ("token without times", times.without)]
        found.append(("end of ordinary tokens", times.end))
    return found


__all__ = ["check_audio", "check_choices", "special_tokens"]
