"""Tokenizers and chat templates out of checkpoints: found wherever transformers puts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from edgeexit.errors import ExportError
from edgeexit.export import export
from edgeexit.export.families.llama import stop_tokens
from edgeexit.export.pretrained import from_pretrained
from edgeexit.export.text_files import read_special_tokens, read_templates, write_text_files
from tests.chats import BEGIN, CHATML, END, LLAMA, TEMPLATES
from tests.decoders import make_decoder, save_decoder

NAMED = [{"name": name, "template": text} for name, text in TEMPLATES.items()]


@pytest.fixture
def folder(chat_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer of chats and nothing that says how to talk."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "tokenizer.json").write_bytes((chat_folder / "tokenizer.json").read_bytes())
    return path


def configure(folder: Path, **config: Any) -> None:
    """Writes ``tokenizer_config.json``."""
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(given | config))


def one_text(folder: Path) -> None:
    configure(folder, chat_template=CHATML)


def named_texts(folder: Path) -> None:
    configure(folder, chat_template=NAMED)


def a_file_beside(folder: Path) -> None:
    configure(folder, chat_template="an older one, which the file replaces")
    (folder / "chat_template.jinja").write_text(LLAMA, newline="\r\n")


def files_beside(folder: Path) -> None:
    a_file_beside(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(CHATML)


def as_transformers_saves(folder: Path) -> None:
    named_texts(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def special_tokens_beside(folder: Path) -> None:
    configure(folder, chat_template=CHATML, eos_token="<|eot_id|>")
    content = {"content": END, "lstrip": False, "normalized": False, "rstrip": False}
    content |= {"single_word": False}
    beside = {"eos_token": content, "pad_token": BEGIN, "additional_special_tokens": [END]}
    (folder / "special_tokens_map.json").write_text(json.dumps(beside))


def special_tokens_of_its_own(folder: Path) -> None:
    configure(
        folder,
        chat_template=CHATML,
        bos_token=None,
        image_token="<|eot_id|>",
        extra_special_tokens={"call_token": "<|im_start|>"},
    )


LAYOUTS: list[Callable[[Path], None]] = [
    one_text,
    named_texts,
    a_file_beside,
    files_beside,
    as_transformers_saves,
    special_tokens_beside,
    special_tokens_of_its_own,
]


@pytest.mark.parametrize("write", LAYOUTS)
def test_templates_and_tokens_are_those_that_transformers_finds(
    folder: Path, write: Callable[[Path], None]
) -> None:
    write(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.chat_template
    named = expected if isinstance(expected, dict) else {"default": expected}
    assert read_templates(folder) == named and named["default"]
    assert read_special_tokens(folder) == tokenizer.special_tokens_map


def test_templates_and_the_end_of_a_turn_go_into_the_bundle(folder: Path, tmp_path: Path) -> None:
    named_texts(folder)
    (tmp_path / "bundle").mkdir()
    text = write_text_files(folder, tmp_path / "bundle")
    assert text.tokenizer == "tokenizer/tokenizer.json" and text.chat is not None
    files = {name: tmp_path / "bundle" / path for name, path in text.chat.templates.items()}
    assert {name: path.read_text() for name, path in files.items()} == TEMPLATES
    assert files["default"].name == "chat_template.jinja"
    assert text.chat.tokens == {"bos_token": BEGIN, "eos_token": END}
    ids = {token["content"]: token["id"] for token in added_tokens(folder)}
    assert text.stop_tokens == (ids[END],)


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


def test_a_checkpoint_without_templates_gives_its_tokenizer_alone(
    folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    text = write_text_files(folder, bundle)
    assert (text.tokenizer, text.chat, text.stop_tokens) == ("tokenizer/tokenizer.json", None, ())
    assert [path.name for path in (bundle / "tokenizer").iterdir()] == ["tokenizer.json"]


def test_a_checkpoint_without_tokenizer_gives_nothing(folder: Path, tmp_path: Path) -> None:
    named_texts(folder)
    (folder / "tokenizer.json").unlink()
    text = write_text_files(folder, tmp_path)
    assert (text.tokenizer, text.chat) == (None, None)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer.json": b"{}"}, r"tokenizer\.json: tokenizers .* cannot read it"),
        ({"tokenizer_config.json": b"{"}, r"tokenizer_config\.json: not JSON"),
        ({"tokenizer_config.json": b"[]"}, r"tokenizer_config\.json: not a JSON object"),
        ({"tokenizer_config.json": b'{"chat_template": 5}'}, "neither a string nor a list"),
        ({"tokenizer_config.json": b'{"chat_template": ["x"]}'}, "neither a string nor a list"),
        ({"tokenizer_config.json": b'{"chat_template": [{"name": "a"}]}'}, "a is not a string"),
        ({"tokenizer_config.json": b'{"chat_template": "\\ud800"}'}, "default is not a string"),
        (
            {"tokenizer_config.json": b'{"chat_template": [{"name": "../../x", "template": ""}]}'},
            r"a chat template has the name '../../x'",
        ),
        ({"special_tokens_map.json": b"5"}, r"special_tokens_map\.json: not a JSON object"),
        ({"chat_template.jinja": b"\xff"}, r"chat_template\.jinja: cannot be read as UTF-8"),
        ({"chat_template.jinja": b"x" * (1 << 21)}, "larger than 1 MiB"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    folder: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ExportError, match=message):
        write_text_files(folder, tmp_path)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    "configured, generating, expected",
    [(0, None, (0,)), (0, [7, 0], (0, 7)), (None, 7, (7,)), ([1, 2], 1, (1, 2)), (None, None, ())],
)
def test_the_ends_of_a_text_are_those_of_both_configurations(
    configured: Any, generating: Any, expected: tuple[int, ...]
) -> None:
    model = make_decoder("llama")
    model.config.eos_token_id = configured
    model.generation_config.eos_token_id = generating
    assert stop_tokens(model) == expected


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_is_refused_before_anything_is_traced(tmp_path: Path, damaged: str) -> None:
    folder = save_decoder("llama", tmp_path / "checkpoint")
    (folder / damaged).write_text("{")
    model = from_pretrained(folder, exits=[1]).split_model()
    done: list[str] = []
    with pytest.raises(ExportError, match="tokenizer"):
        export(model, tmp_path / "bundle", progress=lambda what, *_: done.append(what))
    assert not done and not (tmp_path / "bundle").exists()
