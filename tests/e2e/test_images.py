"""Prompts with images on the command line: what is answered; and what is refused, with one line
that names the thing and the remedy, and the right code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeexit.bundle.reader import Bundle
from tests.e2e.conftest import Ran
from tests.vision_models import make_images

Run = Callable[..., Ran]
WRITES = ("--max-new-tokens", "4", "--threads", "1")  # other tests of this process load models, too


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images, and files that are none, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("cat.png", "dog.png"), make_images(2), strict=True):
        image.save(name)
    Path("cut.png").write_bytes(Path("cat.png").read_bytes()[:300])
    Path("film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    Path("words.png").write_text("no image")
    for name, kind in (("video", "video"), ("film", "image")):
        content = [{"type": kind, "path": "film.mp4"}, {"type": "text", "text": "What?"}]
        Path(f"{name}.json").write_text(json.dumps([{"role": "user", "content": content}]))
    Path("policy.json").write_text("{}")
    return tmp_path


def refused(ran: Ran, code: int, *parts: str) -> None:
    """One error without a traceback, and nothing on stdout."""
    assert ran.code == code, ran
    assert ran.out == "" and "Traceback" not in ran.err
    assert ran.err.count("rror: ") == 1
    for part in parts:
        assert part in ran.err, ran.err


def test_images_are_answered_where_a_prompt_says(
    run_here: Run, folder: Path, vision_bundle: Callable[[str], Bundle]
) -> None:
    bundle = vision_bundle("llava").path
    ran = run_here(
        *("run", bundle, "--image", "cat.png", "--image", "dog.png", *WRITES, "--json"),
        *("--prompt", "a<image>b<image>c", "--tower-exit", "1", "--drop-image-tokens", "2"),
    )
    assert ran.code == 0, ran.err
    assert ran.json["statistics"]["earlier"] == {"vision": ["tower_exit_1"] * 2}
    assert len(ran.json["texts"][0]["tokens"]) == 4


WITH_CAT = ["--image", "cat.png", "--prompt"]
RUNS: dict[str, tuple[list[str], int, list[str]]] = {
    "no file": (["--image", "bird.png", "--prompt", "a"], 1, ["bird.png: cannot be read"]),
    "a file cut short": (["--image", "cut.png", "--prompt", "a"], 1, ["cut.png: not an image"]),
    "a text": (["--image", "words.png", "--prompt", "a"], 1, ["words.png: not an image"]),
    "a video": (["--image", "film.mp4", "--prompt", "a"], 1, ["film.mp4: not an image"]),
    "a video in a message": (
        ["--messages", "video.json"],
        1,
        ["video.json: messages[0]['content'][0] is of type 'video'", "some frames"],
    ),
    "a video as an image": (["--messages", "film.json"], 1, ["film.mp4: not an image"]),
    "an address": (["--image", "https://a/b.png", "--prompt", "a"], 1, ["not downloaded"]),
    "more placeholders": (
        [*WITH_CAT, "<image> or <image>?"],
        1,
        ["prompt 1 has 2 placeholders <image> for 1 image.", "once for each image"],
    ),
    "fewer placeholders": (
        [*WITH_CAT, "<image>?", "--image", "dog.png"],
        1,
        ["prompt 1 has 1 placeholder <image> for 2 images"],
    ),
    "a placeholder of no image": (["--prompt", "<image>?"], 1, ["no inputs are given for them"]),
    "no prompt": (["--image", "cat.png"], 2, ["Give --prompt or --messages"]),
    "two prompts": ([*WITH_CAT, "a", "--prompt", "b"], 2, ["--image is for one prompt"]),
    "a layer that the tower has not": (
        [*WITH_CAT, "a", "--tower-exit", "9"],
        2,
        ["--tower-exit 9: the tower has no exit behind layer 9. It has 1, 2, 3"],
    ),
    "a drop before the image is read": (
        [*WITH_CAT, "a", "--drop-image-tokens", "0"],
        2,
        ["--drop-image-tokens 0: image tokens cannot leave behind layer 0. Give one of 1, 2, 3"],
    ),
    "a drop beside a policy": (
        [*WITH_CAT, "a", "--drop-image-tokens", "1", "--policy", "policy.json"],
        2,
        ["--policy and --drop-image-tokens exclude each other"],
    ),
    "an image at the end that leaves": (
        [*WITH_CAT, "a<image>", "--drop-image-tokens", "1"],
        1,
        ["drop_1: cannot drop the group image", "Put text after them"],
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_prompts_that_do_not_fit_are_refused(
    run_here: Run, folder: Path, vision_bundle: Callable[[str], Bundle], case: str
) -> None:
    options, code, parts = RUNS[case]
    ran = run_here("run", vision_bundle("llava").path, *options, *WRITES)
    refused(ran, code, *parts)


TEXT: dict[str, tuple[list[str], int, str]] = {
    "an image": ([*WITH_CAT, "a"], 1, "takes no images"),
    "an exit of a tower": (["--prompt", "a", "--tower-exit", "1"], 2, "has no vision tower"),
    "a drop": (["--prompt", "a", "--drop-image-tokens", "1"], 2, "has no image tokens"),
}


@pytest.mark.parametrize("case", TEXT)
def test_a_model_of_texts_is_given_nothing_of_images(
    run_here: Run, folder: Path, decoder_bundle: Callable[[str], Bundle], case: str
) -> None:
    options, code, part = TEXT[case]
    refused(run_here("run", decoder_bundle("llama").path, *options, *WRITES), code, part)


EXPORTS: dict[str, tuple[dict[str, Any], list[str], int, list[str]]] = {
    "a family that is not known": (
        {"config.json": {"model_type": "llava_next"}},
        ["--exits", "1", "--tower-exits", "1"],
        1,
        ["no adapter for the model type 'llava_next'", "blip-2", "florence2", "llava", "smolvlm"],
    ),
    "a processor with a step that a device has not": (
        {"preprocessor_config.json": {"do_pad": True}},
        ["--exits", "1"],
        1,
        ["preprocessor_config.json: do_pad is not supported", "Correct or remove the file"],
    ),
    "a layer that the tower has not": (
        {},
        ["--untrained-exits", "1", "--tower-exits", "7"],
        2,
        ["there is no layer 7; the tower has layers 1 to 3"],
    ),
    "tiles of a processor that has none": (
        {},
        ["--exits", "1", "--max-tiles", "1"],
        2,
        ["CLIPImageProcessorPil does not cut images", "InternVL, SmolVLM and Idefics3 have tiles"],
    ),
    "int8, before its data is read": (
        {},
        ["--exits", "1", "--dtype", "int8", "--calibration-data", "policy.json"],
        1,
        ["int8 is not supported for models that write text about images", "float32 or float16"],
    ),
    "a drop before the image is read": (
        {},
        ["--exits", "1", "--drop-image-tokens", "0"],
        2,
        ["image tokens cannot leave behind layer 0", "Give layers from 1 to 3"],
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_checkpoints_that_cannot_be_exported_are_refused(
    run_here: Run, folder: Path, vision_folder: Callable[[str], Path], case: str
) -> None:
    changes, options, code, parts = EXPORTS[case]
    shutil.copytree(vision_folder("llava"), "llava")
    for name, changed in changes.items():
        path = Path("llava") / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    refused(run_here("export", "-m", "llava", *options, "-o", "bundle", "-q"), code, *parts)
    assert not Path("bundle").exists()


def test_exits_of_a_tower_need_a_tower(
    run_here: Run, folder: Path, decoder_folder: Callable[[str], Path]
) -> None:
    checkpoint = decoder_folder("llama")
    ran = run_here("export", "-m", checkpoint, "--exits", "1", "--tower-exits", "1", "-o", "b")
    refused(ran, 2, "a llama has no vision tower", "Leave out --tower-exits")
