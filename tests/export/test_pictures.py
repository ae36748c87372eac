"""Processors of every kind: the device makes the same pixels, or the checkpoint is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.image_processors import image_preprocessing
from edgeexit.preprocessing.images import open_image, preprocess_images
from tests.checkpoints import save_preprocessor
from tests.vision_models import FAMILIES as VISION_FAMILIES
from tests.vision_models import make_processor

EDGE, CROP = {"shortest_edge": 40}, {"height": 32, "width": 32}
EXPRESSED: dict[str, dict[str, Any]] = {
    "ViT": {"image_processor_type": "ViTImageProcessor"},
    "ViT, bicubic": {"image_processor_type": "ViTImageProcessor", "resample": 3},
    "ViT, no rescaling": {"image_processor_type": "ViTImageProcessor", "do_rescale": False},
    "CLIP": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": CROP,
        "do_center_crop": True,
        "resample": 3,
    },
    "CLIP, crop larger than the edge": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 24},
        "crop_size": CROP,
        "do_center_crop": True,
    },
    "BiT": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 37},
        "crop_size": CROP,
        "do_center_crop": True,
        "resample": 3,
    },
    "ConvNeXt": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "resample": 3},
}
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "EfficientNet, offset": (
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "rescale_offset": True,
            "include_top": False,
        },
        "rescale_offset=True",
    ),
    "EfficientNet, top": (
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": True},
        "include_top=True",
    ),
    "LeViT": (
        {
            "image_processor_type": "LevitImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": CROP,
            "do_center_crop": True,
        },
        "pixels on the device would differ",
    ),
    "PoolFormer": (
        {
            "image_processor_type": "PoolFormerImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": CROP,
            "do_center_crop": True,
            "crop_pct": 0.9,
        },
        "pixels on the device would differ",
    ),
    "Donut": (
        {
            "image_processor_type": "DonutImageProcessor",
            "do_thumbnail": True,
            "do_align_long_axis": True,
            "do_pad": False,
        },
        "do_align_long_axis=True",
    ),
    "MobileViT": (
        {
            "image_processor_type": "MobileViTImageProcessor",
            "size": EDGE,
            "crop_size": CROP,
            "do_center_crop": True,
            "do_flip_channel_order": True,
        },
        "do_flip_channel_order",
    ),
}
BASE: dict[str, Any] = {
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
    "do_normalize": True,
}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of other sizes than the exporter tries."""
    random = np.random.RandomState(3)
    sizes = [(41, 37), (64, 19), (30, 77), (32, 32), (11, 200)]
    return [
        Image.fromarray(random.randint(0, 256, (high, wide, 3)).astype(np.uint8))
        for wide, high in sizes
    ]


