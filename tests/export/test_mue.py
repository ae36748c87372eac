"""MuE: encoder-decoders whose exits share head and encoder."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeexit.errors import UsageError
from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.vision_encoder_decoder import ExitVisionEncoderDecoder
from edgeexit.export.families import bart, florence2
from edgeexit.export.methods.mue import Mue
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained
from tests import vision_models
from tests.encoder_decoders import END, PAD, START, VOCABULARY, make_bart
from tests.training import StopAt, arguments, decoder, losses, text_classifier, train
from tests.vision_models import PLACEHOLDER, make_model

SIZE = 2 * vision_models.SIZE
GIVEN = {"max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
Rows = list[dict[str, torch.Tensor]]


def text_model(exits: Any = (1, 2), encoder_exits: Any = (1, 2)) -> ExitEncoderDecoder:
    """A BART of 3 + 3 layers."""
    model = make_bart()
    return ExitEncoderDecoder(model, *bart.trunk(model), exits, encoder_exits)


def seeing_model(apart: bool = True) -> ExitVisionEncoderDecoder:
    """A Florence-2 of 4 + 4 layers."""
    model: Any = make_model("florence2")
    trunk = florence2.trunk(model, (SIZE, SIZE))
    if apart:
        return ExitDecomposed(model, trunk, [1, 3], [2], [1, 3])
    return ExitVisionEncoderDecoder(model, trunk, [1, 3], [2])


def backwards(count: int, seed: int = 0) -> Rows:
    """Sources of 1 to 7 words; the labels are the same words from the last to the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(1, 8, (), generator=generator))
        words = torch.randint(4, VOCABULARY, (length,), generator=generator)
        ids = torch.full((7,), PAD)
        ids[:length] = words
        labels = torch.full((8,), -100)
        labels[:length], labels[length] = words.flip(0), END
        mask = (torch.arange(7) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def seen(count: int, apart: bool = True) -> Rows:
    """An image with a text and labels a row; read together, places for it stand in front."""
    generator = torch.Generator().manual_seed(1)
    places = torch.full((0 if apart else seeing_model().whole.tower.tokens,), PLACEHOLDER)
    rows = []
    for _ in range(count):
        text = torch.randint(4, PLACEHOLDER, (5,), generator=generator)
        ids = torch.cat([places, text])
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(3, SIZE, SIZE, generator=generator),
                "labels": torch.randint(4, PLACEHOLDER, (6,), generator=generator),
            }
        )
    return rows


