"""An encoder-decoder that writes text, with exits in both.

The decoder is that of `edgeexit.export.exits.decoder`; its layers also read the encoder's output.

An exit of the encoder has no module: it passes its state to the decoder as it is. Its score,
`saturation`, is high if the last layer changed the state little (MuE, CVPR 2023, which decides for
all rows together; here each row has its own score, without padding). One component for each segment
of the decoder computes the keys and values of cross attention from that state, once per prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import (
    Chain,
    Exit,
    Preprocessing,
    PromptState,
    Run,
    Tensor,
    TokenState,
)
from edgeexit.export.contract import Component, Form, SplitModel, Table, Values
from edgeexit.export.exits.decoder import DecoderTrunk, ExitDecoder, scaled
from edgeexit.export.exits.saved import SavedExits, check_layers, save_exits, save_model
from edgeexit.export.trace.attention import Heads, causal_attention, read_source, split_heads
from edgeexit.export.trace.relative_bias import RelativeBias

if TYPE_CHECKING:
    from edgeexit.export.trace.layer_stacks import CutLayer, ReadingLayer

SOURCE_IDS = Tensor(name="input_ids", dtype="int64", axes=["batch", "source"])
SOURCE_MASK = Tensor(name="attention_mask", dtype="int64", axes=["batch", "source"])
EXAMPLE_TOKENS = 12


@dataclass(frozen=True)
class EncoderTrunk:
    """A family's description of its encoder.

    Attributes:
        embedding: The model's own parameter ``[vocabulary, width]``; the stem takes the rows of its
            tokens, times `embedding_scale`.
        stem: ``embedded [batch, source, width] -> state`` of the same shape.
        layers: Each is ``(state, read [batch, source] bool) -> state``; `read` is False at padding.
        positions: The longest source, in tokens; None: any length.
        start_tokens: Token ids that a decoder's text begins with.
        pad_token: Token id that pads short sources.
        bias: Added to attention scores by distance; each layer gets it as a third argument,
            ``[heads, source, source]``.
        norm: Applied to a state before the decoder reads it, also to the state of an exit.
    """

    embedding: torch.Tensor
    stem: nn.Module
    layers: Sequence[nn.Module]
    positions: int | None
    start_tokens: tuple[int, ...]
    pad_token: int = 0
    bias: RelativeBias | None = None
    norm: nn.Module | None = None
    embedding_scale: float = 1.0


class ExitEncoderDecoder(ExitDecoder):
    """An encoder-decoder with exits behind some layers of each.

    Args:
        model: The transformers model that owns the weights.
        encoder: Its encoder.
        trunk: Its decoder, whose layers also have ``between`` and ``cross``
            (`edgeexit.export.trace.layer_stacks.ReadingLayer`).
        exits: Layers of the decoder with an exit (1 = behind the first).
        encoder_exits: Those of the encoder.

    Attributes:
        preprocessing, preprocessing_sample: How a text becomes token ids, and a sample.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: EncoderTrunk,
        trunk: DecoderTrunk,
        exits: Iterable[int],
        encoder_exits: Iterable[int] = (),
    ) -> None:
        super().__init__(model, trunk, exits)
        self.encoder = encoder
        self.encoder_layers = list(encoder.layers)
        self.encoder_exit_layers = check_layers(encoder_exits, len(encoder.layers), "encoder")
        encoder_names = (f"encoder_exit_{layer}" for layer in self.encoder_exit_layers)
        self.exit_origins |= dict.fromkeys(encoder_names, "unknown")
        self.preprocessing: tuple[Preprocessing, ...] = ()
        self.preprocessing_sample: Mapping[str, np.ndarray] | None = None
        self._borders = [0, *self.exit_layers, self.depth]

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        layers: int | None = None,
        images: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's output, which `forward` takes as `source`.

        Args:
            input_ids, attention_mask: ``[batch, source]``; the mask is 0 at padding, else 1.
            layers: Number of layers to run; None: all.
            images: Further inputs of `embed_source`.
        """
        encoder, read = self.encoder, attention_mask.bool()
        state = encoder.stem(self.embed_source(input_ids, *images))
        shared = _biases(encoder.bias, state)
        for layer in itertools.islice(self.encoder_layers, layers):
            state = layer(state, read, *shared)
        return state if encoder.norm is None else encoder.norm(state), read

    def embed_source(self, input_ids: torch.Tensor, *images: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[batch, source, width]`` of a source's token ids ``[batch, source]``."""
        encoder = self.encoder
        return scaled(functional.embedding(input_ids, encoder.embedding), encoder.embedding_scale)

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Writes the model as transformers does, with the weights of `state_dict` if it is given,
        and adds the list of exits."""
        folder = Path(folder)
        save_model(self.model, folder, state_dict)
        exits = SavedExits(
            self.exit_layers, encoder=self.encoder_exit_layers, origins=self.exit_origins
        )
        save_exits(folder, exits, self.adapters)

    def split_model(self) -> SplitModel:
        """The contract for export: the encoder in segments and unsplit, the components that compute
        cross keys and values, and the decoder's (`ExitDecoder.split_model`).

        Raises:
            UsageError: Neither half has an early exit.
        """
        split = super().split_model()
        assert split.decoding is not None
        encoder, chain = self._encoder()
        longest = self.encoder.positions
        return dataclasses.replace(
            split,
            task="text2text-generation",
            inputs=(SOURCE_IDS, SOURCE_MASK, *split.inputs),
            components=[*encoder, *self._makers(), *split.components],
            chains={"encoder": chain, **split.chains},
            steps=[
                Table(SOURCE_IDS.name, self._source, self._table, "input"),
                Run(chain="encoder"),
                *split.steps,
            ],
            example=self._example,
            decoding=msgspec.structs.replace(
                split.decoding, start_tokens=list(self.encoder.start_tokens)
            ),
            limits=split.limits if longest is None else {**split.limits, "source": longest},
            preprocessing=self.preprocessing,
            preprocessing_sample=self.preprocessing_sample,
        )

    def _encoder(self) -> tuple[list[Component], Chain]:
        """The encoder's segments, and their chain."""
        borders = [0, *self.encoder_exit_layers, len(self.encoder_layers)]
        segments: list[Component] = []
        exits = []
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            name, state = f"encoder_{number}", self._state(f"encoder_state_{stop}")
            score = Tensor(name=f"{name}/saturation", dtype="float32", axes=["batch"])
            body = _Segment(self.encoder, start, stop)
            takes = self._source if start == 0 else segments[-1].outputs[0]
            forms = (Form(body.eval()),)
            segments.append(Component(name, (takes, SOURCE_MASK), (state, score), forms))
            exits.append(
                Exit(
                    name=f"encoder_exit_{stop}",
                    behind=name,
                    outputs={ENCODED: state.name},
                    scores={"saturation": score.name},
                )
            )
        whole = _Segment(self.encoder, 0, len(self.encoder_layers), scored=False)
        given = self._state(ENCODED)
        forms = (Form(whole.eval()),)
        unsplit = Component("encoder_unsplit", (self._source, SOURCE_MASK), (given,), forms)
        names = [segment.name for segment in segments]
        chain = Chain(components=names, outputs=[given], exits=exits, unsplit=[unsplit.name])
        return [*segments, unsplit], chain

    @property
    def _table(self) -> torch.Tensor:
        return scaled(self.encoder.embedding.detach(), self.encoder.embedding_scale)

    @property
    def _source(self) -> Tensor:
        width = self.encoder.embedding.shape[1]
        return Tensor(name="source", dtype="float32", axes=["batch", "source", width])

    def _makers(self) -> Iterator[Component]:
        """Components that compute the cross keys and values, one for each decoder segment."""
        for number, (start, stop) in enumerate(itertools.pairwise(self._borders)):
            made = [
                state.tensor
                for layer in range(start, stop)
                for state in self._cross_states(layer + 1, number)
            ]
            layers = [*self.layers][start:stop]
            body = _Cross(self.encoder.norm, layers, self.trunk.heads)
            taken = (self._state(ENCODED),)
            yield Component(_maker(number), taken, tuple(made), (Form(body.eval()),))

    def _cross_states(self, layer: int, segment: int) -> list[PromptState]:
        heads = self.trunk.heads
        return [
            PromptState(
                tensor=Tensor(
                    name=f"layer_{layer}/cross_{kind}",
                    dtype="float32",
                    axes=["batch", heads.queries, "source", heads.size],
                ),
                maker=_maker(segment),
            )
            for kind in ("key", "value")
        ]

    def _state(self, name: str) -> Tensor:
        return Tensor(name=name, dtype="float32", axes=["batch", "source", self.trunk.width])

    @property
    def _has_early_exit(self) -> bool:
        return bool(self.exit_layers or self.encoder_exit_layers)

    def _also_read(self) -> tuple[Tensor, ...]:
        return (SOURCE_MASK,)

    def _held(self, start: int, stop: int) -> tuple[TokenState | PromptState, ...]:
        states: list[TokenState | PromptState] = []
        for layer in range(start, stop):
            segment = sum(border <= layer for border in self._borders[1:])
            states += super()._held(layer, layer + 1)
            states += self._cross_states(layer + 1, segment)
        return tuple(states)

    def _through_layer(
        self,
        layer: CutLayer,
        state: torch.Tensor,
        positions: torch.Tensor,
        *source: torch.Tensor,
    ) -> torch.Tensor:
        encoded, read = source
        own, heads = cast("ReadingLayer", layer), self.trunk.heads
        q, k, v = own.before(state)
        state, q = own.between(state, causal_attention(q, k, v, heads, positions))
        k, v = (split_heads(x, heads.queries, heads.size) for x in own.cross(encoded))
        return own.after(state, read_source(q, k, v, unread_of(read), scale=heads.scale))

    def _example(self, rows: int) -> Values:
        generator = torch.Generator().manual_seed(0)
        shape, vocabulary = (rows, EXAMPLE_TOKENS), self.trunk.embedding.shape[0]
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        lengths = torch.tensor([EXAMPLE_TOKENS - 3 * row % EXAMPLE_TOKENS for row in range(rows)])
        mask = (torch.arange(EXAMPLE_TOKENS) < lengths[:, None]).to(torch.int64)
        ids = torch.where(mask.bool(), ids, self.encoder.pad_token)
        tokens = torch.randint(0, vocabulary, shape, generator=generator)
        start = self.encoder.start_tokens
        tokens[:, : len(start)] = torch.tensor(start)
        return {SOURCE_IDS.name: ids, SOURCE_MASK.name: mask, "tokens": tokens}

    def _reference(self, inputs: Values) -> Iterator[Values]:
        encoder, mask = self.encoder, inputs[SOURCE_MASK.name]
        state = self.embed_source(inputs[SOURCE_IDS.name], *self._images_of(inputs))
        borders = [0, *self.encoder_exit_layers, len(self.encoder_layers)]
        for start, stop in itertools.pairwise(borders):
            state, score = _Segment(encoder, start, stop)(state, mask)
            exit_ = f"encoder_exit_{stop}"
            yield {f"{exit_}/{ENCODED}": state, f"{exit_}/saturation": score}
            early = f"{exit_}/" if stop < len(self.encoder_layers) else ""
            source = state if encoder.norm is None else encoder.norm(state)
            read = (source, mask.bool())
            for layer, logits in self.each_exit(inputs["tokens"], source=read):
                yield {f"{early}exit_{layer}": logits}

    def _images_of(self, inputs: Values) -> tuple[torch.Tensor, ...]:
        """Images of an example, which `embed_source` takes."""
        return ()


