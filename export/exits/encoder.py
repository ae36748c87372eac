"""An encoder with exits: layers over a whole sequence, which runs once, before the decoder.

An exit has no module: it passes its state to the decoder as it is. Its score, `saturation`, is high
if the last layer changed the state little (MuE, CVPR 2023, which decides for all rows together;
here each row has its own score, without padding).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgeexit.bundle.manifest import Axis, Chain, Exit, Tensor
from edgeexit.export.contract import Component, Form
from edgeexit.export.exits.saved import check_layers
from edgeexit.export.trace.relative_bias import RelativeBias


@dataclass(frozen=True)
class EncoderTrunk:
    """A family's description of its encoder.

    Attributes:
        embedding: The model's own parameter ``[vocabulary, width]``; the stem takes the rows of its
            tokens, times `embedding_scale`. None: the stem takes an input of the program.
        stem: ``embedded [batch, source, width] -> state`` of the same shape, or of `state_axes`.
        layers: Each is ``(state, read [batch, source] bool) -> state``; `read` is False at padding,
            and None where nothing is padded.
        positions: The longest source, in tokens; None: any length.
        start_tokens: Token ids that a decoder's text begins with.
        pad_token: Token id that pads short sources.
        bias: Added to attention scores by distance; each layer gets it as a third argument,
            ``[heads, source, source]``.
        norm: Applied to a state before the decoder reads it, also to the state of an exit.
        state_axes: Axes of a state; None: those of the embedded source.
    """

    embedding: torch.Tensor | None
    stem: nn.Module
    layers: Sequence[nn.Module]
    positions: int | None
    start_tokens: tuple[int, ...]
    pad_token: int = 0
    bias: RelativeBias | None = None
    norm: nn.Module | None = None
    embedding_scale: float = 1.0
    state_axes: tuple[Axis, ...] | None = None


class ExitEncoder:
    """The layers of an encoder in segments, with exits behind some of them.

    Its weights belong to the model that it is part of, so it is no module.

    Args:
        trunk: The encoder.
        exits: Layers with an exit (1 = behind the first); the last one always has one.
        name: Name of its chain, and prefix of its components and exits.

    Attributes:
        exit_layers: Layers with an early exit.
        output: Name of the state that every exit passes on.
    """

    def __init__(self, trunk: EncoderTrunk, exits: Iterable[int] = (), name: str = "encoder"):
        self.trunk, self.name = trunk, name
        self.depth = len(trunk.layers)
        self.exit_layers = check_layers(exits, self.depth, name.replace("_", " "))
        self.output = f"{name}_state"

    def exit_name(self, layer: int) -> str:
        """Name of the exit behind a layer."""
        return f"{self.name}_exit_{layer}"

    def __call__(
        self, embedded: torch.Tensor, read: torch.Tensor | None, *, layers: int | None = None
    ) -> torch.Tensor:
        """The state behind all layers, or behind that many, without the norm.

        Args:
            embedded: ``[batch, source, width]``.
            read: ``[batch, source]``, 0 at padding; None: there is none.
        """
        trunk = self.trunk
        return _through(trunk.layers[:layers], trunk.stem(embedded), read, trunk.bias)[1]

    def each_exit(
        self, embedded: torch.Tensor, read: torch.Tensor | None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """``(layer, state, saturation)`` of every exit, the last included. Arguments as above."""
        state = self.trunk.stem(embedded)
        for start, stop in itertools.pairwise(self._borders):
            layers = self.trunk.layers[start:stop]
            before, state = _through(layers, state, read, self.trunk.bias)
            yield stop, state, saturation(before, state, read)

    def components(self, takes: Tensor, mask: Tensor | None) -> list[Component]:
        """The segments, and the encoder unsplit.

        Args:
            takes: The embedded source.
            mask: 0 at its padding; None: it has none.
        """
        masks = () if mask is None else (mask,)
        given = self.state(takes)
        segments: list[Component] = []
        for number, (start, stop) in enumerate(itertools.pairwise(self._borders)):
            name = f"{self.name}_{number}"
            state = Tensor(name=f"{self.output}_{stop}", dtype="float32", axes=given.axes)
            score = Tensor(name=f"{name}/saturation", dtype="float32", axes=["batch"])
            forms = (Form(_Segment(self.trunk, start, stop).eval()),)
            coming = takes if start == 0 else segments[-1].outputs[0]
            segments.append(Component(name, (coming, *masks), (state, score), forms))
        whole = _Segment(self.trunk, 0, self.depth, scored=False)
        unsplit = Component(self._unsplit, (takes, *masks), (given,), (Form(whole.eval()),))
        return [*segments, unsplit]

    def chain(self, takes: Tensor) -> Chain:
        """The chain of the segments, with an exit behind each."""
        names = [f"{self.name}_{number}" for number in range(len(self._borders) - 1)]
        exits = [
            Exit(
                name=self.exit_name(stop),
                behind=name,
                outputs={self.output: f"{self.output}_{stop}"},
                scores={"saturation": f"{name}/saturation"},
            )
            for name, stop in zip(names, self._borders[1:], strict=True)
        ]
        outputs = [self.state(takes)]
        return Chain(components=names, outputs=outputs, exits=exits, unsplit=[self._unsplit])

    def state(self, takes: Tensor) -> Tensor:
        """What every exit passes on: a tensor like the embedded source, or of the trunk's axes."""
        axes = self.trunk.state_axes or takes.axes
        return Tensor(name=self.output, dtype="float32", axes=list(axes))

    @property
    def _borders(self) -> list[int]:
        return [0, *self.exit_layers, self.depth]

    @property
    def _unsplit(self) -> str:
        return f"{self.name}_unsplit"


