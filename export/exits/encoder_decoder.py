"""An encoder-decoder that writes text, with exits in both.

The decoder is that of `edgeexit.export.exits.decoder`; its layers also read the encoder's output.

The encoder (`edgeexit.export.exits.encoder`) passes the state of one of its exits on. One component
for each segment of the decoder, and for each adapter of its exits, computes the keys and values of
cross attention from that state, once per prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import (
    Axis,
    Chain,
    Place,
    Preprocessing,
    PromptState,
    Run,
    Tensor,
    TokenState,
)
from edgeexit.export.contract import Component, Form, SplitModel, Table, Values
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.decoder_trunk import DecoderTrunk, scaled
from edgeexit.export.exits.encoder import EncoderTrunk, ExitEncoder, unread_of
from edgeexit.export.exits.saved import SavedExits
from edgeexit.export.exits.states import layer_names, token_states
from edgeexit.export.trace.attention import Heads, causal_attention, read_source, split_heads

if TYPE_CHECKING:
    from edgeexit.export.trace.layer_stacks import CutLayer, ReadingLayer

SOURCE_IDS = Tensor(name="input_ids", dtype="int64", axes=["batch", "source"])
SOURCE_MASK = Tensor(name="attention_mask", dtype="int64", axes=["batch", "source"])
EXAMPLE_TOKENS = 12


class ExitEncoderDecoder(ExitDecoder):
    """An encoder-decoder with exits behind some layers of each.

    Args:
        model: The transformers model that owns the weights.
        encoder: Its encoder.
        trunk: Its decoder, whose layers also have ``between`` and ``cross``
            (`edgeexit.export.trace.layer_stacks.ReadingLayer`).
        exits: Layers of the decoder with an exit (1 = behind the first).
        encoder_exits: Those of the encoder.
        adapters: As for `ExitDecoder`. An adapter's layers read the encoder's output, too.

    Attributes:
        encoder: The encoder with its exits.
        read_by_source: Inputs of `embed_source` besides token ids, in order; training passes them
            on.
        preprocessing, preprocessing_sample: How a text becomes token ids, and a sample.
    """

    read_by_source: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        encoder: EncoderTrunk,
        trunk: DecoderTrunk,
        exits: Iterable[int],
        encoder_exits: Iterable[int] = (),
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__(model, trunk, exits, adapters)
        self.encoder = ExitEncoder(encoder, encoder_exits)
        names = map(self.encoder.exit_name, self.encoder.exit_layers)
        self.exit_origins |= dict.fromkeys(names, "unknown")
        self.preprocessing: tuple[Preprocessing, ...] = ()
        self.preprocessing_sample: Mapping[str, np.ndarray] | None = None
        self._borders = [0, *self.exit_layers, self.depth]

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        *,
        columns: Mapping[str, torch.Tensor] | None = None,
        hand_over: Mapping[str, int] | None = None,
        **options: Any,
    ) -> Any:
        """As `ExitDecoder.forward`.

        Args:
            columns: Of a training batch, which `source_of` reads first; they give `source`.
                Training needs both in one call.
            hand_over: How many layers of the encoder run then, by the names of `encode`.
        """
        if columns is not None:
            options["source"] = self.source_of(columns, **(hand_over or {}))
        return super().forward(input_ids, **options)

    def source_of(
        self, columns: Mapping[str, torch.Tensor], **layers: int
    ) -> tuple[torch.Tensor, ...]:
        """`encode_columns`, if the columns do not hold the encoder's output already
        (`edgeexit.export.methods.kept_states`)."""
        if ENCODED in columns:
            return tuple(columns[name] for name in (ENCODED, READ) if name in columns)
        return self.encode_columns(columns, **layers)

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Columns of a training batch that `encode_columns` reads; the first must be there."""
        return (SOURCE_IDS.name, SOURCE_MASK.name, *self.read_by_source)

    def encode_columns(
        self, columns: Mapping[str, torch.Tensor], **layers: int
    ) -> tuple[torch.Tensor, ...]:
        """The encoder's output for columns of a training batch. Without a mask all is read.
        `layers`: as for `encode`."""
        ids = columns[SOURCE_IDS.name]
        mask = columns.get(SOURCE_MASK.name)
        mask = torch.ones_like(ids) if mask is None else mask
        images = [columns[name] for name in self.read_by_source if name in columns]
        return self.encode(ids, mask, images=images, **layers)

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
        read = attention_mask.bool()
        state = self.encoder(self.embed_source(input_ids, *images), read, layers=layers)
        return self._normed(state), read

    def embed_source(self, input_ids: torch.Tensor, *images: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[batch, source, width]`` of a source's token ids ``[batch, source]``."""
        embedded = functional.embedding(input_ids, self._source_embedding)
        return scaled(embedded, self.encoder.trunk.embedding_scale)

    @property
    def encoder_exit_layers(self) -> list[int]:
        """Layers of the encoder with an early exit."""
        return self.encoder.exit_layers

    def saved_exits(self) -> SavedExits:
        return dataclasses.replace(super().saved_exits(), encoder=self.encoder.exit_layers)

    def split_model(self) -> SplitModel:
        """The contract for export: the encoder in segments and unsplit, the components that compute
        cross keys and values, and the decoder's (`ExitDecoder.split_model`).

        Raises:
            UsageError: Neither half has an early exit.
        """
        split = super().split_model()
        assert split.decoding is not None
        start_tokens = list(self.encoder.trunk.start_tokens)
        return dataclasses.replace(
            split,
            task="text2text-generation",
            inputs=(*self._source_inputs(), *split.inputs),
            components=[*self._source_components(), *self._makers(), *split.components],
            chains={**self._source_chains(), **split.chains},
            steps=[*self._source_steps(), *split.steps],
            example=self._example,
            decoding=msgspec.structs.replace(split.decoding, start_tokens=start_tokens),
            limits={**split.limits, **self._source_limits()},
            preprocessing=self.preprocessing,
            preprocessing_sample=self.preprocessing_sample,
        )

    def _source_inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the steps before the decoder."""
        return SOURCE_IDS, SOURCE_MASK

    def _source_components(self) -> list[Component]:
        return self.encoder.components(self._source, SOURCE_MASK)

    def _source_chains(self) -> dict[str, Chain]:
        return {self.encoder.name: self.encoder.chain(self._source)}

    def _source_steps(self) -> list[Run | Table | Place]:
        """The steps before the decoder."""
        table = Table(SOURCE_IDS.name, self._source, self._table, "input")
        return [table, Run(chain=self.encoder.name)]

    def _source_limits(self) -> dict[str, int]:
        """Axis of the source -> its largest size."""
        longest = self.longest_text
        return {} if longest is None else {"source": longest}

    @property
    def longest_text(self) -> int | None:
        """Most tokens of a text that the encoder reads; None: any number."""
        return self.encoder.trunk.positions

    @property
    def _table(self) -> torch.Tensor:
        return scaled(self._source_embedding.detach(), self.encoder.trunk.embedding_scale)

    @property
    def _source_embedding(self) -> torch.Tensor:
        embedding = self.encoder.trunk.embedding
        assert embedding is not None
        return embedding

    @property
    def _source(self) -> Tensor:
        width = self._source_embedding.shape[1]
        return Tensor(name="source", dtype="float32", axes=["batch", "source", width])

    @property
    def _encoded(self) -> Tensor:
        """What the decoder reads."""
        axes: list[Axis] = ["batch", self._source_axis, self.trunk.width]
        return Tensor(name=ENCODED, dtype="float32", axes=axes)

    @property
    def _source_axis(self) -> Axis:
        """The axis of a source's states."""
        return "source"

    def _makers(self) -> Iterator[Component]:
        """Components that compute the cross keys and values, one for each decoder segment and for
        each adapter."""
        for number, (start, stop) in enumerate(itertools.pairwise(self._borders)):
            yield self._maker(str(number), self.layers[start:stop], layer_names(start, stop))
        for exit_, adapter in self.adapters.items():
            layers, name = list(cast("nn.ModuleList", adapter)), _adapter(exit_)
            names = [f"{name}/{layer}" for layer in layer_names(0, len(layers))]
            yield self._maker(name, layers, names)

    def _maker(self, of: str, layers: Sequence[nn.Module], names: Sequence[str]) -> Component:
        """The component that computes the cross keys and values of layers with these names."""
        made = [state.tensor for name in names for state in self._cross_states(name, of)]
        body = _Cross(self.encoder.trunk.norm, layers, self.trunk.heads)
        return Component(_maker(of), (self._encoded,), tuple(made), (Form(body.eval()),))

    def _cross_states(self, layer: str, of: str) -> list[PromptState]:
        heads = self.trunk.heads
        return [
            PromptState(
                tensor=Tensor(
                    name=f"{layer}/cross_{kind}",
                    dtype="float32",
                    axes=["batch", heads.queries, self._source_axis, heads.size],
                ),
                maker=_maker(of),
            )
            for kind in ("key", "value")
        ]

    def _normed(self, state: torch.Tensor) -> torch.Tensor:
        """An encoder's state as the decoder reads it."""
        norm = self.encoder.trunk.norm
        return state if norm is None else norm(state)

    @property
    def _has_early_exit(self) -> bool:
        return bool(self.exit_layers or self.encoder.exit_layers)

    def _also_read(self) -> tuple[Tensor, ...]:
        return (SOURCE_MASK,)

    def _held(self, start: int, stop: int, component: str) -> tuple[TokenState | PromptState, ...]:
        states: list[TokenState | PromptState] = []
        for layer in range(start, stop):
            segment = sum(border <= layer for border in self._borders[1:])
            states += super()._held(layer, layer + 1, component)
            states += self._cross_states(f"layer_{layer + 1}", str(segment))
        return tuple(states)

    def _adapter_states(self, adapter: str, layers: int) -> tuple[TokenState | PromptState, ...]:
        states: list[TokenState | PromptState] = []
        for layer in layer_names(0, layers):
            states += token_states(self.trunk.heads, [f"{adapter}/{layer}"])
            states += self._cross_states(f"{adapter}/{layer}", adapter)
        return tuple(states)

    def _through_layer(
        self,
        layer: CutLayer,
        state: torch.Tensor,
        positions: torch.Tensor,
        *source: torch.Tensor,
    ) -> torch.Tensor:
        encoded, read = source[0], source[1] if len(source) > 1 else None
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
        ids = torch.where(mask.bool(), ids, self.encoder.trunk.pad_token)
        tokens = torch.randint(0, vocabulary, shape, generator=generator)
        start = self.encoder.trunk.start_tokens
        tokens[:, : len(start)] = torch.tensor(start)
        return {SOURCE_IDS.name: ids, SOURCE_MASK.name: mask, "tokens": tokens}

    def _reference(self, inputs: Values) -> Iterator[Values]:
        encoder, mask = self.encoder, inputs[SOURCE_MASK.name]
        embedded = self.embed_source(inputs[SOURCE_IDS.name], *self._images_of(inputs))
        for layer, state, score in encoder.each_exit(embedded, mask):
            exit_ = encoder.exit_name(layer)
            yield {f"{exit_}/{encoder.output}": state, f"{exit_}/saturation": score}
            early = f"{exit_}/" if layer < encoder.depth else ""
            source = self._normed(state), mask.bool()
            yield from self._answers(inputs["tokens"], early, source=source)

    def _images_of(self, inputs: Values) -> tuple[torch.Tensor, ...]:
        """Images of an example, which `embed_source` takes."""
        return ()


ENCODED = "encoder_state"
"""What the decoder reads: the encoder's output."""
READ = "encoder_read"
"""Column of a training batch: which places of the encoder's output are read, bool ``[batch,
source]``."""


def _maker(of: str) -> str:
    return f"cross_{of}"


def _adapter(exit_: str) -> str:
    """Name of the component that is the adapter of an exit."""
    return exit_.replace("exit", "adapter")


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


__all__ = ["ENCODED", "READ", "ExitEncoderDecoder"]
