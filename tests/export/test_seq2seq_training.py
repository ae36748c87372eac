"""Adapters of encoder-decoders in training: batches as transformers' seq2seq models take them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.families import bart, t5
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.free import Free
from edgeexit.export.methods.layerskip import LayerSkip
from edgeexit.export.methods.sources import shifted
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained
from tests.encoder_decoders import END, FAMILIES, PAD, POSITIONS
from tests.encoder_decoders import save_checkpoint as save_texts
from tests.training import arguments, train
from tests.vision_models import PLACEHOLDER, save_checkpoint

GIVEN = {"max_steps": 6, "learning_rate": 5e-3, "per_device_train_batch_size": 8}


def adapted(family: str = "bart") -> ExitEncoderDecoder:
    model, module = FAMILIES[family](), bart if family == "bart" else t5
    return ExitEncoderDecoder(model, *module.trunk(model), [1, 2], adapters=[1, 2])  # type: ignore[arg-type]


def backwards(count: int) -> list[dict[str, torch.Tensor]]:
    """Sources of 3 to 8 tokens with padding behind, and the same backwards with an end."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(4, 14, (length,), generator=generator)
        fill = torch.full((8 - length,), PAD)
        labels = torch.cat([ids.flip(0), torch.tensor([END]), torch.full_like(fill, -100)])
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(fill)])
        rows.append({"input_ids": torch.cat([ids, fill]), "attention_mask": mask, "labels": labels})
    return rows


def batch_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("family", ["bart", "t5-1.1"])
@pytest.mark.parametrize(
    "method", [AdapterDistillation(), Free(), Free(supervision="distillation", adversary=0.0)]
)
def test_adapters_learn_and_the_model_stays_bit_for_bit(
    tmp_path: Path, family: str, method: AdapterDistillation
) -> None:
    model, held_out = adapted(family), batch_of(backwards(8))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        at_first = float(method.loss(model, model, held_out, None)[0])
    train(tmp_path, model, method, backwards(48), **{**GIVEN, "max_steps": 20})
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) != name.startswith("adapters."), name
    with torch.no_grad():
        assert float(method.loss(model, model, held_out, None)[0]) < at_first
    assert model.exit_origins == {"exit_1": "trained", "exit_2": "trained"}
    assert model.provenance == {"exits": "trained", "adapters": "trained"}


def test_the_text_is_that_of_transformers(tmp_path: Path) -> None:
    """Its loss of the same batch, from the logits of the last layer."""
    model, batch = adapted(), batch_of(backwards(8))
    with torch.no_grad():
        expected = model.model(**batch)  # type: ignore[operator]
        _, logits = AdapterDistillation().loss(model, model, batch, None)
    torch.testing.assert_close(logits["exit_3"], expected.logits, atol=1e-4, rtol=1e-4)
    labels, start = batch["labels"], model.encoder.trunk.start_tokens[0]
    made = shifted(labels, start, PAD)
    assert torch.equal(made, model.model.prepare_decoder_input_ids_from_labels(labels))  # type: ignore[operator]
    given = AdapterDistillation().loss(model, model, batch | {"decoder_input_ids": made}, None)
    assert torch.equal(given[0], AdapterDistillation().loss(model, model, batch, None)[0])
    assert AdapterDistillation().count(model, batch) == (labels != -100).sum()


def test_padding_of_the_source_is_not_read() -> None:
    model, batch = adapted(), batch_of(backwards(8))
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)}
    method = AdapterDistillation()
    assert torch.equal(
        method.loss(model, model, batch, None)[0], method.loss(model, model, other, None)[0]
    )