def unread_of(read: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of source tokens that attention ignores, ``[batch, 1, 1, source]`` bool.

    Args:
        read: ``[batch, source]``, 0 at padding; None: there is none.
    """
    return None if read is None else ~read.bool()[:, None, None]


def saturation(
    before: torch.Tensor,
    after: torch.Tensor,
    read: torch.Tensor | None,
    *,
    flatten: bool = False,
) -> torch.Tensor:
    """Cosine similarity of a layer's input and output, with all tokens of a row as one vector and
    without padding (MuE, CVPR 2023).

    Args:
        before, after: ``[batch, source, width]``; without `read` any shape.
        read: ``[batch, source]``, 0 at padding; None: there is none.
        flatten: As in MuE's public code: the whole batch is one vector, padding included, so that
            all rows have one score, which depends on what stands beside them.

    Returns:
        ``[batch]``, float32.
    """
    before, after = before.float(), after.float()
    if flatten:
        whole = before.flatten(0, 1)[None], after.flatten(0, 1)[None]
        return saturation(*whole, None).expand(len(before))
    if read is not None:
        kept = read.unsqueeze(-1).to(torch.float32)
        before, after = before * kept, after * kept
    norms = _total(before * before).sqrt() * _total(after * after).sqrt()
    return _total(before * after) / norms.clamp_min(1e-8)


def _total(values: torch.Tensor) -> torch.Tensor:
    """Sums per row, token by token first: one sum over all values of a long source, which engines
    may compute in order, would be wrong in the fourth digit."""
    return values.flatten(2).sum(2).sum(1) if values.ndim > 2 else values.sum(1)


class _Segment(nn.Module):
    """Layers of an encoder, and the `saturation` of the last one."""

    def __init__(
        self, encoder: EncoderTrunk, start: int, stop: int, *, scored: bool = True
    ) -> None:
        super().__init__()
        self.stem, self.scored = encoder.stem if start == 0 else None, scored
        self.bias = encoder.bias
        self.layers = nn.ModuleList(encoder.layers[start:stop])

    def forward(
        self, given: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        state = given if self.stem is None else self.stem(given)
        before, state = _through(self.layers, state, mask, self.bias)
        return (state, saturation(before, state, mask)) if self.scored else (state,)


def _through(
    layers: Iterable[nn.Module],
    state: torch.Tensor,
    mask: torch.Tensor | None,
    bias: RelativeBias | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the output of the last of some layers."""
    before, read = state, None if mask is None else mask.bool()
    shared: tuple[torch.Tensor, ...] = ()
    if bias is not None:
        places = torch.arange(state.shape[1], device=state.device)
        shared = (bias(places, places),)
    for layer in layers:
        before, state = state, layer(state, read, *shared)
    return before, state


__all__ = ["EncoderTrunk", "ExitEncoder", "saturation", "unread_of"]
