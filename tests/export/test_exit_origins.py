"""A training marks the exits that it trained, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeexit.export.exits.saved import read_exits
from edgeexit.export.methods.adapters import AdapterDistillation
from edgeexit.export.methods.joint import Joint
from edgeexit.export.methods.layerskip import LayerSkip
from edgeexit.export.pretrained import from_pretrained
from tests.training import counting, decoder, first_word, text_classifier, train


def test_joint_marks_only_exits_with_a_weight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(
        tmp_path, text_classifier(), Joint(weights=[0, 1, 1]), first_word(16), max_steps=1
    )
    assert trainer.exits.exit_origins == {"exit_1": "untrained", "exit_2": "trained"}
    assert trainer.exits.provenance["exits"] == "untrained"
    assert "Joint does not train exit_1: their losses have weight 0" in caplog.text
    trainer.save_model()
    assert read_exits(tmp_path).origins == trainer.exits.exit_origins
    assert from_pretrained(tmp_path).exit_origins == trainer.exits.exit_origins


@pytest.mark.parametrize(
    "given", [{"num_train_epochs": 0}, {"max_steps": 1, "learning_rate": 0.0}], ids=str
)
def test_no_exit_is_marked_when_no_step_changes_weights(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(tmp_path, text_classifier(), Joint(), first_word(16), **given)
    assert set(trainer.exits.exit_origins.values()) == {"untrained"}
    assert "no exit was trained" in caplog.text


def test_layerskip_warns_of_layer_1_and_marks_the_exits_of_its_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(tmp_path, decoder([1, 2, 3]), LayerSkip(), counting(16), max_steps=1)
    assert "LayerSkip does not train exit_1: their losses have weight 0" in caplog.text
    # Every step trains one exit, in rotation.
    assert trainer.exits.exit_origins == {
        "exit_1": "unknown",
        "exit_2": "trained",
        "exit_3": "unknown",
    }


def test_distillation_marks_only_exits_with_an_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder([1, 2], adapters=[2])
    assert model.exit_origins == {"exit_1": "unknown", "exit_2": "untrained"}
    trainer = train(tmp_path, model, AdapterDistillation(), counting(16), max_steps=1)
    assert "AdapterDistillation does not train exit_1: they have no adapters" in caplog.text
    trainer.save_model()
    read = from_pretrained(tmp_path)
    assert read.exit_origins == {"exit_1": "unknown", "exit_2": "trained"}
    assert read.provenance["exits"] == "unknown" and read.provenance["adapters"] == "trained"


def test_checkpoints_during_a_training_say_what_was_trained_so_far(tmp_path: Path) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(tmp_path, decoder([2, 3]), LayerSkip(), counting(16), **given)
    first, second = (read_exits(tmp_path / f"checkpoint-{step}").origins for step in (1, 2))
    assert first == {"exit_2": "trained", "exit_3": "unknown"}
    assert set(second.values()) == {"trained"}
    model = decoder([2, 3])
    train(tmp_path, model, LayerSkip(), counting(16), resume=True, **given)
    assert set(model.exit_origins.values()) == {"trained"}
