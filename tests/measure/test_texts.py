"""Texts for models that write: every form gives the same tokens, and every bad one an error that
names file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import DataError, InputError
from edgeexit.measure.data import open_data
from edgeexit.measure.texts import read_texts
from edgeexit.runtime import load
from tests.decoder_toys import (
    START,
    VOCABULARY,
    fill_decoder_toy,
    make_decoder_toy,
    write_decoder_toy,
)
from tests.decoder_words import write_with_words


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_with_words(make_decoder_toy(), tmp_path_factory.mktemp("writer") / "bundle")


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("translator")
    return write_with_words(make_decoder_toy(encoder=True), folder / "bundle")


def test_lines_give_the_tokens_of_texts_and_lists(writer: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "w5 w6"}', "", '{"text": "w7"}', '{"tokens": [8, 9]}']
    path.write_text("\n".join(lines))
    texts = read_texts(str(path), writer)
    assert [text.tokens for text in texts] == [[5, 6], [7], [8, 9]]
    assert not any(text.inputs for text in texts)


def test_functions_and_arrays_give_the_same_as_lines(
    writer: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "d.npz", tokens=np.array([[5, 6], [7, 8]]))
    (tmp_path / "edgeexit_test_texts.py").write_text(
        "def texts():\n    return ['w5 w6', [7, 8]]\n"
        "def objects():\n    yield {'text': 'w5 w6'}\n    yield {'tokens': [7, 8]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sources = [str(tmp_path / "d.npz"), "edgeexit_test_texts:texts", "edgeexit_test_texts:objects"]
    for source in sources:
        assert [text.tokens for text in read_texts(source, writer)] == [[5, 6], [7, 8]]
    sys.modules.pop("edgeexit_test_texts", None)


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "no prompts"),
        ("prompt\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not an object"),
        ('{"prompt": "w5"}\n\n{"words": "b"}\n', "line 3: there is no prompt"),
        ('{"tokens": [1, "x"]}\n', "line 1 is empty or .* invalid token ids"),
        ('{"tokens": []}\n', "line 1 is empty"),
        (f'{{"tokens": [{VOCABULARY}]}}\n', f"ids from 0 to {VOCABULARY - 1}"),
        ('{"tokens": [-1]}\n', "invalid token ids"),
        ('{"tokens": [1.5]}\n', "invalid token ids"),
        ('{"prompt": ""}\n', "line 1 is empty"),
        ('{"prompt": 5}\n', "line 1 is empty or"),
    ],
)
def test_texts_that_cannot_be_used_name_file_and_line(
    writer: Bundle, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_texts(str(path), writer)
    assert "prompts.jsonl" in str(caught.value)


def test_arrays_that_do_not_fit_are_refused(writer: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", tokens=np.array([[5, 6]], np.int32))
    with pytest.raises(DataError, match=r"d\.npz: input tokens is int32"):
        read_texts(str(tmp_path / "d.npz"), writer)


def test_a_bundle_without_a_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as folder:
        bundle = folder.commit(fill_decoder_toy(make_decoder_toy(), folder.folder))
    (tmp_path / "d.jsonl").write_text('{"text": "w5"}')
    with pytest.raises(InputError, match="no tokenizer"):
        read_texts(str(tmp_path / "d.jsonl"), bundle)


def test_texts_of_one_length_run_together(writer: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [[5], [6, 7], [8], [9], [10, 11]]
    path.write_text("\n".join(json.dumps({"tokens": row}) for row in rows))
    digests = set()
    for size, expected in ((2, [[0, 2], [3], [1, 4]]), (1, [[0], [1], [2], [3], [4]])):
        opened = open_data(path, writer)
        batches = list(opened.batches(size))
        numbers = [batch.numbers.tolist() for batch in batches]  # type: ignore[union-attr]
        assert sorted(numbers) == sorted(expected)
        for batch, own in zip(batches, numbers, strict=True):
            assert batch.inputs["tokens"].tolist() == [rows[number] for number in own]
        digests.add(opened.digest)
    assert opened.rows == 5 and len(digests) == 1


def test_a_prompt_of_an_encoder_becomes_its_inputs(translator: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "w5 w6"}\n{"tokens": [7]}\n')
    first, second = read_texts(str(path), translator)
    assert first.tokens == second.tokens == [START]
    assert {k: v.tolist() for k, v in first.inputs.items()} == {
        "source_ids": [[5, 6]],
        "source_mask": [[1, 1]],
    }
    assert {k: v.tolist() for k, v in second.inputs.items()} == {
        "source_ids": [[7]],
        "source_mask": [[1]],
    }
    with load(translator) as model:
        by_text = model.generate("w5 w6", max_new_tokens=5).finish().tokens
        by_ids = model.generate([], inputs=first.inputs, max_new_tokens=5).finish().tokens
    assert by_text == by_ids


@pytest.mark.parametrize("first", ["", f"w{START}"])
def test_a_target_is_what_the_decoder_reads(tmp_path: Path, first: str) -> None:
    bundle = write_with_words(make_decoder_toy(encoder=True), tmp_path / "bundle", first)
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "w5", "target": "w8 w9"}')
    [text] = read_texts(str(path), bundle, targets=True)
    assert text.tokens == [START, 8, 9]
    [batch] = open_data(path, bundle).batches(1)
    assert batch.inputs["tokens"].tolist() == [[START, 8, 9]]
    path.write_text('{"text": "w5"}')
    with pytest.raises(DataError, match="line 1: there is no 'target'"):
        open_data(path, bundle)


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(), tmp_path / "bundle")
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"tokens": [5, 6]}\n')
    assert [text.tokens for text in read_texts(str(path), bundle)] == [[5, 6]]
