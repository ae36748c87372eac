"""FREE: adapters against an adversary, on a frozen model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.checkpoints import COMPANIONS
from edgeexit.export.methods.free import Discriminator, Free, adversarial_losses
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained
from tests.training import arguments, counting, decoder, train
from tests.vision_models import PLACEHOLDER, SIZE, save_checkpoint

GIVEN = {"max_steps": 6, "learning_rate": 5e-3, "per_device_train_batch_size": 8}


def labelled(count: int) -> list[dict[str, torch.Tensor]]:
    return [row | {"labels": row["input_ids"].clone()} for row in counting(count)]


def by_hand() -> Discriminator:
    """D(x) = leaky(x1) - leaky(x2), with a slope of 0.2 below zero."""
    network = Discriminator(2, 2)
    first, _, last = network
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0, -1.0]]))
        last.bias.zero_()
    return network


def test_both_losses_are_those_worked_out_by_hand() -> None:
    real, made = torch.tensor([[2.0, 1.0]]), torch.tensor([[-5.0, 1.0]])
    # D(real) = 2 - 1 = 1; D(made) = 0.2 * -5 - 1 = -2
    generator, discriminator = adversarial_losses(by_hand(), made, real)
    assert generator.item() == pytest.approx(math.log(1 + math.e**2))
    assert discriminator.item() == pytest.approx(
        math.log(1 + math.e**-1) + math.log(1 + math.e**-2)
    )


def test_each_loss_trains_its_own_side_alone() -> None:
    network = by_hand()
    made, real = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    generator, discriminator = adversarial_losses(network, made, real)
    generator.backward(retain_graph=True)
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in network.parameters())
    before = made.grad.clone()
    discriminator.backward()
    assert torch.equal(made.grad, before) and real.grad is None
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize("supervision", ["labels", "distillation"])
@pytest.mark.parametrize("adversary", [0.0, 0.3])
def test_adapters_change_and_the_model_stays_bit_for_bit(
    tmp_path: Path, supervision: Any, adversary: float
) -> None:
    model = decoder([1, 2], adapters=[1, 2])
    before = copy.deepcopy(model.state_dict())
    method = Free(supervision=supervision, adversary=adversary)
    train(tmp_path, model, method, labelled(48), **GIVEN)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) != name.startswith("adapters."), name
    assert not hasattr(model, "companions")
    assert model.provenance == {"exits": "trained", "adapters": "trained"}


def test_without_labels_and_adversary_it_is_adapter_distillation() -> None:
    model = decoder([1, 2], adapters=[1, 2])
    batch = {"input_ids": torch.stack([row["input_ids"] for row in counting(4)])}
    given = {"forward": model, "inputs": batch, "step": 0}
    free = Free(supervision="distillation", adversary=0.0).loss(model, **given)  # type: ignore[arg-type]
    assert torch.equal(free[0], AdapterDistillation().loss(model, **given)[0])  # type: ignore[arg-type]


def test_a_training_goes_on_with_its_adversary_when_it_is_resumed(tmp_path: Path) -> None:
    whole, stopped = decoder([1], adapters=[1]), decoder([1], adapters=[1])
    rows = labelled(48)
    first = train(tmp_path / "whole", whole, Free(), rows, **GIVEN)
    given = {**GIVEN, "save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "parts", stopped, Free(), rows, **{**given, "max_steps": 6})
    resumed = decoder([1], adapters=[1])
    trainer = ExitTrainer(
        resumed, Free(), arguments(tmp_path / "parts", **given), train_dataset=rows
    )
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
    pairs = zip(trainer._companions.parameters(), first._companions.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    (checkpoint / COMPANIONS).write_bytes(b"damaged")
    with pytest.raises(ExportError, match="does not belong to this training"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_a_vision_language_model_trains_with_its_images(tmp_path: Path) -> None:
    save_checkpoint("llava", tmp_path / "checkpoint")
    model = from_pretrained(tmp_path / "checkpoint", exits=[1], adapters=[1], untrained=True)
    assert isinstance(model, ExitDecoder)
    tokens = model.whole.tower.tokens  # type: ignore[attr-defined]
    ids = torch.tensor([5, *[PLACEHOLDER] * tokens, 7, 8, 9, 10])
    labels = torch.where(ids == PLACEHOLDER, -100, ids)
    rows = [
        {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, SIZE, SIZE)}
        for _ in range(16)
    ]
    before = copy.deepcopy(model.adapters.state_dict())
    train(tmp_path / "out", model, Free(), rows, **GIVEN)
    assert not any(torch.equal(w, before[n]) for n, w in model.adapters.state_dict().items())
    batch = {name: torch.stack([row[name] for row in rows[:4]]) for name in rows[0]}
    seeing = Free(adversary=0.0).loss(model, model, batch, None)[0]
    batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
    assert not torch.isclose(seeing, Free(adversary=0.0).loss(model, model, batch, None)[0])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Free(supervision="both"), "supervision 'both' is not known"),  # type: ignore[arg-type]
        (Free(adversary=-1), "adversary -1 is out of range"),
        (Free(adversary=math.nan), "adversary nan is out of range"),
        (Free(inner=0), "inner 0 is not a width"),
    ],
)
def test_settings_are_refused_when_they_are_invalid(method: Free, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        method.check(decoder([1], adapters=[1]))


@pytest.mark.parametrize("method", [Free(), Free(supervision="distillation", adversary=0)])
def test_without_a_label_nothing_is_trained_or_called_so(
    tmp_path: Path, method: Free, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder([1], adapters=[1])
    rows = [row | {"labels": torch.full_like(row["input_ids"], -100)} for row in counting(8)]
    train(tmp_path, model, method, rows, **GIVEN)
    assert model.exit_origins["exit_1"] == "untrained"
    assert "no exit was trained" in caplog.text


def test_models_without_adapters_and_rows_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Free: the decoder has no adapters"):
        Free().check(decoder([1]))
    with pytest.raises(UsageError, match="Free trains language models"):
        Free().check(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="a batch has no 'labels'") as refused:
        train(tmp_path, decoder([1], adapters=[1]), Free(), counting(8), **GIVEN)
    assert 'supervision="distillation"' in str(refused.value.fix)
