"""Requests in OpenAI's form, and what they ask of the model.

What is not supported is refused by name rather than ignored. Accepted beyond OpenAI's parameters:
``top_k``, ``repetition_penalty``, ``chat_template_kwargs`` (as other servers name them) and
``deadline_s``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from edgeexit.runtime import Sampling
from edgeexit.serve.refusals import BAD, Refusal
from edgeexit.serve.texts import Asked

MOST_PROMPTS, MOST_STOPS = 64, 16
SHORT = 16
"""OpenAI's default of ``max_tokens`` for completions; chats have none."""

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier"}
IGNORED |= {"prompt_cache_key", "parallel_tool_calls"}
"""Parameters that do not change the text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Parameters that are not supported -> values that ask for nothing."""


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Form):
    """``stream_options``."""

    include_usage: bool | None = None


class _Request(_Form):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def asked(self, default: Sampling, new_tokens: int | None) -> Asked:
        """What it asks for. `default`: the checkpoint's sampling; `new_tokens`: most new tokens if
        the request does not say.

        Raises:
            EdgeExitError, Refusal: A value is out of range.
        """
        prompts: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise Refusal(
                BAD, f"prompt has {len(prompts)} prompts. Give 1 to {MOST_PROMPTS}.", param="prompt"
            )
        most = self.max_tokens or new_tokens or SHORT
        return _asked(self, default, most, prompts=prompts)


class TextPart(_Form):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageAddress(_Form):
    """Where an image is: in the address itself (``data:``)."""

    url: str


class ImagePart(_Form):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageAddress


class Message(_Form):
    """A message. Further keys go to the chat template, except empty ones."""

    role: str
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    def as_given(self) -> dict[str, Any]:
        """The message as the model takes it; a developer's is a system message."""
        given = self.model_dump(exclude_none=True)
        role = "system" if self.role == "developer" else self.role
        parts = given.get("content")
        if isinstance(parts, list) and all(part["type"] == "text" for part in parts):
            given["content"] = "".join(part["text"] for part in parts)
        return given | {"role": role}


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def asked(self, default: Sampling, new_tokens: int | None) -> Asked:
        """As `CompletionRequest.asked`; without any limit, a text ends where the capacity does."""
        return _asked(
            self,
            default,
            self.max_completion_tokens or self.max_tokens or new_tokens,
            messages=[message.as_given() for message in self.messages],
            variables=self.chat_template_kwargs or {},
        )


def _asked(request: _Request, default: Sampling, most: int | None, **inputs: Any) -> Asked:
    _check_others(request.model_extra or {})
    given = request.stop
    stops = [given] if isinstance(given, str) else list(given or ())
    if len(stops) > MOST_STOPS:
        raise Refusal(
            BAD, f"stop has {len(stops)} strings. Give {MOST_STOPS} at most.", param="stop"
        )
    sampling = _sampling(request, default)
    return Asked(sampling, most=most, stops=stops, streams=bool(request.stream), **inputs)


def _sampling(request: _Request, default: Sampling) -> Sampling:
    """The checkpoint's sampling with the values of the request; without a seed, a random one."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    given.setdefault("seed", secrets.randbits(32))
    return msgspec.structs.replace(default, **given)


def _check_others(others: Mapping[str, Any]) -> None:
    """Refuses parameters that are unknown or not supported."""
    for name, value in others.items():
        if value is None or name in IGNORED or _asks_for_nothing(name, value):
            continue
        message = f"{name} is not supported by this server. Leave it out."
        if name not in NEUTRAL:
            message = f"{name[:80]}: unknown parameter. Leave it out."
        raise Refusal(BAD, message, param=name[:80], code="unsupported_parameter")


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a parameter has a neutral value. 0 and False are equal, but not the same.

    >>> _asks_for_nothing("n", 1), _asks_for_nothing("logprobs", 0), _asks_for_nothing("stops", 1)
    (True, False, False)
    """
    kinds = NEUTRAL.get(name, ())
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in kinds)


__all__ = ["ChatRequest", "CompletionRequest"]
