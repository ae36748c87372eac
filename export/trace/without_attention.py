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
from torch.nn import functional

from edgeexit.bundle.manifest import Tensor

PROMPT = (
    Tensor(name="prompt_shares", dtype="float32", axes=["batch", 1, "new"]),
    Tensor(name="begins", dtype="bool", axes=["batch", 1]),
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
        width: Size of its prompt state; None: it has none.
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
    """A layer with an adapter in place of its attention, of products only.

    The adapter is linear in a token's normed state x and in ``[w, m]``, which it computes of the
    prompt's mean x: ``x + (w outer (enter(x) + m)) leave``.

    Args:
        rest: The layer's rest.
        gate, up: As for `FoldedLayer`.
        read: Prompt mean -> two logits of w, then m.
        enter: State -> as wide as m.
        leave: ``[2 * len(m), width]``.
    """

    takes = PROMPT

    def __init__(
        self,
        rest: FeedForward,
        gate: nn.Linear,
        up: nn.Linear,
        read: nn.Linear,
        enter: nn.Linear,
        leave: torch.Tensor,
    ) -> None:
        super().__init__(rest)
        nn.init.ones_(self.norm.weight)  # type: ignore[arg-type]
        self.gate, self.up, self.read, self.enter = gate, up, read, enter
        self.leave = nn.Buffer(leave)
        self.width = read.out_features

    def forward(
        self,
        state: torch.Tensor,
        summary: torch.Tensor,
        shares: torch.Tensor,
        begins: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(state)
        read = self.read((shares @ x).squeeze(1))
        made = torch.cat([functional.softmax(read[:, :2], dim=-1), read[:, 2:]], dim=-1)
        summary = torch.where(begins, made, summary)
        mixed = self.enter(x) + summary[:, None, 2:]
        both = (summary[:, None, :2, None] * mixed[:, :, None, :]).flatten(2)
        return self._add(state, x + both @ self.leave, self.gate, self.up), summary


def prompt_of(counts: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors `PROMPT` of states ``[batch, new, width]`` whose first ``counts[row]`` tokens
    belong to the row's prompt."""
    places = torch.arange(like.shape[1], device=like.device)
    belongs = (places < counts[:, None]).to(like.dtype)
    shares = belongs / counts.clamp(min=1)[:, None].to(like.dtype)
    return shares[:, None], counts[:, None] > 0


__all__ = ["PROMPT", "AdaptedLayer", "FeedForward", "FoldedLayer", "WithoutAttention", "prompt_of"]
