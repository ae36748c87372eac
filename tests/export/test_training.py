"""The trainer: resumption, several processes, precision, accumulation, checkpoints, refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import EvalPrediction

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.families import vit
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.checkpoints import last_checkpoint
from edgeexit.export.methods.joint import Joint
from edgeexit.export.methods.layerskip import LayerSkip
from edgeexit.export.methods.method import Method
from edgeexit.export.methods.training import ExitTrainer
from edgeexit.export.pretrained import from_pretrained
from tests.checkpoints import make_model
from tests.training import (
    Rows,
    StopAt,
    arguments,
    counting,
    decoder,
    first_word,
    in_all_processes,
    losses,
    text_classifier,
    train,
)

ROOT = Path(__file__).parent.parent.parent
Maker = Callable[[], ExitClassifier | ExitDecoder]
LAYERSKIP = LayerSkip(dropout=0.5, weights={1: 1.0, 2: 0.5})


class Stream(IterableDataset):
    """Rows without end, as a data set has them that is read from elsewhere."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.cycle(first_word(100))


TRAININGS: dict[str, tuple[Maker, Method, Rows | IterableDataset]] = {
    "stream": (text_classifier, Joint(), Stream()),
    "joint": (text_classifier, Joint(distillation=0.5), first_word(80)),
    "heads": (text_classifier, Joint(freeze_backbone=True), first_word(80)),
    "layerskip": (lambda: decoder([1, 2], [1]), LAYERSKIP, counting(80)),
    "adapters": (lambda: decoder([1, 2], [1]), AdapterDistillation(), counting(80)),
}


def assert_equal(left: torch.nn.Module, right: torch.nn.Module) -> None:
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(left: torch.nn.Module, right: dict[str, torch.Tensor], atol: float) -> None:
    one = left.state_dict()
    assert one.keys() == right.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", TRAININGS)
