"""Exits that are saved with a checkpoint are used, or ignored with a warning; and a bundle says
what is known about the training of its exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edgeexit.bundle.cautions import cautions
from edgeexit.bundle.reader import open_bundle
from edgeexit.cli import cli
from edgeexit.errors import ExportError
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.origins import note_origins
from edgeexit.export.exits.saved import EXITS_CONFIG
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import Policy, Rule
from tests.checkpoints import save_checkpoint
from tests.decoders import make_decoder


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A checkpoint with a trained exit behind layer 2."""
    folder = save_checkpoint("bert", tmp_path / "bert")
    torch.manual_seed(5)
    made = from_pretrained(folder, exits=[2], untrained=True)
    note_origins(made, {"exit_2": "trained"})
    made.save_pretrained(folder)
    return folder


def same(one: ExitClassifier, other: ExitClassifier, exit_: str) -> bool:
    weights = (model.heads[exit_].state_dict() for model in (one, other))
    first, second = weights
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_saved_heads_are_kept_beside_new_ones_or_ignored_with_a_warning(
    classifier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = from_pretrained(classifier)
    mixed = from_pretrained(classifier, exits=[1, 2], untrained=True)
    assert not caplog.text
    new = from_pretrained(classifier, exits=[1, 2], untrained=True, saved_exits=False)
    assert "(behind layers 2) are ignored" in caplog.text and str(classifier) in caplog.text
    assert isinstance(saved, ExitClassifier)
    assert isinstance(mixed, ExitClassifier) and isinstance(new, ExitClassifier)
    assert same(saved, mixed, "exit_2") and not same(saved, new, "exit_2")
    assert [m.provenance["exits"] for m in (saved, mixed, new)] == [
        "trained",
        "untrained",
        "untrained",
    ]


def test_exits_that_were_never_trained_are_not_called_trained_when_saved_and_read(
    classifier: Path,
) -> None:
    mixed = from_pretrained(classifier, exits=[1, 2], untrained=True)
    mixed.save_pretrained(classifier)
    again = from_pretrained(classifier)
    assert again.exit_origins == {"exit_1": "untrained", "exit_2": "trained"}
    assert again.provenance["exits"] == "untrained"
    assert isinstance(again, ExitClassifier) and not again.trained
    config = json.loads((classifier / EXITS_CONFIG).read_text())
    del config["origins"]  # as in files of older versions
    (classifier / EXITS_CONFIG).write_text(json.dumps(config))
    assert from_pretrained(classifier).provenance["exits"] == "unknown"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"origins": {"exit_1": "yes"}}, r"Invalid enum value 'yes' - at `\$.origins\[...\]`"),
        ({"exits": [True, 2]}, r"Expected `int`, got `bool` - at `\$.exits\[0\]`"),
        ({"exits": None}, r"Expected `array`, got `null` - at `\$.exits`"),
        ({"gates": [4]}, r"Expected `object`, got `array` - at `\$.gates`"),
        ({"gates": {"1": 10**9}}, r"Expected `int` <= 1048576 - at `\$.gates\[...\]`"),
        ({"adapters": {"9": 1}}, "adapters names layer 9, which does not have an exit"),
        ({"format": 9}, "format 9 is of a newer edgeexit, this one reads 1"),
    ],
)
def test_a_list_of_exits_that_cannot_be_read_is_refused_with_its_place(
    classifier: Path, given: dict[str, object], message: str
) -> None:
    config = json.loads((classifier / EXITS_CONFIG).read_text())
    (classifier / EXITS_CONFIG).write_text(json.dumps(config | given))
    with pytest.raises(ExportError, match=message):
        from_pretrained(classifier)


@pytest.mark.slow
def test_the_command_line_says_what_is_known_about_the_exits(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    make_decoder("llama").save_pretrained(folder)
    (folder / EXITS_CONFIG).write_text(json.dumps({"format": 1, "exits": [2]}))
    said = {}
    for option, layers in (("--exits", "1"), ("--untrained-exits", "2")):
        output = tmp_path / option
        arguments = ["export", "-m", str(folder), option, layers, "-o", str(output)]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        said[option] = result.stderr
    assert "nothing says that these exits were trained" in said["--exits"]
    assert f"edgeexit bench {tmp_path / '--exits'} --data" in said["--exits"]
    assert "the exits are untrained" in said["--untrained-exits"]
    unknown, untrained = (open_bundle(tmp_path / name) for name in said)
    assert unknown.exits_unknown and not unknown.exits_untrained
    assert untrained.exits_untrained and not untrained.exits_unknown
    early = Policy(rules={"main": Rule(thresholds=0.5)})
    assert "nothing says that the early exits of this bundle were trained" in cautions(
        early, unknown
    )
