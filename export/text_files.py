"""A checkpoint's tokenizer and chat templates, as files of a bundle.

A template lies where one of three generations of transformers wrote it: as a text or as a list of
named texts in ``tokenizer_config.json``, or in ``chat_template.jinja`` with further ones in
``additional_chat_templates/``. They are read as transformers reads them, but without its tokenizer
classes: one that cannot be made here must not keep a bundle from being made.
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
_MEND = "Mend it, or move it away: the bundle then continues texts, but holds no conversations."


@dataclass(frozen=True)
class TextFiles:
    """What a bundle got for text in and out.

    Attributes:
        tokenizer: Path of ``tokenizer.json`` in the bundle; None when the checkpoint has none.
        chat: Its chat templates, if there are any.
        stop_tokens: The tokenizer's own token for the end of a text, or of a turn.
    """

    tokenizer: str | None = None
    chat: Chat | None = None
    stop_tokens: tuple[int, ...] = ()


def write_text_files(checkpoint: Path, bundle: Path) -> TextFiles:
    """Writes tokenizer and chat templates of a checkpoint into a bundle's folder.

    Raises:
        ExportError: A file cannot be read; what it is about is named.
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
    # Where a base model was tuned to chat, often only the tokenizer was told what ends a turn.
    end = tokenizer.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    return TextFiles(
        tokenizer=f"tokenizer/{TOKENIZER}",
        chat=Chat(templates=written, tokens=tokens) if written else None,
        stop_tokens=() if end is None else (end,),
    )


def read_templates(checkpoint: Path) -> dict[str, str]:
    """Name -> text of a checkpoint's chat templates; files go before ``tokenizer_config.json``."""
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
                f"{where}: its chat_template is neither a text nor a list of named ones", fix=_MEND
            )
    for name, text in found.items():
        if not _NAME.fullmatch(name):
            raise ExportError(
                f"{where}: a chat template has the name {name!r}",
                fix="Give it a name of letters, digits, _ and -.",
            )
        if not isinstance(text, str) or not _is_unicode(text):
            raise ExportError(f"{where}: the chat template {name} is not a text", fix=_MEND)
        if len(text.encode()) > CHAT_TEMPLATE_LIMIT_BYTES:
            raise ExportError(f"{where}: the chat template {name} is larger than 1 MiB", fix=_MEND)
    return found


def read_special_tokens(checkpoint: Path) -> dict[str, str]:
    """``bos_token`` and the like -> text, from ``tokenizer_config.json`` and what older versions
    wrote beside it."""
    config = _read_json(checkpoint / "tokenizer_config.json")
    beside = _read_json(checkpoint / "special_tokens_map.json")
    # As transformers does: with added_tokens_decoder the configuration says all there is to say.
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
