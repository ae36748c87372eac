"""The input options of ``edgeexit run`` that a bundle takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeexit.bundle.reader import Bundle

OF_ROWS, OF_TEXT = ("data", "image", "text"), ("prompt", "messages", "audio")
"""Input options of models that answer rows, and of models that write text."""


def taken(bundle: Bundle) -> list[str]:
    """The input options that the bundle takes; none for a speech model without preprocessing."""
    manifest = bundle.manifest
    if manifest.decoding is not None and reads_sound(bundle):
        return [] if manifest.audio_preprocessing is None else ["audio"]
    if manifest.decoding is not None:
        return ["prompt", *([] if manifest.chat is None else ["messages"])]
    images, texts = manifest.image_preprocessing, manifest.text_preprocessing
    return [
        "data",
        *([] if images is None else ["image"]),
        *([] if texts is None else ["text"]),
    ]


def advice(bundle: Bundle) -> str:
    """What to give instead of an input that the bundle does not take."""
    if kinds := taken(bundle):
        return f"Give {' or '.join(f'--{kind}' for kind in kinds)}."
    return "Export a checkpoint that has a preprocessor_config.json."


def reads_sound(bundle: Bundle) -> bool:
    """Whether the bundle is a speech model."""
    return bundle.manifest.task == "automatic-speech-recognition"


__all__ = ["OF_ROWS", "OF_TEXT", "advice", "reads_sound", "taken"]
