"""A vision-language model that writes text: a vision tower (`edgeexit.export.exits.tower`) before a
decoder (`edgeexit.export.exits.decoder`), with exits in both.

The tower's image tokens replace the placeholders of a prompt, one for each. Behind a segment of the
decoder, image tokens can leave. A gate decides it for every prompt (`gate_K`, DyVTE), or they
always leave there (`drop_K`, the static cut that gates are measured against). A policy says which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import nn

from edgeexit.bundle.manifest import (
    Exit,
    ImageText,
    Place,
    Preprocessing,
    Run,
    Tensor,
    TokenGroup,
)
from edgeexit.errors import UsageError
from edgeexit.export.contract import SplitModel, Table, Values
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.exits.gates import Gate, gate_component, gate_exit, gate_name, make_gates
from edgeexit.export.exits.saved import SavedExits, check_repeated
from edgeexit.export.exits.states import state_between
from edgeexit.export.exits.tower import (
    CHAIN,
    IMAGE_FEATURES,
    PIXELS,
    ExitTower,
    TowerTrunk,
    exit_name,
)

GROUP = "image"
IMAGE_MASK = Tensor(name="image_tokens", dtype="bool", axes=["batch", "new"])
EXAMPLE_TOKENS = 8
"""Text tokens of an example, besides its image."""


@dataclasses.dataclass(frozen=True)
class VisionLanguageTrunk:
    """A family's description of its model.

    Attributes:
        tower: The vision tower.
        decoder: The language model.
        placeholder: Id of the token that stands for an image token in a prompt.
        prompt: What a prompt says for an image, with the usual text of that token.
    """

    tower: TowerTrunk
    decoder: DecoderTrunk
    placeholder: int
    prompt: ImageText


@dataclasses.dataclass(frozen=True)
class AtGate:
    """What a gate says of prompts, and what depends on it.

    Attributes:
        gate: The gate's logits ``[batch, 2]``: stay, leave.
        full: The model's logits ``[batch, seq, vocabulary]``.
        without: Those of text tokens without image tokens in the layers behind the gate.
    """

    gate: torch.Tensor
    full: torch.Tensor
    without: torch.Tensor


class ExitVisionLanguage(ExitDecoder):
    """A vision-language model with exits behind some layers of its tower and its decoder.

    Args:
        model: The transformers model that owns the weights.
        trunk: Its description.
        exits: Layers of the decoder with an exit (1 = behind the first).
        tower_exits: Layers of the tower with an exit.
        drops: Further layers of the decoder behind which image tokens can leave; they can behind
            every exit layer.
        adapters: As for `ExitDecoder`.

    Attributes:
        tower: The vision tower with its exits.
        gates: Name of a gate (``gate_LAYER``) -> the gate.
        prompt: What a prompt says for an image; None: there is no tokenizer to write it with.
    """

    read_by_embed = (PIXELS,)

    def __init__(
        self,
        model: nn.Module,
        trunk: VisionLanguageTrunk,
        exits: Iterable[int],
        tower_exits: Iterable[int] = (),
        drops: Iterable[int] = (),
        adapters: Iterable[int] | Mapping[int, int] = (),
        gates: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__(model, trunk.decoder, exits, adapters)
        self.whole = trunk
        self.tower = ExitTower(trunk.tower, tower_exits)
        made = make_gates(gates, trunk.decoder.width, self.depth)
        self.gates = nn.ModuleDict({gate_name(layer): gate for layer, gate in made.items()})
        self.exit_origins |= dict.fromkeys([*self.tower.projectors, *self.gates], "untrained")
        left = {*_drop_layers(drops, self.depth), *made}
        self.border_layers = sorted({*self.exit_layers, *left})
        self.prompt: ImageText | None = None
        self.preprocessing: tuple[Preprocessing, ...] = ()
        self.preprocessing_sample: Mapping[str, np.ndarray] | None = None

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        *,
        images: torch.Tensor | None = None,
        gate: int | None = None,
        prompts: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As `ExitDecoder.forward`, or what a part of the model is trained with.

        Args:
            input_ids: ``[batch, seq]``; None with `images`.
            images: ``[images, channels, height, width]``: returns image tokens of the tower's exits
                (`ExitTower.each_exit`).
            gate: A layer with a gate: returns `AtGate`.
            prompts: With `gate`: ``[batch]``, tokens of each row's prompt.
            options: As for `ExitDecoder.forward` and `embed`.
        """
        if images is not None:
            return self.tower.each_exit(images)
        assert input_ids is not None
        if gate is None:
            return super().forward(input_ids, **options)
        assert prompts is not None
        return self._at_gate(input_ids, gate, prompts, **options)

    def _at_gate(
        self, input_ids: torch.Tensor, layer: int, prompts: torch.Tensor, **inputs: torch.Tensor
    ) -> AtGate:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        image = (input_ids == self.whole.placeholder) & (positions < prompts[:, None])
        belongs = positions < prompts[:, None]
        with torch.no_grad():
            state = self._behind(input_ids, layer, positions, belongs, **inputs)
            full = self._logits(self._through(layer, self.depth, state, positions, belongs))
            without = self._logits_without(state, layer, positions, image, belongs)
        return AtGate(self.gate(layer).logits(state, image, prompts), full, without)

    def logits_without(
        self,
        input_ids: torch.Tensor,
        layer: int,
        gone: torch.Tensor,
        prompts: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Logits ``[batch, seq, classes]`` of the last exit when tokens leave behind a layer; the
        others keep their positions.

        Args:
            input_ids: ``[batch, seq]``.
            layer: 0: in front of the first.
            gone: ``[batch, seq]``, the tokens that leave; their logits are 0.
            prompts: As for `forward`.
            inputs: As for `embed`.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        belongs = torch.ones_like(gone) if prompts is None else positions < prompts[:, None]
        state = self._behind(input_ids, layer, positions, belongs, **inputs)
        return self._logits_without(state, layer, positions, gone, belongs)

    def _behind(
        self,
        input_ids: torch.Tensor,
        layer: int,
        positions: torch.Tensor,
        belongs: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        self._heads = self._heads.on(input_ids.device)
        state = self._first_state(input_ids, positions, **inputs)
        return self._through(0, layer, state, positions, belongs)

    def _logits_without(
        self,
        state: torch.Tensor,
        layer: int,
        positions: torch.Tensor,
        gone: torch.Tensor,
        belongs: torch.Tensor,
    ) -> torch.Tensor:
        # Kept tokens first, in order; those behind them are padding that none of them attends to.
        count = int((~gone).sum(dim=1).max())
        kept = gone.int().argsort(dim=1, stable=True)[:, :count]
        left = state.gather(1, kept[..., None].expand(-1, -1, state.shape[2]))
        places, summarised = positions.gather(1, kept), (belongs & ~gone).gather(1, kept)
        left = self._logits(self._through(layer, self.depth, left, places, summarised))
        logits = left.new_zeros(*state.shape[:2], left.shape[2])
        return logits.scatter_(1, kept[..., None].expand(-1, -1, left.shape[2]), left)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings ``[batch, seq, width]`` with image tokens in place of their placeholders.

        Args:
            input_ids: ``[batch, seq]``.
            pixel_values: ``[images, channels, height, width]``, in the order of the placeholders;
                None: there are none.
            image_features: Image tokens ``[images, tokens, width]`` instead.
        """
        embedded = super().embed(input_ids)
        if pixel_values is not None:
            image_features = self.tower(pixel_values)
        if image_features is None:
            return embedded
        places = (input_ids == self.whole.placeholder)[..., None]
        return embedded.masked_scatter(places, image_features.to(embedded.dtype))

    def saved_exits(self) -> SavedExits:
        gates = {layer: self.gate(layer).inner for layer in self.gate_layers}
        return dataclasses.replace(super().saved_exits(), tower=self.tower.exit_layers, gates=gates)

    def saved_modules(self) -> dict[str, nn.ModuleDict]:
        own = {"tower.projectors": self.tower.projectors, "gates": self.gates}
        return super().saved_modules() | own

    @property
    def gate_layers(self) -> list[int]:
        """Layers with a gate."""
        return [int(name.removeprefix("gate_")) for name in self.gates]

    def gate(self, layer: int) -> Gate:
        """The gate behind a layer."""
        return cast("Gate", self.gates[gate_name(layer)])

    def split_model(self) -> SplitModel:
        """The contract for export: the tower's components and chain, and the decoder's
        (`ExitDecoder.split_model`)."""
        split = super().split_model()
        decoding = split.decoding
        assert decoding is not None
        [table, run] = split.steps
        assert isinstance(table, Table)
        main = split.chains[decoding.chain]
        main = msgspec.structs.replace(main, exits=self._with_drops(main.exits))
        mask = IMAGE_MASK.name if len(self.gates) else None
        group = TokenGroup(token=self.whole.placeholder, mask=mask, image=self.prompt)
        gates = [
            gate_component(
                n, self.gate(n), state_between(f"state_{n}", self.trunk.width), IMAGE_MASK
            )
            for n in self.gate_layers
        ]
        return dataclasses.replace(
            split,
            task="image-text-to-text",
            inputs=(*split.inputs, self.tower.pixels),
            components=[*self.tower.components(), *split.components, *gates],
            chains={CHAIN: self.tower.chain(), **split.chains, decoding.chain: main},
            steps=[
                Run(chain=CHAIN),
                table,
                Place(source=IMAGE_FEATURES, target=table.output.name, group=GROUP),
                run,
            ],
            example=self._example,
            decoding=msgspec.structs.replace(decoding, groups={GROUP: group}),
            preprocessing=self.preprocessing,
            preprocessing_sample=self.preprocessing_sample,
        )

    @property
    def _has_early_exit(self) -> bool:
        return bool(self.border_layers or self.tower.exit_layers)

    def _with_drops(self, exits: Sequence[Exit]) -> list[Exit]:
        """A decoder's exits, and those where image tokens leave: a static one behind every segment
        but the last, and the gates."""
        drops = []
        for number, layer in enumerate(self.border_layers):
            behind = f"segment_{number}"
            drops.append(Exit(name=f"drop_{layer}", behind=behind, action="drop", tokens=GROUP))
            if layer in self.gate_layers:
                drops.append(gate_exit(layer, behind, GROUP))
        order = {f"segment_{number}": number for number in range(len(self.border_layers) + 1)}
        return sorted([*exits, *drops], key=lambda exit_: (order[exit_.behind], exit_.action))

    def _example(self, rows: int) -> Values:
        """Prompts of one length; every second one has an image, at a place of its own."""
        generator = torch.Generator().manual_seed(0)
        tokens, placeholder = self.whole.tower.tokens, self.whole.placeholder
        length = tokens + EXAMPLE_TOKENS
        ids = torch.randint(0, len(self.trunk.embedding), (rows, length), generator=generator)
        ids[ids == placeholder] = 0 if placeholder else 1
        with_image = range(0, rows, 2)
        for row in with_image:
            start = (row + 1) % (EXAMPLE_TOKENS - 1)
            ids[row, start : start + tokens] = placeholder
        shape = (len(with_image), *self.whole.tower.pixels)
        return {"tokens": ids, PIXELS: torch.randn(shape, generator=generator)}

    def _reference(self, inputs: Values) -> Iterator[Values]:
        """Texts without an image are run once, those with one behind each exit of the tower."""
        tokens, behind, features = inputs["tokens"], [], []
        for layer, answers in self.tower.answers(inputs[PIXELS]):
            name = exit_name(layer)
            yield {f"{name}/{key}": value for key, value in answers.items()}
            behind.append(f"{name}/" if layer < self.tower.depth else "")
            features.append(answers[IMAGE_FEATURES])
        image = tokens == self.whole.placeholder
        seeing = image.any(1)
        if len(self.gates):
            yield from self._gate_scores(tokens, image, features[-1])
        batch = torch.cat([tokens[~seeing], *[tokens[seeing]] * len(behind)])
        blind, each = (~seeing).cumsum(0), seeing.cumsum(0)
        for number, logits in self._each_answer(batch, image_features=torch.cat(features)):
            for place, early in enumerate(behind):
                rows = torch.where(seeing, blind[-1] + place * each[-1] + each, blind) - 1
                yield {f"{early}exit_{number}": logits[rows]}

    def _gate_scores(
        self, tokens: torch.Tensor, image: torch.Tensor, features: torch.Tensor
    ) -> Iterator[Values]:
        """Scores ``[rows]`` of the gates for whole prompts, none of which drops anything."""
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        state = self.embed(tokens, image_features=features)
        if self.trunk.stem is not None:
            state = self.trunk.stem(state, positions)
        done, prompts = 0, torch.full((len(tokens),), tokens.shape[1])
        for layer in self.gate_layers:
            state = self._through(done, layer, state, positions)
            done = layer
            yield {f"{gate_name(layer)}/gate": self.gate(layer)(state, image, prompts)}


def _drop_layers(drops: Iterable[int], depth: int) -> list[int]:
    """Layers behind which image tokens can leave. Raises `UsageError` for invalid ones."""
    layers = list(drops)
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer < depth:
            raise UsageError(
                f"image tokens cannot leave behind layer {layer!r}; the decoder has layers 1 to "
                f"{depth}",
                fix=f"Give layers from 1 to {depth - 1} (--drop-image-tokens): before the first, "
                "nothing has read the image, and behind the last, nothing reads it.",
            )
    check_repeated(layers, "layers behind which image tokens leave")
    return layers


__all__ = ["GROUP", "AtGate", "ExitVisionLanguage", "VisionLanguageTrunk"]
