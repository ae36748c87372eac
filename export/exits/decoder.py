"""A causal language model with exits: decoder layers, one head that all exits share, and adapters
for some exits.

A family's file describes its model as a `edgeexit.export.exits.decoder_trunk.DecoderTrunk`;
`edgeexit.export.exits.decoder_pass.DecoderPass` runs it in torch, `ExitDecoder` describes it for
export.

An adapter is one or more layers between an exit's state and the head. The shared head expects
states of the last layer; an adapter makes an early state more similar to them, at the cost of its
layers (Kangaroo, arXiv:2404.18911, drafts with such an adapter).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import nn

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
from edgeexit.export.exits.decoder_pass import DecoderPass
from edgeexit.export.exits.decoder_trunk import DecoderTrunk, scaled
from edgeexit.export.exits.draft_vocabulary import ShortHead, check_vocabularies, head_over
from edgeexit.export.exits.origins import Origin
from edgeexit.export.exits.saved import (
    SavedExits,
    name_layers,
    save_exits,
)
from edgeexit.export.exits.states import POSITIONS, layer_names, state_between, token_states
from edgeexit.export.stored_blocks import StoredRows
from edgeexit.export.trace.layer_stacks import Stacks


class ExitDecoder(DecoderPass):
    """A causal language model with exits behind some layers; all exits share the head.

    Args:
        model, trunk, exits, adapters: As for `DecoderPass`.

    Attributes:
        exit_origins: What is known about the training of each exit, adapter included.
        border_layers: Layers behind which a segment ends, without the last layer.
        draft_vocabularies: Exit layer -> token ids that its head computes, if not all.
    """

    def __init__(
        self,
        model: nn.Module,
        trunk: DecoderTrunk,
        exits: Iterable[int],
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__(model, trunk, exits, adapters)
        self.border_layers = self.exit_layers
        self.name = type(model).__name__
        self.draft_vocabularies: dict[int, tuple[int, ...]] = {}
        self.tokenizer_folder: Path | None = None
        self.generation: GenerationDefaults | None = None
        self.provenance: dict[str, str] = {}
        self.stored: StoredRows | None = None
        self.exit_origins: dict[str, Origin] = {
            name: "untrained" if name in self.adapters else "unknown"
            for name in (f"exit_{layer}" for layer in self.exit_layers)
        }

    @property
    def adapter_sizes(self) -> dict[int, int]:
        """Exits with an adapter: exit layer -> number of adapter layers."""
        return {
            int(name.removeprefix("exit_")): len(cast("nn.ModuleList", adapter))
            for name, adapter in self.adapters.items()
        }

    def set_draft_vocabularies(self, given: Mapping[int, Iterable[int]]) -> None:
        """Gives exits heads over some tokens only (`edgeexit.export.exits.draft_vocabulary`):
        exit layer -> token ids. Exits that are not named compute all logits.

        Raises:
            UsageError: There is no such exit, or ids are not tokens of the model.
            ExportError: Tokens cannot be taken from the model's head.
        """
        size = self.trunk.embedding.shape[0]
        found = check_vocabularies(given, self.exit_layers, size)
        for ids in found.values():
            head_over(self.trunk.head, ids, self.trunk.width, size)
        self.draft_vocabularies = found

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
        return SavedExits(
            self.exit_layers,
            self.adapter_sizes,
            origins=self.exit_origins,
            removed=list(self.skipped.removed),
            pia=self.skipped.ranks,
            vocabularies=self.draft_vocabularies,
        )

    def saved_modules(self) -> dict[str, nn.ModuleDict]:
        """Modules of exits, by their place in this module."""
        return {"adapters": self.adapters, "skipped.pia": self.skipped.pia}

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
        stacks = Stacks(trunk.heads, trunk.width, trunk.stem, trunk.head, masked=bool(also))
        removed = self.skipped.removed
        layers = [
            self.skipped.deployed(number) if number in removed else layer
            for number, layer in enumerate(trunk.layers, start=1)
        ]
        segments, adapters, exits = self._segments(embedded, stacks, layers)
        heads = [Component("head", (looked_at,), (logits,), (Form(trunk.head),))]
        heads += [self._short_head(layer, looked_at, logits) for layer in self.draft_vocabularies]
        unsplit = Component(
            name="unsplit",
            inputs=(embedded, POSITIONS, *also),
            outputs=(logits,),
            forms=stacks.forms(layers, stem=True, head=True),
            states=self._held(0, self.depth, "unsplit"),
        )
        chain = Chain(
            components=[segment.name for segment in segments],
            outputs=[logits, token],
            exits=exits,
            unsplit=[unsplit.name],
        )
        return SplitModel(
            name=self.name,
            task="text-generation",
            inputs=(Tensor(name="tokens", dtype="int64", axes=["batch", "new"]),),
            components=[*segments, *adapters, unsplit, *heads],
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
                stop_tokens=list(trunk.stop_tokens),
                generation=self.generation,
            ),
            float32=trunk.float32,
            limits={} if trunk.positions is None else {"positions": trunk.positions},
            tokenizer_folder=None if self.tokenizer_folder is None else str(self.tokenizer_folder),
            provenance=self.provenance,
            stored=self.stored,
        )

    def _segments(
        self, embedded: Tensor, stacks: Stacks, every: Sequence[nn.Module]
    ) -> tuple[list[Component], list[Component], list[Exit]]:
        """Segments (the layers between exits), adapters, and the exits. `every`: all layers as they
        are exported."""
        trunk = self.trunk
        also = self._also_read()
        segments: list[Component] = []
        adapters, exits = [], []
        borders = [0, *self.border_layers, self.depth]
        for number, (start, stop) in enumerate(itertools.pairwise(borders)):
            layers, state = every[start:stop], state_between(f"state_{stop}", trunk.width)
            answers = stop in (*self.exit_layers, self.depth)
            score = Tensor(
                name=f"segment_{number}/saturation", dtype="float32", axes=["batch", "new"]
            )
            states = self._held(start, stop, f"segment_{number}")
            projects = start > 0 and any(isinstance(one, TokenState) for one in states)
            segments.append(
                Component(
                    name=f"segment_{number}",
                    inputs=(segments[-1].outputs[0] if segments else embedded, POSITIONS, *also),
                    outputs=(state, score) if answers else (state,),
                    forms=stacks.forms(layers, stem=start == 0, scored=answers),
                    states=states,
                    projection=stacks.projection(layers) if projects else None,
                )
            )
            if not answers:
                continue
            path, looked_at = [], state
            if adapter := cast("list[nn.Module]", self._adapter(stop)):
                name, looked_at = f"adapter_{stop}", state_between(f"adapted_{stop}", trunk.width)
                states = self._adapter_states(name, len(adapter))
                # What a single layer keeps of a token follows from its input alone.
                projection = stacks.projection(adapter) if len(adapter) == 1 else None
                ins, outs, forms = (state, POSITIONS, *also), (looked_at,), stacks.forms(adapter)
                adapters.append(Component(name, ins, outs, forms, states, projection))
                path.append(Call(component=name))
            head, of_head = ("head", "") if stop not in self.draft_vocabularies else _short(stop)
            path.append(Call(component=head, inputs={"state": looked_at.name}))
            exits.append(
                Exit(
                    name=f"exit_{stop}",
                    behind=segments[-1].name,
                    outputs={name: f"{of_head}{name}" for name in ("logits", "token")},
                    scores={"saturation": score.name},
                    path=path,
                )
            )
        return segments, adapters, exits

    def _short_head(self, layer: int, state: Tensor, logits: Tensor) -> Component:
        """The head of the exit behind a layer over its draft vocabulary."""
        ids, (name, prefix) = self.draft_vocabularies[layer], _short(layer)
        scored = f"{prefix}draft_logits"
        outputs = (
            Tensor(name=scored, dtype="float32", axes=["batch", len(ids)]),
            msgspec.structs.replace(logits, name=f"{prefix}logits"),
            Tensor(name=f"{prefix}token", dtype="int64", axes=["batch"]),
        )
        forms = (Form(self._head_over(layer)),)
        return Component(name, (state,), outputs, forms, scored=scored)

    def _head_over(self, layer: int) -> ShortHead:
        trunk = self.trunk
        ids, size = self.draft_vocabularies[layer], trunk.embedding.shape[0]
        return ShortHead(trunk.head, ids, trunk.width, size).eval()

    @property
    def _has_early_exit(self) -> bool:
        return bool(self.exit_layers)

    def _also_read(self) -> tuple[Tensor, ...]:
        """Inputs of layers besides states and positions."""
        return ()

    def _held(self, start: int, stop: int, component: str) -> tuple[TokenState | PromptState, ...]:
        """States of the layers from `start` to before `stop`, layer by layer, in a component."""
        states: list[TokenState | PromptState] = []
        for n in range(start, stop):
            if n + 1 in self.skipped.removed:
                states += self.skipped.states(n + 1, component)
            else:
                states += token_states(self.trunk.heads, layer_names(n, n + 1))
        return tuple(states)

    def _adapter_states(self, adapter: str, layers: int) -> tuple[TokenState | PromptState, ...]:
        """States of an adapter of so many layers, layer by layer."""
        names = [f"{adapter}/{layer}" for layer in layer_names(0, layers)]
        return token_states(self.trunk.heads, names)

    def _reference(self, inputs: Values) -> Iterator[Values]:
        yield from self._answers(inputs["tokens"])

    def _answers(self, tokens: torch.Tensor, early: str = "", **options: Any) -> Iterator[Values]:
        """What the samples hold of every exit, of all tokens: `saturation`, and logits, which are
        -inf for tokens that the exit's draft vocabulary does not have.

        Args:
            early: Prefix of the exits' names: an early exit of an earlier chain.
            options: As for `each_exit`.
        """
        for layer, logits, score in self.each_exit(tokens, **options):
            name = f"{early}exit_{layer}"
            if layer in self.draft_vocabularies:
                known = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                known[list(self.draft_vocabularies[layer])] = True
                logits = logits.masked_fill(~known, float("-inf"))
            yield {name: logits, f"{name}/saturation": score}


def _short(layer: int) -> tuple[str, str]:
    """Name of an exit's own head, and prefix of its outputs."""
    return f"head_{layer}", f"head_{layer}/"


def _random_tokens(vocabulary: int, rows: int) -> Values:
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(0, vocabulary, (rows, 12), generator=generator)}


__all__ = ["ExitDecoder"]
