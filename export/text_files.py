"""Writes a checkpoint's tokenizer and chat templates into a bundle.

Depending on the version of transformers, templates are a string or a list of named strings in
``tokenizer_config.json``, or files: ``chat_template.jinja`` and ``additional_chat_templates/``.
This module reads them without the tokenizer classes of transformers, so that export works even if
such a class cannot be loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgeexit.bundle.manifest import Chat
from edgeexit.bundle.reader import CHAT_TEMPLATE_LIMIT_BYTES
from edgeexit.errors import ExportError
from edgeexit.export.device_tokenizer import TOKENIZER, make_tokenizer

DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_MEND = "Correct or remove the file; without it, the bundle cannot hold conversations."


@dataclass(frozen=True)
class TextFiles:
    """The text files of a bundle.

    Attributes:
        tokenizer: Path of ``tokenizer.json`` in the bundle; None when the checkpoint has none.
        chat: Its chat templates, if it has any.
        stop_tokens: The tokenizer's tokens for the end of a text or of a turn.
    """

    tokenizer: str | None = None
    chat: Chat | None = None
    stop_tokens: tuple[int, ...] = ()


def write_text_files(checkpoint: Path, bundle: Path) -> TextFiles:
    """Writes tokenizer and chat templates of a checkpoint into a bundle's folder.

    Raises:
        ExportError: A file cannot be read.
    """
    made = make_tokenizer(checkpoint)
    if made is None:
        return TextFiles()
    tokenizer = Tokenizer.from_buffer(made[0])
    templates, tokens = read_templates(checkpoint), read_special_tokens(checkpoint)
    folder = bundle / "tokenizer"
    folder.mkdir()
    (folder / TOKENIZER).write_bytes(made[0])
    written = {}
    for name, text in templates.items():
        file = "chat_template.jinja" if name == DEFAULT else f"chat_template.{name}.jinja"
        (folder / file).write_bytes(text.encode())
        written[name] = f"tokenizer/{file}"
    # In chat models, often only the tokenizer's configuration has the end-of-turn token.
    end = tokenizer.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    return TextFiles(
        tokenizer=f"tokenizer/{TOKENIZER}",
        chat=Chat(templates=written, tokens=tokens) if written else None,
        stop_tokens=() if end is None else (end,),
    )


def read_templates(checkpoint: Path) -> dict[str, str]:
    """Name -> text of chat templates; files take precedence over ``tokenizer_config.json``."""
    files = {DEFAULT: checkpoint / "chat_template.jinja"}
    further = sorted((checkpoint / "additional_chat_templates").glob("*.jinja"))
    files |= {path.stem: path for path in further}
    found: dict[str, Any] = {name: _read(path) for name, path in files.items() if path.is_file()}
    where = checkpoint / "chat_template.jinja"
    if not found:
        where = checkpoint / "tokenizer_config.json"
        given = _read_json(where).get("chat_template")
        if isinstance(given, str):
            found = {DEFAULT: given}
        elif isinstance(given, list) and all(isinstance(one, dict) for one in given):
            found = {str(one.get("name")): one.get("template") for one in given}
        elif given is not None:
            raise ExportError(
                f"{where}: chat_template is neither a string nor a list of named strings", fix=_MEND
            )
    for name, text in found.items():
        if not _NAME.fullmatch(name):
            raise ExportError(
                f"{where}: a chat template has the name {name!r}",
                fix="Give it a name of letters, digits, _ and -.",
            )
        if not isinstance(text, str) or not _is_unicode(text):
            raise ExportError(f"{where}: the chat template {name} is not a string", fix=_MEND)
        if len(text.encode()) > CHAT_TEMPLATE_LIMIT_BYTES:
            raise ExportError(f"{where}: the chat template {name} is larger than 1 MiB", fix=_MEND)
    return found


def read_special_tokens(checkpoint: Path) -> dict[str, str]:
    """``bos_token`` and the like -> text, from ``tokenizer_config.json`` and the files of older
    versions."""
    config = _read_json(checkpoint / "tokenizer_config.json")
    beside = _read_json(checkpoint / "special_tokens_map.json")
    # As in transformers: added_tokens_decoder replaces the older files.
    merged = config if "added_tokens_decoder" in config else config | beside
    further = merged.get("extra_special_tokens")
    merged = merged | (further if isinstance(further, dict) else {})
    found = {}
    for name, value in merged.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str) and _NAME.fullmatch(name):
            found[name] = text
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not JSON ({error})", fix=_MEND) from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: not a JSON object", fix=_MEND)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: cannot be read as UTF-8 ({error})", fix=_MEND) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
