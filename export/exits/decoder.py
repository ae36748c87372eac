"""A causal language model with exits: decoder layers, one head that all exits share, and adapters
for some exits.

A family's file describes its model as a `edgeexit.export.exits.decoder_trunk.DecoderTrunk`.
Attention, its states and its masks are not part of its layers: training uses torch's attention
(`ExitDecoder`), export chooses a form for the engine (`edgeexit.export.trace.attention`).

An adapter is one or more layers between an exit's state and the head. The shared head expects
states of the last layer; an adapter makes an early state more similar to them, at the cost of its
layers (Kangaroo, arXiv:2404.18911, drafts with such an adapter).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from edgeexit.bundle.manifest import (
    Call,
    Chain,
    Decoding,
    Exit,
    GenerationDefaults,
    PromptState,
    Run,
    Tensor,
    TokenState,
)
from edgeexit.errors import UsageError
from edgeexit.export.contract import Component, Form, SplitModel, Table, Values
from edgeexit.export.exits.decoder_trunk import DecoderTrunk, scaled
from edgeexit.export.exits.origins import Origin
from edgeexit.export.exits.saved import (
    SavedExits,
    check_adapters,
    check_layers,
    name_layers,
    save_exits,
)
from edgeexit.export.exits.states import POSITIONS, layer_names, state_between, token_states
from edgeexit.export.trace.attention import causal_attention
from edgeexit.export.trace.layer_stacks import CutLayer, Stacks

_PART_TOKENS = 32  # whose logits `ExitDecoder.each_exit` returns at a time


class ExitDecoder(nn.Module):
    """A causal language model with exits behind some layers; all exits share the head.

    Args:
        model: The transformers model that owns the weights.
        trunk: Its description; modules are shared with `model`, not copied.
        exits: Layers (1 = behind the first) with an exit; the last layer always has one.
        adapters: Exit layers with an adapter of one layer; as a mapping: exit layer -> number of
            adapter layers. A new adapter is a copy of the model's last layers (EE-Tuning,
            arXiv:2402.00518, starts so too); it must be trained.

    Attributes:
        adapters: Exit name -> its adapter's layers.
        exit_origins: What is known about the training of each exit, adapter included.
        border_layers: Layers behind which a segment ends, without the last layer.
        read_by_embed: Further inputs of `embed`, which training passes on.
    """

    read_by_embed: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        trunk: DecoderTrunk,
        exits: Iterable[int],
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.trunk = trunk
        # Not registered as submodules: their weights are in the model and would be saved twice.
        self.layers = list(trunk.layers)
        self.depth = len(trunk.layers)
        self.exit_layers = check_layers(exits, self.depth)
        self.border_layers = self.exit_layers
        self.adapters = nn.ModuleDict()
        for layer, count in check_adapters(adapters, self.exit_layers, self.depth).items():
            copies = [copy.deepcopy(last) for last in trunk.layers[self.depth - count :]]
            self.adapters[f"exit_{layer}"] = nn.ModuleList(copies)
        self.name = type(model).__name__
        self.tokenizer_folder: Path | None = None
        self.generation: GenerationDefaults | None = None
        self.provenance: dict[str, str] = {}
        self.exit_origins: dict[str, Origin] = {
            name: "untrained" if name in self.adapters else "unknown"
            for name in (f"exit_{layer}" for layer in self.exit_layers)
        }
        self._layer = self._through_layer
        self._head = trunk.head.__call__
        self._heads = trunk.heads
        # The module and attribute of the embedding: FSDP replaces a module's parameters.
        self._embedding = next(
            (
                (module, name)
                for module in model.modules()
                for name, weight in module.named_parameters(recurse=False)
                if weight is trunk.embedding
            ),
            None,
        )

    def compile(self, **options: Any) -> None:
        """Compiles one layer and the head (`torch.compile` with these options) instead of the whole
        pass: all layers share that code, with any choice of exits and dropped layers."""
        self._layer = torch.compile(self._through_layer, **options)
        self._head = torch.compile(self.trunk.head, **options)

    @property
    def adapter_sizes(self) -> dict[int, int]:
        """Exits with an adapter: exit layer -> number of adapter layers."""
        return {
            int(name.removeprefix("exit_")): len(cast("nn.ModuleList", adapter))
            for name, adapter in self.adapters.items()
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        exits: Sequence[int] | None = None,
        skipped: Sequence[int] = (),
        source: Sequence[torch.Tensor] = (),
        features: dict[int, torch.Tensor] | None = None,
        **inputs: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Logits of exits for whole sequences, for training and as a reference.

        Args:
            input_ids: ``[batch, seq]``, no padding.
            exits: Layers whose logits to return; None: all exits and the last layer.
            skipped: Layers (1 = the first) left out of this pass (layer dropout).
            source: The encoder's output, if there is one
                (`edgeexit.export.exits.encoder_decoder.ExitEncoderDecoder.encode`).
            features: Is filled with layer -> features ``[batch, seq, width]``: what the vocabulary
                projection takes, behind the final norm.
            inputs: Further inputs of `embed`.

        Returns:
            Layer -> logits ``[batch, seq, vocabulary]``.
        """
        states = self._each_state(input_ids, exits=exits, skipped=skipped, source=source, **inputs)
        logits = {}
        for layer, state in states:
            logits[layer] = self._logits(state)
            if features is not None:
                norm = getattr(self.trunk.head, "norm", None)
                features[layer] = state if norm is None else norm(state)
        return logits

    def each_exit(
        self, input_ids: torch.Tensor, **options: Any
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """As `forward`, in parts: ``(layer, logits [batch, part, vocabulary])``, the tokens of an
        exit in order. Logits of a large vocabulary take more memory than the layers."""
        for layer, state in self._each_state(input_ids, **options):
            for part in state.split(_PART_TOKENS, dim=1):
                yield layer, self._logits(part)

    def _each_state(
        self,
        input_ids: torch.Tensor,
        *,
        exits: Sequence[int] | None = None,
        skipped: Sequence[int] = (),
        source: Sequence[torch.Tensor] = (),
        **inputs: Any,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """What the head takes at each exit: ``(layer, state [batch, seq, width])``."""
        wanted = [*self.exit_layers, self.depth] if exits is None else list(exits)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand_as(input_ids)
        self._heads = self._heads.on(input_ids.device)
        embedded = self.embed(input_ids, **inputs)
        state = embedded if self.trunk.stem is None else self.trunk.stem(embedded, positions)
        for number, layer in enumerate(_typed(self.layers), start=1):
            if number not in skipped:
                state = self._layer(layer, state, positions, *source)
            if number in wanted:
                adapted = state
                for adapter_layer in self._adapter(number):
                    adapted = self._layer(adapter_layer, adapted, positions, *source)
                yield number, adapted

    def _through(
        self, first: int, last: int, state: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """The state ``[batch, seq, width]`` behind layer `last`, of that behind layer `first`."""
        for layer in _typed(self.layers[first:last]):
            state = self._layer(layer, state, positions)
        return state

    def _logits(self, state: torch.Tensor) -> torch.Tensor:
        return self._head(state.reshape(-1, self.trunk.width)).unflatten(0, state.shape[:2])

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[batch, seq, width]`` of token ids ``[batch, seq]``."""
        place = self._embedding
        embedding = self.trunk.embedding if place is None else getattr(*place)
        return scaled(functional.embedding(input_ids, embedding), self.trunk.embedding_scale)

    def _through_layer(
        self,
        layer: CutLayer,
        state: torch.Tensor,
        positions: torch.Tensor,
        *source: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = layer.before(state)
        return layer.after(state, causal_attention(q, k, v, self._heads, positions))

    def _adapter(self, layer: int) -> list[CutLayer]:
        """Adapter layers of the exit behind a layer; empty if it has no adapter."""
        name = f"exit_{layer}"
        return list(_typed(self.adapters[name])) if name in self.adapters else []  # type: ignore[arg-type]

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Writes the model as transformers does, and its exits in the same folder.

        Args:
            state_dict: Weights to write instead of this module's own, which may be distributed over
                several devices during training.
        """
        save_exits(Path(folder), self.model, self.saved_exits(), self.saved_modules(), state_dict)

    def saved_exits(self) -> SavedExits:
        """The exits, as the checkpoint lists them."""
        return SavedExits(self.exit_layers, self.adapter_sizes, origins=self.exit_origins)

    def saved_modules(self) -> dict[str, nn.ModuleDict]:
        """Modules of exits, by their place in this module."""
        return {"adapters": self.adapters}

    def split_model(self) -> SplitModel:
        """The contract for export: segments and adapters with their states, the shared head, and
        the unsplit model.

        Raises:
            UsageError: There is no early exit.
        """
        trunk = self.trunk
        if not self._has_early_exit:
            raise UsageError(
                f"{self.name}: there is no early exit",
                fix=f"{name_layers(self.depth)} (--exits).",
            )
        vocabulary, width = trunk.embedding.shape
        embedded = state_between("embedded", width)
        looked_at = Tensor(name="state", dtype="float32", axes=["batch", trunk.width])
        logits = Tensor(name="logits", dtype="float32", axes=["batch", vocabulary])
        token = Tensor(name="token", dtype="int64", axes=["batch"])
        also = self._also_read()
        stacks = Stacks(trunk.heads, trunk.width, trunk.stem, trunk.head, reading=bool(also))
        segments, adapters, exits = self._segments(embedded, stacks)
        unsplit = Component(
            name="unsplit",
            inputs=(embedded, POSITIONS, *also),
            outputs=(logits,),
            forms=stacks.forms(trunk.layers, stem=True, head=True),
            states=self._held(0, self.depth),
        )
        head = Component("head", (looked_at,), (logits,), (Form(trunk.head),))
        chain = Chain(
            components=[segment.name for segment in segments],
            outputs=[logits, token],
            exits=exits,
            unsplit=[unsplit.name],
        )
        stops = list(trunk.stop_tokens)
        return SplitModel(
            name=self.name,
            task="text-generation",
            inputs=(Tensor(name="tokens", dtype="int64", axes=["batch", "new"]),),
            components=[*segments, *adapters, unsplit, head],
            chains={"main": chain},
            steps=[
                Table("tokens", embedded, scaled(trunk.embedding.detach(), trunk.embedding_scale)),
                Run(chain="main", when="token"),
            ],
            example=functools.partial(_random_tokens, vocabulary),
            reference=self._reference,
            decoding=Decoding(
                chain="main",
                tokens="tokens",
                positions=POSITIONS,
                capacity=trunk.capacity,
                stop_tokens=stops,
                generation=self.generation,
            ),
            float32=trunk.float32,
            limits={} if trunk.positions is None else {"positions": trunk.positions},
            tokenizer_folder=None if self.tokenizer_folder is None else str(self.tokenizer_folder),
            provenance=self.provenance,
        )

    def _segments(
        self, embedded: Tensor, stacks: Stacks
    ) -> tuple[list[Component], list[Component], list[Exit]]:
        """Segments (the layers between exits), adapters, and the exits."""
        trunk = self.trunk
        also = self._also_read()
        segments: list[Component] = []
        adapters, exits = [], []
        borders = [0, *self.border_layers, self.depth]
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            layers, state = trunk.layers[start:stop], state_between(f"state_{stop}", trunk.width)
            segments.append(
                Component(
                    name=f"segment_{number}",
                    inputs=(segments[-1].outputs[0] if segments else embedded, POSITIONS, *also),
                    outputs=(state,),
                    forms=stacks.forms(layers, stem=start == 0),
                    states=self._held(start, stop),
                    projection=None if start == 0 else stacks.projection(layers),
                )
            )
            if stop not in (*self.exit_layers, self.depth):
                continue
            path, looked_at = [], state
            if adapter := cast("list[nn.Module]", self._adapter(stop)):
                name, looked_at = f"adapter_{stop}", state_between(f"adapted_{stop}", trunk.width)
                names = [f"{name}/{layer}" for layer in layer_names(0, len(adapter))]
                states = token_states(trunk.heads, names)
                # What a single layer keeps of a token follows from its input alone.
                projection = stacks.projection(adapter) if len(adapter) == 1 else None
                ins, outs, forms = (state, POSITIONS), (looked_at,), stacks.forms(adapter)
                adapters.append(Component(name, ins, outs, forms, states, projection))
                path.append(Call(component=name))
            path.append(Call(component="head", inputs={"state": looked_at.name}))
            exits.append(
                Exit(
                    name=f"exit_{stop}",
                    behind=segments[-1].name,
                    outputs={"logits": "logits", "token": "token"},
                    path=path,
                )
            )
        return segments, adapters, exits

    @property
    def _has_early_exit(self) -> bool:
        return bool(self.exit_layers)

    def _also_read(self) -> tuple[Tensor, ...]:
        """Inputs of layers besides states and positions."""
        return ()

    def _held(self, start: int, stop: int) -> tuple[TokenState | PromptState, ...]:
        """States of the layers from `start` to before `stop`, layer by layer."""
        return token_states(self.trunk.heads, layer_names(start, stop))

    def _reference(self, inputs: Values) -> Iterator[Values]:
        for layer, logits in self.each_exit(inputs["tokens"]):
            yield {f"exit_{layer}": logits}


def _random_tokens(vocabulary: int, rows: int) -> Values:
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(0, vocabulary, (rows, 12), generator=generator)}


def _typed(layers: Iterable[nn.Module]) -> Iterator[CutLayer]:
    return (cast("CutLayer", layer) for layer in layers)


__all__ = ["ExitDecoder"]
