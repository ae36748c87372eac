"""Attention that was removed from some layers of a decoder, and the adapters in its place (EAS,
"Not All Attention is Needed", IJCV 2026).

A layer without attention adds its feed-forward part only. A `Pia` in front of it mixes a token's
state with a summary of the prompt, which is all that such a layer knows of other tokens. The
summary is made of the prompt once; tokens that follow read it. A layer is exported with its adapter
(exact), or with the adapter folded into its weights for one fixed summary, the mean over prompts of
calibration data: then it costs nothing, and is an approximation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import PromptState, Tensor
from edgeexit.errors import UsageError
from edgeexit.export.exits.saved import listed
from edgeexit.export.trace.without_attention import (
    AdaptedLayer,
    FeedForward,
    FoldedLayer,
    WithoutAttention,
)

RANK = 32
"""Of a new adapter, as in the paper's smallest."""
GROUPS = 2
TEMPERATURE = 10.0


class Pia(nn.Module):
    """The adapter in place of an attention ("propagation of information adapter").

    For normed states h and the prompt's mean m of A(h): ``z = (m + C(h)) / 2``,
    ``w = softmax(E(mean h) / 10)``, and the result is ``h + scale * (w[0] B(z) + w[1] D(z))``. B
    and D begin at 0, so a new adapter changes nothing.

    Args:
        width: Size of a state.
        rank: Size of z; even.
        scale: Of what is added.

    Attributes:
        fixed: A summary ``[2 + rank]`` (w, then m) for every prompt, with which the adapter is
            folded into the layer's weights; NaN: there is none.
    """

    def __init__(self, width: int, rank: int = RANK, scale: float = 1.0) -> None:
        super().__init__()
        self.mean = nn.Linear(width, rank)
        self.enter = nn.Linear(width, rank)
        self.choose = nn.Linear(width, 2)
        self.leave = nn.Parameter(torch.zeros(2, GROUPS, rank // GROUPS, width // GROUPS))
        self.leave_bias = nn.Parameter(torch.zeros(2, width))
        self.scale = scale
        self.fixed = nn.Buffer(torch.full((2 + rank,), torch.nan))

    @property
    def rank(self) -> int:
        """Size of z."""
        return self.mean.out_features

    @property
    def is_fixed(self) -> bool:
        """Whether it reads one summary for every prompt."""
        return not bool(self.fixed.isnan().any())

    def summary(self, mean: torch.Tensor) -> torch.Tensor:
        """What the adapter reads of prompts: w, then m, ``[batch, 2 + rank]``.

        Args:
            mean: Mean normed state of each prompt ``[batch, width]``.
        """
        weights = functional.softmax(self.choose(mean) / TEMPERATURE, dim=-1)
        return torch.cat([weights, self.mean(mean)], dim=-1)

    def forward(self, x: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """States ``[batch, new, width]`` with what the adapter adds.

        Args:
            x: Normed states.
            summary: ``[batch, 2 + rank]``.
        """
        weights, mean = summary[:, None, :2], summary[:, None, 2:]
        mixed = (mean + self.enter(x)) / 2
        grouped = mixed.unflatten(-1, (GROUPS, -1))
        added = torch.einsum("bngr,kgrd->bnkgd", grouped, self.leave).flatten(3) + self.leave_bias
        return x + self.scale * (weights[..., None] * added).sum(dim=2)

    def leaving(self) -> torch.Tensor:
        """B and D as matrices ``[2, rank, width]``, scaled."""
        return self.scale * torch.stack([torch.block_diag(*one) for one in self.leave])

    def folded(self, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter for a summary ``[2 + rank]``, as ``R [width, width]`` and ``b [width]``:
        ``R h + b``."""
        weights, mean = summary[:2], summary[2:]
        leave = torch.einsum("k,krd->dr", weights, self.leaving())
        turn = torch.eye(leave.shape[0], dtype=leave.dtype, device=leave.device)
        turn = turn + leave @ (self.enter.weight / 2)
        return turn, leave @ ((self.enter.bias + mean) / 2) + self.scale * (
            weights @ self.leave_bias
        )


class SkippedAttention(nn.Module):
    """The layers of a decoder whose attention was removed.

    Args:
        layers: The decoder's layers.
        adapted: Layer (1 = the first) -> rank of its adapter. A layer may have an adapter and still
            its attention: a search for the layers to remove trains all of them.
        removed: Layers without attention; those without an adapter just lose it.

    Attributes:
        pia: ``layer_K`` -> its adapter.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        width: int,
        adapted: Mapping[int, int] | None = None,
        removed: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self._layers = list(layers)
        self.pia = nn.ModuleDict(
            {_name(layer): Pia(width, rank) for layer, rank in sorted((adapted or {}).items())}
        )
        self.remove(removed)

    def remove(self, layers: Iterable[int]) -> None:
        """Removes the attention of these layers, and of no others.

        Raises:
            UsageError: There is no such layer, one is given twice, none would keep its attention,
                or the family's layers cannot do without.
        """
        removed, depth = list(layers), len(self._layers)
        check_removed(removed, depth)
        if removed and not hasattr(self._layers[0], "feed_forward"):
            raise UsageError(
                "attention can be removed from models of the Llama and Qwen families only",
                fix="Use one of these, or describe the family's layers (FeedForward in "
                "edgeexit/export/families/llama.py).",
            )
        self.removed: tuple[int, ...] = tuple(sorted(removed))

    @property
    def ranks(self) -> dict[int, int]:
        """Layer -> rank of its adapter, of the layers without attention."""
        found = {layer: self.adapter(layer) for layer in self.removed}
        return {layer: pia.rank for layer, pia in found.items() if pia is not None}

    @property
    def summarises(self) -> bool:
        """Whether a removed layer reads a summary of the prompt."""
        return any(self.adapter(layer) is not None for layer in self.removed)

    def adapter(self, layer: int) -> Pia | None:
        """The adapter of a layer, if it has one."""
        name = _name(layer)
        return cast("Pia", self.pia[name]) if name in self.pia else None

    def through(
        self, number: int, state: torch.Tensor, belongs: torch.Tensor | None
    ) -> torch.Tensor:
        """The state ``[batch, seq, width]`` behind a layer without attention.

        Args:
            number: The layer.
            belongs: Which tokens belong to the row's prompt, bool ``[batch, seq]``; None: all.
        """
        rest, pia = self.rest(number), self.adapter(number)
        if pia is None:
            return rest.add(state, rest.norm(state))
        x = rest.normed(state)
        fixed = pia.is_fixed
        summary = pia.fixed.expand(len(x), -1) if fixed else pia.summary(_mean(x, belongs))
        return rest.add(state, rest.scale * pia(x, summary))

    def summaries(
        self, number: int, state: torch.Tensor, belongs: torch.Tensor | None
    ) -> torch.Tensor:
        """What the adapter of a layer reads of prompts, ``[batch, 2 + rank]``, of the states
        ``[batch, seq, width]`` that come into the layer."""
        pia = self.adapter(number)
        assert pia is not None
        return pia.summary(_mean(self.rest(number).normed(state), belongs))

    def deployed(self, number: int) -> WithoutAttention:
        """A layer without attention as it is exported, with the weights that it has now."""
        return deployed(self.rest(number), self.adapter(number))

    def states(self, number: int, component: str) -> Iterator[PromptState]:
        """The state that a removed layer has as a part of a component."""
        pia = self.adapter(number)
        if pia is not None and not pia.is_fixed:
            width = pia.rank + 2  # `AdaptedLayer`
            tensor = Tensor(
                name=f"layer_{number}/prompt", dtype="float32", axes=["batch", 1, width]
            )
            yield PromptState(tensor=tensor, maker=component, made=f"layer_{number}/prompt_made")

    def rest(self, number: int) -> FeedForward:
        """A layer behind its attention."""
        rest = self._layers[number - 1].feed_forward
        assert isinstance(rest, FeedForward)
        return rest


def deployed(rest: FeedForward, pia: Pia | None) -> WithoutAttention:
    """A layer without attention as it is exported: its rest alone, with its adapter, or with the
    adapter folded into its weights."""
    if pia is None:
        return FoldedLayer(rest)
    with torch.no_grad():
        if pia.is_fixed:
            turn, bias = pia.folded(pia.fixed)
            return FoldedLayer(
                rest, *(_folded(one, rest.scale, turn, bias) for one in _first(rest))
            )
        gate, up = (_linear(one.weight * rest.scale, one.bias) for one in _first(rest))
        # A further element of z, always 1, has the biases of B and D as its weights. The two
        # weights are sigmoid(g) and 1 - sigmoid(g).
        nothing = pia.enter.weight.new_zeros(1, pia.enter.in_features)
        chosen = (pia.choose.weight[:1] - pia.choose.weight[1:]) / TEMPERATURE
        read = torch.cat([pia.enter.weight / 2, nothing, pia.mean.weight / 2, nothing, chosen])
        bias = torch.cat(
            [
                (pia.enter.bias + pia.mean.bias) / 2,
                torch.ones_like(pia.enter.bias[:1]),
                (pia.choose.bias[:1] - pia.choose.bias[1:]) / TEMPERATURE,
            ]
        )
        one, other = torch.cat([pia.leaving(), pia.scale * pia.leave_bias[:, None]], dim=1)
        leave = torch.cat([other, one - other])
        return AdaptedLayer(rest, gate, up, read.T.contiguous(), bias, leave)


def check_removed(layers: Sequence[object], depth: int) -> None:
    """Raises `UsageError` for layers whose attention cannot be removed."""
    fix = f"Give some of the layers 1 to {depth}, each once."
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer <= depth:
            raise UsageError(
                f"attention cannot be removed from layer {layer!r}; the decoder has layers 1 to "
                f"{depth}",
                fix=fix,
            )
    if len(set(layers)) < len(layers):
        raise UsageError(f"removed attention: {listed(layers)} name a layer twice", fix=fix)  # type: ignore[arg-type]
    if layers and len(layers) == depth:
        raise UsageError(
            f"removed attention: all {depth} layers are named, so no token would see another",
            fix="Leave at least one layer its attention.",
        )


def _first(rest: FeedForward) -> tuple[nn.Linear, nn.Linear]:
    """The projections that take the norm's output."""
    return rest.gate, rest.up


def _folded(
    linear: nn.Linear, scale: torch.Tensor, turn: torch.Tensor, bias: torch.Tensor
) -> nn.Linear:
    """A projection that takes an unscaled normed state in front of the adapter ``turn h + bias``.
    Both products have the original weight (the paper's code adds the bias with the new one)."""
    made = linear.weight @ (scale * bias)
    return _linear(
        linear.weight * scale @ turn, made if linear.bias is None else made + linear.bias
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _mean(x: torch.Tensor, belongs: torch.Tensor | None) -> torch.Tensor:
    """The mean ``[batch, width]`` over the tokens that belong to a prompt."""
    if belongs is None:
        return x.mean(dim=1)
    shares = belongs.to(x.dtype)
    return (shares[:, None] @ x)[:, 0] / shares.sum(dim=1, keepdim=True).clamp(min=1)


def _name(layer: int) -> str:
    return f"layer_{layer}"


__all__ = ["RANK", "Pia", "SkippedAttention", "check_removed", "deployed"]
