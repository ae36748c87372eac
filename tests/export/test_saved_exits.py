"""Exits that are saved with a checkpoint are used, or ignored with a warning; and a bundle says
what is known about the training of its exits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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
from edgeexit.export.methods.eas import rewrite
from edgeexit.export.pretrained import from_pretrained
from edgeexit.runtime import Policy, Rule
from tests import vision_models
from tests.checkpoints import make_model, save_checkpoint
from tests.decoders import make_decoder, save_decoder
from tests.encoder_decoders import make_bart


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


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("bert", {"removed_attention": [1]}, "removed_attention (1) is not for a bert"),
        ("bert", {"adapters": {"2": 1}}, "adapters (2) is not for a bert"),
        ("llama", {"tower_exits": [1]}, "tower_exits (1) is not for a llama"),
        ("llama", {"encoder_exits": [1, 2]}, "encoder_exits (1,2) is not for a llama"),
        ("bart", {"removed_attention": [1, 2]}, "removed_attention (1,2) is not for a bart"),
        ("bart", {"gates": {"1": 8}}, "gates (1) is not for a bart"),
        ("llava", {"image_encoder_exits": [1]}, "image_encoder_exits (1) is not for a llava"),
        ("florence2", {"gates": {"1": 8}}, "gates (1) is not for a florence2"),
    ],
)
def test_a_list_of_what_the_model_cannot_have_is_refused(
    family: str, given: dict[str, object], message: str, tmp_path: Path
) -> None:
    makers: dict[str, Any] = {"bert": make_model, "llama": make_decoder, "bart": make_bart}
    make = makers.get(family, vision_models.make_model)
    folder = tmp_path / family
    (make() if family == "bart" else make(family)).save_pretrained(folder)
    config = folder / EXITS_CONFIG
    config.write_text(json.dumps({"format": 1, "exits": [2]} | given))
    with pytest.raises(ExportError, match=re.escape(f"{config}: {message}")) as told:
        from_pretrained(folder)
    assert "saved with this checkpoint" in told.value.fix


def test_saved_weights_that_are_not_listed_are_told(
    classifier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from_pretrained(classifier, exits=[1, 2], untrained=True).save_pretrained(classifier)
    assert not caplog.text
    config = classifier / EXITS_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"exits": [2]}))
    from_pretrained(classifier)
    told = "exits.safetensors has weights that edgeexit.json does not list, so they are not used"
    assert f"{classifier}: {told}: exit_1" in caplog.text
    config.unlink()
    with pytest.raises(ExportError, match=r"has no exits \(edgeexit.json is missing\)"):
        from_pretrained(classifier)
    assert "that no edgeexit.json lists, so they are not used: exit_1, exit_2" in caplog.text


def test_adapters_of_a_decoder_that_are_not_listed_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_decoder("llama", tmp_path)
    made = from_pretrained(folder, exits=[1, 2], adapters=[1, 2], untrained=True)
    made.save_pretrained(folder)
    assert from_pretrained(folder).exit_layers == [1, 2] and not caplog.text
    config = folder / EXITS_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"adapters": {"1": 1}}))
    from_pretrained(folder)
    assert "does not list, so they are not used: exit_2" in caplog.text


@pytest.fixture
def without_attentions(tmp_path: Path) -> Path:
    """A checkpoint with adapters in place of the attentions of layers 1 and 3."""
    decoder: Any = from_pretrained(save_decoder("llama", tmp_path / "llama"), exits=[1])
    rewrite(decoder, [1, 3], rank=8)
    decoder.save_pretrained(tmp_path / "eas")
    return tmp_path / "eas"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no edgeexit.json lists (layer_1, layer_3)"),
        ({"pia": {}}, "edgeexit.json does not list (layer_1, layer_3)"),
        ({"pia": {"3": 8}}, "edgeexit.json does not list (layer_1)"),
        ({"pia": {}, "removed_attention": []}, "edgeexit.json does not list (layer_1, layer_3)"),
    ],
)
def test_adapters_in_place_of_attention_that_are_not_listed_are_refused(
    change: dict[str, object] | None, message: str, without_attentions: Path
) -> None:
    """Without them the model answers differently."""
    assert from_pretrained(without_attentions).skipped.ranks == {1: 8, 3: 8}  # type: ignore[union-attr]
    config = without_attentions / EXITS_CONFIG
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    expected = f"exits.safetensors has adapters in place of attentions that {message}"
    for saved in (True, False):
        with pytest.raises(ExportError, match=re.escape(expected)):
            from_pretrained(without_attentions, exits=[1], saved_exits=saved)


def test_a_model_without_weights_of_exits_replaces_one_with_them(without_attentions: Path) -> None:
    decoder: Any = from_pretrained(without_attentions.parent / "llama", exits=[2])
    decoder.save_pretrained(without_attentions)
    again: Any = from_pretrained(without_attentions)
    assert again.exit_layers == [2] and not again.skipped.removed


def test_a_family_that_cannot_do_without_attention_is_refused_with_the_file(tmp_path: Path) -> None:
    make_decoder("opt").save_pretrained(tmp_path)
    config = tmp_path / EXITS_CONFIG
    config.write_text(json.dumps({"format": 1, "exits": [1], "removed_attention": [2]}))
    with pytest.raises(ExportError, match=rf"{config}: attention can be removed from .* Llama"):
        from_pretrained(tmp_path)


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
