"""LayerSkip training and that of adapters: what they add to language modelling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeexit.errors import UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.origins import note_origins
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.layerskip import (
    IGNORED,
    LayerSkip,
    agreement_loss,
    dropout_rates,
    exit_weights,
    token_loss,
    tokens_and_targets,
)
from edgeexit.export.methods.method import Method
from tests.decoders import LAYERS, VOCABULARY
from tests.training import counting, decoder, first_word, losses, text_classifier, train

GIVEN = {"max_steps": 60, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
HELD_OUT = torch.stack([row["input_ids"] for row in counting(8, seed=12345)])


def losses_of(model: ExitDecoder) -> dict[int, float]:
    """Of every exit, on rows that nothing is trained on."""
    with torch.no_grad():
        found = model(HELD_OUT[:, :-1])
    return {layer: token_loss(logits, HELD_OUT[:, 1:]).item() for layer, logits in found.items()}


def test_deeper_layers_are_dropped_more_often() -> None:
    rates = dropout_rates(12, 0.2)
    assert rates == sorted(rates)
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)


def test_the_papers_weights_grow_with_depth_and_stay_below_the_last_layers() -> None:
    weights = exit_weights([1, 2, 3], LAYERS, 1.0)
    assert list(weights.values()) == sorted(weights.values())
    assert all(0 <= weight < 1 for weight in weights.values())


def test_exits_learn_with_losses_and_do_not_without(tmp_path: Path) -> None:
    plain, skipping = decoder([1, 2]), decoder([1, 2])
    rows = counting(480)
    train(tmp_path, plain, LayerSkip(dropout=0.0, weights={}), rows, **GIVEN)
    train(tmp_path, skipping, LayerSkip(dropout=0.2, weights={1: 0.5, 2: 0.5}), rows, **GIVEN)
    without, with_ = losses_of(plain), losses_of(skipping)
    assert with_[1] < 0.7 * without[1] and with_[2] < 0.7 * without[2]
    assert with_[LAYERS] < 1.0 and without[LAYERS] < 1.0
    assert plain.provenance["exits"] == "unknown" and skipping.provenance["exits"] == "trained"


def test_adapters_learn_with_the_model(tmp_path: Path) -> None:
    model = decoder([1, 2], adapters=[1])
    before = {name: value.clone() for name, value in model.adapters.state_dict().items()}
    first = losses_of(model)
    train(tmp_path, model, LayerSkip(dropout=0.0, weights={1: 0.5, 2: 0.5}), counting(480), **GIVEN)
    after = model.adapters.state_dict()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())
    assert losses_of(model)[1] < 0.5 * first[1]
    assert model.provenance == {"exits": "trained", "adapters": "trained"}


def apart(model: ExitDecoder) -> dict[int, float]:
    """How far an early exit's answer is from the last layer's: cross-entropy above its entropy."""
    with torch.no_grad():
        found = model(HELD_OUT[:, :-1])
    target = found[LAYERS].flatten(0, 1).log_softmax(-1)
    return {
        layer: torch.nn.functional.kl_div(
            found[layer].flatten(0, 1).log_softmax(-1),
            target,
            reduction="batchmean",
            log_target=True,
        ).item()
        for layer in model.exit_layers
    }


def test_adapters_alone_learn_what_the_last_layer_says_and_leave_the_model_as_it_is(
    tmp_path: Path,
) -> None:
    model = decoder([1, 2], adapters=[2])
    held = {name: value.clone() for name, value in model.model.state_dict().items()}
    before = apart(model)
    made = losses(train(tmp_path, model, AdapterDistillation(), counting(480), **GIVEN))
    assert len(made) == 60 and made[-1] < made[0]
    after = apart(model)
    assert after[2] < 0.7 * before[2] and after[1] == before[1]
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, held[name])
    assert all(parameter.requires_grad for parameter in model.model.parameters())
    assert model.exit_origins == {"exit_1": "unknown", "exit_2": "trained"}
    assert model.provenance == {"adapters": "trained", "exits": "unknown"}


def test_distilled_exits_agree_with_the_last_layer_more_than_those_that_learn_the_text(
    tmp_path: Path,
) -> None:
    """On noise there is nothing to learn but what the last layer says."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (480, 13), generator=generator)
    noise = [{"input_ids": row} for row in ids]
    found = []
    for share in (0.0, 1.0):
        model = decoder([1])
        method = LayerSkip(dropout=0.0, weights={1: 1.0}, distillation=share)
        train(tmp_path, model, method, noise, **GIVEN)
        found.append(apart(model)[1])
    assert found[1] < 0.8 * found[0]


