"""The vlm example: the pages' commands run in an empty folder and print what the pages show, and
transformers reads the checkpoint."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli import cli
from edgeexit.runtime import load
from tests.command_lines import find_commands

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples/vlm"
CHECKPOINT = HERE / "checkpoint"
PAGE, FRONT = HERE / "README.md", ROOT / "README.md"
ASKED = [
    ("seven.png", "What digit is it?"),
    ("three_and_eight.png", "Which is larger, the left or the right?"),
    ("five_zero_two.png", "Which digits do you see?"),
]


def commands(page: Path) -> list[str]:
    """The commands of a page that are about the committed checkpoint; those of real ones need a
    network."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    found = [command for kind, block in blocks if not kind for command in find_commands(block)]
    return [one for one in found if re.search(r"(^edgeexit \w+| -o) vlm\b", one)]


def invoke(command: str, *more: str) -> Result:
    words = shlex.split(command, comments=True)[1:]
    if words[0] in ("run", "check") and "--threads" not in more:
        more += ("--threads", "1")  # other tests of this process load models, too
    return CliRunner().invoke(cli, [*words, *more], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the examples, and the bundle of the page's first command."""
    folder = tmp_path_factory.mktemp("vlm")
    (folder / "examples").symlink_to(ROOT / "examples")
    [first] = [command for command in commands(PAGE) if " export " in command]
    assert first.startswith("edgeexit export -m examples/vlm/checkpoint ")
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert invoke(first).exit_code == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The bundle, in whose folder the test runs."""
    monkeypatch.chdir(folder)
    return open_bundle(folder / "vlm")


def test_the_page_shows_every_step(bundle: Bundle) -> None:
    verbs = [command.split()[1] for command in commands(PAGE)]
    assert {"export", "check", "inspect", "run", "bench"} == set(verbs)


@pytest.mark.parametrize("page", [PAGE, FRONT], ids=["page", "front"])
def test_commands_print_what_is_shown(page: Path, bundle: Bundle) -> None:
    shown = page.read_text().splitlines()
    ran = [one for one in commands(page) if one.split()[1] in ("check", "inspect", "run")]
    assert sum(one.startswith("edgeexit run") for one in ran) >= 1
    for command in ran:
        result = invoke(command)
        assert result.exit_code == 0, command
        if command.startswith("edgeexit run"):
            assert result.stdout.strip() in shown, command


def test_bench_measures_every_case_of_the_page(bundle: Bundle) -> None:
    [command] = [one for one in commands(PAGE) if one.startswith("edgeexit bench")]
    options = ["--time", "100ms", "--threads", "1", "--new-tokens", "8", "--json"]
    result = invoke(command, *options)
    assert result.exit_code == 0
    cases = json.loads(result.stdout)["vision"]["cases"]
    assert set(cases) == {"tower:2", "tower:3", "drop:2", "drop:3"}
    table = PAGE.read_text()
    assert all(re.search(rf"^{case} ", table, re.MULTILINE) for case in cases)


def test_an_image_of_no_numbers_spoils_no_later_answer(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    import numpy as np

    prompt, picture = "USER: <image>\nWhat digit is it?\nASSISTANT:\n", str(HERE / "seven.png")
    with load(bundle) as model:
        rows, inputs = model.prompts_with_images(prompt, picture)
        spoilt = {name: np.full_like(pixels, np.nan) for name, pixels in inputs.items()}
        model.generate(rows, inputs=spoilt, max_new_tokens=8).finish()
        assert "prompt 1: the states are not numbers" in caplog.text
        for mode in ("full", "exact"):
            made = model.generate(prompt, images=picture, max_new_tokens=8, mode=mode)
            assert made.finish().texts == ["It is a seven."], mode


@pytest.mark.parametrize("option", ["", " --drop-image-tokens 2"])
def test_audit_reads_the_images_of_the_prompt(bundle: Bundle, option: str) -> None:
    command = "edgeexit run vlm --threshold 0.9 --mode fast --audit --chat --prompt Well?"
    result = invoke(f"{command} --image examples/vlm/seven.png{option}")
    assert result.exit_code == 0
    assert "on given text" in result.stderr


def test_bench_of_texts_alone_measures_no_tower(bundle: Bundle, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "USER: hi\\nASSISTANT:\\n"}\n')
    quick = ["--time", "10ms", "--threads", "1", "--new-tokens", "4", "--json"]
    result = invoke(f"edgeexit bench vlm --data {texts}", *quick)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["vision"] is None
    assert any("not every prompt has an image" in text for text in found["warnings"])


def test_texts_are_those_of_transformers(bundle: Bundle) -> None:
    """The checkpoint as transformers itself reads it: processor, chat template, model."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with load(bundle) as ours:
        for name, question in ASKED:
            path = str(HERE / name)
            content = [{"type": "image", "path": path}, {"type": "text", "text": question}]
            messages: Any = [{"role": "user", "content": content}]
            inputs = processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            made = model.generate(**inputs, max_new_tokens=20, do_sample=False)
            text = processor.decode(made[0, inputs["input_ids"].shape[1] :], True)
            assert ours.chat(messages, max_new_tokens=20).finish().texts == [text], name


def test_chat_template_writes_what_the_training_wrote(
    bundle: Bundle, script: Callable[[str], dict[str, Any]]
) -> None:
    trained = script("train.py")
    question, answer = ASKED[0][1], "It is a seven."
    batches = trained["Batches"](trained["make_processor"]())
    ids, labels = batches.encode(question, answer)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    with load(bundle) as model:
        prompt = model.chat_prompt([{"role": "user", "content": content}])
        picture = str(HERE / ASKED[0][0])
        [row], _ = model.prompts_with_images([prompt], [picture], special_tokens=False)
        said = model.encode(f"{answer}<|end|>", special_tokens=False)
    assert [*row, *said] == ids
    assert labels == [-100] * len(row) + said


@pytest.fixture
def script() -> Callable[[str], dict[str, Any]]:
    """``script(name)``: a file of the example, read as a module."""

    def read(name: str) -> dict[str, Any]:
        before = sys.modules.pop("data", None), sys.path[:]
        try:
            return runpy.run_path(str(HERE / name))
        finally:
            sys.path[:] = before[1]
            sys.modules.pop("data", None)
            if before[0] is not None:
                sys.modules["data"] = before[0]

    return read


def test_answers_about_unseen_digits_are_as_recorded(
    bundle: Bundle, script: Callable[[str], dict[str, Any]]
) -> None:
    """A part of what accuracy.json records; the page has its figures."""
    recorded = json.loads((HERE / "accuracy.json").read_text())
    module = script("accuracy.py")
    examples = module["data"].examples(recorded["split"], 100, 0)
    with load(bundle) as model:
        policies = dict(module["policies"](model))
        assert set(policies) == set(recorded["right"])
        model.policy = policies["full"]
        found = module["right"](model, examples)
    assert abs(found["all"] - recorded["right"]["full"]["all"]) < 0.1
    page = PAGE.read_text().splitlines()
    for name, shares in recorded["right"].items():
        [row] = [line for line in page if line.startswith(f"| `{name}`")]
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        kinds = ("what", "which", "count", "larger", "all")
        assert cells == [f"{100 * shares[kind]:.1f}" for kind in kinds], name
    right = json.loads((CHECKPOINT / "training.json").read_text())["validation"]
    for exits in ("tower_exit_4, exit_4", "tower_exit_4, exit_2"):
        assert f"{100 * right[exits]:.1f} %" in PAGE.read_text()


def test_pictures_are_those_that_the_script_draws(
    tmp_path: Path, script: Callable[[str], dict[str, Any]]
) -> None:
    import numpy as np
    from PIL import Image

    script("data.py")["main"](tmp_path)
    for name, _ in ASKED:
        with Image.open(HERE / name) as ours, Image.open(tmp_path / name) as drawn:
            assert np.array_equal(np.asarray(ours), np.asarray(drawn)), name


@pytest.mark.slow
def test_training_makes_a_checkpoint_that_exports(tmp_path: Path) -> None:
    smoke = [sys.executable, str(HERE / "train.py"), "--smoke", "-o", str(tmp_path / "made")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(smoke, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = invoke(f"edgeexit export -m {tmp_path / 'made'} -o {tmp_path / 'bundle'}")
    assert result.exit_code == 0
    assert not open_bundle(tmp_path / "bundle").exits_untrained
