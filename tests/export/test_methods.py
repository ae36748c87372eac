"""Training: losses fall, the frozen stays, teachers do not learn, interruptions leave no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.families import bert, resnet
from edgeexit.export.methods.joint import Batch, exit_loss, train_heads, train_joint
from tests.checkpoints import CLASSES, make_model


def text_classifier(dropout: float = 0.1) -> ExitClassifier:
    model = make_model("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    torch.manual_seed(3)
    return ExitClassifier(model, bert.trunk(model), [1, 2])


def image_classifier() -> ExitClassifier:
    model = make_model("resnet")
    torch.manual_seed(3)
    return ExitClassifier(model, resnet.trunk(model, (16, 16)), [1, 3])


def first_word(step: int) -> Batch:
    """The label is written in the first token, the one that exits look at."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(10, 60, (16, 6), generator=generator)
    labels = torch.randint(0, CLASSES, (16,), generator=generator)
    ids[:, 0] = labels + 4
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ids}, labels


def bright_channel(step: int) -> Batch:
    """The label is the brightest channel."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (16,), generator=generator)
    images = 0.3 * torch.randn(16, CLASSES, 16, 16, generator=generator)
    images[torch.arange(16), labels] += 1.0
    return {"pixel_values": images}, labels


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_train_joint_makes_every_exit_right_when_the_problem_is_easy(distillation: float) -> None:
    classifier = text_classifier()
    told: list[tuple[int, int, float]] = []
    losses = train_joint(
        classifier,
        first_word,
        steps=40,
        learning_rate=3e-3,
        warmup=5,
        distillation=distillation,
        progress=lambda done, of, loss: told.append((done, of, loss)),
    )
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert told == [(i + 1, 40, loss) for i, loss in enumerate(losses)]
    inputs, labels = first_word(1000)
    for logits in classifier(**inputs):
        assert (logits.argmax(-1) == labels).float().mean() >= 0.9
    assert classifier.trained and not classifier.training
    assert classifier.provenance["exits"] == "trained"


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_train_heads_leaves_the_backbone_bit_identical_and_the_heads_better(family: str) -> None:
    classifier = text_classifier() if family == "bert" else image_classifier()
    batches = first_word if family == "bert" else bright_channel
    backbone, heads = weights_of(classifier.model), weights_of(classifier.heads)
    losses = train_heads(classifier, batches, steps=60, learning_rate=2e-2)
    assert_equal(weights_of(classifier.model), backbone)  # batch statistics included
    assert all(
        not torch.equal(heads[name], value) for name, value in classifier.heads.state_dict().items()
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert classifier.trained
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert all(parameter.grad is None for parameter in classifier.model.parameters())


def test_train_heads_keeps_frozen_parameters_frozen_when_they_were_before() -> None:
    classifier = text_classifier()
    classifier.model.classifier.weight.requires_grad_(False)
    train_heads(classifier, first_word, steps=1)
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


@pytest.mark.parametrize("train", [train_joint, train_heads])
def test_training_gives_the_same_weights_when_interrupted_and_resumed(
    train, tmp_path: Path
) -> None:
    options = {"steps": 12, "learning_rate": 1e-2, "warmup": 2, "distillation": 0.5}
    torch.manual_seed(7)
    whole = text_classifier()
    losses = train(whole, first_word, **options)

    def interrupt(done: int, of: int, loss: float) -> None:
        if done == 7:
            raise KeyboardInterrupt

    state = tmp_path / "training.state"
    torch.manual_seed(7)
    cut = text_classifier()
    with pytest.raises(KeyboardInterrupt):
        train(cut, first_word, **options, state_file=state, save_every=5, progress=interrupt)
    assert not cut.trained
    torch.manual_seed(99)  # the state brings its own random numbers, for dropout
    again = text_classifier()
    rest = train(again, first_word, **options, state_file=state, save_every=5)
    assert rest == losses[5:]
    assert_equal(weights_of(again), weights_of(whole))
    assert train(again, first_word, **options, state_file=state) == []


def test_training_refuses_a_state_when_it_is_of_another_training(tmp_path: Path) -> None:
    state = tmp_path / "training.state"
    train_joint(text_classifier(), first_word, steps=1, state_file=state)
    with pytest.raises(ExportError, match=r"training\.state: the state of another training"):
        train_joint(text_classifier(), first_word, steps=2, state_file=state)
    with pytest.raises(ExportError, match=r"training\.state: the state of another training"):
        train_heads(text_classifier(), first_word, steps=1, state_file=state)
    state.write_bytes(b"not a state")
    with pytest.raises(ExportError, match=r"training\.state: not a training state"):
        train_joint(text_classifier(), first_word, steps=1, state_file=state)


def test_training_stops_with_the_weights_as_they_were_when_the_loss_is_not_finite() -> None:
    def poisoned(step: int) -> Batch:
        inputs, labels = bright_channel(step)
        return {
            "pixel_values": inputs["pixel_values"] * (float("nan") if step == 1 else 1.0)
        }, labels

    classifier = image_classifier()
    with pytest.raises(ExportError, match="loss of step 2 is nan"):
        train_heads(classifier, poisoned, steps=3)
    assert all(parameter.isfinite().all() for parameter in classifier.parameters())
    assert not classifier.trained


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": 3, "warmup": 4}, "warmup 4"),
        ({"steps": 1, "weights": [1.0]}, "1 for 3 exits"),
        ({"steps": 1, "weights": [1.0, -1.0, 1.0]}, "cannot weigh"),
        ({"steps": 1, "weights": [0.0, 0.0, 0.0]}, "cannot weigh"),
        ({"steps": 1, "distillation": 1.5}, "distillation 1.5"),
        ({"steps": 1, "temperature": 0.0}, "temperature 0.0"),
    ],
)
def test_train_joint_refuses_when_arguments_cannot_be_meant(options: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        train_joint(text_classifier(), first_word, **options)


def test_train_heads_refuses_when_there_are_no_heads() -> None:
    model = make_model("bert")
    with pytest.raises(UsageError, match="no exit heads"):
        train_heads(ExitClassifier(model, bert.trunk(model), []), first_word, steps=1)
