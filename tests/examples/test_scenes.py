"""The scenes example: what its questions ask, that splits share no picture, and that every stage of
its training runs and goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from edgeexit.bundle.policy_file import read_policy
from edgeexit.bundle.rules import ALWAYS
from edgeexit.export import export
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.families.llava import trunk
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.runtime import Policy, Rule, load
from edgeexit.runtime.model import Model
from edgeexit.runtime.programs.generation import Generation

HERE = Path(__file__).parents[2] / "examples/scenes"


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    names = ("data", "model", "language", "conversations", "small_llava")
    for name in names:  # other examples have some of them, too
        sys.modules.pop(name, None)
    yield importlib.import_module("data")
    for name in names:
        sys.modules.pop(name, None)


def test_answers_are_what_the_cards_say(data: Any) -> None:
    """Worked out from the picture's own cells, step by step."""
    for item in data.items("validation", 60, 3):
        cells = item.scene.cover().reshape(-1, 2)
        cards = [(a, b) for a, b in cells.tolist() if a != data.BLANK]
        words = item.question.split()
        if item.kind == "read":
            assert item.answer == " , ".join(f"{a} {b}" for a, b in cards) and item.steps == 0
            continue
        place = int(words[words.index("from") + 1])
        if item.kind == "walk":
            start, ring = place, []
            while start != place or not ring:
                [place] = [b for a, b in cards if a == place]
                ring.append(str(place))
            assert item.answer.split() == ring and item.steps == 1
            continue
        steps, start = 1 + data.STEPS.index(words[-1]), place
        for _ in range(steps):
            [place] = [b for a, b in cards if a == place]
        assert item.answer.split()[-1] == str(place) and item.steps == steps
        assert 1 <= item.steps <= data.MOST_STEPS and place != start


