"""Images in prompts and messages: what is accepted, what is refused, what is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeexit.bundle.policy import Policy, Rule
from edgeexit.bundle.raw_inputs import ImageText
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import BundleError, DataError, EdgeExitError, InputError, UsageError
from edgeexit.preprocessing.images import Cut
from edgeexit.runtime import load
from edgeexit.runtime.executor.rows import Answers
from edgeexit.runtime.model import Model
from edgeexit.runtime.programs.features import FeatureCache
from edgeexit.runtime.programs.images import text_of
from tests.vision_models import PLACEHOLDER, make_images, marker_of

MARKER = "<image>"


@pytest.fixture(scope="module")
def model(vision_bundle: Callable[[str], Bundle]) -> Iterator[Model]:
    with load(vision_bundle("llava")) as loaded:
        yield loaded


def tokens(model: Model, prompts: Any, images: Any) -> list[list[int]]:
    return model.generate(prompts, images=images, max_new_tokens=6).finish().tokens


def test_paths_images_and_arrays_are_the_same(model: Model, tmp_path: Path) -> None:
    [image] = make_images(1)
    image.save(tmp_path / "one.png")
    prompt = f"a{MARKER}b"
    wanted = tokens(model, prompt, image)
    for given in (tmp_path / "one.png", str(tmp_path / "one.png"), np.asarray(image)):
        assert tokens(model, prompt, given) == wanted
        assert tokens(model, prompt, [given]) == wanted
        assert tokens(model, [prompt], [[given]]) == wanted


def test_lists_of_images_are_dealt_out_in_order(model: Model) -> None:
    images = make_images(3)
    prompts = [f"{MARKER}a{MARKER}", "b", f"c{MARKER}"]
    wanted = tokens(model, prompts, [images[:2], [], images[2:]])
    assert tokens(model, prompts, images) == wanted
    assert tokens(model, prompts[0], images[:2]) == wanted[:1]
    assert tokens(model, prompts[0], images[1::-1]) != wanted[:1]


MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK")


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_images_are_accepted(model: Model, mode: str) -> None:
    [image] = make_images(1)
    grey = image.convert("L") if mode in ("L", "LA", "1") else image
    assert len(tokens(model, MARKER, grey.convert(mode))) == 1


@pytest.mark.parametrize("size", [(1, 1), (7, 2000), (2000, 7), (4000, 3000)])
def test_sizes_of_images_are_accepted(model: Model, size: tuple[int, int]) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    assert len(tokens(model, MARKER, pixels)) == 1


def test_images_are_turned_by_their_orientation(model: Model, tmp_path: Path) -> None:
    [image] = make_images(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    assert tokens(model, MARKER, tmp_path / "turned.png") == tokens(model, MARKER, turned)
    with Image.open(tmp_path / "turned.png") as opened:
        assert tokens(model, MARKER, opened) == tokens(model, MARKER, turned)


def test_messages_with_images_equal_prompts_with_images(model: Model, tmp_path: Path) -> None:
    first, second = make_images(2)
    first.save(tmp_path / "first.png")
    parts = [
        {"type": "image", "path": str(tmp_path / "first.png")},
        {"type": "text", "text": "and"},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": parts}]
    prompt = f"user: {MARKER}and{MARKER}assistant: "
    assert model.chat_prompt(messages) == prompt
    wanted = tokens(model, prompt, [first, second])
    assert model.chat(messages, images=second, max_new_tokens=6).finish().tokens == wanted
    parts[2] = {"type": "image", "image": second}
    assert model.chat(messages, max_new_tokens=6).finish().tokens == wanted


def make_bad(folder: Path) -> dict[str, Any]:
    """Images that cannot be read."""
    whole = folder / "whole.png"
    make_images(1)[0].save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:400])
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    (folder / "words.png").write_text("not an image")
    return {
        "cut": folder / "cut.png",
        "film": folder / "film.mp4",
        "words": folder / "words.png",
        "missing": folder / "missing.png",
        "folder": folder,
    }


@pytest.mark.parametrize("case", ["cut", "film", "words", "missing", "folder"])
def test_files_that_are_no_images_are_refused_by_name(
    model: Model, case: str, tmp_path: Path
) -> None:
    path = make_bad(tmp_path)[case]
    with pytest.raises(DataError, match=f"image 1 of prompt 1, .*{path.name}"):
        tokens(model, MARKER, path)


def test_bombs_are_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some KiB that would be 2.5 GB of pixels; and an image in memory."""
    side = 50_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * 100))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
        )
    )
    with pytest.raises(DataError, match="image 1 of prompt 1, .*bomb.png: .*2500000000 pixels"):
        tokens(model, MARKER, tmp_path / "bomb.png")
    monkeypatch.setattr("edgeexit.preprocessing.images.IMAGE_LIMIT_PIXELS", 1000)
    with pytest.raises(DataError, match="100 x 100 pixels"):
        tokens(model, MARKER, Image.new("RGB", (100, 100)))


class BytesPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def test_a_path_may_be_bytes(model: Model, tmp_path: Path) -> None:
    [image] = make_images(1)
    image.save(tmp_path / "one.png")
    assert tokens(model, MARKER, BytesPath(tmp_path / "one.png")) == tokens(model, MARKER, image)


def test_a_file_of_too_many_bytes_is_refused_unread(model: Model, tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(DataError, match=r"sparse.png: 42949672960 bytes, more than the 1073741824"):
        tokens(model, MARKER, tmp_path / "sparse.png")


def test_an_image_whose_mode_pillow_cannot_convert_is_refused(model: Model) -> None:
    image = make_images(1)[0].convert("LA")
    with pytest.raises(InputError, match="image 1 of prompt 1: .* mode La cannot be .*to LA or"):
        tokens(model, MARKER, image.convert("La"))


ADDRESSES = ["https://example.org/cat.jpg", "HTTP://a/b", "s3://a/b", "data:image/png;base64,A"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_as_they_were_given(model: Model, address: str) -> None:
    for given in (address, Path(address)):
        with pytest.raises(
            InputError, match=re.escape(f"image 1 of prompt 1 is an address ({address})")
        ):
            tokens(model, MARKER, given)


REFUSED: dict[str, tuple[Any, Any, type[EdgeExitError], str]] = {
    "fewer placeholders": ("a", "one", InputError, "prompt 1 has 0 placeholders <image> for 1 im"),
    "more placeholders": (MARKER * 2, "one", InputError, "prompt 1 has 2 placeholders <image> fo"),
    "placeholders of no images": (MARKER, [], InputError, "has 1 placeholder <image> for 0 images"),
    "too few for several prompts": (
        [MARKER, MARKER],
        ["one"],
        InputError,
        "there is 1 image for 2 prompts with 2 placeholders",
    ),
    "lists for other prompts": ([MARKER], [["one"], []], InputError, "2 lists of images for 1"),
    "token ids with a flat list": ([[1], [2]], ["one"], InputError, "share one list of images"),
    "an address": (MARKER, "https://example.org/cat.jpg", InputError, "images are not downloaded"),
    "a number": (MARKER, 3, InputError, "is a int"),
    "floats": (MARKER, np.zeros((4, 4, 3)), InputError, "is an array float64"),
    "four channels": (MARKER, np.zeros((4, 4, 4), np.uint8), InputError, r"array \[4, 4, 4\]"),
    "no pixels": (MARKER, np.zeros((0, 4, 3), np.uint8), InputError, "is an array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_images_are_refused(model: Model, case: str) -> None:
    prompts, images, error, message = REFUSED[case]
    [one] = make_images(1)

    def filled(given: Any) -> Any:
        if isinstance(given, list):
            return [filled(item) for item in given]
        return one if isinstance(given, str) and given == "one" else given

    with pytest.raises(error, match=message):
        tokens(model, prompts, filled(images))


def test_every_row_of_token_ids_has_the_placeholders_of_its_own_images(model: Model) -> None:
    first, second = make_images(2)
    [shown], _ = model.prompts_with_images([f"a{MARKER}b"], [[first]])
    count = shown.count(PLACEHOLDER)
    ids = [shown[:-1] + shown[1:], [1, 2]]
    said = f"prompt 1 has {2 * count} placeholders .the token 299., its 1 image {count} image"
    with pytest.raises(InputError, match=said):
        tokens(model, ids, [[first], [second]])
    wanted = tokens(model, ids[0], [first, second]) + tokens(model, ids[1], [])
    assert tokens(model, ids, [[first, second], []]) == wanted
    with pytest.raises(InputError, match="not a list of token ids"):
        tokens(model, [[1], [[2]]], [[], []])


@pytest.mark.parametrize("placeholder", ["<image><image>", "ab", "never seen"])
@pytest.mark.parametrize("family", ["llava", "florence2"])
def test_a_placeholder_that_is_not_its_token_is_refused(
    vision_bundle: Callable[[str], Bundle], family: str, placeholder: str, tmp_path: Path
) -> None:
    shutil.copytree(vision_bundle(family).path, tmp_path / "edited")
    path = tmp_path / "edited/manifest.json"
    raw = json.loads(path.read_text())
    raw["decoding"]["groups"]["image"]["image"]["placeholder"] = placeholder
    path.write_text(json.dumps(raw))
    with load(tmp_path / "edited") as edited, pytest.raises(BundleError, match="is not one token"):
        edited.generate(f"{placeholder}a", images=make_images(1), max_new_tokens=1)


def test_placeholders_without_images_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="no inputs are given for them"):
        model.generate(f"a{MARKER}b", max_new_tokens=2).finish()


def test_images_and_inputs_exclude_each_other(model: Model) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        model.generate(MARKER, images=make_images(1), inputs={"pixel_values": np.zeros(1)})


def test_images_in_messages_and_inputs_exclude_each_other(model: Model) -> None:
    """One of them would win."""
    inputs = {"pixel_values": np.zeros((1, 3, 32, 32), np.float32)}
    for part in ({"type": "image", "image": make_images(1)[0]}, {"type": "image"}):
        with pytest.raises(UsageError, match="exclude each other, also images in messages"):
            model.chat([{"role": "user", "content": [part]}], inputs=inputs)
    with pytest.raises(UsageError, match="exclude each other"):
        model.chat([{"role": "user", "content": "a"}], images=make_images(1), inputs=inputs)


NO_PROMPTS: list[tuple[Any, str]] = [
    (5, "the prompts are a int"),
    (None, "the prompts are a NoneType"),
    ({"prompt": MARKER}, "the prompts are a dict"),
    (b"a", "the prompts are a bytes"),
    (np.array(3), "the prompts are a number"),
    ([None], "a prompt is object"),
    ([{"a": 1}], "a prompt is object"),
    ([[1, "a"]], "not a list of token ids"),
    ([[]], "a prompt is empty"),
    ([[1.5]], "a prompt is float64"),
]


@pytest.mark.parametrize(("prompts", "message"), NO_PROMPTS)
@pytest.mark.parametrize("family", ["llava", "florence2"])
def test_what_is_no_prompt_is_refused_with_images(
    vision_bundle: Callable[[str], Bundle], family: str, prompts: Any, message: str
) -> None:
    with load(vision_bundle(family)) as loaded, pytest.raises(InputError, match=message):
        loaded.generate(prompts, images=make_images(1), max_new_tokens=1)


def test_image_items_and_images_must_agree(model: Model) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(InputError, match="1 image items without an image, and 0 images"):
        model.chat(messages)
    with pytest.raises(InputError, match="1 image items without an image, and 2 images"):
        model.chat(messages, images=make_images(2))
    assert model.chat_prompt(messages) == f"user: {MARKER}assistant: "
    with pytest.raises(
        InputError, match=r"image 1 of prompt 1 is missing\. In messages: .*--image"
    ):
        model.prompts_with_images([MARKER], [[None]])


def test_a_model_without_a_tower_takes_no_images(
    decoder_bundle: Callable[[str], Bundle],
) -> None:
    with (
        load(decoder_bundle("llama")) as text,
        pytest.raises(InputError, match="takes no images"),
    ):
        text.generate("a", images=make_images(1))


UNREAD = [
    ({"type": "video", "path": "film.mp4"}, "type 'video', which is not supported.*frames"),
    ({"type": "audio", "path": "voice.wav"}, "type 'audio', which is not supported"),
    ({"type": "image_url", "image_url": {"url": "https://a/b.png"}}, "'image_url'.*downloaded"),
    ({"type": "input_image", "image_url": "https://a/b.png"}, "'input_image'.*downloaded"),
    ({"type": "video_url", "video_url": {"url": "https://a/b"}}, "'video_url'.*frames"),
    ({"type": "input_audio", "input_audio": {"data": ""}}, "'input_audio'.*Give its text"),
    ({"type": "document", "source": {}}, "'document'.*Give parts as.*text.*Give images as"),
    ({"type": "Image", "path": "cat.jpg"}, "'Image', which is not supported.*Give images as"),
    ({"type": "image", "path": "cat.jpg", "url": "cat.jpg"}, "has path and url, but is one image"),
    ({"type": "image", "path": "a", "image": Image.new("L", (1, 1))}, "has image and path, but"),
    ({"type": "image", "base64": "AAAA"}, "an image as 'base64', which is not supported"),
    ({"type": "image", "image_url": "https://a/b.png"}, "an image as 'image_url', which is not"),
]


@pytest.mark.parametrize(("part", "message"), UNREAD)
def test_parts_of_messages_that_nothing_reads_are_refused(
    model: Model, part: dict[str, Any], message: str
) -> None:
    """The template would leave them out, and the answer would be to another question."""
    content = [part, {"type": "text", "text": "What happens?"}]
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": content}]
    for call in (model.chat, model.chat_prompt):
        with pytest.raises(InputError, match=rf"messages\[1\]\['content'\]\[0\] .*{message}"):
            call(messages)


def test_features_of_known_images_are_kept_within_their_bound(model: Model) -> None:
    images = make_images(3, seed=5)
    cache = model.features
    cache.clear()
    before = cache.hits, cache.misses
    prompts = [f"{MARKER}a{MARKER}", f"b{MARKER}{MARKER}"]
    first = tokens(model, prompts, [images[:2], images[1:]])
    assert (cache.hits - before[0], cache.misses - before[1]) == (1, 3)
    assert tokens(model, prompts, [images[:2], images[1:]]) == first
    assert (cache.hits - before[0], cache.misses - before[1]) == (5, 3)
    exits = model.generate(prompts[0], images=images[:2], max_new_tokens=1).finish()
    assert exits.statistics.earlier["vision"] == ["tower_exit_3"] * 2


@pytest.mark.parametrize("family", ["llava", "florence2"])
def test_a_second_question_about_an_image_does_not_run_the_tower(
    vision_bundle: Callable[[str], Bundle], family: str
) -> None:
    """Whatever chains follow the tower: Florence-2's encoder reads the image with each text."""
    image, marker = make_images(1)[0], marker_of(family)
    with load(vision_bundle(family)) as model, load(vision_bundle(family)) as forgetful:
        forgetful.features.limit_bytes = 0
        for number, question in enumerate(("what is it?", "and where?", "what is it?")):
            made, again = (
                one.generate(marker + question, images=image, max_new_tokens=8).finish()
                for one in (model, forgetful)
            )
            assert made.tokens == again.tokens and made.tokens[0]
            assert made.statistics.earlier == again.statistics.earlier
            assert (model.features.misses, model.features.hits) == (1, number)
            assert (forgetful.features.misses, forgetful.features.hits) == (number + 1, 0)


def test_rows_with_a_known_image_a_new_one_and_none(
    vision_bundle: Callable[[str], Bundle],
) -> None:
    """Florence-2: as many texts as rows of the encoder's other inputs, not as images."""
    first, second = make_images(2)
    with load(vision_bundle("florence2")) as model:
        prompts = ["what is it?", "a cat", "ab", "and?"]
        images = [[first], [], [second, first], [second]]
        together = model.generate(prompts, images=images, max_new_tokens=8).finish().tokens
        assert (model.features.misses, model.features.hits) == (2, 2)
        for prompt, own, text in zip(prompts, images, together, strict=True):
            alone = model.generate(prompt, images=own, max_new_tokens=8).finish()
            assert alone.tokens == [text]
        assert model.features.misses == 2
        assert model.generate("a cat", max_new_tokens=8).finish().tokens == together[1:2]
        assert len(set(map(tuple, together))) > 1


def test_another_policy_forgets_features(model: Model) -> None:
    [image] = make_images(1, seed=6)
    full = tokens(model, MARKER, image)
    before = model.policy
    early = {"vision": Rule(thresholds=-2.0, score="saturation"), "main": Rule()}
    model.policy = Policy(rules=early)
    made = model.generate(MARKER, images=image, max_new_tokens=6).finish()
    assert made.statistics.earlier["vision"] == ["tower_exit_1"]
    model.policy = before
    assert tokens(model, MARKER, image) == full


def test_a_feature_cache_drops_the_oldest() -> None:
    ran: list[int] = []

    def run(feeds: Mapping[str, np.ndarray]) -> Answers:
        images = feeds["pixels"]
        ran.extend(images[:, 0].tolist())
        ones = np.ones(len(images), np.int64)
        return Answers({"out": images * 2}, ones, images[:, 1])

    images = np.arange(8, dtype=np.float32).reshape(4, 2)
    cache = FeatureCache(limit_bytes=2 * images[0].nbytes)
    for chosen, wanted in (([0, 1], [0, 2]), ([1, 2], [4]), ([0], [0]), ([2, 0], [])):
        ran.clear()
        made = cache.answers("vision", "pixels", images[chosen], run)
        assert (made.outputs["out"] == images[chosen] * 2).all()
        assert made.exits.tolist() == [1] * len(chosen)
        assert (made.scores == images[chosen, 1]).all()
        assert ran == wanted
    cache.limit_bytes = None
    cache.answers("vision", "pixels", images, run)
    ran.clear()
    cache.answers("vision", "pixels", images, run)
    assert not ran
    for bad in (-1, "1", True, 1.5):
        with pytest.raises(UsageError, match="limit_bytes is .*None: no bound"):
            cache.limit_bytes = bad  # type: ignore[assignment]
    none = FeatureCache(limit_bytes=0)
    for _ in range(2):
        ran.clear()
        none.answers("vision", "pixels", images[:1], run)
        assert ran == [0]


def test_a_feature_cache_tells_chains_and_shapes_apart() -> None:
    cache, images = FeatureCache(), np.zeros((1, 4, 2), np.float32)
    for chain, given in (("one", images), ("two", images), ("one", images.reshape(1, 2, 4))):
        shape = given.shape[1:]

        def run(feeds: Mapping[str, np.ndarray], shape: Any = shape) -> Answers:
            return Answers({"out": feeds["pixels"]}, np.zeros(1, np.int64), np.zeros(1, np.float32))

        made = cache.answers(chain, "pixels", given, run)
        assert made.outputs["out"].shape[1:] == shape
    assert (cache.hits, cache.misses) == (0, 3)


def test_tiles_are_written_in_rows_with_an_overview() -> None:
    written = ImageText(
        placeholder="<i>",
        tokens=2,
        whole="[{image}]",
        tile="({row},{column}){image}",
        row_end=";",
        overview="|{image}",
    )
    pixels = np.zeros((5, 3, 1, 1), np.float32)
    said = text_of(written, Cut(pixels, rows=2, columns=2))
    assert said == "(1,1)<i><i>(1,2)<i><i>;(2,1)<i><i>(2,2)<i><i>;|<i><i>"
    assert text_of(written, Cut(pixels[:1])) == "[<i><i>]"
    flat = ImageText(placeholder="<i>", tokens=1, whole="[{image}]")
    assert text_of(flat, Cut(pixels, rows=2, columns=2)) == "[<i><i><i><i><i>]"
