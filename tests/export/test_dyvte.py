"""Training of gates (DyVTE) and of projectors of tower exits: labels, and what is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.methods.dyvte import Dyvte
from edgeexit.export.methods.method import Batch
from edgeexit.export.methods.tower import TowerDistillation
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained
from tests.training import arguments, decoder, train
from tests.vision_models import PLACEHOLDER
from tests.vision_reference import run_in_float64

GIVEN = {"max_steps": 8, "learning_rate": 5e-3, "per_device_train_batch_size": 4}
GATES = [1, 3]


@pytest.fixture
def split(vision_folder: Callable[[str], Path]) -> Any:
    return from_pretrained(
        vision_folder("llava"), exits=[2], tower_exits=[1, 2], gates=GATES, untrained=True
    )


def questions(split: Any, count: int) -> list[dict[str, torch.Tensor]]:
    """An image, a question of three to five tokens and an answer of four, padded to one length."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        asked = 3 + number % 3
        text = torch.randint(5, 200, (asked + 4,), generator=generator)
        ids = torch.cat([torch.full((split.whole.tower.tokens,), PLACEHOLDER), text])
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - 4, ids, -100)
        padding = 5 - asked
        rows.append(
            {
                "input_ids": nn.functional.pad(ids, (0, padding)),
                "labels": nn.functional.pad(labels, (0, padding), value=-100),
                "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, padding)),
                "pixel_values": torch.randn(*split.whole.tower.pixels, generator=generator),
            }
        )
    return rows


