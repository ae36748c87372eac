"""Reads conversations for ``edgeexit run``: prompts as user messages, or files of messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit.errors import DataError, UsageError

_FORM = (
    'Give a .json file with [{"role": "user", "content": "..."}], or a .jsonl file with one such '
    'list, or {"messages": [...]}, per line.'
)


@dataclass(frozen=True)
class Conversation:
    """Messages, and the functions that the model may call (JSON schemas). `where` names the file
    and line."""

    messages: Any
    tools: Any = None
    where: str = ""


def asked(
    prompts: Sequence[str], system: str | None, images: Sequence[Path] = ()
) -> list[Conversation]:
    """One conversation per prompt: a user message, after the system message if there is one. The
    images stand in front of the prompt."""
    first = [] if system is None else [{"role": "system", "content": system}]
    if not images:
        return [Conversation([*first, {"role": "user", "content": prompt}]) for prompt in prompts]
    before = [{"type": "image", "path": str(path)} for path in images]
    return [
        Conversation(
            [*first, {"role": "user", "content": [*before, {"type": "text", "text": prompt}]}]
        )
        for prompt in prompts
    ]


def read_conversations(path: Path) -> list[Conversation]:
    """Reads the conversation of a ``.json`` file, or those of a ``.jsonl`` file, one per line.

    Raises:
        DataError: The file cannot be read or has another format; with file and line. The model
            checks the messages themselves.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason})", fix=_FORM) from error
    if path.suffix not in (".jsonl", ".ndjson"):
        return [_conversation(text, str(path))]
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: it has no conversation", fix=_FORM)
    return [_conversation(line, f"{path}: line {number}") for number, line in lines]


def _conversation(text: str, where: str) -> Conversation:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})", fix=_FORM) from error
    if isinstance(found, dict) and "messages" in found:
        return Conversation(found["messages"], found.get("tools"), where)
    if isinstance(found, list):
        return Conversation(found, where=where)
    raise DataError(f"{where}: neither a list of messages nor an object with messages", fix=_FORM)


def template_variables(text: str | None) -> dict[str, Any]:
    """Reads ``--chat-template-kwargs``.

    >>> template_variables('{"enable_thinking": false}')
    {'enable_thinking': False}
    """
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"--chat-template-kwargs {text}: not a JSON object",
            fix="Write it as '{\"enable_thinking\": false}'.",
        )
    return found
