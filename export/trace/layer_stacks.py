"""Describes a trunk's layers as `Stack`s: with their caches in every form of attention, and as
projections.

`edgeexit.export.exits.decoder` builds its components with `Stacks`. It compares layers by running
them, so a family's file need not say which layers compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from edgeexit.bundle.manifest import Tensor
from edgeexit.export.contract import Form, Layer, Stack
from edgeexit.export.trace.attention import (
    AnyForm,
    Append,
    Heads,
    forms,
    read_source,
    split_heads,
)
from edgeexit.export.trace.rotary import angles, rotations, turn
from edgeexit.export.trace.without_attention import PROMPT, WithoutAttention, prompt_of


class CutLayer(Protocol):
    """Methods of a trunk's layer module, an ``nn.Module``: `before` and `after` attention."""

    def before(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def after(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor: ...


class ReadingLayer(CutLayer, Protocol):
    """A layer with a second attention, over the encoder's output: `before` self-attention,
    `between` the two, and `after` both. `cross` gives the second one's keys and values."""

    def between(
        self, state: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def cross(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


_UNREAD = Tensor(name="unread", dtype="bool", axes=["batch", 1, 1, "source"])


class Stacks:
    """Makes stacks that share modules where possible, because each module is traced once.

    Args:
        heads: Shape of attention.
        width: Size of a state.
        stem: ``(embedded, positions) -> state``, before the first layer; optional.
        head: ``state [rows, width] -> logits``, behind the last layer.
        masked: Whether layers that also attend over a source (`ReadingLayer`) leave out its
            padding; its mask is then an input after positions.
    """

    def __init__(
        self,
        heads: Heads,
        width: int,
        stem: nn.Module | None,
        head: nn.Module,
        *,
        masked: bool = False,
    ) -> None:
        self._heads = heads
        self._state = Tensor(name="state", dtype="float32", axes=["batch", "new", width])
        self._attentions = [form(heads) for form in forms(heads)]
        self._stem, self._masked = stem, masked
        self._entries: dict[tuple[object, ...], _Entry] = {}
        self._head = _LastToken(head)
        self._rotations = _Rotations(heads)
        self._kinds: list[_Kind] = []
        self._without: list[WithoutAttention] = []
        self._saturation = Saturation().eval()

    def forms(
        self,
        layers: Sequence[nn.Module],
        *,
        stem: bool = False,
        head: bool = False,
        scored: bool = False,
    ) -> tuple[Form, ...]:
        """Layers with their caches, in every form that supports the heads. Layers without attention
        (`WithoutAttention`) may be among them; a stack of nothing else has forms with and without
        ONNX Runtime's own operators.

        Args:
            stem, head: Whether it begins with the stem, and ends with the head.
            scored: Whether the last layer's `Saturation` is an output behind the state.
        """
        attends = any(not isinstance(layer, WithoutAttention) for layer in layers)
        summarises = any(isinstance(layer, WithoutAttention) and layer.takes for layer in layers)
        made: list[Form] = []
        for number, attention in enumerate(self._attentions):
            entry = self._entry(attention if attends else None, stem=stem, summarises=summarises)
            requires = attention.requires
            if not attends:
                requires = tuple(name for name in requires if name == "onnxruntime-operators")
            form = Form(
                body=Stack(
                    entry=entry.eval(),
                    state=self._state,
                    shared=entry.shared,
                    layers=[self._layer(layer, number) for layer in layers],
                    head=self._head if head else None,
                    closing=self._saturation if scored else None,
                ),
                requires=requires,
                states=attention.states if attends else "append",
                lengths=(
                    *(attention.lengths if attends else ()),
                    *(("prompt",) if summarises else ()),
                ),
                opset=attention.opset if attends else Append.opset,
            )
            if attends or all(form.requires != known.requires for known in made):
                made.append(form)
        return tuple(made)

    def _entry(self, attention: AnyForm | None, *, stem: bool, summarises: bool) -> _Entry:
        stem = stem and self._stem is not None
        key = attention, stem, summarises
        if key not in self._entries:
            self._entries[key] = _Entry(
                self._stem if stem else None, attention, self._masked, summarises=summarises
            )
        return self._entries[key]

    def _layer(self, layer: nn.Module, number: int) -> Layer:
        """A layer in one of the forms."""
        if isinstance(layer, WithoutAttention):
            module = next((known for known in self._without if _same(known, layer)), layer)
            if module is layer:
                self._without.append(layer)
            names = tuple(tensor.name for tensor in layer.takes)
            count = 0 if layer.width is None else 1
            return Layer(module.eval(), _own_tensors(layer), names, count, count)
        shared = (*self._attentions[number].shared, *((_UNREAD,) if self._masked else ()))
        return Layer(
            self._kind(layer).cached[number],
            _weights(layer),
            tuple(tensor.name for tensor in shared),
            states=4 if hasattr(layer, "between") else 2,
            updated=2,
        )

    def projection(self, layers: Sequence[nn.Module]) -> Stack:
        """Computes the keys and values of all layers from one state, as if it were the input of
        each layer (CALM's propagation of a skipped token's state, arXiv:2207.07061)."""
        shared = () if self._heads.rotary is None else rotations(self._heads.size)
        names = tuple(tensor.name for tensor in shared)
        return Stack(
            entry=self._rotations,
            state=self._state,
            shared=shared,
            layers=[
                Layer(self._kind(layer).projecting, _weights(layer), names, updated=2)
                for layer in layers
                if not isinstance(layer, WithoutAttention)
            ],
        )

    def _kind(self, layer: nn.Module) -> _Kind:
        for kind in self._kinds:
            if _alike(kind.layer, layer, self._state.axes[-1], self._heads):
                return kind
        self._kinds.append(_Kind(layer, self._attentions, self._heads))
        return self._kinds[-1]


class _Kind:
    """Modules to trace for all layers that compute the same as `layer`."""

    def __init__(self, layer: nn.Module, attentions: Sequence[AnyForm], heads: Heads) -> None:
        self.layer = layer
        self.cached = [_CachedLayer(layer, attention).eval() for attention in attentions]
        self.projecting = _ProjectingLayer(layer, heads).eval()


class _Entry(nn.Module):
    """Computes the first state, and the values that layers share (`shared`)."""

    def __init__(
        self, stem: nn.Module | None, attention: AnyForm | None, masked: bool, *, summarises: bool
    ) -> None:
        super().__init__()
        self.stem = stem
        self.attention = attention
        self.masked = masked
        self.summarises = summarises

    @property
    def shared(self) -> tuple[Tensor, ...]:
        own = () if self.attention is None else self.attention.shared
        return (*own, *((_UNREAD,) if self.masked else ()), *(PROMPT if self.summarises else ()))

    def forward(
        self, state: torch.Tensor, positions: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        source, given = (rest[:1], list(rest[1:])) if self.masked else ((), list(rest))
        past = None if self.attention is None else given.pop()
        counts = [given.pop()] if self.summarises else []
        if self.stem is not None:
            state = self.stem(state, positions)
        shared: tuple[torch.Tensor, ...] = ()
        if self.attention is not None and past is not None:
            shared = self.attention.prepare(positions, given, past.shape[2])
        unread = (~mask.bool()[:, None, None] for mask in source)
        prompt = (value for count in counts for value in prompt_of(count, state))
        return (state, *shared, *unread, *prompt)


class _CachedLayer(nn.Module):
    """A layer with attention over its cache."""

    def __init__(self, layer: nn.Module, attention: AnyForm) -> None:
        super().__init__()
        self.layer = layer
        self.attention = attention

    def forward(
        self,
        state: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer, past = cast("CutLayer", self.layer), (past_key, past_value)
        q, k, v = layer.before(state)
        if not hasattr(layer, "between"):
            attended, key, value = self.attention(q, k, v, past, rest)
            return layer.after(state, attended), key, value
        cross_key, cross_value, *given = rest
        own = len(self.attention.shared)
        attended, key, value = self.attention(q, k, v, past, given[:own])
        unread = given[own] if len(given) > own else None
        state, q = cast("ReadingLayer", layer).between(state, attended)
        scale = self.attention.heads.scale
        attended = read_source(q, cross_key, cross_value, unread, scale=scale)
        return layer.after(state, attended), key, value


class Saturation(nn.Module):
    """How little a layer changes each token: the cosine similarity of its input and output (CALM,
    arXiv:2207.07061; MuE, CVPR 2023), float32 ``[batch, new]``."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return functional.cosine_similarity(before.float(), after.float(), dim=-1)


class _LastToken(nn.Module):
    """Applies the head to each row's last token."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.head(state[:, -1])


class _Rotations(nn.Module):
    """The entry of projections: passes the state on, and computes the rotations of keys."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.rotary = heads.rotary is not None
        if heads.rotary is not None:
            self.cos, self.sin = (nn.Buffer(table) for table in heads.rotary)

    def forward(
        self, state: torch.Tensor, positions: torch.Tensor, *source: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (state, *angles(self.cos, self.sin, positions)) if self.rotary else (state,)


class _ProjectingLayer(nn.Module):
    """Computes a layer's keys and values from a state, and passes the state on."""

    def __init__(self, layer: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.layer = layer
        self.heads = heads

    def forward(
        self, state: torch.Tensor, *turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, k, v = cast("CutLayer", self.layer).before(state)
        k, v = (split_heads(x, self.heads.keys, self.heads.size) for x in (k, v))
        return state, turn(k, turns[0], turns[1]) if turns else k, v


class _WithoutAttention(nn.Module):
    """Everything that a layer computes except attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer = cast("CutLayer", self.layer)
        outputs = (*layer.before(state), layer.after(state, attended))
        if not hasattr(layer, "between"):
            return outputs
        reading = cast("ReadingLayer", layer)
        return (*outputs, *reading.between(state, attended), *reading.cross(state))


def _weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A layer's tensors by their names in this file's modules, where the layer is ``layer``."""
    return {f"layer.{name}": value for name, value in _own_tensors(layer).items()}


def _own_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in _tensors(layer).items()}


def _same(known: nn.Module, layer: nn.Module) -> bool:
    """Whether modules have the same structure and shapes."""
    same = type(known) is type(layer) and repr(known) == repr(layer)
    return same and _shapes(layer) == _shapes(known)


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _alike(known: nn.Module, layer: nn.Module, width: object, heads: Heads) -> bool:
    """Whether a layer differs from a known one only in its weights: same modules, same settings,
    and bit-identical outputs if the known layer runs with its weights."""
    if layer is known:
        return True
    if not _same(known, layer):
        return False
    assert isinstance(width, int)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2, 3, width, generator=generator)
    attended = torch.randn(2, 3, heads.queries * heads.size, generator=generator)
    with torch.no_grad():
        expected = _WithoutAttention(layer)(state, attended)
        outputs = functional_call(_WithoutAttention(known), _weights(layer), (state, attended))
    return all(map(torch.equal, expected, outputs))


def _shapes(layer: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in _tensors(layer).items()}


__all__ = ["CutLayer", "ReadingLayer", "Saturation", "Stacks"]