def test_a_training_is_resumed(tmp_path: Path) -> None:
    rows = backwards(48)
    whole, stopped, resumed = (adapted() for _ in range(3))
    train(tmp_path / "whole", whole, Free(), rows, **GIVEN)
    given = {**GIVEN, "save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "parts", stopped, Free(), rows, **given)
    args = arguments(tmp_path / "parts", **given)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    ExitTrainer(resumed, Free(), args, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
    read = from_pretrained(checkpoint)
    assert isinstance(read, ExitEncoderDecoder) and read.adapter_sizes == {1: 1, 2: 1}
    model = FAMILIES["bart"]()
    fewer = ExitEncoderDecoder(model, *bart.trunk(model), [1, 2], adapters=[1])  # type: ignore[arg-type]
    trainer = ExitTrainer(fewer, Free(), args, train_dataset=rows)
    with pytest.raises(ExportError, match="has adapters .* Resume with the checkpoint's exits"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_transformers_collator_pads_the_rows(tmp_path: Path) -> None:
    rows = [
        {name: row[name][row[name] >= 0].tolist() for name in ("input_ids", "labels")}
        for row in backwards(16)
    ]

    save_texts(FAMILIES["bart"](), tmp_path / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    args = arguments(tmp_path / "out", **GIVEN)
    model = adapted()
    trainer = ExitTrainer(
        model, AdapterDistillation(), args, train_dataset=rows, data_collator=collator
    )
    trainer.train()
    assert model.exit_origins["exit_1"] == "trained"


def test_florence_2_trains_with_its_images(tmp_path: Path) -> None:
    save_checkpoint("florence2", tmp_path / "checkpoint")
    model = from_pretrained(tmp_path / "checkpoint", exits=[1], adapters=[1], untrained=True)
    tokens, size = model.whole.tower.tokens, model.tower.trunk.pixels[1]  # type: ignore[union-attr]
    ids = torch.tensor([*[PLACEHOLDER] * tokens, 7, 8, 9])
    rows = [
        {
            "input_ids": ids,
            "labels": torch.tensor([5, 6, 0]),
            "pixel_values": torch.randn(3, size, size),
        }
        for _ in range(16)
    ]
    before = copy.deepcopy(model.adapters.state_dict())  # type: ignore[union-attr]
    train(tmp_path / "out", model, Free(adversary=0.0), rows, **{**GIVEN, "max_steps": 2})
    after = model.adapters.state_dict()  # type: ignore[union-attr]
    assert not any(torch.equal(weight, before[name]) for name, weight in after.items())
    method, batch = AdapterDistillation(), batch_of(rows[:4])
    with pytest.raises(UsageError, match="have places for 4 images, and it has 2"):
        fewer = batch | {"pixel_values": batch["pixel_values"][:2]}
        method.loss(model, model, fewer, None)  # type: ignore[arg-type]
    del batch["pixel_values"]
    with pytest.raises(UsageError, match="has no 'pixel_values'"):
        method.loss(model, model, batch, None)  # type: ignore[arg-type]


class Features(ExitEncoderDecoder):
    """A model whose encoder reads features instead of token ids, as speech models do."""

    source_columns = ("input_features",)  # type: ignore[assignment]

    def encode_columns(self, columns: Any) -> tuple[torch.Tensor, ...]:
        features = columns["input_features"]
        every = torch.ones(features.shape[:2], dtype=torch.int64)
        return self.encode(features, every)

    def embed_source(self, input_ids: torch.Tensor, *images: torch.Tensor) -> torch.Tensor:
        return input_ids * 0.5


def test_a_model_may_embed_other_inputs(tmp_path: Path) -> None:
    bart_model = FAMILIES["bart"]()
    model = Features(bart_model, *bart.trunk(bart_model), [1], adapters=[1])  # type: ignore[arg-type]
    rows = [
        {"input_features": torch.randn(6, 32), "labels": row["labels"]} for row in backwards(16)
    ]
    before = copy.deepcopy(model.adapters.state_dict())
    train(tmp_path, model, AdapterDistillation(), rows, **GIVEN)
    after = model.adapters.state_dict()
    assert not any(torch.equal(weight, before[name]) for name, weight in after.items())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"labels": None}, "has no 'labels'"),
    "no source": ({"input_ids": None}, "has no 'input_ids'"),
    "one label a row": ({"labels": torch.tensor([5, 6])}, r"shape \[2\], not \[batch, tokens\]"),
    "label": ({"labels": torch.tensor([[5, 99], [6, 7]])}, "labels has the value 99"),
    "labels of floats": ({"labels": torch.rand(2, 3)}, "labels are float32"),
    "source id": ({"input_ids": torch.tensor([[5, 6], [6, -2]])}, "input_ids has the value -2"),
    "rows": ({"labels": torch.tensor([[5, 6]])}, "input_ids has 2 rows, labels have 1"),
    "mask": ({"attention_mask": torch.ones(2, 5)}, r"\[2, 2\] with a mask \[2, 5\]"),
    "long source": ({"input_ids": torch.full((2, POSITIONS + 1), 5)}, "reads at most 64"),
    "long text": ({"labels": torch.full((2, POSITIONS + 1), 5)}, "the decoder has 64 positions"),
    "decoder's ids": ({"decoder_input_ids": torch.full((2, 5), 5)}, "labels .* made of the labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_batches_that_cannot_be_are_refused(case: str) -> None:
    changes, message = WRONG[case]
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 6], [7, 8]]),
        "labels": torch.tensor([[5, 6, 2], [7, 8, 2]]),
    }
    batch = {name: value for name, value in (batch | changes).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        AdapterDistillation().loss(adapted(), lambda *a, **b: None, batch, 0)


def test_other_methods_and_models_without_adapters_are_refused() -> None:
    with pytest.raises(UsageError, match="LayerSkip trains .* without an encoder"):
        LayerSkip().check(adapted())
    model = FAMILIES["bart"]()
    without = ExitEncoderDecoder(model, *bart.trunk(model), [1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the decoder has no adapters"):
        AdapterDistillation().check(without)