def test_each_card_is_led_to_by_another(data: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        for count in range(data.FEWEST, data.CARDS + 1):
            left, right = data.make_scene(rng, count).cards.T
            assert len(set(left.tolist())) == count
            assert sorted(left.tolist()) == sorted(right.tolist()) and (left != right).all()


def test_splits_share_no_source_picture(data: Any) -> None:
    seen: set[bytes] = set()
    for split in ("train", "validation", "test"):
        images = {image.tobytes() for image in data.pictures(split)[0]}
        assert images and not images & seen
        seen |= images


def test_a_scene_is_drawn_the_same_again_and_otherwise_with_another_seed(data: Any) -> None:
    scene = data.make_scene(np.random.default_rng(1), 5)
    first, again, other = (
        np.asarray(data.draw(scene, "test", np.random.default_rng(seed))) for seed in (2, 2, 3)
    )
    assert first.shape == (data.SIZE, data.SIZE)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_hidden_image_is_as_one_that_left(data: Any) -> None:
    """The training hides pictures from layers; on the device their tokens leave."""
    language, parts = importlib.import_module("language"), importlib.import_module("model")
    torch.manual_seed(0)
    model = parts.make_model(layers=4, width=64).eval()
    split = ExitVisionLanguage(model, trunk(model), [], [])
    model.set_attn_implementation({"text_config": "eager"})
    scenes = [data.make_scene(np.random.default_rng(seed), 4) for seed in (1, 2)]
    level = language.Level(cards=8, go=3, after=3)
    turns = language.Turns(scenes, np.random.default_rng(3), level, 1, 0)
    image = turns.ids == language.IDS[parts.IMAGE]
    pixels = torch.rand(2, 3, data.SIZE, data.SIZE)
    turns.leaves[:] = 2
    turns.leaves[image] = sys.modules["conversations"].NEVER
    with torch.no_grad():
        embedded = split.embed(turns.ids, pixel_values=pixels)
        decoder = model.model.language_model
        with language.hidden_images(decoder.layers, turns):
            hidden = model.lm_head(decoder(inputs_embeds=embedded, use_cache=False)[0])
        seen = model.lm_head(decoder(inputs_embeds=embedded, use_cache=False)[0])
        left = split.logits_without(turns.ids, 2, image, pixel_values=pixels)
    behind = ~image
    behind[:, 0] = False
    assert torch.allclose(hidden[behind], left[behind], atol=1e-4)
    assert not torch.allclose(seen[behind], left[behind], atol=1e-2)


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(HERE / script), *arguments, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_every_stage_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """From nothing to a bundle that equals torch, in a few steps a stage."""
    plain, exits = tmp_path / "plain", tmp_path / "exits"
    run("train.py", "--smoke", "-o", str(plain), "--stop-after", "language")
    stage = plain / "state" / "language.pt"
    written = stage.stat().st_mtime_ns
    run("train.py", "--smoke", "-o", str(plain))
    assert stage.stat().st_mtime_ns == written  # a stage that is done is not trained again
    trained = (plain / "model.safetensors").read_bytes()
    run("exits.py", "-m", str(plain), "-o", str(exits), "--steps", "2")
    assert (exits / "model.safetensors").read_bytes() == trained
    origins = json.loads((exits / "edgeexit.json").read_text())["origins"]
    assert origins["exit_4"] == origins["tower_exit_2"] == "trained"
    files = [path for path in exits.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    export(from_pretrained(exits).split_model(), tmp_path / "bundle")
    with load(tmp_path / "bundle", all_scores=True, threads=1) as model:
        report = check(model, threads=1)
    assert report.passed, [c for c in report.comparisons if not c.passed]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with its exits, as its page exports it."""
    folder = tmp_path_factory.mktemp("scenes") / "bundle"
    export(from_pretrained(HERE / "checkpoint", gates=[4, 7]).split_model(), folder)
    return folder


def answered(model: Model, item: Any, mode: Literal["full", "fast"] = "full") -> Generation:
    """What the model answers to a question about a scene."""
    asked = [{"type": "image"}, {"type": "text", "text": item.question}]
    chat = [{"role": "user", "content": asked}]
    return model.chat(chat, images=[item.picture], max_new_tokens=48, mode=mode).finish()


@pytest.mark.slow
def test_the_checkpoint_answers_questions_about_unseen_scenes(bundle: Path, data: Any) -> None:
    """Word for word, on the device; and what it needs an image for depends on the question."""
    items = data.items("test", 80, 5)
    by_steps: dict[str, list[list[bool]]] = {"stay": [[], []], "drop": [[], []]}
    right = dict.fromkeys(by_steps, 0)
    with load(bundle, threads=1) as model:
        rules = {name: Rule() for name in model.chains}
        drop = {model.chain_name: Rule(thresholds={"drop_4": ALWAYS})}
        for name, policy in (("stay", rules), ("drop", rules | drop)):
            model.policy = Policy(rules=policy)
            for item in items:
                same = answered(model, item).texts[0].strip() == item.answer
                right[name] += same
                if item.kind == "go":
                    by_steps[name][item.steps > 2].append(same)
    assert right["stay"] >= 0.8 * len(items)
    few, many = (np.mean(one) for one in by_steps["drop"])
    assert few > many  # behind layer 4 two steps are over, three are not
    assert np.mean(by_steps["stay"][1]) > many


@pytest.mark.slow
def test_its_exits_answer_early_what_the_whole_model_answers(bundle: Path, data: Any) -> None:
    """With the example's policy; many steps take the image longer than reading does."""
    items = data.items("test", 80, 6)
    dropped: dict[bool, list[bool]] = {False: [], True: []}
    exits: Counter[str] = Counter()
    with load(bundle, threads=1) as model:
        whole = [answered(model, item).tokens for item in items]
        model.policy = read_policy(HERE / "policy.json")
        early = [answered(model, item, "fast") for item in items]
    for item, made in zip(items, early, strict=True):
        exits.update(made.statistics.exits)
        for drops in made.statistics.dropped.get("gate_4", []):  # not asked of what layer 3 answers
            dropped[item.kind == "go" and item.steps > 2].append(drops)
    same = [made.tokens == tokens for made, tokens in zip(early, whole, strict=True)]
    assert np.mean(same) >= 0.9
    assert exits["exit_3"] > 0.6 * exits.total()
    assert np.mean(dropped[False]) > 0.7 > 0.3 > np.mean(dropped[True])
