"""`from_pretrained`: makes a model with exits from a checkpoint directory or hub id.

transformers reads the model; a classifier's exits are in ``exits.safetensors`` beside it; labels,
preprocessing and tokenizer are in the checkpoint's own files. A decoder's exits share its head: the
checkpoint has only their layer numbers and the adapters of some exits.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.checkpoint import Checkpoint, open_checkpoint, read_labels, read_model
from edgeexit.export.device_tokenizer import has_tokenizer
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.saved import (
    EXITS_WEIGHTS,
    SavedExits,
    example_layers,
    listed,
    load_exits,
    name_layers,
    read_exits,
)
from edgeexit.export.generation import generation_of
from edgeexit.export.image_processors import image_preprocessing
from edgeexit.export.library_errors import translated
from edgeexit.export.preprocessing import text_preprocessing
from edgeexit.export.pretrained_vision import VISION_LANGUAGE, Exits, read_vision_language

logger = logging.getLogger(__name__)

FAMILIES = {
    "bert": ("bert", "AutoModelForSequenceClassification", "text-classification"),
    "roberta": ("bert", "AutoModelForSequenceClassification", "text-classification"),
    "distilbert": ("distilbert", "AutoModelForSequenceClassification", "text-classification"),
    "vit": ("vit", "AutoModelForImageClassification", "image-classification"),
    "resnet": ("resnet", "AutoModelForImageClassification", "image-classification"),
}
"""transformers' model type -> (module of this package, class that reads it, task)."""

DECODERS = {"llama": "llama", "qwen2": "llama", "qwen3": "llama", "opt": "opt"}
"""The same for causal language models: model type -> module of this package."""

ENCODER_DECODERS = {
    "bart": ("bart", "BartForConditionalGeneration"),
    "t5": ("t5", "T5ForConditionalGeneration"),
    "mt5": ("t5", "MT5ForConditionalGeneration"),
}
"""The same for encoder-decoders that write text: model type -> (module, class that reads it)."""

LONGEST_TEXT = 4096
"""Maximum tokens of an encoder's text if neither the model nor its tokenizer has a limit."""


def name_of(path: str | Path) -> str:
    """Name of a checkpoint: its folder's name, or the parent's if that is generic.

    >>> name_of("models/talker"), name_of("models/digits/checkpoint")
    ('talker', 'digits')
    """
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name


