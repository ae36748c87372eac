"""Structs of the manifest (`edgeexit.bundle.manifest`) that say how raw data becomes inputs of a
program: images, sounds, texts, prompts with images, and conversations."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}$")]


class ImageText(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a prompt says where an image stands.

    A user writes `placeholder` once per image; it is the text of the group's token. It is replaced
    with `whole`, where ``{image}`` stands for `tokens` placeholders, once for each tile. With
    `in_front`, users write nothing: images stand in front of the encoded prompt, before its special
    tokens. With `tile`, an image of several tiles is instead written as `tile` for each, where
    ``{row}`` and ``{column}`` count from 1, `row_end` behind each row, and `overview`.
    """

    placeholder: Annotated[str, Meta(min_length=1)]
    tokens: Annotated[int, Meta(ge=1)]
    whole: str = "{image}"
    in_front: bool = False
    tile: str | None = None
    row_end: str = ""
    overview: str = ""


class Tiles(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an image is cut into tiles of one size, followed by an overview: the whole image at the
    size of a tile. A single tile has no overview.

    ``aspect-ratio``: the grid of `least` to `most` tiles with the ratio nearest to the image's; of
    equal ones, the larger if the image has more than half of its pixels (InternVL). ``cover``: the
    smallest grid that covers the image (SmolVLM, Idefics3).
    """

    rule: Literal["aspect-ratio", "cover"]
    most: Annotated[int, Meta(ge=1, le=256)]
    least: Annotated[int, Meta(ge=1)] = 1


class ImagePreprocessing(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="image"
):
    """Image to tensor: decode, resize, crop, scale, normalise; channels first.

    With `shortest_edge`, the image is resized so that its shorter side has that many pixels, and
    its centre of `height` x `width` is cropped. Without, it is resized to `height` x `width`. With
    `longest_edge`, it is first resized so that its longer side has that many pixels, and the other
    one an even number. With `tiles`, it becomes several tiles of `height` x `width`. With
    `background`, transparent pixels are first laid on that colour; without, transparency is
    ignored.
    value = (pixel * scale - mean[channel]) / std[channel]
    """

    input: str
    height: Annotated[int, Meta(ge=1)]
    width: Annotated[int, Meta(ge=1)]
    mode: Literal["RGB", "L"] = "RGB"
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    background: Literal["white"] | None = None
    shortest_edge: Annotated[int, Meta(ge=1)] | None = None
    longest_edge: Annotated[int, Meta(ge=1)] | None = None
    tiles: Tiles | None = None
    scale: float = 1 / 255
    mean: list[float] = msgspec.field(default_factory=lambda: [0.0])
    std: list[float] = msgspec.field(default_factory=lambda: [1.0])


class AudioPreprocessing(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="audio"
):
    """Sound to log-mel features ``[batch, mels, samples / hop]`` float32, as Whisper takes them.

    A sound of one channel at `rate` Hz is padded with silence to `samples`. Frames of `fft` samples
    begin every `hop` samples, centred there (the sound is reflected at both ends), times a Hann
    window; the power of their spectrum goes through `mels` triangular filters from 0 to
    `highest_hz` (Slaney's scale and norm). x = log10(power), at least -10 and at least 8 below the
    largest; value = (x + 4) / 4.
    """

    input: str
    rate: Annotated[int, Meta(ge=1000, le=192_000)] = 16_000
    samples: Annotated[int, Meta(ge=1)] = 480_000
    fft: Annotated[int, Meta(ge=16, le=65_536)] = 400
    hop: Annotated[int, Meta(ge=1, le=65_536)] = 160
    mels: Annotated[int, Meta(ge=1, le=1024)] = 80
    highest_hz: Annotated[float, Meta(gt=0)] = 8000.0

    @property
    def frames(self) -> int:
        """Frames of features that the model takes at a time: a window."""
        return self.samples // self.hop

    @property
    def seconds(self) -> float:
        """Seconds of sound that the model takes at a time."""
        return self.samples / self.rate


class TextPreprocessing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="text"):
    """Text (or a pair of texts) to token ids with the bundle's tokenizer, padded to the batch."""

    max_length: Annotated[int, Meta(ge=1)]
    ids: str
    mask: str | None = None
    types: str | None = None
    pad_id: int = 0
    pad_token: str = "[PAD]"


Preprocessing = ImagePreprocessing | AudioPreprocessing | TextPreprocessing


class Chat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a conversation becomes a prompt: the checkpoint's own chat templates (Jinja).

    `templates` maps a name to a file in UTF-8. ``default`` is used if no template is named,
    ``tool_use`` (if present) if tools are given. `tokens` maps variables of the templates to
    special tokens: ``bos_token`` -> text. A reader may ignore chat templates: it then continues
    texts, but cannot hold conversations.
    """

    templates: Annotated[dict[Name, str], Meta(min_length=1)]
    tokens: dict[Name, str] = {}
