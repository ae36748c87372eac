"""`Settings`: what the command line chooses for a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a server does with requests.

    Attributes:
        name: The model's name in requests and answers.
        hosts: Names and addresses by which browsers may call a server without a token.
        token: What requests must carry; None: nothing.
        queue: Most requests that wait for the model.
        deadline_s: Seconds from a request's arrival until it ends.
        grace_s: Seconds that what runs at a shutdown may go on.
        body_bytes: Largest body of a request.
        body_s: Seconds that a body may take to arrive.
        new_tokens: Most new tokens where a request does not say; None: what the route says.
        generating: Arguments of `Model.generate` that all texts share: mode, drafting.
    """

    name: str
    hosts: tuple[str, ...] = ("127.0.0.1", "::1", "localhost")
    token: str | None = None
    queue: int = 8
    deadline_s: float = 60.0
    grace_s: float = 30.0
    body_bytes: int = 16 << 20
    body_s: float = 10.0
    new_tokens: int | None = None
    generating: Mapping[str, Any] = field(default_factory=dict)


__all__ = ["Settings"]
