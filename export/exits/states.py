"""Names and shapes of the states that layers keep per token."""

from __future__ import annotations

from collections.abc import Sequence

from edgeexit.bundle.manifest import TokenState
from edgeexit.export.trace.attention import Heads


def layer_names(start: int, stop: int) -> list[str]:
    """Names of the layers from `start` to before `stop`, counted from 1."""
    return [f"layer_{layer + 1}" for layer in range(start, stop)]


def token_states(heads: Heads, layers: Sequence[str]) -> tuple[TokenState, ...]:
    """Keys and values of layers."""
    return tuple(
        TokenState(
            name=f"{layer}/{kind}",
            dtype="float32",
            axes=["batch", heads.keys, "past", heads.size],
            past=f"{layer}/past_{kind}",
            present=f"{layer}/present_{kind}",
        )
        for layer in layers
        for kind in ("key", "value")
    )


__all__ = ["layer_names", "token_states"]
