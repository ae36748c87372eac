"""Forms of attention with a cache, one module each, which compute the same for different engines.

A decoder's segment is exported once per form. `InPlace` is ONNX Runtime's GroupQueryAttention,
which appends to the cache that it reads. `Fixed` does the same with standard operators, for engines
that support opset 24. `Append` runs on every engine: it returns the new keys and values, and the
runtime appends them. Caches are ``[batch, heads, capacity, size]``. The filled length of each row
is an input; `edgeexit.bundle.manifest.LENGTHS` has its kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import StateForm, Tensor
from edgeexit.export.contract import Length, length
from edgeexit.export.trace.relative_bias import RelativeBias
from edgeexit.export.trace.rotary import angles, rotate, rotations, turn

Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_PLACES = Tensor(name="places", dtype="int64", axes=["batch", "new"])
FLOAT32_ATTENTION = "float32-attention"
"""Engine feature that fused attention requires in float32; GPUs only have it in half precision."""
ATTENTION_BIAS = "attention-bias"
"""Engine feature that fused attention requires where a bias is added to its scores."""


@dataclass(frozen=True)
class Heads:
    """Shape of a trunk's attention.

    Attributes:
        queries: Attention heads.
        keys: Heads of keys and values; each serves ``queries / keys`` query heads.
        size: Width of one head.
        rotary: Tables ``(cos, sin)``, each ``[positions, size / 2]``, that rotate the two halves of
            a query or key (RoPE, arXiv:2104.09864). None: the model has no rotary positions.
        bias: Added to scores by the distance between query and key. It needs as many key heads as
            query heads, and token states without gaps: a key's index there is its position.
        scale: Factor of the scores; None: ``size ** -0.5``.
    """

    queries: int
    keys: int
    size: int
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    bias: RelativeBias | None = None
    scale: float | None = None

    @property
    def scaling(self) -> float:
        """Factor of the scores."""
        return self.size**-0.5 if self.scale is None else self.scale

    def scaled(self, q: torch.Tensor) -> torch.Tensor:
        """Queries multiplied by `scaling`."""
        return q if self.scaling == 1.0 else q * self.scaling

    def on(self, device: torch.device) -> Heads:
        """A copy with its tables on a device."""
        if self.rotary is None or self.rotary[0].device == device:
            return self
        cos, sin = self.rotary
        return dataclasses.replace(self, rotary=(cos.to(device), sin.to(device)))


class InPlace(nn.Module):
    """GroupQueryAttention: past and present share one buffer, so nothing is copied.

    For export only: torch cannot run the operator, which is ONNX Runtime's own. The head size must
    be a multiple of 16.
    """

    states: StateForm = "in-place"
    requires: tuple[str, ...] = ("onnxruntime-operators", FLOAT32_ATTENTION)
    lengths: tuple[Length, ...] = ("last", "most")
    opset = 18

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads, self.bias = heads, heads.bias
        self.shared: tuple[Tensor, ...] = (_PLACES, *(length(kind, kind) for kind in self.lengths))
        if heads.rotary is not None:
            self.cos, self.sin = (nn.Buffer(table) for table in heads.rotary)
        if heads.bias is not None:
            self.requires = (*self.requires, ATTENTION_BIAS)
            self.shared += (_bias(heads, None),)

    def prepare(
        self, positions: torch.Tensor, lengths: Sequence[torch.Tensor], capacity: int
    ) -> tuple[torch.Tensor, ...]:
        """The values that layers share (`shared`)."""
        if self.bias is None:
            return (positions, *lengths)
        # The operator's bias must have exactly as many keys as the longest row.
        most = lengths[self.lengths.index("most")].item()
        torch._check(most >= 0)
        seen = torch.arange(most, device=positions.device)
        return (positions, *lengths, self.bias(positions, seen))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
        shared: Sequence[torch.Tensor],
    ) -> Made:
        """q, k, v ``[batch, new, heads * size]``. Returns the output and the whole caches."""
        heads, rotary = self.heads, self.heads.rotary is not None
        positions, last, most, *bias = shared
        inputs: list[torch.Tensor | None] = [q, k, v, *past, last, most]
        inputs += [self.cos, self.sin, positions] if rotary else [None] * 3 if bias else []
        inputs += bias
        attended, key, value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            {
                "num_heads": heads.queries,
                "kv_num_heads": heads.keys,
                "do_rotary": int(rotary),
                "scale": heads.scaling,
            },
            dtypes=[q.dtype] * 3,
            shapes=[q.shape, past[0].shape, past[1].shape],
            version=1,
        )
        return attended, key, value


class Fixed(nn.Module):
    """TensorScatter and Attention of opset 24: past and present share one buffer, whose size an
    engine may fix when it is built (TensorRT does).

    For export only: torch cannot run the operators. Only a mask decides which tokens a query sees:
    engines disagree on ``is_causal`` and ``nonpad_kv_seqlen`` if several new tokens follow a past
    (onnx 1.23 corrected the operator's definition), and an early TensorRT parser silently ignores
    the latter. The graph scales queries before the operator; else TensorRT would multiply the whole
    cache. TensorRT has kernels for head sizes of 16 to 256 that are a multiple of 8, in float16 and
    bfloat16.
    """

    states: StateForm = "fixed"
    requires: tuple[str, ...] = ("opset-24", "cache-update", FLOAT32_ATTENTION)
    lengths: tuple[Length, ...] = ("past",)
    opset = 24

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads, self.bias = heads, heads.bias
        self.shared: tuple[Tensor, ...] = (
            _PLACES,
            *(length(kind, kind) for kind in self.lengths),
            Tensor(name="seen", dtype="bool", axes=["batch", 1, "new", "past"])
            if heads.bias is None
            else _bias(heads, "past"),
        )
        if heads.rotary is not None:
            self.cos, self.sin = (nn.Buffer(table) for table in heads.rotary)
        if heads.bias is not None:
            self.requires = (*self.requires, ATTENTION_BIAS)

    def prepare(
        self, positions: torch.Tensor, lengths: Sequence[torch.Tensor], capacity: int
    ) -> tuple[torch.Tensor, ...]:
        """The values that layers share (`shared`): which cache entries each new token sees, as a
        mask or as a bias that is very low for the other entries."""
        (filled,) = lengths
        last = filled.unsqueeze(1) + torch.arange(positions.shape[1], device=positions.device)
        places = torch.arange(capacity, device=positions.device)
        seen = (places <= last.unsqueeze(2)).unsqueeze(1)
        if self.bias is None:
            return positions, filled, seen
        return positions, filled, _masked(self.bias(positions, places), ~seen)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
        shared: Sequence[torch.Tensor],
    ) -> Made:
        """q, k, v ``[batch, new, heads * size]``. Returns the output and the whole caches."""
        heads, (positions, filled, seen) = self.heads, shared
        q, k, v = (
            split_heads(x, count, heads.size)
            for x, count in ((q, heads.queries), (k, heads.keys), (v, heads.keys))
        )
        if heads.rotary is not None:
            q, k = (
                _operator("RotaryEmbedding", [x, self.cos, self.sin, positions], {}, like=x)
                for x in (q, k)
            )
        key, value = (
            _operator("TensorScatter", [whole, new, filled], {"axis": -2}, like=whole)
            for whole, new in zip(past, (k, v), strict=True)
        )
        attended = _operator(
            "Attention",
            [heads.scaled(q), key, value, seen],
            {"scale": 1.0},
            like=q,
        )
        return join_heads(attended), key, value


def _operator(
    name: str, inputs: Sequence[torch.Tensor], attributes: dict[str, Any], like: torch.Tensor
) -> torch.Tensor:
    """An operator of opset 24 whose output has the type and shape of `like`."""
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=like.dtype, shape=like.shape, version=Fixed.opset
    )


class Append(nn.Module):
    """Attention over the cache and the new tokens with operators that every engine has (opset 20).

    One softmax covers the scores of cached and new keys; cache entries beyond a row's length are
    masked.
    """

    states: StateForm = "append"
    requires: tuple[str, ...] = ()
    lengths: tuple[Length, ...] = ("past",)
    opset = 18

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads, self.bias = heads, heads.bias
        alone = heads.queries == heads.keys
        self.shared: tuple[Tensor, ...] = (
            Tensor(name="beyond", dtype="bool", axes=["batch", 1, 1, "past"]),
            Tensor(name="later", dtype="bool", axes=["new" if alone else "queries", "new"]),
        )
        if heads.bias is not None:
            axes: list[str | int | None] = [heads.queries, "new", "new"]
            self.shared = (
                _bias(heads, "past"),
                Tensor(name="own_bias", dtype="float32", axes=axes),
            )
        if heads.rotary is not None:
            self.shared += rotations(heads.size)
            self.cos, self.sin = (nn.Buffer(table) for table in heads.rotary)

    def prepare(
        self, positions: torch.Tensor, lengths: Sequence[torch.Tensor], capacity: int
    ) -> tuple[torch.Tensor, ...]:
        """The values that layers share (`shared`): masks of the cached and of the new keys that
        each new token (each query, where several share keys) does not see, or biases that are very
        low there; and rotations."""
        (filled,) = lengths
        new, shared = positions.shape[1], self.heads.queries // self.heads.keys
        beyond = torch.arange(capacity, device=positions.device) >= filled.reshape(-1, 1, 1, 1)
        order = torch.arange(new, device=positions.device)
        later = order.unsqueeze(0) > order.unsqueeze(1)
        if self.bias is not None:
            places = torch.arange(capacity, device=positions.device)
            of_old, of_own = self.bias(positions, places), self.bias(order, order)
            return _masked(of_old, beyond), _masked(of_own, later)
        if shared > 1:
            later = later.repeat(shared, 1)
        if self.heads.rotary is None:
            return beyond, later
        return (beyond, later, *angles(self.cos, self.sin, positions))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
        shared: Sequence[torch.Tensor],
    ) -> Made:
        """q, k, v ``[batch, new, heads * size]``. Returns the output, and the new keys and values
        ``[batch, heads, new, size]``."""
        heads, (beyond, later, *turns) = self.heads, shared
        past_key, past_value = past
        q, k, v = (
            split_heads(x, count, heads.size)
            for x, count in ((q, heads.queries), (k, heads.keys), (v, heads.keys))
        )
        if heads.rotary is not None:
            cos, sin = turns
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        new, capacity = q.shape[2], past_key.shape[2]
        group = heads.queries // heads.keys
        q = heads.scaled(q)
        if group > 1:
            # Query heads that share keys become rows: [batch, keys, group * new, size]
            q = q.unflatten(1, (heads.keys, group)).flatten(2, 3)
        old, own = q @ past_key.transpose(-1, -2), q @ k.transpose(-1, -2)
        if self.bias is None:
            old, own = _masked(old, beyond), _masked(own, later)
        else:  # `prepare` has masked the biases
            old, own = old + beyond, own + later
        shares = torch.softmax(torch.cat([old, own], dim=-1), dim=-1, dtype=torch.float32)
        of_old, of_own = shares.to(q.dtype).split([capacity, new], dim=-1)
        attended = of_old @ past_value + of_own @ v
        if group > 1:
            attended = attended.unflatten(2, (group, new)).flatten(1, 2)
        return join_heads(attended), k, v


def _masked(scores: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
    """Sets scores or biases of unseen keys to the lowest value of the type."""
    return scores.masked_fill(unseen, torch.finfo(scores.dtype).min)


def _bias(heads: Heads, keys: str | None) -> Tensor:
    """Describes the bias that is added to scores, with `keys` as its last axis."""
    axes: list[str | int | None] = ["batch", heads.queries, "new", keys]
    return Tensor(name="bias", dtype="float32", axes=axes)


AnyForm = InPlace | Fixed | Append


def forms(heads: Heads) -> tuple[type[AnyForm], ...]:
    """The forms that support these heads, fastest first: the runtime takes the first form whose
    requirements its engine meets."""
    supported: list[type[AnyForm]] = [Append]
    if heads.size % 8 == 0 and 16 <= heads.size <= 256:
        supported.insert(0, Fixed)
    if heads.size % 16 == 0:
        supported.insert(0, InPlace)
    return tuple(supported)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads, positions: torch.Tensor
) -> torch.Tensor:
    """Causal attention over whole sequences. q and the result: ``[batch, seq, queries * size]``."""
    q, k, v = (
        split_heads(x, count, heads.size)
        for x, count in ((q, heads.queries), (k, heads.keys), (v, heads.keys))
    )
    if heads.rotary is not None:
        # The tables are float32, whatever the model is trained in.
        q, k = (rotate(x, *heads.rotary, positions).to(v.dtype) for x in (q, k))
    shared = heads.queries // heads.keys
    if shared > 1:
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    if heads.bias is None:
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=heads.scaling
        )
        return join_heads(attended)
    bias = heads.bias(positions[:1], positions[:1])  # all rows have the same positions
    later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
    attended = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=_masked(bias, later), scale=heads.scaling
    )
    return join_heads(attended)


def read_source(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    unread: torch.Tensor | None,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a whole source: no causal mask.

    Args:
        q: ``[batch, new, heads * size]``.
        key, value: ``[batch, heads, source, size]``.
        unread: Source tokens to ignore, bool ``[batch, 1, 1, source]``; None: none.
        scale: Factor of the scores; None: ``size ** -0.5``.
        bias: Added to the scores, ``[..., heads, new, source]``.

    Returns:
        ``[batch, new, heads * size]``.
    """
    heads = Heads(key.shape[1], key.shape[1], key.shape[3], scale=scale)
    scores = heads.scaled(split_heads(q, heads.queries, heads.size)) @ key.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    scores = scores if unread is None else _masked(scores, unread)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return join_heads(shares @ value)


def split_heads(x: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """``[batch, new, heads * size]`` to ``[batch, heads, new, size]``."""
    return x.unflatten(-1, (count, size)).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, new, size]`` to ``[batch, new, heads * size]``."""
    return x.transpose(1, 2).flatten(-2)
