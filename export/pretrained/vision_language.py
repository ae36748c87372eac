"""Vision-language models: exits in the tower, with projectors of their own, and in the language
model, whose exits share its head."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tokenizers import Tokenizer

from edgeexit.bundle.manifest import ImageText
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.checkpoint import Checkpoint, read_model
from edgeexit.export.device_tokenizer import make_tokenizer
from edgeexit.export.exits.decomposed import ExitDecomposed
from edgeexit.export.exits.gates import gate_sizes
from edgeexit.export.exits.origins import Origin, note_origins, origins_of
from edgeexit.export.exits.saved import SavedExits, listed, load_exits, name_layers
from edgeexit.export.exits.tower import ExitTower
from edgeexit.export.exits.vision_encoder_decoder import (
    ExitVisionEncoderDecoder,
    VisionEncoderTrunk,
)
from edgeexit.export.exits.vision_language import ExitVisionLanguage
from edgeexit.export.generation import generation_of
from edgeexit.export.image_processors import image_preprocessing
from edgeexit.export.preprocessing import text_preprocessing
from edgeexit.export.pretrained.common import (
    depth_of_config,
    name_of,
    tell_of_tokenizer,
    trunk_of,
)
from edgeexit.export.pretrained.decoders import (
    adapters_of,
    load_adapters,
    load_skipped,
    origins_of_decoder,
)
from edgeexit.export.pretrained.encoder_decoders import origins_of_both

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """How a model type is read.

    Attributes:
        family: Module of `edgeexit.export.families`.
        reader: Class of transformers.
        processing: Options that the model's processor passes to its image processor.
        encodes: Whether an encoder reads the prompt.
        sized: Whether its tower takes images of the size that preprocessing gives.
    """

    family: str
    reader: str
    processing: Mapping[str, Any] = field(default_factory=dict)
    encodes: bool = False
    sized: bool = False


VISION_LANGUAGE = {
    "llava": Kind("llava", "LlavaForConditionalGeneration"),
    "internvl": Kind("internvl", "InternVLForConditionalGeneration", {"crop_to_patches": True}),
    "smolvlm": Kind("smolvlm", "SmolVLMForConditionalGeneration"),
    "idefics3": Kind("smolvlm", "Idefics3ForConditionalGeneration"),
    "blip-2": Kind("blip2", "Blip2ForConditionalGeneration"),
    "florence2": Kind("florence2", "Florence2ForConditionalGeneration", encodes=True, sized=True),
}
"""transformers' model type -> how it is read."""


@dataclass(frozen=True)
class Exits:
    """The exits that a vision-language model gets; None: those saved with the checkpoint.

    Attributes:
        decoder, encoder, tower: Layers with an exit.
        image_encoder: Layers with an exit of an encoder that reads an image apart from the text;
            `encoder` then has those for the text.
        drops: Further layers of the decoder behind which image tokens can leave.
        adapters: As for `edgeexit.export.exits.decoder.ExitDecoder`.
        gates: Layers of the decoder with a gate that may drop image tokens; as a mapping: layer ->
            width of the gate.
        untrained: Attach new adapters, projectors and gates where the checkpoint has none.
    """

    decoder: Iterable[int] | None = None
    encoder: Iterable[int] | None = None
    image_encoder: Iterable[int] | None = None
    tower: Iterable[int] | None = None
    drops: Iterable[int] = ()
    adapters: Iterable[int] | Mapping[int, int] | None = None
    gates: Iterable[int] | Mapping[int, int] | None = None
    untrained: bool = False