def test_training_gives_the_same_weights_when_interrupted_and_resumed(
    kind: str, tmp_path: Path
) -> None:
    make, method, rows = TRAININGS[kind]
    given: dict[str, Any] = {"max_steps": 8, "learning_rate": 1e-2, "warmup_steps": 2}
    whole = make()
    expected = losses(train(tmp_path / "whole", whole, method, rows, **given))
    given |= {"save_strategy": "steps", "save_steps": 3}
    cut = make()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", cut, method, rows, **given, callbacks=[StopAt(5)])
    assert "exits" not in cut.provenance and not cut.training
    assert all(parameter.requires_grad for parameter in cut.parameters())
    torch.manual_seed(99)  # the checkpoint brings its own random numbers, for dropout
    again = make()
    trainer = train(tmp_path / "cut", again, method, rows, **given, resume=True)
    assert losses(trainer) == expected
    assert_equal(again, whole)
    assert len(expected) == 8
    torch.manual_seed(99)
    ended = make()
    trainer = train(tmp_path / "cut", ended, method, rows, **given, resume=True)
    assert trainer.state.global_step == 8
    assert_equal(ended, whole)
    assert "trained" in ended.provenance.values()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """With DistributedDataParallel, and sharded by FSDP; rows have different numbers of tokens."""
    names = ["joint-ddp", "layerskip-ddp", "free-ddp"]
    if int(transformers.__version__.split(".")[0]) >= 5:  # before, FSDP is one that needs GPUs
        names.append("layerskip-fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training", str(tmp_path), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in names:
        kind = name.split("-")[0]
        first, second = (torch.load(tmp_path / name / f"rank-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        alone = in_all_processes(tmp_path / "alone", kind, 16)
        assert_close(alone.exits, first, atol=1e-5)
        assert_close(from_pretrained(tmp_path / name), first, atol=0)


def test_accumulated_batches_equal_a_bigger_one(tmp_path: Path) -> None:
    """Although they have different numbers of tokens."""
    whole = in_all_processes(tmp_path, "layerskip", 16)
    parts = in_all_processes(tmp_path, "layerskip", 4, gradient_accumulation_steps=4)
    assert_close(parts.exits, whole.exits.state_dict(), atol=1e-5)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_bfloat16_is_that_of_the_training_and_not_left_in_the_model(tmp_path: Path) -> None:
    """A second training of the same model is in bfloat16 as well."""
    model = decoder([1, 2])
    seen: set[torch.dtype] = set()
    model.model.lm_head.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    for _ in range(2):
        seen.clear()
        trainer = train(tmp_path, model, LAYERSKIP, counting(32), max_steps=2, bf16=True)
        assert seen == {torch.bfloat16}
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        ids = counting(1)[0]["input_ids"][None]
        torch.testing.assert_close(
            model(ids)[4], model.model(ids).logits, rtol=0, atol=1e-5, check_dtype=True
        )
    exact = train(tmp_path, decoder([1, 2]), LAYERSKIP, counting(32), max_steps=1)
    assert losses(trainer)[0] != losses(exact)[0]


def test_training_stops_with_the_weights_as_they_were_when_the_loss_is_not_finite(
    tmp_path: Path,
) -> None:
    class Poisoned(Joint):
        def loss(self, model: Any, forward: Any, inputs: Any, step: int | None) -> Any:
            loss, logits = super().loss(model, forward, inputs, step)
            return loss * (float("nan") if step == 1 else 1.0), logits

    classifier = text_classifier()
    with pytest.raises(ExportError, match="loss of step 2 is nan. Lower the learning rate"):
        train(tmp_path, classifier, Poisoned(), first_word(48), max_steps=3)
    assert all(parameter.isfinite().all() for parameter in classifier.parameters())
    assert not classifier.trained


def test_evaluation_gives_the_logits_of_every_exit_and_the_best_weights_are_kept(
    tmp_path: Path,
) -> None:
    classifier, held_out = text_classifier(), first_word(16, seed=5)

    def accuracies(found: EvalPrediction) -> dict[str, float]:
        labels = found.label_ids
        return {f"{n}": float((one.argmax(-1) == labels).mean()) for n, one in enumerate(found[0])}

    # Steps so large that it gets worse: the first checkpoint is the best.
    given = {"max_steps": 4, "learning_rate": 0.5, "eval_steps": 1, "save_steps": 1}
    given |= {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    args = arguments(tmp_path, **given, lr_scheduler_type="constant")
    rows = [row | {"text": "not read"} for row in first_word(64)]
    trainer = ExitTrainer(
        classifier,
        Joint(),
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        compute_metrics=accuracies,
    )
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(found, key=lambda entry: entry["eval_loss"])
    assert best is not found[-1]
    assert_equal(from_pretrained(tmp_path / f"checkpoint-{best['step']}"), classifier)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(best["eval_loss"])
    expected = accuracies(trainer.predict(held_out))  # type: ignore[arg-type]
    assert [metrics[f"eval_{n}"] for n in range(3)] == list(expected.values())
    logits = classifier(**{k: torch.stack([r[k] for r in held_out]) for k in held_out[0]})
    for one, other in zip(trainer.predict(held_out).predictions, logits, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other)


def test_an_evaluation_asks_every_exit_of_a_decoder(tmp_path: Path) -> None:
    model = decoder([1, 2])
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = ExitTrainer(model, LAYERSKIP, args, eval_dataset=counting(4))
    ids = torch.stack([row["input_ids"] for row in counting(4)])
    each = trainer.predict(counting(4)).predictions
    for one, other in zip(each, model(ids[:, :-1]).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other)
    nats = [
        torch.nn.functional.cross_entropy(torch.from_numpy(one).flatten(0, 1), ids[:, 1:].flatten())
        for one in each
    ]
    expected = (1.0 * nats[0] + 0.5 * nats[1] + nats[2]) / 2.5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_saved_models_are_read_with_their_exits(tmp_path: Path) -> None:
    model = make_model("vit")
    classifier = ExitClassifier(model, vit.trunk(model, (8, 12)), [1, 2])
    images = torch.randn(16, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": n % 3} for n, image in enumerate(images)]
    trainer = train(tmp_path / "vit", classifier, Joint(), rows, max_steps=1)  # type: ignore[arg-type]
    trainer.save_model()
    assert_equal(from_pretrained(tmp_path / "vit"), classifier)
    trainer = train(tmp_path, decoder([1, 2], [1]), LAYERSKIP, counting(16), max_steps=1)
    trainer.save_model(str(tmp_path / "llama"))
    read = from_pretrained(tmp_path / "llama")
    assert_equal(read, trainer.exits)
    assert read.provenance["adapters"] == "trained"


def test_matrices_decay_and_nothing_else(tmp_path: Path) -> None:
    model = make_model("vit")
    classifier = ExitClassifier(model, vit.trunk(model, (8, 12)), [1])
    trainer = ExitTrainer(classifier, Joint(), arguments(tmp_path, weight_decay=0.1))
    decays, stays = trainer.create_optimizer().param_groups
    assert decays["weight_decay"] == 0.1 and stays["weight_decay"] == 0.0
    assert len(decays["params"]) + len(stays["params"]) == len(list(classifier.parameters()))
    assert all(one.ndim > 1 and len(one) > 1 for one in decays["params"])
    base = classifier.model.vit.embeddings
    ids = set(map(id, stays["params"]))
    assert {id(base.cls_token), id(base.position_embeddings)} <= ids


def test_resuming_is_refused_when_the_checkpoint_does_not_fit(tmp_path: Path) -> None:
    make, method, rows = TRAININGS["layerskip"]
    given: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(UsageError, match=r"there is no checkpoint to resume from. Train without"):
        train(tmp_path, make(), method, rows, **given, resume=True)
    train(tmp_path, make(), method, rows, **given)
    with pytest.raises(UsageError, match=r"checkpoint-2: the checkpoint was trained with Layer"):
        train(tmp_path, make(), LayerSkip(dropout=0.1), rows, **given, resume=True)
    with pytest.raises(ExportError, match=r"behind layers \[1, 2\], the model \[2, 3\]"):
        other = LayerSkip(dropout=0.5, weights={2: 1.0, 3: 0.5})
        (tmp_path / "checkpoint-2/method.txt").write_text(f"{other}\n")
        train(tmp_path, decoder([2, 3]), other, rows, **given, resume=True)
    with pytest.raises(UsageError, match="nowhere: not a checkpoint to resume from"):
        train(tmp_path, make(), method, rows, **given, resume=str(tmp_path / "nowhere"))
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()  # as if its writing was interrupted
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    weights = tmp_path / "checkpoint-1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExportError, match="checkpoint-1: not a checkpoint of this model"):
        train(tmp_path, make(), method, rows, **given, resume=True)


@pytest.mark.parametrize("given", [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}])
def test_training_arguments_are_refused_when_they_have_no_meaning_here(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(given))} is not supported with exits"):
        train(tmp_path, text_classifier(), Joint(), first_word(16), **given)


def test_trainer_refuses_what_it_would_not_do(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(UsageError, match="compute_loss_func is not supported"):
        ExitTrainer(text_classifier(), Joint(), args, compute_loss_func=print)
    sharded = arguments(tmp_path)
    sharded.fsdp, sharded.fsdp_config = (
        True,
        {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )
    with pytest.raises(UsageError, match="transformer_layer_cls_to_wrap is not supported"):
        ExitTrainer(decoder([1, 2]), LAYERSKIP, sharded)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(UsageError, match="one process with 2 GPUs .* torchrun --nproc-per-node 2"):
        ExitTrainer(text_classifier(), Joint(), args)


def test_exporting_loads_no_trainer() -> None:
    code = "import sys, edgeexit.export.pretrained, edgeexit.export.methods.joint\n"
    code += "sys.exit('transformers.trainer' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