def from_pretrained(
    path: str | Path,
    *,
    exits: Iterable[int] | None = None,
    adapters: Iterable[int] | Mapping[int, int] | None = None,
    encoder_exits: Iterable[int] | None = None,
    tower_exits: Iterable[int] | None = None,
    image_drops: Iterable[int] = (),
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
        tower_exits: Vision-language models: layers of the vision tower that get an exit with a
            projector of its own. None: those saved with the checkpoint, or none.
        image_drops: Vision-language models: layers behind which image tokens can leave; they can
            behind every exit layer.
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
    config, saved = checkpoint.config, _saved_exits(checkpoint, use=saved_exits)
    if config.model_type in VISION_LANGUAGE:
        chosen = Exits(exits, encoder_exits, tower_exits, image_drops, adapters, untrained)
        return _vision_language(checkpoint, saved, chosen, most_tiles)
    if tower_exits is not None or list(image_drops) or most_tiles is not None:
        raise UsageError(
            f"{path}: a {config.model_type} has no vision tower before a language model",
            fix="Leave out --tower-exits, --drop-image-tokens and --max-tiles (tower_exits, "
            "image_drops, most_tiles).",
        )
    if config.model_type in ENCODER_DECODERS:
        if adapters is not None:
            raise UsageError(
                f"{path}: adapters are for models without an encoder, not {config.model_type}",
                fix="Leave them out.",
            )
        return _encoder_decoder(checkpoint, saved, exits, encoder_exits, untrained=untrained)
    if encoder_exits is not None:
        raise UsageError(
            f"{path}: a {config.model_type} has no encoder before a decoder",
            fix="Leave out --encoder-exits (encoder_exits).",
        )
    if config.model_type in DECODERS:
        return _decoder(checkpoint, saved, exits, adapters, untrained=untrained)
    if adapters is not None:
        raise UsageError(
            f"{path}: adapters are for language models, this is a {config.model_type}",
            fix="Leave them out: a classifier's exits have heads of their own.",
        )
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = {*FAMILIES, *DECODERS, *ENCODER_DECODERS, *VISION_LANGUAGE}
        raise ExportError(
            f"{path}: edgeexit has no adapter for the model type {config.model_type!r} "
            f"(it has {', '.join(sorted(known))})",
            fix="Export it to ONNX with exit outputs and give that file, or write an adapter "
            "(edgeexit/export/families/bert.py is the example) and give it as module:function.",
        )
    return _classifier(checkpoint, saved.layers, exits, *family, untrained=untrained)


def _saved_exits(checkpoint: Checkpoint, *, use: bool) -> SavedExits:
    """The exits that are saved with a checkpoint. A warning says that they are not used, or that
    they were trained without the adapters that are merged."""
    found = read_exits(checkpoint.folder)
    if not found.layers and not found.encoder:
        return found if use else SavedExits()
    layers = ", ".join(map(str, found.layers or []))
    if not use:
        logger.warning(
            "%s: the exits that are saved with the checkpoint (behind layers %s) are ignored; "
            "--exits uses them",
            checkpoint.path,
            layers,
        )
        return SavedExits()
    if checkpoint.adapters is not None:
        logger.warning(
            "%s: the exits that are saved with the checkpoint (behind layers %s) were trained "
            "without the adapter that is merged now: calibrate them on the bundle, or train them "
            "again",
            checkpoint.path,
            layers,
        )
    return found


def _origin(chosen: Iterable[int], saved: Iterable[int] | None, *, untrained: bool) -> str:
    """What is known about exits that share the model's head: ``trained`` if they are saved with the
    checkpoint. Any layer can have one, so other exits may be trained (LayerSkip), too."""
    if set(chosen) <= set(saved or []):
        return "trained"
    return "untrained" if untrained else "unknown"


def _classifier(
    checkpoint: Checkpoint,
    saved: list[int] | None,
    exits: Iterable[int] | None,
    module_name: str,
    reader: str,
    task: str,
    *,
    untrained: bool,
) -> ExitClassifier:
    """A classifier; its exits have heads of their own."""
    path, folder, config = checkpoint.path, checkpoint.folder, checkpoint.config
    labels = read_labels(path, config)
    if exits is None and saved is None:
        raise ExportError(
            f"{path}: the checkpoint has no exits ({EXITS_WEIGHTS} is missing)",
            fix="Train exits with edgeexit.export.methods and save_pretrained, or give "
            f"--untrained-exits {listed(example_layers(_depth(config)))} (untrained=True) to "
            "measure latency before training.",
        )
    model, missing_weights = read_model(reader, checkpoint)
    if missing_weights and not untrained:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {missing_weights[0]}, "
            "which its classifier needs",
            fix="Fine-tune it as a classifier first, or use --untrained-exits (untrained=True) to "
            "measure latency with random weights.",
        )
    if missing_weights:
        logger.warning(
            "%s: the checkpoint has no weights for %s; they are random, so answers of the last "
            "exit are meaningless, too",
            path,
            ", ".join(missing_weights[:3]) + (", ..." if len(missing_weights) > 3 else ""),
        )
    images, sizes = None, []
    if task == "image-classification":
        images = image_preprocessing(folder, config.num_channels)
        sizes = [(images[0].height, images[0].width) if images else None]
    trunk = _trunk(checkpoint, module_name, model, *sizes)
    classifier = ExitClassifier(model, trunk, list(saved or [] if exits is None else exits))
    held = [layer for layer in classifier.exit_layers if layer in (saved or [])]
    missing = [layer for layer in classifier.exit_layers if layer not in held]
    if missing and not untrained:
        raise UsageError(
            f"{path}: no trained exit behind layer {missing[0]} (trained: "
            f"{listed(saved or []) or 'none'})",
            fix="Choose trained exits, or use --untrained-exits (untrained=True).",
        )
    if saved is not None:
        load_exits(classifier.heads, held, folder)
        classifier.trained = not missing
    classifier.eval()
    classifier.name, classifier.task = name_of(path), task
    classifier.labels = labels
    trained = "trained" if classifier.trained else "untrained"
    classifier.provenance = checkpoint.provenance | {"exits": trained}
    if missing_weights:
        classifier.provenance["head"] = "untrained"
    if images:
        classifier.preprocessing, classifier.preprocessing_sample = (images[0],), images[1]
    elif task == "text-classification":
        names = [tensor.name for tensor in trunk.inputs]
        _tell_of_tokenizer(checkpoint)
        if texts := text_preprocessing(checkpoint.text_folder, names, trunk.limits["seq"]):
            text, classifier.tokenizer, sample = texts
            classifier.preprocessing = (text,)
            classifier.preprocessing_sample = sample
    return classifier


