"""An encoder-decoder that writes text about an image: a vision tower
(`edgeexit.export.exits.tower`) before an encoder-decoder
(`edgeexit.export.exits.encoder_decoder`), with exits in all three.

The image tokens replace the placeholders of the text that the encoder reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn

from edgeexit.bundle.manifest import Chain, ImageText, Place, Run, Tensor, TokenGroup
from edgeexit.export.contract import Component, SplitModel, Table, Values
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.exits.encoder import EncoderTrunk
from edgeexit.export.exits.encoder_decoder import SOURCE_IDS, SOURCE_MASK, ExitEncoderDecoder
from edgeexit.export.exits.saved import SavedExits
from edgeexit.export.exits.tower import (
    CHAIN,
    IMAGE_FEATURES,
    PIXELS,
    ExitTower,
    TowerTrunk,
    exit_name,
)
from edgeexit.export.exits.vision_language import GROUP


@dataclass(frozen=True)
class VisionEncoderTrunk:
    """A family's description of its model.

    Attributes:
        tower, encoder, decoder: Its parts.
        placeholder: Id of the token that stands for an image token in the encoder's text.
        prompt: What that text says for an image, with the usual text of that token.
        branches: The encoder's layers over image tokens alone, and over text alone
            (`edgeexit.export.exits.decomposed`).
    """

    tower: TowerTrunk
    encoder: EncoderTrunk
    decoder: DecoderTrunk
    placeholder: int
    prompt: ImageText
    branches: tuple[EncoderTrunk, EncoderTrunk]


class ExitVisionEncoderDecoder(ExitEncoderDecoder):
    """An encoder-decoder with a vision tower, and exits behind some layers of each.

    Args:
        model: The transformers model that owns the weights.
        trunk: Its description.
        exits, encoder_exits, adapters: As for `ExitEncoderDecoder`.
        tower_exits: Layers of the tower with an exit.

    Attributes:
        tower: The vision tower with its exits.
        prompt: What a prompt says for an image; None: there is no tokenizer to write it with.
    """

    read_by_source = (PIXELS,)

    def __init__(
        self,
        model: nn.Module,
        trunk: VisionEncoderTrunk,
        exits: Iterable[int],
        encoder_exits: Iterable[int] = (),
        tower_exits: Iterable[int] = (),
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__(model, trunk.encoder, trunk.decoder, exits, encoder_exits, adapters)
        self.whole = trunk
        self.tower = ExitTower(trunk.tower, tower_exits)
        self.exit_origins |= dict.fromkeys(self.tower.projectors, "untrained")
        self.prompt: ImageText | None = None

    def forward(
        self, input_ids: torch.Tensor | None, *, images: torch.Tensor | None = None, **options: Any
    ) -> dict[int, torch.Tensor]:
        """As `ExitDecoder.forward`; with `images` ``[images, channels, height, width]`` alone:
        image tokens of the tower's exits (`ExitTower.each_exit`)."""
        if images is not None:
            return self.tower.each_exit(images)
        assert input_ids is not None
        return super().forward(input_ids, **options)

    def embed_source(self, input_ids: torch.Tensor, *images: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[batch, source, width]`` with image tokens in place of their placeholders.

        Args:
            input_ids: ``[batch, source]``.
            images: One tensor ``[image, channels, height, width]``, or image tokens ``[image,
                tokens, width]``; or none.
        """
        embedded = super().embed_source(input_ids)
        if not images:
            return embedded
        [given] = images
        features = self.tower(given) if given.ndim == 4 else given
        places = (input_ids == self.whole.placeholder)[..., None]
        return embedded.masked_scatter(places, features.to(embedded.dtype))

    def saved_exits(self) -> SavedExits:
        return dataclasses.replace(super().saved_exits(), tower=self.tower.exit_layers)

    def saved_modules(self) -> dict[str, nn.ModuleDict]:
        return super().saved_modules() | {"tower.projectors": self.tower.projectors}

    def split_model(self) -> SplitModel:
        """The contract for export: the tower's components and chain, and those of
        `ExitEncoderDecoder.split_model`."""
        split = super().split_model()
        assert split.decoding is not None
        decoding = msgspec.structs.replace(split.decoding, groups=self._groups())
        return dataclasses.replace(split, task="image-text-to-text", decoding=decoding)

    def _groups(self) -> dict[str, TokenGroup]:
        """The placeholders of image tokens in the source."""
        return {GROUP: TokenGroup(token=self.whole.placeholder, image=self.prompt)}

    def _source_inputs(self) -> tuple[Tensor, ...]:
        return (*super()._source_inputs(), self.tower.pixels)

    def _source_components(self) -> list[Component]:
        return [*self.tower.components(), *super()._source_components()]

    def _source_chains(self) -> dict[str, Chain]:
        return {CHAIN: self.tower.chain(), **super()._source_chains()}

    def _source_steps(self) -> list[Run | Table | Place]:
        [table, encoder] = super()._source_steps()
        place = Place(source=IMAGE_FEATURES, target=self._source.name, group=GROUP)
        return [Run(chain=CHAIN), table, place, encoder]

    def _example(self, rows: int) -> Values:
        """Sources of unlike lengths behind an image each."""
        example = super()._example(rows)
        generator = torch.Generator().manual_seed(1)
        tokens = self.whole.tower.tokens
        front = torch.full((rows, tokens), self.whole.placeholder)
        ids, mask = example[SOURCE_IDS.name], example[SOURCE_MASK.name]
        ids[ids == self.whole.placeholder] = self.encoder.trunk.pad_token
        return example | {
            SOURCE_IDS.name: torch.cat([front, ids], 1),
            SOURCE_MASK.name: torch.cat([torch.ones_like(front), mask], 1),
            PIXELS: torch.randn(rows, *self.whole.tower.pixels, generator=generator),
        }

    @property
    def _has_early_exit(self) -> bool:
        return super()._has_early_exit or bool(self.tower.exit_layers)

    def _images_of(self, inputs: Values) -> tuple[torch.Tensor, ...]:
        return (inputs[PIXELS],)

    def _reference(self, inputs: Values) -> Iterator[Values]:
        yield from super()._reference(inputs)
        for layer, answers in self.tower.answers(inputs[PIXELS]):
            name = exit_name(layer)
            yield {f"{name}/{key}": value for key, value in answers.items()}
            if layer == self.tower.depth:
                continue
            for found in super()._reference(inputs | {PIXELS: answers[IMAGE_FEATURES]}):
                yield {f"{name}/{key}": x for key, x in found.items() if key.startswith("exit_")}


__all__ = ["ExitVisionEncoderDecoder", "VisionEncoderTrunk"]