def batch_of(rows: list[dict[str, torch.Tensor]]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def cut_short(row: dict[str, torch.Tensor]) -> None:
    """Leaves out a row's first two tokens, as a limit of its length does."""
    for name in ("input_ids", "labels", "attention_mask"):
        row[name] = row[name][2:]


def two_answers(row: dict[str, torch.Tensor]) -> None:
    """Labels a token of the question, too."""
    row["labels"][1] = row["input_ids"][1]


@pytest.mark.parametrize("layer", GATES)
def test_labels_are_those_of_a_run_without_the_image_tokens(split: Any, layer: int) -> None:
    """Against a run in float64 in which every row is alone; both labels occur."""
    rows = questions(split, 12)
    # Labels of real answers: what the model itself would say, changed in some rows.
    with torch.no_grad():
        batch = batch_of(rows)
        said = split(batch["input_ids"], exits=[split.depth], pixel_values=batch["pixel_values"])
    for number, row in enumerate(rows[::2]):
        own = said[split.depth][2 * number].argmax(-1)
        answer = (row["labels"] != -100).nonzero()[:, 0]
        row["labels"][answer[0]] = own[answer[0] - 1]
    method = Dyvte(agreement=0.5, ratio=1.2, slack=0.05)
    judged = method.judge(split, split, batch_of(rows), layer)
    expected = []
    for row in rows:
        length = int(row["attention_mask"].sum())
        ids, labels = row["input_ids"][:length].tolist(), row["labels"][:length]
        start = int((labels != -100).nonzero()[0])
        pixels = row["pixel_values"][None]
        runs = [
            torch.from_numpy(
                run_in_float64(split, ids[:start], ids[start:], pixels, dropped_behind)[1]
            )[:-1]
            for dropped_behind in (None, layer)
        ]
        full, without = (nn.functional.cross_entropy(z, labels[start:]).item() for z in runs)
        same = (runs[0].argmax(-1) == runs[1].argmax(-1)).double().mean().item()
        expected.append(int(same >= 0.5 and without < 1.2 * full + 0.05))
    assert judged.labels.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_a_gates_score_in_training_is_that_of_the_device(split: Any) -> None:
    batch = batch_of(questions(split, 3))
    judged = Dyvte().judge(split, split, batch, 1)
    ids = batch["input_ids"]
    prompts = (batch["labels"] != -100).int().argmax(1)
    state = split._through(
        0, 1, split.embed(ids, batch["pixel_values"]), torch.arange(ids.shape[1]).expand_as(ids)
    )
    score = split.gate(1)(state, ids == PLACEHOLDER, prompts)
    torch.testing.assert_close(judged.scores, score)


def test_gates_learn_and_everything_else_stays_bit_for_bit(tmp_path: Path, split: Any) -> None:
    before = copy.deepcopy(split.state_dict())
    trainer = train(tmp_path, split, Dyvte(), questions(split, 16), **GIVEN)
    for name, weight in split.state_dict().items():
        assert torch.equal(weight, before[name]) != name.startswith("gates."), name
    assert split.exit_origins["gate_1"] == split.exit_origins["gate_3"] == "trained"
    assert split.provenance["gates"] == "trained"
    assert trainer.state.global_step == 8


def test_a_gate_learns_which_prompts_need_their_image(tmp_path: Path, split: Any) -> None:
    """Without slack and agreement, labels depend on the prompt: a trained gate ranks them."""
    method, rows = Dyvte(agreement=0.0, ratio=1.0, slack=0.0), questions(split, 24)
    given = {**GIVEN, "max_steps": 120, "per_device_train_batch_size": 24}
    train(tmp_path, split, method, rows, **given)
    judged = method.judge(split, split, batch_of(rows), 1)
    leave, stay = judged.scores[judged.labels == 1], judged.scores[judged.labels == 0]
    assert len(leave) and len(stay)
    assert (leave[:, None] > stay).float().mean() > 0.95  # area under the ROC curve


def test_projectors_of_tower_exits_learn_the_image_tokens(tmp_path: Path, split: Any) -> None:
    rows = [{"pixel_values": row["pixel_values"]} for row in questions(split, 16)]
    before, method = copy.deepcopy(split.state_dict()), TowerDistillation()
    first = method.loss(split, split, batch_of(rows), None)[0].item()
    train(tmp_path, split, method, rows, **{**GIVEN, "max_steps": 60})
    assert method.loss(split, split, batch_of(rows), None)[0].item() < 0.7 * first
    for name, weight in split.state_dict().items():
        trained = name.startswith("tower.projectors.")
        assert torch.equal(weight, before[name]) != trained, name
    assert split.provenance["tower_exits"] == "trained"
    without = [{"labels": torch.tensor([1])}] * 4
    with pytest.raises(UsageError, match="a batch has no 'pixel_values'"):
        train(tmp_path / "without", split, method, without, **GIVEN)


def test_a_training_of_other_gates_or_tower_exits_is_not_resumed(
    tmp_path: Path, split: Any, vision_folder: Callable[[str], Path]
) -> None:
    given = {**GIVEN, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path, split, Dyvte(), questions(split, 8), **given)
    folder = vision_folder("llava")
    for options, message in (
        ({"gates": [2], "tower_exits": [1, 2]}, r"\{1: 128, 3: 128\}, the model \{2: 128\}"),
        ({"gates": {1: 8, 3: 128}, "tower_exits": [1, 2]}, r"the model \{1: 8, 3: 128\}"),
        ({"gates": GATES, "tower_exits": [1, 2], "adapters": [2]}, r"none, the model \{2: 1\}"),
        ({"gates": GATES, "tower_exits": [1]}, r"of the tower \[1, 2\], the model \[1\]"),
    ):
        other: Any = from_pretrained(folder, exits=[2], untrained=True, **options)  # type: ignore[arg-type]
        rows = questions(other, 8)
        args = arguments(tmp_path, **{**given, "max_steps": 4})
        trainer = ExitTrainer(other, Dyvte(), args, train_dataset=rows)
        with pytest.raises(ExportError, match=message):
            trainer.train(resume_from_checkpoint=True)


def test_models_and_settings_are_refused_when_they_do_not_fit(split: Any) -> None:
    with pytest.raises(UsageError, match="Dyvte trains vision-language models"):
        Dyvte().check(decoder([1]))
    with pytest.raises(UsageError, match="TowerDistillation trains vision-language models"):
        TowerDistillation().check(decoder([1]))
    for method, message in (
        (Dyvte(ratio=0.5), r"ratio 0\.5 is out of range"),
        (Dyvte(slack=math.inf), "slack inf is out of range"),
        (Dyvte(agreement=1.5), r"agreement 1\.5 is out of range"),
        (Dyvte(agreement="all"), "agreement 'all' is out of range"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=message):
            method.check(split)
    split.gates.clear()
    with pytest.raises(UsageError, match="the model has no gates"):
        Dyvte().check(split)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("labels"), "a batch has no 'labels'"),
        (lambda row: row["labels"].fill_(-100), "a row has no answer"),
        (two_answers, "a row has more than one answer"),
        (lambda row: row["input_ids"].clamp_(max=7), "has no image tokens in its prompt"),
        (lambda row: row.pop("pixel_values"), "places for 4 images, and it has 0"),
        (cut_short, "row 0 of a batch has .* places for image tokens, and an image makes"),
        (lambda row: row.update(pixel_values=row["pixel_values"][:, 1:]), "not floating point"),
        (lambda row: row.update(pixel_values=row["pixel_values"].int()), "pixel_values are int32"),
    ],
)
def test_rows_that_teach_a_gate_nothing_are_refused(
    tmp_path: Path, split: Any, change: Callable[[Any], Any], message: str
) -> None:
    rows = questions(split, 4)
    for row in rows:
        change(row)
    with pytest.raises(UsageError, match=message):
        train(tmp_path, split, Dyvte(), rows, **GIVEN)