@pytest.mark.parametrize("kind", EXPRESSED)
def test_the_device_makes_the_pixels_of_the_processor(
    kind: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    save_preprocessor(tmp_path, **BASE | EXPRESSED[kind])
    made = image_preprocessing(tmp_path, 3)
    assert made is not None
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for picture in pictures:
        expected = np.asarray(processor(picture, return_tensors="np")["pixel_values"])
        found = preprocess_images(made[0], [picture])
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", OTHER)
def test_what_cannot_be_expressed_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    config, message = OTHER[kind]
    save_preprocessor(tmp_path, **BASE | config)
    with pytest.raises(ExportError) as caught:
        image_preprocessing(tmp_path, 3)
    assert message in str(caught.value)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_file_is_turned_as_its_orientation_says(
    turn: int, pictures: list[Image.Image], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    pictures[0].save(tmp_path / "photo.png", exif=exif)
    found = open_image(tmp_path / "photo.png", "photo.png")
    assert np.array_equal(np.asarray(found), np.asarray(load_image(str(tmp_path / "photo.png"))))
    same = np.array_equal(np.asarray(found), np.asarray(pictures[0]))
    assert same == (turn == 1)


GOT: dict[str, Any] = {"image_processor_type": "GotOcr2ImageProcessorPil", "min_patches": 1}
GOT |= {"size": {"height": 32, "width": 32}, "do_convert_rgb": True}
SMOLVLM: dict[str, Any] = {"image_processor_type": "SmolVLMImageProcessorPil"}
SMOLVLM |= {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
TILED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "one tile": (GOT, {"options": {"crop_to_patches": False}}, (1, 1, 1, 1)),
    "tiles of the nearest ratio": (
        GOT | {"max_patches": 6},
        {"options": {"crop_to_patches": True}},
        (7, 4, 7, 1),
    ),
    "fewer tiles": (
        GOT | {"max_patches": 12},
        {"options": {"crop_to_patches": True}, "most_tiles": 2},
        (1, 3, 3, 1),
    ),
    "tiles that cover": (SMOLVLM, {}, (13, 9, 5, 17)),
    "fewer that cover": (SMOLVLM, {"most_tiles": 4}, (5, 3, 3, 5)),
    "no square that cover": (SMOLVLM, {"most_tiles": 8}, (5, 3, 3, 5)),
    "no square below 4": (SMOLVLM, {"most_tiles": 3}, (1, 1, 1, 1)),
    "more than it has": (SMOLVLM, {"most_tiles": 17}, (13, 9, 5, 17)),
    "none that cover": (SMOLVLM, {"most_tiles": 1}, (1, 1, 1, 1)),
    "not split": (SMOLVLM | {"do_image_splitting": False}, {}, (1, 1, 1, 1)),
}


LIMITS = {"no square that cover": "they have 4 tiles at most", "no square below 4": "stay whole"}


@pytest.mark.parametrize("kind", TILED)
def test_images_are_cut_into_the_tiles_of_the_processor(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, options, counts = TILED[kind]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    made = image_preprocessing(tmp_path, 3, **options)
    assert made is not None
    random = np.random.RandomState(4)
    shapes = [(90, 130), (7, 20), (200, 3), (33, 33)]
    found = []
    for shape in shapes:
        pixels = random.randint(0, 256, (*shape, 3)).astype(np.uint8)
        found.append(len(preprocess_images(made[0], [Image.fromarray(pixels)])))
    assert tuple(found) == counts
    assert [LIMITS[kind] in one.getMessage() for one in caplog.records] == [True] * (kind in LIMITS)


def test_a_limit_of_tiles_is_refused_where_there_are_none(tmp_path: Path) -> None:
    save_preprocessor(tmp_path, **BASE, image_processor_type="CLIPImageProcessor")
    with pytest.raises(UsageError, match="does not cut images into tiles") as error:
        image_preprocessing(tmp_path, 3, most_tiles=1)
    assert "InternVL, SmolVLM and Idefics3" in str(error.value)


SIZES = [(1, 1), (7, 2000), (2000, 7), (4000, 3000), (33, 1)]
MODES = ["L", "LA", "RGBA", "CMYK", "P", "1"]


def assert_same_pixels(family: str, folder: Path, theirs: Image.Image, ours: Image.Image) -> None:
    """The device makes the pixels of a vision-language family's processor, as the model's own
    processor calls it."""
    processor = make_processor(family)
    processor.save_pretrained(folder)
    options = {"crop_to_patches": True} if family == "internvl" else {}
    made = image_preprocessing(folder, 3, options=options)
    assert made is not None
    asked = processor(theirs, input_data_format="channels_last", return_tensors="np", **options)
    expected = np.asarray(asked["pixel_values"], np.float32)
    expected = expected.reshape(-1, *expected.shape[-3:])
    np.testing.assert_allclose(preprocess_images(made[0], [ours]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_of_extreme_sizes_become_the_pixels_of_the_processor(
    family: str, size: tuple[int, int], tmp_path: Path
) -> None:
    pixels = np.random.RandomState(1).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    assert_same_pixels(family, tmp_path, image, image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_files_of_every_mode_become_the_pixels_of_the_processor(
    family: str, mode: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """Grey, transparent, CMYK, palettes; all turned by EXIF, as transformers turns them."""
    picture = pictures[1].convert("L") if mode in ("LA", "1") else pictures[1]
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    picture.convert(mode).save(path, exif=exif)
    theirs, ours = load_image(str(path)), open_image(path, path.name)
    assert ours.size == theirs.size == pictures[1].size[::-1]
    assert_same_pixels(family, tmp_path, theirs, ours)


def save_transparent(kind: str, picture: Image.Image, folder: Path) -> Path:
    """A file with one transparent colour, shade or palette entry, or with alpha."""
    few = picture.quantize(4)
    palette = few.convert("RGB")
    clear = picture.convert("RGBA")
    clear.putalpha(picture.convert("L"))
    middle = picture.width // 2, picture.height // 2
    images: dict[str, Image.Image] = {
        "colour.png": palette,
        "shade.png": palette.convert("L"),
        "two_shades.png": few.convert("1"),
        "entry.png": few,
        "entries.png": few,
        "entry.gif": few,
        "alpha.png": clear,
        "alpha.webp": clear,
        "grey_alpha.png": clear.convert("LA"),
    }
    image = images[kind]
    options: dict[str, Any] = {}
    if "alpha" not in kind:
        entries = bytes([0, 99, 200, 255])
        options["transparency"] = entries if kind == "entries.png" else image.getpixel(middle)
    image.save(folder / kind, **options)
    return folder / kind


TRANSPARENT = ["colour.png", "shade.png", "two_shades.png", "entry.png", "entries.png"]
TRANSPARENT += ["entry.gif", "alpha.png", "alpha.webp", "grey_alpha.png"]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_transparent_images_become_the_pixels_of_the_processor(
    family: str, kind: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """transformers' loader drops alpha; its processors lay a transparent colour, and the alpha of
    an image of Pillow, on white."""
    path = save_transparent(kind, pictures[1], tmp_path)
    with Image.open(path) as opened:
        assert_same_pixels(family, tmp_path, load_image(opened), open_image(path, path.name))
        assert_same_pixels(family, tmp_path, opened, opened)


@pytest.mark.parametrize("background", ["white", None])
def test_a_background_is_what_the_processor_has(background: str | None, tmp_path: Path) -> None:
    kind = {"image_processor_type": "CLIPImageProcessor", "crop_size": CROP}
    converts = {"do_convert_rgb": background is not None}
    save_preprocessor(tmp_path, **BASE | kind | {"size": EDGE} | converts)
    made = image_preprocessing(tmp_path, 3)
    assert made is not None
    assert made[0].background == background