def _tell_of_tokenizer(checkpoint: Checkpoint) -> None:
    """Warns that a bundle will not take texts."""
    if not has_tokenizer(checkpoint.text_folder):
        logger.warning(
            "%s: the checkpoint has no tokenizer, so the bundle takes token ids, not texts; to add "
            "one, save it in the same folder (tokenizer.save_pretrained)",
            checkpoint.path,
        )


def depth_of(path: str | Path) -> int:
    """Number of layers that can have an exit, the last one included.

    Raises:
        ExportError: The configuration cannot be read.
    """
    return _depth(open_checkpoint(path).config)


def _depth(config: transformers.PretrainedConfig) -> int:
    """Number of a model's layers (ResNet: blocks; encoder-decoders: those of the decoder)."""
    if depths := getattr(config, "depths", None):
        return sum(depths)
    names = ("num_decoder_layers", "decoder_layers") if config.is_encoder_decoder else ()
    names = (*names, "num_hidden_layers")
    return next((int(n) for name in names if (n := getattr(config, name, None))), 1)


def _sizes(held: Mapping[int, int]) -> str:
    """Adapters of a checkpoint in words."""
    found = [f"{size} behind layer {layer}" for layer, size in held.items()]
    return ", ".join(found) or "none"


def _trunk(
    checkpoint: Checkpoint, module_name: str, model: transformers.PreTrainedModel, *more: Any
) -> Any:
    """The description of a model by its family's module."""
    family = importlib.import_module(f"edgeexit.export.families.{module_name}")
    does = f"this configuration of {checkpoint.config.model_type} is not supported"
    with translated(checkpoint.path, does, "Correct config.json and generation_config.json."):
        try:
            return family.trunk(model.eval(), *more)
        except ExportError as error:  # families do not know the path
            raise ExportError(f"{checkpoint.path}: {error.what}", fix=error.fix) from error


def _vision_language(
    checkpoint: Checkpoint, saved: SavedExits, exits: Exits, most_tiles: int | None
) -> ExitDecoder:
    """A vision-language model; exits of its language model share the model's own head."""

    def describe(family: str, model: transformers.PreTrainedModel, *more: Any) -> Any:
        return _trunk(checkpoint, family, model, *more)

    split = read_vision_language(checkpoint, saved, exits, describe, most_tiles)
    split.name = name_of(checkpoint.path)
    origin = _origin(split.exit_layers, saved.layers, untrained=exits.untrained)
    split.provenance["exits"] = origin
    return split