def test_a_dropped_layer_is_left_out() -> None:
    model = decoder([1])
    with torch.no_grad():
        whole, short = model(HELD_OUT), model(HELD_OUT, skipped=[2, 3, 4])
    torch.testing.assert_close(short[LAYERS], whole[1])


def test_layers_are_dropped_by_the_step_alone() -> None:
    """Not by the random numbers of a process, which differ between processes."""
    model, method = decoder([1, 2]), LayerSkip(dropout=0.9, weights={1: 1.0, 2: 1.0})
    asked: list[tuple[list[int], list[int]]] = []

    def forward(ids: torch.Tensor, *, exits: list[int], skipped: list[int]) -> object:
        asked.append((exits, skipped))
        return model(ids, exits=exits, skipped=skipped)

    for seed in (0, 1):
        torch.manual_seed(seed)
        for step in (0, 1, 2, 3, 4, 5, 6, 7):
            method.loss(model, forward, {"input_ids": HELD_OUT}, step)
    assert asked[:8] == asked[8:]
    assert [exits for exits, _ in asked[:4]] == [[1, 4], [2, 4], [1, 4], [2, 4]]
    assert len({tuple(skipped) for _, skipped in asked}) > 3
    method.loss(model, forward, {"input_ids": HELD_OUT}, None)
    assert asked[-1] == ([1, 2, 4], [])


def test_padding_and_ignored_tokens_are_not_learned() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8], [IGNORED, 6, 0, 0]])
    tokens, targets = tokens_and_targets({"input_ids": ids, "attention_mask": mask})
    assert tokens.tolist() == [[5, 6, 7], [5, 6, 0]]
    assert targets.tolist() == [[6, 7, 8], [6, IGNORED, IGNORED]]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert tokens_and_targets(batch)[1].tolist() == [[IGNORED, 7, 8], [6, IGNORED, IGNORED]]
    model = decoder([1], adapters=[1])
    assert LayerSkip().count(model, batch) == AdapterDistillation().count(model, batch) == 3
    with pytest.raises(UsageError, match=r"padding before a token. Pad on the right"):
        tokens_and_targets({"input_ids": ids, "attention_mask": mask.flip(1)})


def test_losses_are_means_over_what_is_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, last = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[1, 2, IGNORED], [IGNORED, IGNORED, 6]])
    kept = targets != IGNORED
    expected = -logits.float()[kept].log_softmax(-1).gather(1, targets[kept][:, None]).mean()
    torch.testing.assert_close(token_loss(logits, targets), expected)
    said = last.float()[kept].softmax(-1)
    expected = -(said * logits.float()[kept].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(agreement_loss(logits, last, targets), expected)
    nothing = torch.full_like(targets, IGNORED)
    assert token_loss(logits, nothing) == 0 and agreement_loss(logits, last, nothing) == 0


def test_saved_exits_are_read_back(tmp_path: Path) -> None:
    from edgeexit.export.pretrained import from_pretrained

    made = decoder([1, 3])
    note_origins(made, {"exit_1": "trained", "exit_3": "trained"})
    made.save_pretrained(tmp_path)
    read = from_pretrained(tmp_path)
    assert isinstance(read, ExitDecoder) and read.exit_layers == [1, 3]
    assert read.provenance["exits"] == "trained"
    assert from_pretrained(tmp_path, exits=[2]).provenance["exits"] == "unknown"
    named = from_pretrained(tmp_path, exits=[2], untrained=True)
    assert named.provenance["exits"] == "untrained"


@pytest.mark.parametrize(
    "method, complaint",
    [
        (LayerSkip(dropout=1.0), "dropout 1.0 is out of range"),
        (LayerSkip(weights={3: 1.0}), "layer 3 has no exit"),
        (LayerSkip(weights={1: -1.0}), "are invalid"),
        (LayerSkip(distillation=1.5), "distillation 1.5 is out of range"),
        (AdapterDistillation(), "no adapters"),
    ],
)
def test_settings_are_refused_when_they_are_invalid(
    method: Method, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        train(tmp_path, decoder([1]), method, counting(8), max_steps=1)


@pytest.mark.parametrize("method", [LayerSkip(), AdapterDistillation()])
def test_models_are_refused_when_they_are_not_plain_language_models(
    method: Method, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="(without an encoder|with exits), not ExitClassifier"):
        train(tmp_path, text_classifier(), method, first_word(8), max_steps=1)