def batch_of(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def by_hand(smoothing: float) -> float:
    """The loss of `backwards(4)` in float64, row by row and word by word, by transformers' own
    layers."""
    model = make_bart().double()
    total, words = {1: 0.0, 2: 0.0, 3: 0.0}, 0
    for row in backwards(4):
        length = int(row["attention_mask"].sum())
        labels = row["labels"][: length + 1]
        read = torch.tensor([[START, *labels[:-1].tolist()]])
        made = model(
            input_ids=row["input_ids"][None, :length],
            decoder_input_ids=read,
            output_hidden_states=True,
        )
        for layer in total:
            state = made.decoder_hidden_states[layer][0]
            chances = (model.lm_head(state) + model.final_logits_bias).log_softmax(-1)
            for place, label in enumerate(labels.tolist()):
                own, even = chances[place, label], chances[place].mean()
                total[layer] -= float((1 - smoothing) * own + smoothing * even)
        words += len(labels)
    return sum(total.values()) / words


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_over_layers_worked_out_by_hand(smoothing: float) -> None:
    model = text_model().double()
    method = Mue(label_smoothing=smoothing)
    loss, logits = method.loss(model, model, batch_of(backwards(4)), 0)
    assert loss.item() == pytest.approx(by_hand(smoothing), rel=1e-6)
    assert list(logits) == ["exit_1", "exit_2", "exit_3"]


@torch.no_grad()
def test_without_a_mask_every_token_is_read() -> None:
    model, batch = text_model(), batch_of(backwards(4))
    masked = Mue().loss(model, model, batch, 0)[0]
    batch["attention_mask"].fill_(1)
    unmasked = Mue().loss(model, model, batch, 0)[0]
    del batch["attention_mask"]
    assert torch.equal(Mue().loss(model, model, batch, 0)[0], unmasked)
    assert not torch.isclose(masked, unmasked)


@torch.no_grad()
def test_a_text_that_is_read_but_not_learned_comes_with_the_decoder_s_inputs() -> None:
    model, batch = text_model(), batch_of(backwards(4))
    labels = batch["labels"]
    before = torch.cat([torch.full((4, 1), START), labels[:, :-1]], 1)
    before = before.masked_fill(before == -100, PAD)
    plain = Mue().loss(model, model, batch, 0)[0]
    same = Mue().loss(model, model, {**batch, "decoder_input_ids": before}, 0)[0]
    assert torch.equal(plain, same)
    batch["labels"] = torch.cat([torch.full((4, 1), -100), labels[:, 1:]], 1)
    with pytest.raises(UsageError, match="stands in front of one that is not"):
        Mue().loss(model, model, batch, 0)
    learned = {**batch, "decoder_input_ids": before}
    assert torch.isfinite(Mue().loss(model, model, learned, 0)[0])
    assert Mue().count(model, learned) == Mue().count(model, {"labels": labels}) - 4
    moved = before.clone()
    moved[:, 0] = 7
    assert not torch.equal(
        Mue().loss(model, model, learned, 0)[0],
        Mue().loss(model, model, {**learned, "decoder_input_ids": moved}, 0)[0],
    )


@torch.no_grad()
def test_the_sampled_branches_hand_over_at_every_exit_and_at_the_end() -> None:
    model, method = seeing_model(), Mue(hand_over="sampled")
    drawn = [method.layers(model, step) for step in range(60)]
    assert {(one["text_encoder"], one["image_encoder"]) for one in drawn} == {
        (text, image) for text in (2, 4) for image in (1, 3, 4)
    }
    assert method.layers(model, 7) == method.layers(model, 7)
    last = {"text_encoder": 4, "image_encoder": 4}
    assert method.layers(model, None) == Mue().layers(model, 7) == last


@torch.no_grad()
def test_the_sampled_loss_is_that_of_the_encoder_s_states_at_these_layers() -> None:
    model, batch = seeing_model(), batch_of(seen(3))
    method = Mue(hand_over="sampled")
    step = next(n for n in range(60) if set(method.layers(model, n).values()) == {2, 3})
    loss, logits = method.loss(model, model, batch, step)
    ids, mask, pixels = (batch[n] for n in ("input_ids", "attention_mask", "pixel_values"))
    source = model.encode(ids, mask, layers=2, image_layers=3, images=[pixels])  # type: ignore[call-arg]
    tokens = torch.cat([torch.full((3, 1), END), batch["labels"][:, :-1]], 1)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    wanted = model(tokens, source=source).values()
    targets = batch["labels"].flatten()
    assert torch.isclose(loss, sum(smoothed(own.flatten(0, 1), targets) for own in wanted))  # type: ignore[arg-type]
    assert list(logits)[3:] == ["text_encoder_exit_2", "image_encoder_exit_3"]
    whole = method.loss(model, model, batch, None)
    assert list(whole[1]) == ["exit_1", "exit_3", "exit_4"]
    assert torch.equal(whole[0], Mue().loss(model, model, batch, step)[0])


def test_a_text_model_learns_and_its_exits_are_trained_and_saved(tmp_path: Path) -> None:
    model = text_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    given = {**GIVEN, "max_steps": 40}
    trainer = train(tmp_path, model, Mue(), backwards(64), **given)
    assert losses(trainer)[-1] < losses(trainer)[0]
    unread = {"model.final_logits_bias", "model.model.shared.weight"}  # a buffer; not tied here
    assert {n for n, w in model.state_dict().items() if torch.equal(w, before[n])} == unread
    assert model.exit_origins == {
        "exit_1": "trained",
        "exit_2": "trained",
        "encoder_exit_1": "unknown",
        "encoder_exit_2": "unknown",
    }
    trainer.save_model()
    again = from_pretrained(tmp_path, exits=None)
    assert isinstance(again, ExitEncoderDecoder)
    assert again.exit_origins == model.exit_origins
    tokens = torch.tensor([[START, 5, 6]])
    source = [m.encode(tokens, torch.ones_like(tokens)) for m in (model, again)]
    one, other = (m(tokens, source=own) for m, own in zip((model, again), source, strict=True))
    assert all(torch.equal(one[layer], other[layer]) for layer in (1, 2, 3))


@pytest.mark.parametrize("apart", [True, False])
def test_a_model_that_sees_trains_with_its_images(tmp_path: Path, apart: bool) -> None:
    model = seeing_model(apart)
    rows = seen(16, apart)
    method = Mue(hand_over="sampled")
    trainer = train(tmp_path, model, method, rows, **{**GIVEN, "max_steps": 12})
    assert set(model.exit_origins.values()) == {"trained"}
    assert model.provenance["exits"] == "trained"
    vision_models.make_tokenizer("florence2").save_pretrained(tmp_path)
    vision_models.make_processor("florence2").save_pretrained(tmp_path)
    trainer.save_model()
    again = from_pretrained(tmp_path, exits=None)
    assert type(again) is type(model) and again.exit_origins == model.exit_origins
    weights = again.state_dict()
    assert all(torch.equal(weights[name], own) for name, own in model.state_dict().items())
    batch = batch_of(rows[:4])
    with torch.no_grad():
        found = Mue().loss(model, model, batch, None)[0]
        reread = Mue().loss(again, again, batch, None)[0]  # type: ignore[arg-type]
        assert torch.isclose(found, reread, rtol=1e-6, atol=0.0)  # buffers lie elsewhere
        batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
        assert not torch.isclose(found, Mue().loss(model, model, batch, None)[0])


def test_a_training_goes_on_the_same_when_it_is_resumed(tmp_path: Path) -> None:
    method, rows = Mue(hand_over="sampled"), backwards(64)
    whole, stopped, resumed = (text_model() for _ in range(3))
    train(tmp_path / "whole", whole, method, rows, **GIVEN)
    given = {**GIVEN, "save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(folder, stopped, method, rows, callbacks=[StopAt(4)], **given)
    train(folder, resumed, method, rows, resume=True, **given)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
    assert resumed.exit_origins == whole.exit_origins
    with pytest.raises(UsageError, match="was trained with Mue"):
        train(folder, text_model(), Mue(), rows, resume=True, **given)


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (lambda: decoder([1]), Mue(), "trains encoder-decoders with exits, not ExitDecoder"),
        (text_classifier, Mue(), "trains encoder-decoders with exits, not ExitClassifier"),
        (make_bart, Mue(), "not BartForConditionalGeneration"),
        (lambda: text_model([], [1]), Mue(), "the decoder has no exits"),
        (lambda: text_model([], []), Mue(hand_over="sampled"), "the model has no exits"),
        (lambda: text_model([1], []), Mue(hand_over="sampled"), "the encoder has no exits"),
        (text_model, Mue(hand_over="first"), "hand_over 'first' is not known"),  # type: ignore[arg-type]
        (text_model, Mue(label_smoothing=1.0), "label_smoothing 1.0 is out of range"),
        (text_model, Mue(label_smoothing=math.nan), "label_smoothing nan is out of range"),
        (text_model, Mue(label_smoothing="0.1"), "label_smoothing '0.1' is out of range"),  # type: ignore[arg-type]
    ],
)
def test_models_and_settings_are_refused_when_they_do_not_fit(
    tmp_path: Path, make: Any, method: Mue, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ExitTrainer(make(), method, arguments(tmp_path), train_dataset=backwards(2))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"labels": None}, "no 'labels'"),
    ({"input_ids": None}, "no 'input_ids'"),
    ({"labels": torch.ones(4, 8)}, "labels are float32, not whole numbers"),
    ({"labels": torch.ones(4, dtype=torch.long)}, r"labels have the shape \[4\]"),
    ({"labels": torch.ones(3, 8, dtype=torch.long)}, r"input_ids has 4 rows, labels have 3"),
    ({"labels": torch.ones(4, 65, dtype=torch.long)}, "has 65 labels, the decoder has 64"),
    ({"labels": torch.full((4, 8), VOCABULARY)}, f"labels has the value {VOCABULARY}"),
    ({"input_ids": torch.ones(4, 7)}, "input_ids are float32"),
    ({"input_ids": torch.full((4, 7), -1)}, "input_ids has the value -1"),
    ({"input_ids": torch.ones(4, dtype=torch.long)}, r"input_ids has the shape \[4\]"),
    ({"attention_mask": torch.ones(4, 8)}, r"with a mask \[4, 8\]"),
    ({"attention_mask": torch.arange(7).expand(4, 7) // 3}, "padding before a token"),
    ({"decoder_input_ids": torch.ones(4, 7)}, r"decoder_input_ids has the shape \[4, 7\]"),
    ({"decoder_input_ids": torch.full((4, 8), 99)}, "decoder_input_ids has the value 99"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_a_batch_is_refused_with_a_reason(changed: dict[str, Any], message: str) -> None:
    model = text_model()
    batch = {**batch_of(backwards(4)), **changed}
    batch = {name: value for name, value in batch.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        Mue().loss(model, model, batch, 0)


def test_a_source_is_refused_when_it_is_longer_than_the_encoder_reads() -> None:
    model, ids = text_model(), torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(UsageError, match="a row has 65 tokens, the encoder reads at most 64"):
        Mue().loss(model, model, {"input_ids": ids, "labels": ids[:, :3]}, 0)


@pytest.mark.parametrize(
    ("apart", "changed", "message"),
    [
        (True, {"pixel_values": torch.zeros(4, 3, 8, 8)}, "pixel_values are float32"),
        (True, {"pixel_values": torch.zeros(3, 3, SIZE, SIZE)}, "has 4 rows and 3 images"),
        (True, {"input_ids": torch.full((4, 5), PLACEHOLDER)}, "reads images and texts apart"),
        (False, {"pixel_values": torch.zeros(3, 3, SIZE, SIZE)}, "places for 4 images"),
    ],
)
def test_images_are_refused_when_they_do_not_fit(
    apart: bool, changed: dict[str, torch.Tensor], message: str
) -> None:
    model = seeing_model(apart)
    with pytest.raises(UsageError, match=message):
        Mue().loss(model, model, {**batch_of(seen(4, apart)), **changed}, 0)


def test_without_a_label_nothing_is_trained_or_called_so(tmp_path: Path) -> None:
    model, rows = text_model(), backwards(8)
    rows = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows]
    train(tmp_path, model, Mue(), rows, **GIVEN)
    assert set(model.exit_origins.values()) == {"unknown"}
