"""`Texts`: writes texts with the model, on its thread.

All prompts of a request are checked before the first text begins, so a stream that has begun is not
refused any more. Texts of several prompts are written one after the other: memory does not depend
on their number, and each reuses what it has in common with earlier ones.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeexit.errors import InputError
from edgeexit.preprocessing.images import decode_image
from edgeexit.runtime import Generation, Model, Sampling
from edgeexit.runtime.programs.images import take_images
from edgeexit.serve.jobs import Job
from edgeexit.serve.metrics import Metrics
from edgeexit.serve.refusals import BAD, Refusal

LIMIT_PIXELS = 64 << 20
"""Larger images are refused: a small file can hold a very large image."""

CHARACTERS_OF_A_TOKEN = 256
"""More than any token has: longer prompts are refused without encoding them, which takes long."""

_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompts: Texts, or lists of token ids; or a single conversation in `messages`.
        messages: The messages of a conversation; images are ``data:`` addresses.
        variables: Variables of the chat template.
        sampling: How tokens are chosen.
        most: Most new tokens; None: what fits.
        stops: Strings that end a text.
        streams: Whether pieces are emitted.
    """

    sampling: Sampling
    prompts: Sequence[str | list[int]] = ()
    messages: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    most: int | None = None
    stops: Sequence[str] = ()
    streams: bool = False


@dataclass(frozen=True)
class Delta:
    """New text of a prompt; `number` counts the prompts of a request."""

    number: int
    text: str


@dataclass(frozen=True)
class Written:
    """A text that has ended.

    Attributes:
        reason: ``stop`` or ``length``, as in `Generation.reasons`; or ``deadline``, ``shutdown``,
            ``gone``.
        made: Its tokens and statistics.
    """

    number: int
    text: str
    reason: str
    prompt_tokens: int
    made: Generation


@dataclass(frozen=True)
class _Begun:
    prompt_tokens: int
    generation: Generation


class Texts:
    """Writes texts.

    Args:
        model: The model; only `write` uses it, on one thread.
        generating: Arguments of `Model.generate` that all texts share.
    """

    def __init__(self, model: Model, generating: Mapping[str, Any], metrics: Metrics) -> None:
        self._model, self._generating, self._metrics = model, dict(generating), metrics

    def write(self, asked: Asked, job: Job) -> list[Written]:
        """Writes all texts of a request. Emits `Delta` and, per text, `Written`, if it streams.

        Raises:
            EdgeExitError: What `Model.generate` raises.
        """
        begun = self._begin(asked)
        return [self._finish(number, one, asked, job) for number, one in enumerate(begun)]

    def _begin(self, asked: Asked) -> list[_Begun]:
        """Checks everything that can be checked before the first token."""
        if asked.messages is not None:
            return [self._begin_chat(asked, asked.messages)]
        return [self._begin_prompt(asked, prompt) for prompt in asked.prompts]

    def _begin_prompt(self, asked: Asked, prompt: str | list[int]) -> _Begun:
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        reads = self._start_tokens > 0 and isinstance(prompt, str)  # the encoder reads the text
        return self._generate(asked, [prompt if reads else ids], len(ids), None)

    def _begin_chat(self, asked: Asked, messages: Sequence[Mapping[str, Any]]) -> _Begun:
        plain, images = take_images([_with_images(message) for message in messages])
        prompt = self._model.chat_prompt(plain, variables=asked.variables)
        ids = self._encode(prompt, special_tokens=False)  # the template has added them
        if not images:
            return self._generate(asked, [ids], len(ids), None)
        rows, inputs = self._model.prompts_with_images(prompt, [images], special_tokens=False)
        return self._generate(asked, rows, max(map(len, rows), default=len(ids)), inputs)

    def _encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        most = self._model.capacity * CHARACTERS_OF_A_TOKEN
        if len(text) > most:
            raise Refusal(
                BAD,
                f"The prompt has {len(text)} characters, more than the {self._model.capacity} "
                "tokens of a text can hold. Shorten it.",
                code="context_length_exceeded",
            )
        return self._model.encode(text, special_tokens=special_tokens)

    @property
    def _start_tokens(self) -> int:
        """Number of tokens that a text begins with, if an encoder reads the prompt."""
        decoding = self._model.bundle.manifest.decoding
        return len(decoding.start_tokens) if decoding is not None else 0

    def _generate(
        self, asked: Asked, rows: list[Any], prompt_tokens: int, inputs: Mapping[str, Any] | None
    ) -> _Begun:
        read = self._start_tokens or prompt_tokens
        room = self._model.capacity - read
        if (asked.most or 1) > room:
            asks = f" and max_tokens is {asked.most}" if asked.most else ""
            raise Refusal(
                BAD,
                f"A text of this model has {self._model.capacity} tokens at most, the prompt has "
                f"{read}{asks}. Shorten the prompt or lower max_tokens.",
                param="max_tokens" if room > 0 else None,
                code="context_length_exceeded",
            )
        made = self._model.generate(
            rows,
            inputs=inputs,
            max_new_tokens=asked.most or room,
            sampling=asked.sampling,
            stop=list(asked.stops),
            **self._generating,
        )
        return _Begun(prompt_tokens, made)

    def _finish(self, number: int, begun: _Begun, asked: Asked, job: Job) -> Written:
        made, ended_by = begun.generation, job.ended_by()
        try:
            for piece in made if ended_by is None else ():
                if asked.streams:
                    job.emit(Delta(number, piece.text))
                if (ended_by := job.ended_by()) is not None:
                    break
        finally:
            made.close()
        reason = ended_by or "stop"
        if made.reasons:  # it began
            reason = made.reasons[0] or reason
            self._metrics.count_text(made, begun.prompt_tokens, reason)
        written = Written(number, made.texts[0], reason, begun.prompt_tokens, made)
        if asked.streams:
            job.emit(written)
        return written


def _with_images(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose images are images of Pillow, from ``image_url`` parts with ``data:``
    addresses. Nothing is read from files or downloaded."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [
        {"type": "image", "image": _image(part["image_url"]["url"])}
        if part["type"] == "image_url"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _image(address: str) -> Any:
    found = _DATA.match(address)
    if found is None:
        raise InputError(
            f"image_url {address[:40]!a}: only images in the request itself are read",
            fix="Give data:image/png;base64,... with the bytes of the file.",
        )
    try:
        raw = base64.b64decode(address[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"image_url: not base64 ({error})", fix="Encode the bytes of the file."
        ) from error
    return decode_image(raw, "image_url", limit_pixels=LIMIT_PIXELS)


__all__ = ["Asked", "Delta", "Texts", "Written"]
