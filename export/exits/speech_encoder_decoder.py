"""An encoder-decoder that writes what was said in a sound, with exits in both.

As `edgeexit.export.exits.encoder_decoder`, but the encoder takes features of a window of sound
instead of token ids. A window always has the same length, so there is no mask: shorter sounds are
padded with silence, which the model was trained to read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from edgeexit.bundle.manifest import (
    Axis,
    Place,
    Run,
    StartChoice,
    Tensor,
    Timestamps,
)
from edgeexit.export.contract import Component, SplitModel, Table, Values
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.exits.encoder import EncoderTrunk
from edgeexit.export.exits.encoder_decoder import EXAMPLE_TOKENS, ExitEncoderDecoder

FEATURES = "input_features"


@dataclass(frozen=True)
class SpeechTrunk:
    """A family's description of its model.

    Attributes:
        encoder: Its stem takes features ``[batch, mels, frames]``; its states have fixed axes.
        decoder: The decoder.
        mels, frames: Size of a window's features.
        choices, timestamps: Tokens behind the start token (`edgeexit.bundle.manifest.Decoding`).
        settings: Generation settings that the family heeds itself.
    """

    encoder: EncoderTrunk
    decoder: DecoderTrunk
    mels: int
    frames: int
    choices: Mapping[str, StartChoice]
    timestamps: Timestamps | None
    settings: tuple[str, ...] = ()


class ExitSpeechEncoderDecoder(ExitEncoderDecoder):
    """An encoder-decoder that reads sound, with exits behind some layers of each.

    Args:
        model: The transformers model that owns the weights.
        trunk: Its description.
        exits, encoder_exits, adapters: As for `ExitEncoderDecoder`.
    """

    source_columns = (FEATURES,)

    def __init__(
        self,
        model: nn.Module,
        trunk: SpeechTrunk,
        exits: Iterable[int],
        encoder_exits: Iterable[int] = (),
        adapters: Iterable[int] | Mapping[int, int] = (),
    ) -> None:
        super().__init__(model, trunk.encoder, trunk.decoder, exits, encoder_exits, adapters)
        self.whole = trunk

    def encode_columns(
        self, columns: Mapping[str, torch.Tensor], **layers: int
    ) -> tuple[torch.Tensor, ...]:
        return self.encode(columns[FEATURES], **layers)

    def encode(  # type: ignore[override]
        self, input_features: torch.Tensor, *, layers: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The encoder's output, which `forward` takes as `source`.

        Args:
            input_features: ``[batch, mels, frames]``.
            layers: Number of layers to run; None: all.
        """
        return (self._normed(self.encoder(input_features, None, layers=layers)),)

    def split_model(self) -> SplitModel:
        """The contract for export (`ExitEncoderDecoder.split_model`), with the choices of start
        tokens."""
        split = super().split_model()
        assert split.decoding is not None
        decoding = msgspec.structs.replace(
            split.decoding, choices=dict(self.whole.choices), timestamps=self.whole.timestamps
        )
        return dataclasses.replace(split, task="automatic-speech-recognition", decoding=decoding)

    def _source_inputs(self) -> tuple[Tensor, ...]:
        return (self._source,)

    def _source_components(self) -> list[Component]:
        return self.encoder.components(self._source, None)

    def _source_steps(self) -> list[Run | Table | Place]:
        return [Run(chain=self.encoder.name)]

    def _source_limits(self) -> dict[str, int]:
        return {}

    @property
    def _source(self) -> Tensor:
        axes: list[Axis] = ["batch", self.whole.mels, self.whole.frames]
        return Tensor(name=FEATURES, dtype="float32", axes=axes)

    @property
    def _source_axis(self) -> Axis:
        axes = self.encoder.trunk.state_axes
        assert axes is not None
        return axes[1]

    def _also_read(self) -> tuple[Tensor, ...]:
        return ()

    def _example(self, rows: int) -> Values:
        """Noise, and texts of one length behind the start token."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(rows, self.whole.mels, self.whole.frames, generator=generator)
        shape = (rows, min(EXAMPLE_TOKENS, self.trunk.positions or EXAMPLE_TOKENS))
        tokens = torch.randint(0, self.trunk.embedding.shape[0], shape, generator=generator)
        start = self.encoder.trunk.start_tokens
        tokens[:, : len(start)] = torch.tensor(start)
        return {FEATURES: features, "tokens": tokens}

    def _reference(self, inputs: Values) -> Iterator[Values]:
        encoder = self.encoder
        for layer, state, score in encoder.each_exit(inputs[FEATURES], None):
            name = encoder.exit_name(layer)
            yield {f"{name}/{encoder.output}": state, f"{name}/saturation": score}
            early = f"{name}/" if layer < encoder.depth else ""
            source = (self._normed(state),)
            yield from self._answers(inputs["tokens"], early, source=source)


__all__ = ["FEATURES", "ExitSpeechEncoderDecoder", "SpeechTrunk"]