ENCODED = "encoder_state"


def _maker(segment: int) -> str:
    return f"cross_{segment}"


def unread_of(read: torch.Tensor) -> torch.Tensor:
    """The mask of source tokens that attention ignores, ``[batch, 1, 1, source]`` bool.

    Args:
        read: ``[batch, source]``, 0 at padding.
    """
    return ~read.bool()[:, None, None]


def saturation(before: torch.Tensor, after: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of a layer's input and output, with all tokens of a row as one vector and
    without padding (MuE, CVPR 2023).

    Args:
        before, after: ``[batch, source, width]``.
        read: ``[batch, source]``, 0 at padding.

    Returns:
        ``[batch]``, float32.
    """
    kept = read.unsqueeze(-1).to(torch.float32)
    before, after = ((state.float() * kept).flatten(1) for state in (before, after))
    return functional.cosine_similarity(before, after, dim=1)


class _Segment(nn.Module):
    """Layers of the encoder, and the `saturation` of the last one."""

    def __init__(
        self, encoder: EncoderTrunk, start: int, stop: int, *, scored: bool = True
    ) -> None:
        super().__init__()
        self.stem, self.scored = encoder.stem if start == 0 else None, scored
        self.bias = encoder.bias
        self.layers = nn.ModuleList(encoder.layers[start:stop])

    def forward(
        self, given: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        state = before = given if self.stem is None else self.stem(given)
        shared = _biases(self.bias, state)
        for layer in self.layers:
            before, state = state, layer(state, mask.bool(), *shared)
        return (state, saturation(before, state, mask)) if self.scored else state


def _biases(bias: RelativeBias | None, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Further arguments of the encoder's layers: none, or biases ``[heads, source, source]``."""
    if bias is None:
        return ()
    places = torch.arange(state.shape[1], device=state.device)
    return (bias(places, places),)


class _Cross(nn.Module):
    """Cross keys and values of some layers, ``[batch, heads, source, size]``."""

    def __init__(self, norm: nn.Module | None, layers: Sequence[nn.Module], heads: Heads) -> None:
        super().__init__()
        self.norm = norm
        self.layers = nn.ModuleList(layers)
        self.heads = heads

    def forward(self, encoded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = encoded if self.norm is None else self.norm(encoded)
        return tuple(
            split_heads(x, self.heads.queries, self.heads.size)
            for layer in self.layers
            for x in cast("ReadingLayer", layer).cross(encoded)
        )


__all__ = ["EncoderTrunk", "ExitEncoderDecoder", "saturation", "unread_of"]
