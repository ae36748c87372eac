"""Images in prompts and messages: reads and preprocesses them, and writes their placeholders into
the prompts (`edgeexit.bundle.manifest.ImageText`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle.layout import RECOPY
from edgeexit.bundle.manifest import ImagePreprocessing, ImageText
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError, InputError
from edgeexit.preprocessing.images import Cut, cut_image, image_from_array, open_image, upright
from edgeexit.runtime.programs.arguments import Prompt, are_ids, check_prompts, token_rows

Image = Any
"""A path, a ``PIL.Image.Image``, or a uint8 array ``[height, width]`` or ``[height, width, 3]``."""
KEYS = ("image", "path", "url")
"""Keys of the item of a message that hold an image, as in transformers."""
_OTHER_KEYS = ("base64", "image_url", "data", "source", "file_id")
"""Keys that hold images elsewhere. Further keys are left to the template."""
_ADDRESS = re.compile(r"(https?|ftp|s3|gs|file):/|data:", re.IGNORECASE)


def write_images(
    bundle: Bundle,
    prompts: Prompt | Sequence[Prompt],
    images: Image | Sequence[Image] | Sequence[Sequence[Image]],
    encode: Callable[[str], list[int]],
) -> tuple[list[Prompt], dict[str, NDArray[Any]]]:
    """Prompts with the placeholders of their images, and the images as an input.

    Args:
        prompts: A text or a list of token ids; or a batch of either. A text has one placeholder per
            image; token ids have all placeholders already.
        images: An image; or several, in the order of the placeholders in the prompts; or a list of
            images for each prompt. A model that reads images apart takes one for each prompt.
        encode: Converts a text to token ids, special tokens included.

    Raises:
        InputError: The model takes no images, their number is not that of the placeholders, or a
            prompt is invalid.
        DataError: An image cannot be read.
    """
    written, preprocessing = image_input(bundle)
    check_prompts(prompts)
    single = isinstance(prompts, str) or are_ids(prompts)
    many: list[Any] = [prompts] if single else list(prompts)
    own = _per_prompt(images, many, written)
    if written is None and (wrong := [n for n, given in enumerate(own) if len(given) != 1]):
        raise InputError(
            f"prompt {wrong[0] + 1} has {len(own[wrong[0]])} images; the model takes one with each "
            "prompt",
            fix="Give one image for each prompt.",
        )
    token = None if written is None else _placeholder_id(bundle, written, many, encode)
    rows: list[Prompt] = []
    pixels: list[NDArray[np.float32]] = []
    for number, (prompt, given) in enumerate(zip(many, own, strict=True)):
        cuts = [
            _cut(preprocessing, image, f"image {n + 1} of prompt {number + 1}")
            for n, image in enumerate(given)
        ]
        pixels += [cut.pixels for cut in cuts]
        if isinstance(prompt, str):
            where = f"prompt {number + 1}"
            prompt = (
                encode(prompt)
                if written is None or token is None
                else _with_placeholders(prompt, cuts, written, token, encode, where)
            )
        else:
            check_prompts(prompt)
            [prompt] = token_rows([prompt], encode)
            if written is not None:
                _check_ids(bundle, prompt, cuts, written, f"prompt {number + 1}")
        rows.append(prompt)
    inputs = {preprocessing.input: np.concatenate(pixels)} if pixels else {}
    return rows, inputs


def _cut(preprocessing: ImagePreprocessing, image: Image, where: str) -> Cut:
    """Reads and preprocesses an image."""
    read = read_image(image, where)
    try:
        return cut_image(preprocessing, read)
    except InputError as error:
        raise InputError(f"{where}: {error.what}", fix=error.fix) from error


def image_input(bundle: Bundle) -> tuple[ImageText | None, ImagePreprocessing]:
    """How prompts of a bundle write images, and how images are preprocessed.

    Returns:
        None instead of the first if prompts do not mention images: an encoder reads one image
        apart from each prompt.

    Raises:
        InputError: The model takes no images with prompts.
    """
    manifest, preprocessing = bundle.manifest, bundle.manifest.image_preprocessing
    groups = [] if manifest.decoding is None else list(manifest.decoding.groups.values())
    written = [group.image for group in groups if group.image is not None]
    if preprocessing is not None and (written or (manifest.decoding and not groups)):
        return written[0] if written else None, preprocessing
    pixels = {axis for t in manifest.inputs if t.dtype == "float32" for axis in t.axes}
    raise InputError(
        f"{bundle.path}: the model takes {'images only as inputs' if pixels else 'no images'}",
        fix="Give preprocessed inputs=... (edgeexit inspect), or export a checkpoint with a "
        "tokenizer and an image processor."
        if pixels
        else "Leave images out.",
    )


def read_image(image: Image, where: str) -> Any:
    """An image as Pillow has it, turned by its EXIF orientation.

    Args:
        image: A path, an image of Pillow, or a uint8 array.
        where: Its name in messages.

    Raises:
        DataError: The file is not an image that can be read.
        InputError: It is none of these.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fsdecode(image)
        if _ADDRESS.match(name):
            name = re.sub(r"^(\w+):/(?!/)", r"\1://", name)  # as it was before it became a Path
            raise InputError(
                f"{where} is an address ({name[:40]}): images are not downloaded",
                fix="Save it to a file and give its path.",
            )
        return open_image(Path(name), f"{where}, {name}")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
            raise InputError(
                f"{where} is an array {image.dtype}{list(image.shape)}",
                fix="Give uint8 [height, width] or [height, width, 3].",
            )
        if image.ndim == 3 and image.shape[2] != 3:
            raise InputError(
                f"{where} is an array {list(image.shape)}", fix="Give [height, width, 3]."
            )
        return image_from_array(np.ascontiguousarray(image))
    if hasattr(image, "convert") and hasattr(image, "getexif"):
        return upright(image, where)
    if image is None:
        raise InputError(
            f"{where} is missing",
            fix='In messages: {"type": "image", "path": "cat.jpg"}; else images=[...] (--image).',
        )
    raise InputError(
        f"{where} is a {type(image).__name__}", fix="Give a path, a PIL image or a uint8 array."
    )


