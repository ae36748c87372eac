"""An encoder-decoder that reads an image and a text apart: the modality decomposition of MuE (CVPR
2023).

The encoder's layers run twice with the same weights, which are stored once: over the tokens of one
image, and over the text. The two branches do not attend to each other, so each has exits of its
own. The decoder reads the states of both, the image first. The answers are those of the
undecomposed model only if the model was trained in this form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from edgeexit.bundle.manifest import Axis, Chain, Exit, Place, Run, Tensor, TokenGroup
from edgeexit.export.contract import Component, Form, Table, Values
from edgeexit.export.exits.encoder import ExitEncoder
from edgeexit.export.exits.encoder_decoder import (
    ENCODED,
    SOURCE_IDS,
    SOURCE_MASK,
    ExitEncoderDecoder,
)
from edgeexit.export.exits.saved import SavedExits
from edgeexit.export.exits.tower import CHAIN, IMAGE_FEATURES, PIXELS, exit_name
from edgeexit.export.exits.vision_encoder_decoder import (
    ExitVisionEncoderDecoder,
    VisionEncoderTrunk,
)

TEXT_IDS, TEXT_MASK = (
    Tensor(name=tensor.name, dtype="int64", axes=["batch", "text"])
    for tensor in (SOURCE_IDS, SOURCE_MASK)
)
JOINED_MASK = Tensor(name="joined_mask", dtype="int64", axes=["batch", "source"])
"""What the decoder reads of image and text: 0 at the text's padding."""
JOINED = "joined"


