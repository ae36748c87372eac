"""Answers in OpenAI's form: whole ones, and the events of a stream.

What OpenAI's form has no place for is in ``edgeexit``: the exits that gave the tokens, and what
ended a text early.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgeexit.serve.texts import Written

LAST_EVENT = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """An event of a stream (server-sent events).

    >>> event({"a": 1})
    b'data: {"a":1}\\n\\n'
    """
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


@dataclass(frozen=True)
class Answers:
    """Builds the answers to one request.

    Args:
        model: The model's name.
        chats: Whether the answers are those of a chat.
        with_usage: Whether a stream says the number of tokens at its end.
        mode: The decoding mode.
    """

    model: str
    chats: bool
    with_usage: bool
    mode: str
    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[Written]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for text in texts:
            end = {"finish_reason": _finish_reason(text), "logprobs": None}
            message = {"role": "assistant", "content": text.text, "refusal": None}
            said = {"message": message} if self.chats else {"text": text.text}
            choices.append({"index": text.number} | said | end)
        kind = "chat.completion" if self.chats else "text_completion"
        about = [self._about(text) for text in texts]
        head = self._head(kind) | {"choices": choices, "usage": usage(texts)}
        return head | {"edgeexit": about[0] if len(about) == 1 else about}

    def first(self, number: int) -> bytes:
        """The event before a text's first piece; only chats have one."""
        if not self.chats:
            return b""
        return self._chunk({"index": number, "delta": {"role": "assistant", "content": ""}})

    def piece(self, number: int, text: str) -> bytes:
        """The event of new text; nothing if there is none."""
        if not text:
            return b""
        said: dict[str, Any] = {"delta": {"content": text}} if self.chats else {"text": text}
        return self._chunk({"index": number} | said)

    def end(self, text: Written) -> bytes:
        """The event of a text's end."""
        said: dict[str, Any] = {"delta": {}} if self.chats else {"text": ""}
        choice = {"index": text.number} | said | {"finish_reason": _finish_reason(text)}
        return self._chunk(choice, edgeexit=self._about(text))

    def last(self, texts: Sequence[Written]) -> bytes:
        """The events behind the last text."""
        if not self.with_usage:
            return LAST_EVENT
        said = self._head(self._kind) | {"choices": [], "usage": usage(texts)}
        return event(said) + LAST_EVENT

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chats else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chats else "cmpl"
        head = {"id": f"{prefix}-{self.identity}", "object": kind, "created": self.created}
        return head | {"model": self.model}

    def _chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        choice = {"finish_reason": None, "logprobs": None} | choice
        if self.with_usage:
            more["usage"] = None
        return event(self._head(self._kind) | {"choices": [choice]} | more)

    def _about(self, text: Written) -> dict[str, Any]:
        made = text.made
        return {
            "mode": self.mode,
            "exits": made.statistics.exits,
            "earlier": {chain: exits[0] for chain, exits in made.statistics.earlier.items()},
            "acceptance": made.statistics.acceptance,
            "ended_by": text.reason,
            "first_token_ms": made.first_token_s * 1e3,
            "tokens_per_s": made.tokens_per_s,
        }


def usage(texts: Sequence[Written]) -> dict[str, Any]:
    """The number of tokens of a request's texts."""
    prompt = sum(text.prompt_tokens for text in texts)
    written = sum(len(text.made.tokens[0]) for text in texts)
    reused = sum(text.made.reused_tokens for text in texts)
    counts = {"prompt_tokens": prompt, "completion_tokens": written}
    counts["total_tokens"] = prompt + written
    return counts | {"prompt_tokens_details": {"cached_tokens": reused}}


def _finish_reason(text: Written) -> str:
    """OpenAI's word for why a text ended."""
    return "stop" if text.reason == "stop" else "length"


__all__ = ["Answers", "event", "usage"]