def _decoder(
    checkpoint: Checkpoint,
    found: SavedExits,
    exits: Iterable[int] | None,
    adapters: Iterable[int] | Mapping[int, int] | None,
    *,
    untrained: bool,
) -> ExitDecoder:
    """A causal language model; its exits share its own head, so any layer can have one."""
    path, folder, config = checkpoint.path, checkpoint.folder, checkpoint.config
    saved, held = found.layers, found.adapters
    if exits is None and saved is None:
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"{name_layers(_depth(config))} (--exits).",
        )
    model, missing_weights = read_model("AutoModelForCausalLM", checkpoint)
    if missing_weights:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {missing_weights[0]}",
            fix="Give a whole causal language model.",
        )
    trunk = _trunk(checkpoint, DECODERS[config.model_type], model)
    chosen = list(saved or [] if exits is None else exits)
    if adapters is None:
        adapters = {layer: size for layer, size in held.items() if layer in chosen}
    decoder = ExitDecoder(model, trunk, chosen, adapters)
    sizes = decoder.adapter_sizes
    loaded = [layer for layer, size in sizes.items() if held.get(layer) == size]
    if (missing := [layer for layer in sizes if layer not in loaded]) and not untrained:
        raise UsageError(
            f"{path}: the checkpoint has no adapter of {sizes[missing[0]]} layer(s) for the exit "
            f"behind layer {missing[0]} (it has {_sizes(held)})",
            fix="Choose these exits, or use --untrained-exits (untrained=True) for new adapters.",
        )
    if loaded:
        load_exits(decoder.adapters, loaded, folder)
    decoder.eval()
    decoder.name = name_of(path)
    decoder.tokenizer_folder = checkpoint.text_folder
    _tell_of_tokenizer(checkpoint)
    decoder.generation = generation_of(model, path)
    origin = _origin(decoder.exit_layers, saved, untrained=untrained)
    decoder.provenance = checkpoint.provenance | {"exits": origin}
    if sizes:
        decoder.provenance["adapters"] = "untrained" if missing else "trained"
    return decoder


def _encoder_decoder(
    checkpoint: Checkpoint,
    saved: SavedExits,
    exits: Iterable[int] | None,
    encoder_exits: Iterable[int] | None,
    *,
    untrained: bool,
) -> ExitEncoderDecoder:
    """An encoder-decoder; no exit has weights of its own, so any layer can have one."""
    path, config = checkpoint.path, checkpoint.config
    if exits is None and saved.layers is None and encoder_exits is None:
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"{name_layers(_depth(config))}, of the decoder (--exits), encoder "
            "(--encoder-exits) or both.",
        )
    module_name, reader = ENCODER_DECODERS[config.model_type]
    model, missing_weights = read_model(reader, checkpoint)
    if missing_weights:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {missing_weights[0]}",
            fix="Give a whole model for conditional generation.",
        )
    chosen = list(saved.layers or [] if exits is None else exits)
    own = list(saved.encoder or [] if encoder_exits is None else encoder_exits)
    encoder, decoder = _trunk(checkpoint, module_name, model)
    split = ExitEncoderDecoder(model, encoder, decoder, chosen, own)
    split.eval()
    split.name = name_of(path)
    split.tokenizer_folder = checkpoint.text_folder
    split.generation = generation_of(model, path)
    origins = {
        _origin(split.exit_layers, saved.layers, untrained=untrained),
        _origin(split.encoder_exit_layers, saved.encoder, untrained=untrained),
    }
    origin = next(one for one in ("untrained", "unknown", "trained") if one in origins)
    split.provenance = checkpoint.provenance | {"exits": origin}
    _tell_of_tokenizer(checkpoint)
    takes, longest = ["input_ids", "attention_mask"], encoder.positions or LONGEST_TEXT
    if texts := text_preprocessing(checkpoint.text_folder, takes, longest):
        split.preprocessing, split.preprocessing_sample = (texts[0],), texts[2]
    return split