class ExitDecomposed(ExitVisionEncoderDecoder):
    """An encoder-decoder with a vision tower, whose encoder reads one image and a text apart.

    Args:
        model, trunk, exits, tower_exits, adapters: As for `ExitVisionEncoderDecoder`.
        text_exits, image_exits: Layers of the encoder's branches with an exit.

    Attributes:
        encoder: The branch of the text.
        image_encoder: The branch of the image.
    """

    def __init__(
        self,
        model: nn.Module,
        trunk: VisionEncoderTrunk,
        exits: Iterable[int],
        text_exits: Iterable[int] = (),
        image_exits: Iterable[int] = (),
        tower_exits: Iterable[int] = (),
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__(model, trunk, exits, (), tower_exits, adapters)
        image, text = trunk.branches
        self.encoder = ExitEncoder(text, text_exits, "text_encoder")
        self.image_encoder = ExitEncoder(image, image_exits, "image_encoder")
        for branch in (self.encoder, self.image_encoder):
            names = map(branch.exit_name, branch.exit_layers)
            self.exit_origins |= dict.fromkeys(names, "unknown")

    def saved_exits(self) -> SavedExits:
        return dataclasses.replace(
            super().saved_exits(), image_encoder=self.image_encoder.exit_layers
        )

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        layers: int | None = None,
        image_layers: int | None = None,
        images: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder reads, which `forward` takes as `source`.

        Args:
            input_ids, attention_mask: The text, ``[batch, text]``, without placeholders of images.
            layers, image_layers: Number of layers to run over the text and over the image (MuE
                hands over there); None: all.
            images: One tensor ``[batch, channels, height, width]``, or image tokens ``[batch,
                tokens, width]``.
        """
        [given] = images
        features = self.tower(given) if given.ndim == 4 else given
        image = self.image_encoder(features, None, layers=image_layers)
        embedded = ExitEncoderDecoder.embed_source(self, input_ids)
        text = self.encoder(embedded, attention_mask.bool(), layers=layers)
        state, mask = _Join()(image, text, attention_mask)
        return self._normed(state), mask.bool()

    def _groups(self) -> dict[str, TokenGroup]:
        return {}

    def _source_inputs(self) -> tuple[Tensor, ...]:
        return TEXT_IDS, TEXT_MASK, self.tower.pixels

    def _source_components(self) -> list[Component]:
        image, text = (
            branch.state(takes)
            for branch, takes in ((self.image_encoder, self._features), (self.encoder, self._text))
        )
        taken, made = (image, text, TEXT_MASK), (self._encoded, JOINED_MASK)
        join = Component(JOINED, taken, made, (Form(_Join().eval()),))
        return [
            *self.tower.components(),
            *self.image_encoder.components(self._features, None),
            *self.encoder.components(self._text, TEXT_MASK),
            join,
        ]

    def _source_chains(self) -> dict[str, Chain]:
        outputs = [self._encoded, JOINED_MASK]
        only = Exit(name=JOINED, behind=JOINED, outputs={t.name: t.name for t in outputs})
        return {
            CHAIN: self.tower.chain(),
            self.image_encoder.name: self.image_encoder.chain(self._features),
            self.encoder.name: self.encoder.chain(self._text),
            JOINED: Chain(components=[JOINED], outputs=outputs, exits=[only], unsplit=[JOINED]),
        }

    def _source_steps(self) -> list[Run | Table | Place]:
        table = Table(TEXT_IDS.name, self._text, self._table, "input")
        chains = (CHAIN, self.image_encoder.name, self.encoder.name, JOINED)
        vision, image, text, joined = (Run(chain=name) for name in chains)
        return [vision, image, table, text, joined]

    def _source_limits(self) -> dict[str, int]:
        longest, tokens = self.longest_text, self.whole.tower.tokens
        return {} if longest is None else {"text": longest, "source": longest + tokens}

    @property
    def longest_text(self) -> int | None:
        whole = self.encoder.trunk.positions
        return None if whole is None else whole - self.whole.tower.tokens

    def _also_read(self) -> tuple[Tensor, ...]:
        return (JOINED_MASK,)

    @property
    def _features(self) -> Tensor:
        axes = self._axes(self.whole.tower.tokens)
        return Tensor(name=IMAGE_FEATURES, dtype="float32", axes=axes)

    @property
    def _text(self) -> Tensor:
        return Tensor(name="text", dtype="float32", axes=self._axes("text"))

    def _axes(self, sequence: Axis) -> list[Axis]:
        return ["batch", sequence, self.trunk.width]

    @property
    def _has_early_exit(self) -> bool:
        return super()._has_early_exit or bool(self.image_encoder.exit_layers)

    def _example(self, rows: int) -> Values:
        """Texts of unlike lengths, and an image for each."""
        example = ExitEncoderDecoder._example(self, rows)
        generator = torch.Generator().manual_seed(1)
        shape = (rows, *self.whole.tower.pixels)
        return example | {PIXELS: torch.randn(shape, generator=generator)}

    def _reference(self, inputs: Values) -> Iterator[Values]:
        mask = inputs[TEXT_MASK.name]
        embedded = ExitEncoderDecoder.embed_source(self, inputs[TEXT_IDS.name])
        text, image = self.encoder, self.image_encoder
        texts = {}
        for layer, state, score in text.each_exit(embedded, mask):
            name = text.exit_name(layer)
            yield {f"{name}/{text.output}": state, f"{name}/saturation": score}
            texts[f"{name}/" if layer < text.depth else ""] = state
        for tower_layer, answers in self.tower.answers(inputs[PIXELS]):
            early = f"{exit_name(tower_layer)}/" if tower_layer < self.tower.depth else ""
            yield {f"{exit_name(tower_layer)}/{key}": value for key, value in answers.items()}
            if early:
                state = image(answers[IMAGE_FEATURES], None)
                yield from self._behind(early, state, texts[""], inputs)
                continue
            for layer, state, score in image.each_exit(answers[IMAGE_FEATURES], None):
                name = image.exit_name(layer)
                yield {f"{name}/{image.output}": state, f"{name}/saturation": score}
                if layer < image.depth:
                    yield from self._behind(f"{name}/", state, texts[""], inputs)
            for behind, own in texts.items():
                yield from self._behind(behind, state, own, inputs)

    def _behind(
        self, early: str, image: torch.Tensor, text: torch.Tensor, inputs: Values
    ) -> Iterator[Values]:
        """What the decoder answers behind one early exit, or behind none."""
        state, mask = _Join()(image, text, inputs[TEXT_MASK.name])
        if not early:
            yield {f"{JOINED}/{ENCODED}": state, f"{JOINED}/{JOINED_MASK.name}": mask}
        source = self._normed(state), mask.bool()
        yield from self._answers(inputs["tokens"], early, source=source)


class _Join(nn.Module):
    """States of image and text as one, and their mask: every image token is read."""

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = torch.ones(image.shape[:2], dtype=mask.dtype, device=mask.device)
        return torch.cat([image, text], 1), torch.cat([read, mask], 1)


__all__ = ["ExitDecomposed"]
