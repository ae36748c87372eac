"""States that are computed once: training on them is training on the texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from edgeexit.errors import UsageError
from edgeexit.export.exits.encoder_decoder import ENCODED, READ
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.free import Free
from edgeexit.export.methods.kept_states import collate, keep_states
from edgeexit.export.methods.training import ExitTrainer
from tests.export.test_seq2seq_training import adapted, backwards, batch_of
from tests.training import arguments, decoder

VOCABULARY = [*range(0, 40, 2)]


def texts() -> dict[str, torch.Tensor]:
    """Three texts of different lengths, of which the first tokens are not learnt."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 40, (n,), generator=generator) for n in (9, 5, 7)]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def both() -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    yield decoder([1, 2], [1, 2]), texts()
    yield adapted("bart"), batch_of(backwards(6))


@pytest.mark.parametrize("method", [AdapterDistillation(), Free(adversary=0.0)])
@pytest.mark.parametrize("which", [0, 1])
def test_the_loss_is_that_of_the_texts(tmp_path: Path, which: int, method: Any) -> None:
    model, batch = list(both())[which]
    rows = keep_states(model, [batch], tmp_path)
    kept = collate([rows[n] for n in range(len(rows))])
    expected, _ = method.loss(model, model, batch, None)
    found, _ = method.loss(model, model, kept, None)
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)  # float16
    assert method.count(model, kept) == method.count(model, batch)


def test_only_the_adapters_and_the_head_run(tmp_path: Path, monkeypatch: Any) -> None:
    model = decoder([1, 2], [1, 2])
    rows = keep_states(model, [texts()], tmp_path)
    monkeypatch.setattr(model, "_each_state", None)
    loss, logits = AdapterDistillation().loss(model, model, collate([rows[0], rows[2]]), None)
    assert torch.isfinite(loss) and logits["exit_1"].shape[:2] == (2, 8)


def test_the_loss_is_over_the_draft_vocabulary() -> None:
    model, batch = decoder([1, 2], [1, 2]), texts()
    model.set_draft_vocabularies({1: VOCABULARY})
    with torch.no_grad():
        logits = model(batch["input_ids"][:, :-1], exits=[1, 2, model.depth])
        found, _ = AdapterDistillation().loss(model, model, batch, None)
    targets = batch["labels"][:, 1:].flatten() != -100
    losses = []
    for layer, chosen in ((1, VOCABULARY), (2, slice(None))):
        own, last = (logits[n][..., chosen].flatten(0, 1)[targets] for n in (layer, model.depth))
        losses.append(functional.cross_entropy(own, last.softmax(-1)))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    model.set_draft_vocabularies({1: VOCABULARY, 2: VOCABULARY[:7]})
    with torch.no_grad():
        found, made = AdapterDistillation().loss(model, model, batch, None)
    assert made["exit_1"].shape[-1] == len(VOCABULARY)
    own, last = (logits[n][..., VOCABULARY[:7]].flatten(0, 1)[targets] for n in (2, model.depth))
    losses[1] = functional.cross_entropy(own, last.softmax(-1))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_adapters_learn_from_kept_states(tmp_path: Path) -> None:
    model = decoder([1, 2], [1, 2])
    before = copy.deepcopy(model.state_dict())
    rows = keep_states(model, [texts()], tmp_path / "states")
    args = arguments(tmp_path, max_steps=60, learning_rate=5e-3, per_device_train_batch_size=3)
    trainer = ExitTrainer(
        model, AdapterDistillation(), args, train_dataset=rows, data_collator=collate
    )
    at_first = AdapterDistillation().loss(model, model, texts(), None)[0].item()
    trainer.train()
    assert (
        AdapterDistillation().loss(model, model, texts(), None)[0].item() < at_first - 0.2
    )  # of texts without sense
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) != name.startswith("adapters."), name


def test_files_of_the_same_texts_and_model_are_not_written_again(tmp_path: Path) -> None:
    model, batch = decoder([1, 2], [1, 2]), texts()
    keep_states(model, [batch], tmp_path)
    [path] = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    keep_states(model, [batch], tmp_path)
    assert path.stat().st_mtime_ns == written
    model.adapters["exit_1"][0].requires_grad_(True)
    with torch.no_grad():
        next(model.adapters.parameters()).add_(1.0)  # adapters are not part of it
    keep_states(model, [batch], tmp_path)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-20])  # cut off
    keep_states(model, [batch], tmp_path)
    assert (written := path.stat().st_mtime_ns) and len(keep_states(model, [batch], tmp_path)) == 3
    with torch.no_grad():
        model.trunk.embedding.mul_(1.5)
    keep_states(model, [batch], tmp_path)
    assert path.stat().st_mtime_ns > written


def test_what_the_encoder_gave_may_stand_in_the_batch(tmp_path: Path) -> None:
    model, batch = adapted("bart"), batch_of(backwards(6))
    source = {name: batch[name] for name in model.source_columns if name in batch}
    with torch.no_grad():
        encoded, read = model.encode_columns(source)
    given = {ENCODED: encoded, READ: read, "labels": batch["labels"]}
    expected = AdapterDistillation().loss(model, model, batch, None)[0].item()
    assert AdapterDistillation().loss(model, model, given, None)[0].item() == expected
    rows = keep_states(model, [given], tmp_path)
    kept = collate([rows[n] for n in range(len(rows))])
    found = AdapterDistillation().loss(model, model, kept, None)[0].item()
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("state_1"), "a batch has no state_1 for texts of 8 tokens"),
        (lambda batch: batch.update(state_1=batch["state_1"][:, :3]), r"\[2, 3, \d+\] of state_1"),
    ],
)
def test_states_of_other_texts_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = decoder([1, 2], [1, 2])
    rows = keep_states(model, [texts()], tmp_path)
    batch = collate([rows[0], rows[1]])
    change(batch)
    with pytest.raises(UsageError, match=message):
        AdapterDistillation().loss(model, model, batch, 0)


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    model = decoder([1, 2], [1, 2])
    with pytest.raises(UsageError, match="there is no batch"):
        keep_states(model, [], tmp_path)
    with torch.no_grad():
        model.trunk.embedding.mul_(1e6)
    with pytest.raises(UsageError, match="exceed what float16 holds"):
        keep_states(model, [texts()], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