def read_vision_language(
    checkpoint: Checkpoint,
    saved: SavedExits,
    exits: Exits,
    most_tiles: int | None = None,
) -> ExitVisionLanguage | ExitVisionEncoderDecoder:
    """A vision-language model with exits.

    Args:
        most_tiles: Most tiles of an image, besides its overview; None: as the processor says.

    Raises:
        ExportError, UsageError: As `edgeexit.export.pretrained.from_pretrained`.
    """
    path, config = checkpoint.path, checkpoint.config
    kind = VISION_LANGUAGE[config.model_type]
    depth = depth_of_config(config)
    tower_exits = list(saved.tower or [] if exits.tower is None else exits.tower)
    drops = list(exits.drops)
    given = (exits.decoder, exits.encoder, exits.image_encoder, saved.layers, exits.gates)
    if given == (None,) * len(given) and not (tower_exits or drops):
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"{name_layers(depth)} (--exits), or exits of the tower (--tower-exits).",
        )
    _check_parts(path, kind, exits)
    images = image_preprocessing(  # first: it is fast and may refuse
        checkpoint.folder, 3, options=kind.processing, most_tiles=most_tiles
    )
    if images is None and most_tiles is not None:
        raise UsageError(
            f"{path}: the checkpoint has no image processor, so nothing cuts images into tiles",
            fix="Leave --max-tiles (most_tiles) out, or add preprocessor_config.json.",
        )
    model, missing, stored = read_model(kind.reader, checkpoint)
    if missing:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {missing[0]}",
            fix="Give a whole vision-language model.",
        )
    size = [(images[0].height, images[0].width)] if images and kind.sized else []
    trunk = trunk_of(checkpoint, kind.family, model, *size)
    if images and trunk.tower.pixels[1:] != (images[0].height, images[0].width):
        raise ExportError(
            f"{path}: the image processor makes images of {images[0].height} x "
            f"{images[0].width}, the tower takes {trunk.tower.pixels[1]} x "
            f"{trunk.tower.pixels[2]}",
            fix="Correct the size in preprocessor_config.json.",
        )
    chosen = list(saved.layers or [] if exits.decoder is None else exits.decoder)
    split: ExitVisionLanguage | ExitVisionEncoderDecoder
    if kind.encodes:
        split = _with_encoder(path, model, trunk, saved, exits, chosen, tower_exits)
    else:
        adapters = adapters_of(saved, chosen, exits.adapters)
        gates = _gates(path, saved, exits)
        split = ExitVisionLanguage(model, trunk, chosen, tower_exits, drops, adapters, gates)
        load_skipped(checkpoint, split, saved)
        if held := [layer for layer in split.gate_layers if layer in saved.gates]:
            load_exits(split.gates, held, checkpoint.folder, prefix="gate")
    load_adapters(checkpoint, split, saved, untrained=exits.untrained)
    _load_projectors(checkpoint, split.tower, saved, untrained=exits.untrained)
    split.eval()
    split.tokenizer_folder = checkpoint.text_folder
    split.generation = generation_of(model, path)
    split.prompt = _prompt_of(checkpoint, trunk.placeholder, trunk.prompt)
    split.name = name_of(path)
    split.provenance = dict(checkpoint.provenance)
    split.stored = stored
    note_origins(split, _origins(split, saved, untrained=exits.untrained))
    tell_of_tokenizer(checkpoint)
    _add_preprocessing(checkpoint, split, images)
    return split


def _with_encoder(
    path: Any,
    model: Any,
    trunk: VisionEncoderTrunk,
    saved: SavedExits,
    exits: Exits,
    chosen: Sequence[int],
    tower_exits: Sequence[int],
) -> ExitVisionEncoderDecoder:
    """A model whose encoder reads image and text together, or apart."""
    encoder = list(saved.encoder or [] if exits.encoder is None else exits.encoder)
    images = saved.image_encoder if exits.image_encoder is None else exits.image_encoder
    adapters = adapters_of(saved, chosen, exits.adapters)
    if images is None:
        return ExitVisionEncoderDecoder(model, trunk, chosen, encoder, tower_exits, adapters)
    if saved.image_encoder is None:
        logger.warning(
            "%s: the checkpoint does not say that it was trained to read images and texts apart: "
            "its answers will differ from the original model's",
            path,
        )
    return ExitDecomposed(model, trunk, chosen, encoder, images, tower_exits, adapters)


def _check_parts(path: Any, kind: Kind, exits: Exits) -> None:
    """Refuses exits of parts that the model does not have."""
    if kind.encodes and list(exits.drops):
        raise UsageError(
            f"{path}: layers that drop image tokens are for models whose decoder reads the image "
            "tokens",
            fix="Leave them out.",
        )
    if not kind.encodes and (exits.encoder is not None or exits.image_encoder is not None):
        raise UsageError(
            f"{path}: the model has no encoder between its tower and its decoder",
            fix="Leave encoder_exits and image_encoder_exits out (--encoder-exits, "
            "--image-encoder-exits); exits of the tower: tower_exits (--tower-exits).",
        )


