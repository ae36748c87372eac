"""Data and arguments that a training cannot use give an error that names them; and an
encoder-decoder can be trained with a method of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.families import bart, bert
from edgeexit.export.methods.checkpoints import load_weights
from edgeexit.export.methods.joint import Joint
from edgeexit.export.methods.layerskip import LayerSkip
from edgeexit.export.methods.method import Batch, Forward, Loss, Method
from edgeexit.export.methods.training import ExitTrainer
from tests.checkpoints import CLASSES, make_model
from tests.decoders import VOCABULARY
from tests.encoder_decoders import make_bart
from tests.training import arguments, counting, decoder, first_word, losses, text_classifier, train

Row = dict[str, torch.Tensor]


def without(row: Row, name: str) -> Row:
    return {key: value for key, value in row.items() if key != name}


OF_CLASSIFIER: dict[str, tuple[Callable[[Row], Row], str]] = {
    "float": (lambda r: r | {"labels": r["labels"].float()}, "labels are float32, not whole"),
    "column": (lambda r: r | {"labels": r["labels"][None]}, r"shape \[16, 1\], not \[16\]"),
    "one-hot": (
        lambda r: r | {"labels": functional.one_hot(r["labels"], CLASSES)},
        r"shape \[16, 3\], not \[16\].*argmax",
    ),
    "too large": (lambda r: r | {"labels": 0 * r["labels"] + 50}, "value 50, the model has 0 to 2"),
    "negative": (lambda r: r | {"labels": 0 * r["labels"] - 100}, "labels has the value -100"),
    "texts": (lambda r: r | {"labels": "good"}, "labels of a row is the text 'good', not a number"),
    "empty": (lambda r: r | {"labels": None}, r"labels of a row is missing \(None\)"),
    "types": (
        lambda r: r | {"token_type_ids": r["token_type_ids"] + 9},
        "token_type_ids has the value 9, the model has 0 to 1",
    ),
    "none": (lambda r: without(r, "labels"), "a batch has no 'labels'"),
    "no mask": (lambda r: without(r, "attention_mask"), "a batch has no 'attention_mask'"),
    "ids": (lambda r: r | {"input_ids": r["input_ids"] + 1000}, "input_ids has the value 10"),
    "float ids": (lambda r: r | {"input_ids": r["input_ids"].float()}, "input_ids are float32"),
    "flat": (lambda r: r | {"input_ids": r["input_ids"][0]}, r"input_ids has the shape \[16\]"),
    "long": (
        lambda r: {k: v if k == "labels" else v.repeat(20) for k, v in r.items()},
        "input_ids: seq is 120, the model takes at most",
    ),
    "ragged": (
        lambda r: r | {"input_ids": r["input_ids"][: 3 + int(r["labels"])]},
        "rows cannot be put into one batch .*DataCollatorWithPadding",
    ),
}

OF_DECODER: dict[str, tuple[Callable[[Row], Row], str]] = {
    "labels": (lambda r: r | {"labels": r["input_ids"][:5]}, r"shape \[16, 5\], not \[16, 13\]"),
    "mask": (lambda r: r | {"attention_mask": torch.ones(4)}, "attention_mask has the shape"),
    "float": (lambda r: r | {"labels": r["input_ids"].float()}, "labels are float32"),
    "range": (
        lambda r: {"input_ids": r["input_ids"] + VOCABULARY},
        r"input_ids has the value 3\d\d, ",
    ),
    "targets": (lambda r: r | {"labels": r["input_ids"] - 90}, "labels has the value -.*-100 mark"),
    "one": (lambda r: {"input_ids": r["input_ids"][:1]}, "have one token"),
    "long": (lambda r: {"input_ids": r["input_ids"].repeat(9)}, "117 tokens, the model has 96"),
    "number": (lambda r: {"input_ids": r["input_ids"][0]}, r"shape \[16\], not \[batch, tokens\]"),
}


@pytest.mark.parametrize("kind", OF_CLASSIFIER)
def test_rows_that_a_classifier_cannot_learn_from_are_refused(kind: str, tmp_path: Path) -> None:
    change, words = OF_CLASSIFIER[kind]
    rows = [change(row) for row in first_word(16)]
    with pytest.raises(UsageError, match=words) as caught:
        train(tmp_path, text_classifier(), Joint(), rows, max_steps=1)
    assert caught.value.fix


@pytest.mark.parametrize("kind", OF_DECODER)
def test_rows_that_a_decoder_cannot_learn_from_are_refused(kind: str, tmp_path: Path) -> None:
    change, words = OF_DECODER[kind]
    rows = [change(row) for row in counting(16)]
    with pytest.raises(UsageError, match=words) as caught:
        train(tmp_path, decoder([1, 2]), LayerSkip(), rows, max_steps=1)
    assert caught.value.fix


def test_labels_of_any_whole_type_train_alike(tmp_path: Path) -> None:
    found = []
    for kind in (torch.int64, torch.int32, torch.uint8):
        rows = [row | {"labels": row["labels"].to(kind)} for row in first_word(16)]
        found.append(losses(train(tmp_path, text_classifier(0.0), Joint(), rows, max_steps=1)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"method": Joint}, "the method is Joint. Give a method, as in"),
        ({"args": None}, "args is a NoneType"),
        ({"model": make_model("bert")}, "not BertForSequenceClassification. Give it exits"),
        ({"model": decoder([1])}, "not ExitDecoder. Use LayerSkip"),
        ({"train_dataset": "rows.jsonl"}, "train_dataset is 'rows.jsonl', not a data set"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": []}, "train_dataset has no rows"),
        ({"train_dataset": iter([])}, "is a list_iterator, which can be read only once"),
        ({"train_dataset": {"train": []}}, r"is a dictionary \(train\), not a list of rows"),
        ({"train_dataset": 5}, "train_dataset is a int, not a data set"),
        ({"method": Joint(weights="ab")}, "weights 'ab' are invalid"),  # type: ignore[arg-type]
        ({"method": Joint(weights=[None, 1, 1])}, "are invalid. Give a list of 3"),  # type: ignore[list-item]
        ({"method": Joint(distillation="x")}, "distillation 'x' is out of range"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_kind_are_refused(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    usual: dict[str, Any] = {
        "model": text_classifier(),
        "method": Joint(),
        "args": arguments(tmp_path),
        "train_dataset": first_word(16),
    }
    with pytest.raises(UsageError, match=words):
        ExitTrainer(**(usual | given)).train()


def test_an_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    with pytest.raises(UsageError, match="eval_strategy is 'steps', but there is no eval_dataset"):
        ExitTrainer(text_classifier(), Joint(), args, train_dataset=first_word(16))


def test_token_types_are_zero_when_rows_have_none(tmp_path: Path) -> None:
    rows = first_word(16)
    bare = [without(row, "token_type_ids") for row in rows]
    found = [
        losses(train(tmp_path, text_classifier(0.0), Joint(), given, max_steps=1))
        for given in (rows, bare)
    ]
    assert found[0] == found[1]


def test_a_model_without_exits_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("bert")
    bare = ExitClassifier(model, bert.trunk(model), [])  # type: ignore[arg-type]
    ExitTrainer(bare, Joint(), arguments(tmp_path))
    assert "the model has no exits" in caplog.text


def test_training_twice_goes_on_from_the_first(tmp_path: Path) -> None:
    trainer = train(tmp_path, text_classifier(0.0), Joint(), first_word(16), max_steps=3)
    first = losses(trainer)
    trainer.train()
    assert losses(trainer)[0] < first[0]


@dataclass(frozen=True)
class Reading(Method):
    """Teacher forcing of an encoder-decoder, all exits alike."""

    def check(self, model: Any) -> None:
        pass

    def inputs(self, model: Any) -> list[str]:
        return ["input_ids"]

    def loss(self, model: Any, forward: Forward, inputs: Batch, step: int | None) -> Loss:
        ids = inputs["input_ids"]
        logits = forward(ids[:, :-1], source=model.encode(ids, torch.ones_like(ids)))
        each = [
            functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten()) for z in logits.values()
        ]
        return torch.stack(each).mean(), {f"exit_{layer}": z for layer, z in logits.items()}

    def trains(self, model: Any) -> list[str]:
        return [f"exit_{layer}" for layer in model.exit_layers]


def make_reader(encoder_exits: list[int]) -> ExitEncoderDecoder:
    model = make_bart()
    return ExitEncoderDecoder(model, *bart.trunk(model), [1, 2], encoder_exits)


def test_an_encoder_decoder_is_trained_with_its_scaled_embedding(tmp_path: Path) -> None:
    model = make_reader([1])
    before = model.trunk.embedding.detach().clone()
    rows = [{"input_ids": row["input_ids"] + 3} for row in counting(16)]
    given: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2}
    trainer = train(tmp_path, model, Reading(), rows, **given)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not torch.equal(before, model.trunk.embedding)
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        mask = torch.ones_like(ids)
        own = model(ids, source=model.encode(ids, mask))[model.depth]
        whole = model.model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits  # type: ignore[operator]
    torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-4)
    table = next(step for step in model.split_model().steps if getattr(step, "ids", "") == "tokens")
    trained = model.trunk.embedding.detach()
    torch.testing.assert_close(table.weight, trained * model.trunk.embedding_scale)  # type: ignore[union-attr]
    trainer.save_model()
    load_weights(make_reader([1]), tmp_path)
    with pytest.raises(ExportError, match=r"behind layers of the encoder \[1\], the model"):
        load_weights(make_reader([2]), tmp_path)
