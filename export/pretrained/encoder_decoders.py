"""Encoder-decoders that write text: exits share the model's own head, so any layer can have one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeexit.errors import ExportError
from edgeexit.export.checkpoint import Checkpoint, read_model
from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.origins import Origin, note_origins, origins_of
from edgeexit.export.exits.saved import SavedExits, name_layers
from edgeexit.export.exits.speech_encoder_decoder import ExitSpeechEncoderDecoder, SpeechTrunk
from edgeexit.export.feature_extractors import audio_preprocessing
from edgeexit.export.generation import generation_of
from edgeexit.export.preprocessing import text_preprocessing
from edgeexit.export.pretrained.common import (
    LONGEST_TEXT,
    depth_of_config,
    name_of,
    tell_of_tokenizer,
    trunk_of,
)
from edgeexit.export.pretrained.decoders import adapters_of, load_adapters, origins_of_decoder

ENCODER_DECODERS = {
    "bart": ("bart", "BartForConditionalGeneration"),
    "t5": ("t5", "T5ForConditionalGeneration"),
    "mt5": ("t5", "MT5ForConditionalGeneration"),
    "whisper": ("whisper", "WhisperForConditionalGeneration"),
}
"""transformers' model type -> (module of `edgeexit.export.families`, class that reads it)."""


def read_encoder_decoder(
    checkpoint: Checkpoint,
    saved: SavedExits,
    exits: Iterable[int] | None,
    encoder_exits: Iterable[int] | None,
    adapters: Iterable[int] | Mapping[int, int] | None = None,
    *,
    untrained: bool,
) -> ExitEncoderDecoder:
    """An encoder-decoder; its exits share its own head, so any layer can have one."""
    path, config = checkpoint.path, checkpoint.config
    if exits is None and saved.layers is None and encoder_exits is None:
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"{name_layers(depth_of_config(config))}, of the decoder (--exits), encoder "
            "(--encoder-exits) or both.",
        )
    module_name, reader = ENCODER_DECODERS[config.model_type]
    model, missing_weights, stored = read_model(reader, checkpoint)
    if missing_weights:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {missing_weights[0]}",
            fix="Give a whole model for conditional generation.",
        )
    chosen = list(saved.layers or [] if exits is None else exits)
    own = list(saved.encoder or [] if encoder_exits is None else encoder_exits)
    trunk = trunk_of(checkpoint, module_name, model)
    layers = adapters_of(saved, chosen, adapters)
    hears = isinstance(trunk, SpeechTrunk)
    if hears:
        split: ExitEncoderDecoder = ExitSpeechEncoderDecoder(model, trunk, chosen, own, layers)
    else:
        encoder, decoder = trunk
        split = ExitEncoderDecoder(model, encoder, decoder, chosen, own, layers)
    load_adapters(checkpoint, split, saved, untrained=untrained)
    split.eval()
    split.name = name_of(path)
    split.tokenizer_folder = checkpoint.text_folder
    split.generation = generation_of(model, path, heeded=trunk.settings if hears else ())
    split.provenance = dict(checkpoint.provenance)
    split.stored = stored
    note_origins(split, origins_of_both(split, saved, untrained=untrained))
    tell_of_tokenizer(checkpoint)
    if hears:
        if sounds := audio_preprocessing(checkpoint.folder, trunk.mels, trunk.frames):
            split.preprocessing, split.preprocessing_sample = (sounds[0],), sounds[1]
        return split
    takes, longest = ["input_ids", "attention_mask"], split.longest_text or LONGEST_TEXT
    if texts := text_preprocessing(checkpoint.text_folder, takes, longest):
        split.preprocessing, split.preprocessing_sample = (texts[0],), texts[2]
    return split


def origins_of_both(
    split: ExitEncoderDecoder, saved: SavedExits, *, untrained: bool
) -> dict[str, Origin]:
    """What is known about the exits of an encoder-decoder, in all of its parts but a tower."""
    otherwise: Origin = "untrained" if untrained else "unknown"
    parts: list[tuple[str, list[int], list[int] | None]] = [
        (f"{split.encoder.name}_exit", split.encoder.exit_layers, saved.encoder),
    ]
    if isinstance(split, ExitDecomposed):
        image = split.image_encoder
        parts.append((f"{image.name}_exit", image.exit_layers, saved.image_encoder))
    found = origins_of_decoder(split, saved, untrained=untrained)
    for prefix, layers, held in parts:
        found |= origins_of(layers, held, saved.origins, prefix=prefix, otherwise=otherwise)
    return found


__all__ = ["ENCODER_DECODERS", "origins_of_both", "read_encoder_decoder"]
