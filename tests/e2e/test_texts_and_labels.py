"""What `run` says of texts that are too long or empty, of missing inputs, and of labels; and what
`export` says of folders without a model or without a tokenizer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgeexit.cli import cli
from edgeexit.errors import ExportError, InputError
from edgeexit.export import export
from edgeexit.export.pretrained import depth_of, from_pretrained
from edgeexit.preprocessing.texts import cut_and_pad, encode_texts
from edgeexit.runtime.text.tokenizer import encode_batch, open_tokenizer
from tests.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("bert", tmp_path_factory.mktemp("bert") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    split = from_pretrained(checkpoint, exits=[1], untrained=True).split_model()
    export(split, checkpoint.parent / "bundle")
    return checkpoint.parent / "bundle"


def run(*arguments: object) -> Result:
    # A pool of its own: the default, the process's pool, would be for all later tests, too.
    given = ["run", *map(str, arguments), "--threads", "1"]
    return CliRunner().invoke(cli, given)


def test_a_text_that_is_cut_is_told_once(bundle: Path) -> None:
    long = "great " * 200
    result = run(bundle, "--text", long, "--text", long)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("the rest is cut") == 1
    assert "'great great" in result.stderr and "the model reads the first" in result.stderr
    assert "cut" not in run(bundle, "--text", "great").stderr


def test_a_text_without_tokens_is_refused_with_its_row(bundle: Path) -> None:
    from edgeexit.bundle.reader import open_bundle

    opened = open_bundle(bundle)
    tokenizer = open_tokenizer(opened)
    tokenizer.post_processor = None  # as tokenizers without special tokens
    schema = opened.manifest.text_preprocessing
    with pytest.raises(InputError, match="the text of row 1 has no tokens: ''"):
        encode_texts(cut_and_pad(tokenizer, schema), schema, ["great", ""])  # type: ignore[arg-type]
    assert encode_batch(opened, [""])["attention_mask"].sum() > 0  # start and end


def test_missing_token_types_are_told_with_their_value(bundle: Path, tmp_path: Path) -> None:
    ids = np.ones((2, 3), np.int64)
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=ids)
    result = run(bundle, "--data", tmp_path / "rows.npz")
    assert "token_type_ids is missing" in str(result.exception)
    assert "numpy.zeros_like(input_ids)" in str(result.exception)


def test_answers_and_labels_have_one_form(bundle: Path, tmp_path: Path) -> None:
    ids = np.ones((2, 3), np.int64)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    np.savez(tmp_path / "rows.npz", **inputs, label=[0, 2])  # type: ignore[arg-type]
    result = run(bundle, "--data", tmp_path / "rows.npz")
    names = from_pretrained(bundle.parent / "checkpoint", exits=[1], untrained=True).labels  # type: ignore[union-attr]
    _, _, first, second, _ = result.stdout.splitlines()
    assert first.endswith(f"{names[0]} (0)") and second.endswith(f"{names[2]} (2)")
    assert any(f"{name} ({number})" in first[:20] for number, name in enumerate(names))


def test_a_folder_with_only_a_tokenizer_is_named(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    with pytest.raises(ExportError, match="has a tokenizer, but no model"):
        from_pretrained(tmp_path, exits=[1])
    inside = tmp_path / "inside"
    shutil.copytree(checkpoint, inside / "last")
    with pytest.raises(ExportError, match=f"in a folder inside. Give {inside / 'last'}"):
        from_pretrained(inside, exits=[1])


def test_a_checkpoint_without_a_tokenizer_gives_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder)
    with caplog.at_level(logging.WARNING):
        from_pretrained(folder, exits=[1], untrained=True)
    assert "no tokenizer, so the bundle takes token ids" in caplog.text


def test_all_layers_are_counted_from_the_configuration(checkpoint: Path, tmp_path: Path) -> None:
    assert depth_of(checkpoint) == from_pretrained(checkpoint, exits=[], untrained=True).depth
    resnet = save_checkpoint("resnet", tmp_path / "resnet")
    assert depth_of(resnet) == from_pretrained(resnet, exits=[], untrained=True).depth