def _gates(path: Any, saved: SavedExits, exits: Exits) -> dict[int, int]:
    """Gates of the model: layer -> width. Those that are saved have their own width."""
    if exits.gates is None:
        return dict(saved.gates)
    sizes = gate_sizes(exits.gates)
    missing = [layer for layer in sizes if layer not in saved.gates]
    if missing and not exits.untrained:
        raise UsageError(
            f"{path}: no trained gate behind layer {missing[0]} (trained: "
            f"{listed(saved.gates) or 'none'})",
            fix="Choose trained gates, or pass untrained=True (--untrained-exits) to measure what "
            "a gate would cost and save.",
        )
    return sizes | {layer: width for layer, width in saved.gates.items() if layer in sizes}


def _load_projectors(
    checkpoint: Checkpoint, tower: ExitTower, saved: SavedExits, *, untrained: bool
) -> None:
    """Loads the projectors of a tower's exits."""
    held = [layer for layer in tower.exit_layers if layer in (saved.tower or [])]
    missing = [layer for layer in tower.exit_layers if layer not in held]
    if missing and not untrained:
        raise UsageError(
            f"{checkpoint.path}: no trained projector behind layer {missing[0]} of the tower "
            f"(trained: {listed(saved.tower or []) or 'none'})",
            fix="Choose trained exits, or pass untrained=True (--untrained-exits) to measure what "
            "an exit would save.",
        )
    if held:
        load_exits(tower.projectors, held, checkpoint.folder, prefix="tower_exit")


def _origins(
    split: ExitVisionLanguage | ExitVisionEncoderDecoder, saved: SavedExits, *, untrained: bool
) -> dict[str, Origin]:
    """What is known about all exits. A projector that is not saved is new, so it is untrained."""
    found: dict[str, Origin] = dict(
        origins_of_both(split, saved, untrained=untrained)
        if isinstance(split, ExitVisionEncoderDecoder)
        else origins_of_decoder(split, saved, untrained=untrained)
    )
    found |= origins_of(
        split.tower.exit_layers,
        saved.tower,
        saved.origins,
        prefix="tower_exit",
        otherwise="untrained",
    )
    if isinstance(split, ExitVisionLanguage):
        layers, held = split.gate_layers, list(saved.gates)
        origins = saved.origins
        found |= origins_of(layers, held, origins, prefix="gate", otherwise="untrained")
    return found


def _prompt_of(checkpoint: Checkpoint, placeholder: int, prompt: ImageText) -> ImageText | None:
    """What a prompt says for an image, with the tokenizer's text of the placeholder."""
    made = make_tokenizer(checkpoint.text_folder)
    if made is None:
        return None
    tokenizer = Tokenizer.from_buffer(made[0])
    text = tokenizer.id_to_token(placeholder)
    if text is None or tokenizer.encode(text, add_special_tokens=False).ids != [placeholder]:
        raise ExportError(
            f"{checkpoint.text_folder / 'tokenizer.json'}: the image token {placeholder} of "
            f"config.json is {'not in it' if text is None else f'not one token ({text!r})'}",
            fix="Save the tokenizer with the image token, as the model's processor adds it.",
        )
    return msgspec.structs.replace(prompt, placeholder=text)


def _add_preprocessing(
    checkpoint: Checkpoint,
    split: ExitVisionLanguage | ExitVisionEncoderDecoder,
    images: tuple[Any, Mapping[str, Any]] | None,
) -> None:
    """Preprocessing of images, and of the text that an encoder reads, with samples of both."""
    made: list[Any] = []
    sample: dict[str, Any] = {}
    if images:
        made.append(images[0])
        sample |= images[1]
    if isinstance(split, ExitVisionEncoderDecoder):
        longest = split.longest_text
        takes: Sequence[str] = ["input_ids", "attention_mask"]
        if longest and (texts := text_preprocessing(checkpoint.text_folder, takes, longest)):
            made.append(texts[0])
            sample |= texts[2]
    split.preprocessing, split.preprocessing_sample = tuple(made), sample or None


__all__ = ["VISION_LANGUAGE", "Exits", "Kind", "read_vision_language"]
