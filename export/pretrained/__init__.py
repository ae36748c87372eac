"""`from_pretrained`: makes a model with exits from a checkpoint directory or hub id.

transformers reads the model; a classifier's exits are in ``exits.safetensors`` beside it; labels,
preprocessing and tokenizer are in the checkpoint's own files. A decoder's exits share its head: the
checkpoint has only their layer numbers and the adapters of some exits.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.checkpoint import Checkpoint, open_checkpoint
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.saved import (
    EXITS_CONFIG,
    EXITS_WEIGHTS,
    SAVE_AGAIN,
    SavedExits,
    check_keys,
    read_exits,
    unlisted,
)
from edgeexit.export.pretrained.classifiers import FAMILIES, read_classifier
from edgeexit.export.pretrained.common import depth_of_config, name_of
from edgeexit.export.pretrained.decoders import DECODERS, read_decoder
from edgeexit.export.pretrained.encoder_decoders import ENCODER_DECODERS, read_encoder_decoder
from edgeexit.export.pretrained.vision_language import VISION_LANGUAGE, Exits, read_vision_language

logger = logging.getLogger(__name__)

AnyDecoder = TypeVar("AnyDecoder", bound=ExitDecoder)


def from_pretrained(
    path: str | Path,
    *,
    exits: Iterable[int] | None = None,
    adapters: Iterable[int] | Mapping[int, int] | None = None,
    encoder_exits: Iterable[int] | None = None,
    image_encoder_exits: Iterable[int] | None = None,
    tower_exits: Iterable[int] | None = None,
    image_drops: Iterable[int] = (),
    gates: Iterable[int] | Mapping[int, int] | None = None,
    draft_vocabularies: Mapping[int, Iterable[int]] | None = None,
    most_tiles: int | None = None,
    adapter: str | Path | Iterable[str | Path] | None = None,
    untrained: bool = False,
    saved_exits: bool = True,
) -> ExitClassifier | ExitDecoder:
    """Reads a checkpoint and gives it exits.

    Args:
        path: A checkpoint directory, or a hub id.
        exits: Layers that get an exit (1 = behind the first layer). None: those saved with the
            checkpoint. The last layer always answers with the model's own head.
        adapters: Decoders: layers whose exit has an adapter before the shared head (see
            `ExitDecoder`). None: those saved with the checkpoint.
        encoder_exits: Encoder-decoders: layers of the encoder that get an exit. None: those saved
            with the checkpoint, or none.
        image_encoder_exits: Vision-language encoder-decoders: the encoder reads one image and the
            text apart, with exits behind these layers for the image; `encoder_exits` are then
            those for the text. None: as saved with the checkpoint, or both together.
        tower_exits: Vision-language models: layers of the vision tower that get an exit with a
            projector of its own. None: those saved with the checkpoint, or none.
        image_drops: Vision-language models: layers behind which image tokens can leave; they can
            behind every exit layer.
        gates: Vision-language models: layers behind which a gate decides for every prompt whether
            its image tokens leave (`edgeexit.export.exits.gates`); as a mapping: layer -> width of
            the gate. None: those saved with the checkpoint.
        draft_vocabularies: Models that write text: exit layer -> ids of the tokens that its head
            computes; exits that are not named compute all
            (`edgeexit.export.exits.draft_vocabulary`). None: as saved with the checkpoint.
        most_tiles: Vision-language models: most tiles that an image is cut into, besides its
            overview; None: as the checkpoint's processor does.
        adapter: A folder (or hub id) with a peft adapter such as LoRA, or several. They are merged
            into the weights in this order. An adapter's tokenizer replaces the checkpoint's.
        untrained: Attach new, random heads (new adapters) where the checkpoint has none, to measure
            latency before training, or to train them.
        saved_exits: Whether to use the exits that are saved with the checkpoint. False: a warning
            names them, if there are any.

    Raises:
        ExportError: The checkpoint cannot be read, its model type is not supported, or it has no
            exits for these layers; or an adapter cannot be read or merged.
    """
    checkpoint = open_checkpoint(path, adapter)
    config = checkpoint.config
    known = {*FAMILIES, *DECODERS, *ENCODER_DECODERS, *VISION_LANGUAGE}
    if config.model_type not in known:
        raise ExportError(
            f"{path}: edgeexit has no adapter for the model type {config.model_type!r} "
            f"(it has {', '.join(sorted(known))})",
            fix="Export it to ONNX with exit outputs and give that file, or write an adapter "
            "(edgeexit/export/families/bert.py is the example) and give it as module:function.",
        )
    saved = _saved_exits(checkpoint, use=saved_exits)
    exits, tower_exits = _listed(exits), _listed(tower_exits)
    gates = gates if isinstance(gates, Mapping) else _listed(gates)
    if untrained:
        asked = {"exit": exits, "tower_exit": tower_exits, "gate": gates}
        _tell_of_left_out(checkpoint, saved, asked)
    vocabularies = saved, draft_vocabularies
    if config.model_type in VISION_LANGUAGE:
        chosen = Exits(
            decoder=exits,
            encoder=encoder_exits,
            image_encoder=image_encoder_exits,
            tower=tower_exits,
            drops=image_drops,
            adapters=adapters,
            gates=gates,
            untrained=untrained,
        )
        return _short(read_vision_language(checkpoint, saved, chosen, most_tiles), vocabularies)
    of_images = (tower_exits, image_encoder_exits, gates, most_tiles)
    if any(one is not None for one in of_images) or list(image_drops):
        raise UsageError(
            f"{path}: a {config.model_type} has no vision tower before a language model",
            fix="Leave out --tower-exits, --image-encoder-exits, --drop-image-tokens, --gates and "
            "--max-tiles (tower_exits, image_encoder_exits, image_drops, gates, most_tiles).",
        )
    if config.model_type in ENCODER_DECODERS:
        split = read_encoder_decoder(
            checkpoint, saved, exits, encoder_exits, adapters, untrained=untrained
        )
        return _short(split, vocabularies)
    if encoder_exits is not None:
        raise UsageError(
            f"{path}: a {config.model_type} has no encoder before a decoder",
            fix="Leave out --encoder-exits (encoder_exits).",
        )
    if config.model_type in DECODERS:
        decoder = read_decoder(checkpoint, saved, exits, adapters, untrained=untrained)
        return _short(decoder, vocabularies)
    if adapters is not None or draft_vocabularies is not None:
        what = "draft vocabularies" if adapters is None else "adapters"
        raise UsageError(
            f"{path}: {what} are for language models, this is a {config.model_type}",
            fix="Leave them out: a classifier's exits have heads of their own.",
        )
    return read_classifier(
        checkpoint, saved, exits, *FAMILIES[config.model_type], untrained=untrained
    )


def _short(
    decoder: AnyDecoder, vocabularies: tuple[SavedExits, Mapping[int, Iterable[int]] | None]
) -> AnyDecoder:
    """The model with the draft vocabularies that are given, or with those that are saved."""
    saved, given = vocabularies
    held = {n: ids for n, ids in saved.vocabularies.items() if n in decoder.exit_layers}
    decoder.set_draft_vocabularies(held if given is None else given)
    return decoder


def depth_of(path: str | Path) -> int:
    """Number of layers that can have an exit, the last one included.

    Raises:
        ExportError: The configuration cannot be read.
    """
    return depth_of_config(open_checkpoint(path).config)


def _saved_exits(checkpoint: Checkpoint, *, use: bool) -> SavedExits:
    """The exits that are saved with a checkpoint. A warning says that they are not used, or that
    they were trained without the adapters that are merged."""
    found, kind = read_exits(checkpoint.folder), checkpoint.config.model_type
    check_keys(checkpoint.folder, found, _can_have(kind), kind)
    _tell_of_unlisted(checkpoint, found)
    apart: list[int] | None = None if found.image_encoder is None else []
    without = SavedExits(removed=found.removed, pia=found.pia, image_encoder=apart)  # of the model
    if not found.layers and not found.encoder:
        return found if use else without
    layers = ", ".join(map(str, found.layers or []))
    if not use:
        logger.warning(
            "%s: the exits that are saved with the checkpoint (behind layers %s) are ignored; "
            "--exits uses them",
            checkpoint.path,
            layers,
        )
        return without
    if checkpoint.adapters is not None:
        logger.warning(
            "%s: the exits that are saved with the checkpoint (behind layers %s) were trained "
            "without the adapter that is merged now: calibrate them on the bundle, or train them "
            "again",
            checkpoint.path,
            layers,
        )
    return found


def _can_have(model_type: str) -> set[str]:
    """What a checkpoint of this type can have besides exits: attributes of `SavedExits`."""
    if model_type in FAMILIES:
        return set()
    if model_type in DECODERS:
        own = {"removed", "pia"}
    elif model_type in ENCODER_DECODERS:
        own = {"encoder"}
    elif VISION_LANGUAGE[model_type].encodes:
        own = {"encoder", "image_encoder", "tower"}
    else:
        own = {"tower", "gates", "removed", "pia"}
    return {"adapters", "vocabularies", *own}


def _tell_of_unlisted(checkpoint: Checkpoint, saved: SavedExits) -> None:
    """Warns of weights of exits that the checkpoint's list does not name.

    Raises:
        ExportError: They are adapters in place of attentions, which change every exit.
    """
    with_weights = {
        "exit": saved.layers if checkpoint.config.model_type in FAMILIES else saved.adapters,
        "tower_exit": saved.tower,
        "gate": saved.gates,
        "layer": saved.pia,
    }
    names = {f"{kind}_{layer}" for kind, layers in with_weights.items() for layer in layers or ()}
    more = unlisted(checkpoint.folder, names)
    has_list = (checkpoint.folder / EXITS_CONFIG).is_file()
    why = f"{EXITS_CONFIG} does not list" if has_list else f"no {EXITS_CONFIG} lists"
    if gone := [name for name in more if name.startswith("layer_")]:
        raise ExportError(
            f"{checkpoint.path}: {EXITS_WEIGHTS} has adapters in place of attentions that {why} "
            f"({', '.join(gone)}): without them, this is another model",
            fix=f"Copy the whole checkpoint again. {SAVE_AGAIN}",
        )
    if more:
        logger.warning(
            "%s: %s has weights that %s, so they are not used: %s",
            checkpoint.path,
            EXITS_WEIGHTS,
            why,
            ", ".join(more),
        )


def _listed(layers: Iterable[int] | None) -> list[int] | None:
    return None if layers is None else list(layers)


def _tell_of_left_out(
    checkpoint: Checkpoint,
    saved: SavedExits,
    asked: Mapping[str, Collection[int] | Mapping[int, int] | None],
) -> None:
    """Warns of trained exits that the model will not have: saved again, it has lost them."""
    known = {"exit": saved.layers, "tower_exit": saved.tower, "gate": saved.gates}
    left = [
        name
        for prefix, chosen in asked.items()
        for layer in known[prefix] or ()
        if chosen is not None and layer not in chosen
        if saved.origins.get(name := f"{prefix}_{layer}") == "trained"
    ]
    if left:
        logger.warning(
            "%s: its trained exits %s are left out; name their layers, too, to keep them",
            checkpoint.path,
            ", ".join(left),
        )


__all__ = [
    "DECODERS",
    "ENCODER_DECODERS",
    "FAMILIES",
    "VISION_LANGUAGE",
    "depth_of",
    "from_pretrained",
    "name_of",
]
