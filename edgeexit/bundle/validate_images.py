"""Checks how images become inputs: sizes and numbers that processors have, and agreement with the
input that takes the images and the tensor that replaces their placeholders.

A wrong number would otherwise fail with the first image, or give answers about other pixels.
"""

from __future__ import annotations

import math

from edgeexit.bundle.layout import MANIFEST, RECOPY
from edgeexit.bundle.manifest import Manifest, Place
from edgeexit.bundle.raw_inputs import ImagePreprocessing, ImageText
from edgeexit.errors import BundleError

LARGEST_EDGE = 8192
"""Pixels of an edge of a model's input, or of the edge that images are resized to."""
LARGEST_PICTURE = 16384
"""Pixels of the longer edge of an image that is then cut into tiles."""
PIXELS_LIMIT = 256 << 20
"""Pixels that a model takes of one image, in all tiles."""


def check_images(manifest: Manifest) -> None:
    """Refuses preprocessing that no processor has, or that does not fit the program.

    Raises:
        BundleError: With the field and its value.
    """
    preprocessing = manifest.image_preprocessing
    if preprocessing is not None:
        where = f"{MANIFEST}: image preprocessing"
        if (fault := preprocessing_fault(preprocessing)) is not None:
            raise BundleError(f"{where}: {fault}", fix=RECOPY)
        _check_input(manifest, where, preprocessing)
    for name, group in ({} if manifest.decoding is None else manifest.decoding.groups).items():
        if group.image is not None:
            _check_text(manifest, f"{MANIFEST}: token group {name}", name, group.image)


def preprocessing_fault(preprocessing: ImagePreprocessing) -> str | None:
    """What is wrong with sizes, tiles or numbers; None: nothing."""
    p, tiles = preprocessing, preprocessing.tiles
    edges = {"height": p.height, "width": p.width, "shortest_edge": p.shortest_edge or 1}
    for field, size in edges.items():
        if size > LARGEST_EDGE:
            return f"{field}: image size {size} is out of range (1 to {LARGEST_EDGE})"
    if (p.longest_edge or 1) > LARGEST_PICTURE:
        return f"longest_edge {p.longest_edge} is out of range (1 to {LARGEST_PICTURE})"
    if tiles is not None and p.shortest_edge is not None:
        return "tiles and shortest_edge exclude each other"
    if tiles is not None and tiles.least > tiles.most:
        return f"at least {tiles.least} tiles, but at most {tiles.most}"
    if tiles is not None and tiles.rule == "cover":
        needed = math.ceil((p.longest_edge or LARGEST_PICTURE) / p.height)
        needed *= math.ceil((p.longest_edge or LARGEST_PICTURE) / p.width)
        if p.longest_edge is None or needed > tiles.most:
            return f"longest_edge {p.longest_edge} needs more than {tiles.most} tiles"
    count = 1 if tiles is None else tiles.most + 1
    if count * p.height * p.width > PIXELS_LIMIT:
        return f"{count} tiles of {p.width} x {p.height} pixels are more than {PIXELS_LIMIT} pixels"
    return _number_fault(p)


def _number_fault(preprocessing: ImagePreprocessing) -> str | None:
    channels = len(preprocessing.mode)
    for field, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (1, channels):
            return f"{field} has {len(values)} values for {channels} channels"
    scale, mean, std = preprocessing.scale, preprocessing.mean, preprocessing.std
    if not all(map(math.isfinite, [scale, *mean, *std])) or min(scale, *std) <= 0:
        return f"invalid scale, mean or std ({', '.join(map(str, [scale, *mean, *std]))})"
    return None


def _check_input(manifest: Manifest, where: str, preprocessing: ImagePreprocessing) -> None:
    """Checks the shape that the input takes, as far as it is fixed."""
    [tensor] = [tensor for tensor in manifest.inputs if tensor.name == preprocessing.input]
    made = [None, len(preprocessing.mode), preprocessing.height, preprocessing.width]
    fixed = [axis if isinstance(axis, int) else None for axis in tensor.axes]
    fits = len(fixed) == len(made) and all(
        axis in (None, size) for axis, size in zip(fixed[1:], made[1:], strict=True)
    )
    if not fits or tensor.dtype != "float32":
        raise BundleError(
            f"{where} makes float32[image, {', '.join(map(str, made[1:]))}], but the input "
            f"{tensor.name} is {tensor.dtype}{tensor.axes}",
            fix=RECOPY,
        )


def _check_text(manifest: Manifest, where: str, group: str, written: ImageText) -> None:
    """Checks that prompts have one placeholder per row of the tensor that replaces them."""
    forms = {"whole": written.whole}
    if written.tile is not None:
        forms |= {"tile": written.tile, "overview": written.overview}
    for field, text in forms.items():
        if text.count("{image}") != 1:
            raise BundleError(
                f"{where}: {field} is {text[:60]!r}, which does not have {{image}} once",
                fix=RECOPY,
            )
    sources = {
        step.source for step in manifest.steps if isinstance(step, Place) and step.group == group
    }
    outputs = [tensor for chain in manifest.chains.values() for tensor in chain.outputs]
    for tensor in outputs:
        tokens = tensor.axes[1] if tensor.name in sources and len(tensor.axes) == 3 else None
        if isinstance(tokens, int) and tokens != written.tokens:
            raise BundleError(
                f"{where}: an image is written as {written.tokens} tokens, but {tensor.name} has "
                f"{tokens} per image",
                fix=RECOPY,
            )


__all__ = ["LARGEST_EDGE", "check_images", "preprocessing_fault"]
