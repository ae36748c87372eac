"""Structs of the manifest (`edgeexit.bundle.manifest`) for tokens that are no text: those that a
text begins with by choice, and those that say times."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Token = Annotated[int, Meta(ge=0)]


class StartChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A choice of tokens behind the start token: a language, a task.

    `options` maps a name to its tokens, `aliases` further names to those (``english`` -> ``en``).
    Without `default`, every call must choose.
    """

    options: Annotated[dict[str, list[Token]], Meta(min_length=1)]
    default: str | None = None
    aliases: dict[str, str] = {}


class Timestamps(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens that say when something was said, for texts that have them by choice.

    `first` and all tokens behind it are times: `step_s` apart, from 0 seconds. The start tokens of
    a text without times end with `without`. In a text with times, they never decrease; a text
    begins with one (of the first `latest` + 1, if given), they come in pairs around what was said,
    and the next token is one where all of them together are likelier than each other token
    (Whisper, arXiv:2212.04356). `end` is the token behind those of ordinary text.
    """

    first: Token
    without: Token
    end: Token
    step_s: Annotated[float, Meta(gt=0)] = 0.02
    latest: Annotated[int, Meta(ge=0)] | None = None


__all__ = ["StartChoice", "Timestamps"]
