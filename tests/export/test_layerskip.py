"""LayerSkip training: what it adds to language modelling, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeexit.errors import EdgeExitError, UsageError
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families.llama import trunk
from edgeexit.export.methods.adapters import train_adapters
from edgeexit.export.methods.layerskip import (
    dropout_rates,
    exit_weights,
    next_token_loss,
    train_layerskip,
)
from tests.decoders import LAYERS, VOCABULARY, make_decoder


def make(exits: list[int], adapters: list[int] | None = None) -> ExitDecoder:
    model = make_decoder("llama")
    return ExitDecoder(model, trunk(model), exits, adapters or [])  # type: ignore[arg-type]


def batches(step: int) -> torch.Tensor:
    """Tokens that count upwards from a random start: the next one can be known."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(1, VOCABULARY, (8, 1), generator=generator)
    return (starts + torch.arange(13)) % 20 + 1


def losses(decoder: ExitDecoder) -> dict[int, float]:
    with torch.no_grad():
        tokens = batches(12345)
        found = decoder(tokens[:, :-1])
    return {layer: next_token_loss(logits, tokens).item() for layer, logits in found.items()}


def test_deeper_layers_are_dropped_more_often() -> None:
    rates = dropout_rates(12, 0.2)
    assert rates == sorted(rates)
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)


def test_the_papers_weights_grow_with_depth_and_stay_below_the_last_layers() -> None:
    weights = exit_weights([1, 2, 3], LAYERS, 1.0)
    assert list(weights.values()) == sorted(weights.values())
    assert all(0 <= weight < 1 for weight in weights.values())


def test_exits_learn_with_losses_and_do_not_without() -> None:
    plain, skipping = make([1, 2]), make([1, 2])
    how = {"steps": 60, "learning_rate": 5e-3}
    train_layerskip(plain, batches, **how, dropout=0.0, weights={})  # type: ignore[arg-type]
    train_layerskip(skipping, batches, **how, dropout=0.2, weights={1: 0.5, 2: 0.5})  # type: ignore[arg-type]
    without, with_ = losses(plain), losses(skipping)
    assert with_[1] < 0.7 * without[1] and with_[2] < 0.7 * without[2]
    assert with_[LAYERS] < 1.0 and without[LAYERS] < 1.0


def test_adapters_learn_with_the_model() -> None:
    decoder = make([1, 2], adapters=[1])
    before = {name: value.clone() for name, value in decoder.adapters.state_dict().items()}
    first = losses(decoder)
    train_layerskip(
        decoder, batches, steps=60, learning_rate=5e-3, dropout=0.0, weights={1: 0.5, 2: 0.5}
    )
    after = decoder.adapters.state_dict()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())
    assert losses(decoder)[1] < 0.5 * first[1]


def apart(decoder: ExitDecoder) -> dict[int, float]:
    """How far an early exit's answer is from the last layer's: cross-entropy above its entropy."""
    with torch.no_grad():
        found = decoder(batches(12345)[:, :-1])
    target = found[LAYERS].flatten(0, 1).log_softmax(-1)
    return {
        layer: torch.nn.functional.kl_div(
            found[layer].flatten(0, 1).log_softmax(-1),
            target,
            reduction="batchmean",
            log_target=True,
        ).item()
        for layer in decoder.exit_layers
    }


def test_adapters_alone_learn_what_the_last_layer_says_and_leave_the_model_as_it_is() -> None:
    decoder = make([1, 2], adapters=[2])
    model = {name: value.clone() for name, value in decoder.model.state_dict().items()}
    before = apart(decoder)
    made = train_adapters(decoder, batches, steps=60, learning_rate=5e-3)
    assert len(made) == 60 and made[-1] < made[0]
    after = apart(decoder)
    assert after[2] < 0.7 * before[2] and after[1] == before[1]
    for name, value in decoder.model.state_dict().items():
        assert torch.equal(value, model[name])
    assert all(parameter.requires_grad for parameter in decoder.model.parameters())


def test_distilled_exits_agree_with_the_last_layer_more_than_those_that_learn_the_text() -> None:
    """On noise there is nothing to learn but what the last layer says."""

    def noise(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(1, VOCABULARY, (8, 13), generator=generator)

    found = []
    for distillation in (0.0, 1.0):
        decoder = make([1])
        train_layerskip(
            decoder,
            noise,
            steps=60,
            learning_rate=5e-3,
            dropout=0.0,
            weights={1: 1.0},
            distillation=distillation,
        )
        found.append(apart(decoder)[1])
    assert found[1] < 0.8 * found[0]


def test_there_must_be_adapters_to_train() -> None:
    with pytest.raises(UsageError, match="no adapters"):
        train_adapters(make([1]), batches, steps=1)


def test_a_dropped_layer_is_left_out() -> None:
    decoder = make([1])
    ids = batches(0)
    with torch.no_grad():
        whole, short = decoder(ids), decoder(ids, skipped=[2, 3, 4])
    torch.testing.assert_close(short[LAYERS], whole[1])


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    once, twice = make([1, 2]), make([1, 2])
    how = {"steps": 8, "dropout": 0.2, "weights": {1: 0.5}, "save_every": 4}
    train_layerskip(once, batches, **how)  # type: ignore[arg-type]

    def stop(done: int, of: int, loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train_layerskip(twice, batches, **how, state_file=state, progress=stop)  # type: ignore[arg-type]
    train_layerskip(twice, batches, **how, state_file=state)  # type: ignore[arg-type]
    for one, other in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(EdgeExitError, match="another training"):
        train_layerskip(make([1, 2]), batches, **(how | {"dropout": 0.1}), state_file=state)  # type: ignore[arg-type]


def test_saved_exits_are_read_back(tmp_path: Path) -> None:
    from edgeexit.export.pretrained import from_pretrained

    make([1, 3]).save_pretrained(tmp_path)
    read = from_pretrained(tmp_path)
    assert isinstance(read, ExitDecoder) and read.exit_layers == [1, 3]
    assert read.provenance["exits"] == "trained"
    assert from_pretrained(tmp_path, exits=[2]).provenance["exits"] == "untrained"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dropout": 1.0}, "dropout"),
        ({"weights": {3: 1.0}}, "layer 3 has no exit"),
        ({"steps": 0}, "steps"),
        ({"distillation": 1.5}, "distillation"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_layerskip(make([1]), batches, **({"steps": 1} | wrong))  # type: ignore[arg-type]