def take_images(messages: Any) -> tuple[Any, list[Image | None]]:
    """Takes the images out of a conversation.

    Returns:
        The messages, where an item that has an image is ``{"type": "image"}``; and the images in
        order, None for an item without one.

    Raises:
        InputError: An item has several images, or something else than an image.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        return messages, []  # the templates refuse it
    without, images = [], []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            without.append(message)
            continue
        items: list[Any] = []
        for item in content:
            if isinstance(item, Mapping) and item.get("type") == "image":
                where = f"messages[{number}]['content'][{len(items)}]"
                images.append(_image_of(item, where))
                item = {key: value for key, value in item.items() if key not in KEYS}
            items.append(item)
        without.append({**message, "content": items})
    return without, images


def _image_of(item: Mapping[str, Any], where: str) -> Image | None:
    """The image of an item of a message; None: it has none."""
    given = [key for key in KEYS if item.get(key) is not None]
    other = [key for key, value in item.items() if key in _OTHER_KEYS and value is not None]
    if len(given) > 1:
        raise InputError(
            f"{where} has {' and '.join(given)}, but is one image", fix="Give one of them."
        )
    if other:
        raise InputError(
            f"{where} has an image as {other[0]!r}, which is not supported",
            fix='Give {"type": "image", "path": "cat.jpg"}, or "image": an image of Pillow.',
        )
    return item[given[0]] if given else None


def fill_images(
    found: Sequence[Sequence[Image | None]], given: Image | Sequence[Image] | None
) -> list[list[Image]]:
    """Images per conversation: those in the messages, and others in the order of the items without
    one.

    Raises:
        InputError: The number of other images is not that of these items.
    """
    others = [] if given is None else list(given) if _several(given) else [given]
    missing = sum(image is None for row in found for image in row)
    if missing != len(others):
        raise InputError(
            f"the messages have {missing} image items without an image, and {len(others)} images "
            "are given for them",
            fix='Give one per item: {"type": "image", "path": "cat.jpg"}, or images=[...].',
        )
    left = iter(others)
    return [[next(left) if image is None else image for image in row] for row in found]


def _several(images: Any) -> bool:
    return isinstance(images, (list, tuple)) or (
        isinstance(images, np.ndarray) and images.ndim == 4
    )


def _per_prompt(
    images: Any, prompts: Sequence[Any], written: ImageText | None
) -> list[list[Image]]:
    """The images of each prompt."""
    given = list(images) if _several(images) else [images]
    if given and all(_several(own) for own in given):
        if len(given) != len(prompts):
            raise InputError(
                f"there are {len(given)} lists of images for {len(prompts)} prompts",
                fix="Give one list for each prompt; [] for a prompt without images.",
            )
        return [list(own) for own in given]
    if len(prompts) == 1:
        return [given]
    if written is not None and not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(
            "several prompts of token ids share one list of images",
            fix="Give a list of images for each prompt.",
        )
    marker = None if written is None or written.in_front else written.placeholder
    counts = [1 if marker is None else prompt.count(marker) for prompt in prompts]
    if sum(counts) != len(given):
        what = f"{_counted(sum(counts), 'placeholder')} {marker}"
        raise InputError(
            f"there {'is' if len(given) == 1 else 'are'} {_counted(len(given), 'image')} for "
            f"{len(prompts)} prompts with " + ("one image each" if marker is None else what),
            fix="Give a list of images for each prompt."
            if marker is None
            else f"Write {marker} once for each image.",
        )
    left = iter(given)
    return [[next(left) for _ in range(count)] for count in counts]


def _check_ids(
    bundle: Bundle, ids: NDArray[np.int64], cuts: Sequence[Cut], written: ImageText, where: str
) -> None:
    """Raises `InputError` if token ids do not have the placeholders of their images."""
    token = _token_of(bundle, written)
    found = int((ids == token).sum())
    wanted = written.tokens * sum(len(cut.pixels) for cut in cuts)
    if found != wanted:
        raise InputError(
            f"{where} has {_counted(found, 'placeholder')} (the token {token}), its "
            f"{_counted(len(cuts), 'image')} {wanted} image tokens",
            fix="Write one placeholder for each image token, or give the prompt as a text.",
        )


def _placeholder_id(
    bundle: Bundle,
    written: ImageText,
    prompts: Sequence[Prompt],
    encode: Callable[[str], list[int]],
) -> int | None:
    """The token of placeholders; None if no prompt is a text. Raises `BundleError` if the tokenizer
    has another one, or several."""
    if not any(isinstance(prompt, str) for prompt in prompts):
        return None
    token, marker = _token_of(bundle, written), written.placeholder
    if encode(marker).count(token) != 1:
        raise BundleError(
            f"{bundle.path}: the placeholder of images, {marker[:60]!r}, is not one token "
            f"{token} of the tokenizer",
            fix=RECOPY,
        )
    return token


def _token_of(bundle: Bundle, written: ImageText) -> int:
    """The token that stands for an image token."""
    groups = bundle.manifest.decoding.groups.values()  # type: ignore[union-attr]
    return next(group.token for group in groups if group.image == written)


def _with_placeholders(
    prompt: str,
    cuts: Sequence[Cut],
    written: ImageText,
    token: int,
    encode: Callable[[str], list[int]],
    where: str,
) -> list[int]:
    """Token ids of a prompt with the placeholders of its images."""
    marker = written.placeholder
    parts = prompt.split(marker)
    markers = 0 if written.in_front else len(cuts)
    if len(parts) - 1 != markers:
        raise InputError(
            f"{where} has {_counted(len(parts) - 1, 'placeholder')} {marker} for "
            f"{_counted(len(cuts), 'image')}",
            fix=f"Leave {marker} out: images stand in front of the prompt."
            if written.in_front
            else f"Write {marker} once for each image.",
        )
    texts = [text_of(written, cut) for cut in cuts]
    if written.in_front:
        front = sum(text.count(marker) for text in texts)
        return [token] * front + encode(prompt)
    return encode("".join(a + b for a, b in zip(parts, [*texts, ""], strict=True)))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def marked(written: ImageText | None, prompt: str, images: int) -> str:
    """A prompt that says nothing of its images, with their placeholders in front."""
    if written is None or written.in_front or written.placeholder in prompt:
        return prompt
    return f"{written.placeholder * images}\n{prompt}"


def text_of(written: ImageText, cut: Cut) -> str:
    """What a prompt says for an image."""
    one = written.placeholder * written.tokens
    if written.tile is None or len(cut.pixels) == 1:
        return written.whole.replace("{image}", one * len(cut.pixels))
    said = ""
    for row in range(cut.rows):
        for column in range(cut.columns):
            tile = written.tile.replace("{row}", str(row + 1))
            said += tile.replace("{column}", str(column + 1)).replace("{image}", one)
        said += written.row_end
    return said + written.overview.replace("{image}", one)


__all__ = [
    "Image",
    "fill_images",
    "image_input",
    "marked",
    "read_image",
    "take_images",
    "text_of",
    "write_images",
]
