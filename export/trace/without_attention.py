"""Layers whose attention was removed: what is left of them, in the forms that are exported.

A family describes the rest of a layer as a `FeedForward`. `FoldedLayer` reads only a token's
state. `AdaptedLayer` also reads a summary of the prompt, which it makes itself when the prompt
passes (`edgeexit.bundle.manifest.PromptState`). `edgeexit.export.exits.skipped_attention` makes
them of trained weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from edgeexit.bundle.manifest import Tensor

PROMPT = (
    Tensor(name="prompt_shares", dtype="float32", axes=["batch", 1, "new"]),
    Tensor(name="begins", dtype="bool", axes=["batch", 1, 1]),
)
"""What layers that summarise a prompt share: the weights of a mean over its tokens, and whether a
row has any of them."""


@dataclass(frozen=True)
class FeedForward:
    """A layer behind its attention: ``state + down(activation(gate(x)) * up(x))`` with ``x =
    norm(state)``.

    Attributes:
        norm: RMS norm with a ``weight`` ``[width]``.
        epsilon: Its epsilon.
    """

    norm: nn.Module
    epsilon: float
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor]

    @property
    def scale(self) -> torch.Tensor:
        """The norm's weight."""
        weight = self.norm.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def normed(self, state: torch.Tensor) -> torch.Tensor:
        """A state divided by its root mean square: the norm without its weight."""
        wide = state if state.dtype == torch.float64 else state.float()
        square = wide.square().mean(-1, keepdim=True)
        return (state * torch.rsqrt(square + self.epsilon)).to(state.dtype)

    def add(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The state behind the layer, of `x` behind the norm."""
        return state + self.down(self.activation(self.gate(x)) * self.up(x))


class WithoutAttention(nn.Module):
    """A layer without attention: ``forward(state, *states, *shared)``, as in
    `edgeexit.export.contract.Layer`.

    Attributes:
        takes: Shared tensors that it takes.
        width: Size of its prompt state ``[batch, 1, width]``; None: it has none.
    """

    takes: tuple[Tensor, ...] = ()
    width: int | None = None

    def __init__(self, rest: FeedForward) -> None:
        super().__init__()
        self.norm = copy.deepcopy(rest.norm)
        self.down = rest.down
        self.activation = rest.activation

    def _add(
        self, state: torch.Tensor, x: torch.Tensor, gate: nn.Linear, up: nn.Linear
    ) -> torch.Tensor:
        return state + self.down(self.activation(gate(x)) * up(x))


class FoldedLayer(WithoutAttention):
    """A layer that reads a token's state alone.

    Args:
        rest: The layer's rest.
        gate, up: Its first projections, which take the norm's output without its weight; None: the
            layer's own, behind its own norm.
    """

    def __init__(
        self, rest: FeedForward, gate: nn.Linear | None = None, up: nn.Linear | None = None
    ) -> None:
        super().__init__(rest)
        if gate is not None:
            nn.init.ones_(self.norm.weight)  # type: ignore[arg-type]
        self.gate, self.up = gate or rest.gate, up or rest.up

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self._add(state, self.norm(state), self.gate, self.up)


class AdaptedLayer(WithoutAttention):
    """A layer with an adapter in place of its attention, in as few operators as it takes: beside a
    single token, they take longer than what they compute.

    Of normed states x, ``z, q = x @ read``. A prompt's summary ``[m, g]`` is its mean q, plus a
    bias. With ``z = z + m``, ``x + [z, sigmoid(g) z] @ leave`` goes on to the layer's rest.

    Args:
        rest: The layer's rest.
        gate, up: As for `FoldedLayer`.
        read: ``[width, inner + inner + 1]``.
        bias: ``[inner + 1]``.
        leave: ``[2 * inner, width]``.
    """

    takes = PROMPT

    def __init__(
        self,
        rest: FeedForward,
        gate: nn.Linear,
        up: nn.Linear,
        read: torch.Tensor,
        bias: torch.Tensor,
        leave: torch.Tensor,
    ) -> None:
        super().__init__(rest)
        nn.init.ones_(self.norm.weight)  # type: ignore[arg-type]
        self.gate, self.up = gate, up
        self.read, self.bias, self.leave = (nn.Buffer(one) for one in (read, bias, leave))
        self.width = len(bias)

    def forward(
        self,
        state: torch.Tensor,
        summary: torch.Tensor,
        shares: torch.Tensor,
        begins: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(state)
        z, q = torch.split(x @ self.read, [len(self.bias) - 1, len(self.bias)], dim=-1)
        summary = torch.where(begins, shares @ q + self.bias, summary)
        m, g = torch.split(summary, [len(self.bias) - 1, 1], dim=-1)
        z = z + m
        both = torch.cat([z, z * torch.sigmoid(g)], dim=-1)
        return self._add(state, x + both @ self.leave, self.gate, self.up), summary


def prompt_of(counts: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors `PROMPT` of states ``[batch, new, width]`` whose first ``counts[row]`` tokens
    belong to the row's prompt."""
    places = torch.arange(like.shape[1], device=like.device)
    belongs = (places < counts[:, None]).to(like.dtype)
    shares = belongs / counts.clamp(min=1)[:, None].to(like.dtype)
    return shares[:, None], counts[:, None, None] > 0


__all__ = ["PROMPT", "AdaptedLayer", "FeedForward", "FoldedLayer", "WithoutAttention", "prompt_of"]
