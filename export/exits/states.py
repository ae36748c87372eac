"""Names and shapes of a decoder's tensors: states between its segments, and the states that layers
keep per token."""

from __future__ import annotations

from collections.abc import Sequence

from edgeexit.bundle.manifest import Tensor, TokenState
from edgeexit.export.trace.attention import Heads

POSITIONS = Tensor(name="positions", dtype="int64", axes=["batch", "new"])


def state_between(name: str, width: int) -> Tensor:
    """What a segment hands on to the next."""
    return Tensor(name=name, dtype="float32", axes=["batch", "new", width])


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


__all__ = ["POSITIONS", "layer_names", "state_between", "token_states"]
