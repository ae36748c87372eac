"""Training of classifiers: losses fall, the frozen stays, teachers do not learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from edgeexit.errors import UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.families import bert, resnet
from edgeexit.export.methods.joint import Joint, exit_loss
from tests.checkpoints import CLASSES, make_model
from tests.training import Rows, decoder, first_word, losses, text_classifier, train


def image_classifier() -> ExitClassifier:
    model = make_model("resnet")
    torch.manual_seed(3)
    return ExitClassifier(model, resnet.trunk(model, (16, 16)), [1, 3])


def bright_channel(count: int) -> Rows:
    """The label is the brightest channel."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = 0.3 * torch.randn(count, CLASSES, 16, 16, generator=generator)
    images[torch.arange(count), labels] += 1.0
    columns = zip(images, labels, strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in columns]


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_joint_makes_every_exit_right_when_the_problem_is_easy(
    distillation: float, tmp_path: Path
) -> None:
    classifier, method = text_classifier(), Joint(distillation=distillation)
    given = {"max_steps": 40, "learning_rate": 3e-3, "warmup_steps": 5}
    trainer = train(tmp_path, classifier, method, first_word(640), **given)
    found = losses(trainer)
    assert len(found) == 40
    assert sum(found[-5:]) < 0.2 * sum(found[:5])
    rows = first_word(16, seed=1000)
    names = [tensor.name for tensor in classifier.trunk.inputs]
    inputs = {name: torch.stack([row[name] for row in rows]) for name in names}
    labels = torch.stack([row["labels"] for row in rows])
    for logits in classifier(**inputs):
        assert (logits.argmax(-1) == labels).float().mean() >= 0.9
    assert classifier.trained and not classifier.training
    assert classifier.provenance["exits"] == "trained"


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_a_frozen_backbone_stays_bit_identical_while_the_heads_learn(
    family: str, tmp_path: Path
) -> None:
    classifier = text_classifier() if family == "bert" else image_classifier()
    rows = first_word(320) if family == "bert" else bright_channel(320)
    backbone, heads = weights_of(classifier.model), weights_of(classifier.heads)
    method = Joint(freeze_backbone=True)
    found = losses(train(tmp_path, classifier, method, rows, max_steps=60, learning_rate=2e-2))
    assert_equal(weights_of(classifier.model), backbone)  # batch statistics included
    assert all(
        not torch.equal(heads[name], value) for name, value in classifier.heads.state_dict().items()
    )
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert classifier.trained
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert all(parameter.grad is None for parameter in classifier.model.parameters())


def test_batch_statistics_move_when_the_backbone_is_trained(tmp_path: Path) -> None:
    classifier = image_classifier()
    before = weights_of(classifier.model)
    train(tmp_path, classifier, Joint(), bright_channel(16), max_steps=1)
    moved = [name for name, value in before.items() if "running" in name]
    after = classifier.model.state_dict()
    assert moved and not any(torch.equal(before[name], after[name]) for name in moved)


def test_parameters_stay_frozen_when_they_were_before(tmp_path: Path) -> None:
    classifier = text_classifier()
    classifier.model.classifier.weight.requires_grad_(False)
    given: dict[str, Any] = {"max_steps": 1}
    train(tmp_path, classifier, Joint(freeze_backbone=True), first_word(16), **given)
    assert not classifier.model.classifier.weight.requires_grad
    assert classifier.model.classifier.bias.requires_grad


def test_exit_loss_equals_its_equation_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    labels = torch.tensor([0, 3, 1, 2, 0])
    weights, share, temperature = [1.0, 0.5, 2.0], 0.3, 3.0
    expected = 0.0
    target = (logits[-1] / temperature).softmax(-1)
    for number, (z, weight) in enumerate(zip(logits, weights, strict=True)):
        hard = -z.softmax(-1)[torch.arange(5), labels].log().mean()
        p = (z / temperature).softmax(-1)
        soft = (target * (target.log() - p.log())).sum(-1).mean() * temperature**2
        loss = hard if number == 2 else (1 - share) * hard + share * soft
        expected += weight * float(loss) / sum(weights)
    found = exit_loss(logits, labels, weights=weights, distillation=share, temperature=temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_distillation_gives_no_gradient_to_the_exit_it_learns_from() -> None:
    early = torch.randn(4, 3, requires_grad=True)
    last = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    exit_loss([early, last], labels, weights=[1.0, 0.0], distillation=1.0).backward()
    assert last.grad is None or not last.grad.any()
    assert early.grad is not None and early.grad.abs().sum() > 0
    early.grad = last.grad = None
    exit_loss([early, last], labels, distillation=1.0).backward()
    alone = last.detach().clone().requires_grad_(True)
    (functional.cross_entropy(alone, labels) / 2).backward()
    torch.testing.assert_close(last.grad, alone.grad)


@pytest.mark.parametrize(
    "method, complaint",
    [
        (Joint(weights=[1.0]), "1 weights for 3 exits"),
        (Joint(weights=[1.0] * 3, freeze_backbone=True), "3 weights for 2 exits"),
        (Joint(weights=[1.0, -1.0, 1.0]), "are invalid"),
        (Joint(weights=[1.0, float("nan"), 1.0]), "are invalid"),
        (Joint(weights=[0.0, 0.0, 0.0]), "are invalid"),
        (Joint(distillation=1.5), "distillation 1.5 is out of range"),
        (Joint(temperature=0.0), "temperature 0.0"),
    ],
)
def test_joint_refuses_when_settings_are_invalid(
    method: Joint, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        train(tmp_path, text_classifier(), method, first_word(16))


def test_joint_refuses_when_there_is_nothing_to_train(tmp_path: Path) -> None:
    model = make_model("bert")
    classifier = ExitClassifier(model, bert.trunk(model), [])
    with pytest.raises(UsageError, match="no exit heads to train"):
        train(tmp_path, classifier, Joint(freeze_backbone=True), first_word(16))
    with pytest.raises(UsageError, match="Joint trains classifiers with exits, not ExitDecoder"):
        train(tmp_path, decoder([1]), Joint(), first_word(16))


def test_joint_refuses_batches_without_labels(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in first_word(16)]
    with pytest.raises(UsageError, match="no 'labels' .it has input_ids, .*must have input_ids"):
        train(tmp_path, text_classifier(), Joint(), rows, max_steps=1)
