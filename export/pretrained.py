"""`from_pretrained`: a checkpoint directory or hub id becomes a model with exits.

The model is read with transformers, a classifier's exits from ``exits.safetensors`` beside it, the
labels, preprocessing and tokenizer from the checkpoint's own files. A decoder's exits share its own
head; the checkpoint only says behind which layers they were trained, and holds the adapters that
some of them have.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from edgeexit.errors import ExportError, UsageError, first_line
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.encoder_decoder import ExitEncoderDecoder
from edgeexit.export.exits.saved import EXITS_WEIGHTS, load_exits, read_exits
from edgeexit.export.preprocessing import image_preprocessing, text_preprocessing

logger = logging.getLogger(__name__)

FAMILIES = {
    "bert": ("bert", "AutoModelForSequenceClassification", "text-classification"),
    "roberta": ("bert", "AutoModelForSequenceClassification", "text-classification"),
    "distilbert": ("distilbert", "AutoModelForSequenceClassification", "text-classification"),
    "vit": ("vit", "AutoModelForImageClassification", "image-classification"),
    "resnet": ("resnet", "AutoModelForImageClassification", "image-classification"),
}
"""transformers' model type -> (module of this package, class that reads it, task)."""

DECODERS = {"llama": "llama", "qwen3": "llama", "opt": "opt"}
"""The same for causal language models: model type -> module of this package."""

ENCODER_DECODERS = {"bart": ("bart", "BartForConditionalGeneration")}
"""The same for encoder-decoders that write text: model type -> (module, class that reads it)."""


def name_of(path: str | Path) -> str:
    """What a checkpoint is called: its folder's name, or that of the one above where it says
    nothing.

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
    untrained: bool = False,
) -> ExitClassifier | ExitDecoder:
    """Reads a checkpoint and gives it exits.

    Args:
        path: A checkpoint directory, or a hub id.
        exits: Layers that get an exit (1 = behind the first layer). None: those saved with the
            checkpoint. The last layer always answers with the model's own head.
        adapters: Decoders: those of these layers whose exit has an adapter before the shared head
            (see `ExitDecoder`). None: those saved with the checkpoint.
        encoder_exits: Encoder-decoders: layers of the encoder that get an exit. None: those saved
            with the checkpoint, or none.
        untrained: Attach new, random heads (new adapters) even where the checkpoint has none: to
            measure what exits would cost and save before training them, or to train them now.

    Raises:
        ExportError: The checkpoint cannot be read, is of a family edgeexit does not know, or holds
            no exits for the layers asked for.
    """
    folder = _local(path)
    if (folder / "manifest.json").is_file():
        raise ExportError(f"{path} is a bundle already", fix="Give the checkpoint it was made of.")
    config = _config(path, folder)
    if config.model_type in ENCODER_DECODERS:
        if adapters is not None:
            raise UsageError(
                f"{path}: adapters are for models without an encoder, not {config.model_type}",
                fix="Leave them out.",
            )
        return _encoder_decoder(path, folder, config, exits, encoder_exits)
    if encoder_exits is not None:
        raise UsageError(
            f"{path}: a {config.model_type} has no encoder before a decoder",
            fix="Leave encoder_exits out (--encoder-exits).",
        )
    if config.model_type in DECODERS:
        return _decoder(path, folder, config, exits, adapters, untrained=untrained)
    if adapters is not None:
        raise UsageError(
            f"{path}: adapters are for language models, this is a {config.model_type}",
            fix="Leave them out: a classifier's exits have heads of their own.",
        )
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"{path}: edgeexit has no adapter for the model type {config.model_type!r} "
            f"(it has {', '.join(sorted({*FAMILIES, *DECODERS, *ENCODER_DECODERS}))})",
            fix="Export it to ONNX with exit outputs and give that file, or write an adapter "
            "(edgeexit/export/families/bert.py is the example) and give it as module:function.",
        )
    return _classifier(path, folder, config, exits, *family, untrained=untrained)


def _config(path: str | Path, folder: Path) -> transformers.PretrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"{path}: not a transformers checkpoint ({first_line(error)})",
            fix="Give a directory with config.json, as save_pretrained writes it.",
        ) from error


def _classifier(
    path: str | Path,
    folder: Path,
    config: transformers.PretrainedConfig,
    exits: Iterable[int] | None,
    module_name: str,
    reader: str,
    task: str,
    *,
    untrained: bool,
) -> ExitClassifier:
    """A classifier; its exits have heads of their own."""
    saved = read_exits(folder).layers
    if exits is None and saved is None:
        raise ExportError(
            f"{path}: the checkpoint has no exits ({EXITS_WEIGHTS} is not there)",
            fix="Train some with edgeexit.export.methods and save_pretrained, or pass "
            "--untrained-exits 3,6,9 to measure latency before training.",
        )
    model, found = _read(reader, path, folder)
    if found["missing_keys"] and not untrained:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {sorted(found['missing_keys'])[0]}, "
            "which its classifier needs",
            fix="Fine-tune it as a classifier first, or pass untrained=True (--untrained-exits) to "
            "measure latency with random weights.",
        )
    adapter = importlib.import_module(f"edgeexit.export.families.{module_name}")
    images, sizes = None, []
    if task == "image-classification":
        images = image_preprocessing(folder, config.num_channels)
        sizes = [(images[0].height, images[0].width) if images else None]
    trunk = adapter.trunk(model.eval(), *sizes)
    classifier = ExitClassifier(model, trunk, list(saved or [] if exits is None else exits))
    missing = [layer for layer in classifier.exit_layers if layer not in (saved or [])]
    if missing and not untrained:
        raise UsageError(
            f"{path}: no trained exit behind layer {missing[0]} (trained: {saved or 'none'})",
            fix="Choose among the trained ones, or pass untrained=True (--untrained-exits).",
        )
    if saved is not None and not missing:
        load_exits(classifier.heads, classifier.exit_layers, folder)
        classifier.trained = True
    classifier.eval()
    classifier.name, classifier.task = name_of(path), task
    labels = config.id2label or {}
    classifier.labels = tuple(str(labels[i]) for i in sorted(labels))
    trained = "trained" if classifier.trained else "untrained"
    classifier.provenance = {"model_type": config.model_type, "exits": trained}
    if images:
        classifier.preprocessing, classifier.preprocessing_sample = images
    elif task == "text-classification":
        names = [tensor.name for tensor in trunk.inputs]
        if texts := text_preprocessing(folder, names, trunk.limits["seq"]):
            classifier.preprocessing, classifier.tokenizer_file, sample = texts
            classifier.preprocessing_sample = sample
    return classifier


def _decoder(
    path: str | Path,
    folder: Path,
    config: transformers.PretrainedConfig,
    exits: Iterable[int] | None,
    adapters: Iterable[int] | Mapping[int, int] | None,
    *,
    untrained: bool,
) -> ExitDecoder:
    """A causal language model; its exits share its own head, so any layer can have one."""
    found = read_exits(folder)
    saved, held = found.layers, found.adapters
    if exits is None and saved is None:
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"Name layers from 1 to {config.num_hidden_layers - 1}, as in exits=[2, 4] "
            "(--exits 2,4).",
        )
    model, loading = _read("AutoModelForCausalLM", path, folder)
    if loading["missing_keys"]:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {sorted(loading['missing_keys'])[0]}",
            fix="Give a whole causal language model.",
        )
    adapter = importlib.import_module(f"edgeexit.export.families.{DECODERS[config.model_type]}")
    chosen = list(saved or [] if exits is None else exits)
    if adapters is None:
        adapters = {layer: size for layer, size in held.items() if layer in chosen}
    decoder = ExitDecoder(model, adapter.trunk(model.eval()), chosen, adapters)
    sizes = decoder.adapter_sizes
    loaded = [layer for layer, size in sizes.items() if held.get(layer) == size]
    if (missing := [layer for layer in sizes if layer not in loaded]) and not untrained:
        raise UsageError(
            f"{path}: the checkpoint has no adapter of {sizes[missing[0]]} layer(s) for the exit "
            f"behind layer {missing[0]} (it has, by layer: {held or 'none'})",
            fix="Choose among those, or pass untrained=True (--untrained-exits) for new ones.",
        )
    if loaded:
        load_exits(decoder.adapters, loaded, folder)
    decoder.eval()
    decoder.name = name_of(path)
    decoder.tokenizer_folder = folder
    trained = "trained" if set(decoder.exit_layers) <= set(saved or []) else "untrained"
    decoder.provenance = {"model_type": config.model_type, "exits": trained}
    if sizes:
        decoder.provenance["adapters"] = "untrained" if missing else "trained"
    return decoder


def _encoder_decoder(
    path: str | Path,
    folder: Path,
    config: transformers.PretrainedConfig,
    exits: Iterable[int] | None,
    encoder_exits: Iterable[int] | None,
) -> ExitEncoderDecoder:
    """An encoder-decoder; no exit has weights of its own, so any layer can have one."""
    saved = read_exits(folder)
    if exits is None and saved.layers is None:
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"Name layers of the decoder from 1 to {config.decoder_layers - 1}, as in "
            "exits=[2, 4] (--exits 2,4), and of the encoder with encoder_exits (--encoder-exits).",
        )
    module_name, reader = ENCODER_DECODERS[config.model_type]
    model, loading = _read(reader, path, folder)
    if loading["missing_keys"]:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {sorted(loading['missing_keys'])[0]}",
            fix="Give a whole model for conditional generation.",
        )
    family = importlib.import_module(f"edgeexit.export.families.{module_name}")
    chosen = list(saved.layers or [] if exits is None else exits)
    own = list(saved.encoder or [] if encoder_exits is None else encoder_exits)
    if settings := family.unheeded(model):
        logger.warning(
            "%s: generation goes by the model's own logits; not heeded of its settings: %s",
            path,
            ", ".join(settings),
        )
    encoder, decoder = family.trunk(model.eval())
    split = ExitEncoderDecoder(model, encoder, decoder, chosen, own)
    split.eval()
    split.name = name_of(path)
    split.tokenizer_folder = folder
    known = set(chosen) <= set(saved.layers or []) and set(own) <= set(saved.encoder or [])
    trained = "trained" if known else "untrained"
    split.provenance = {"model_type": config.model_type, "exits": trained}
    texts = text_preprocessing(folder, ["input_ids", "attention_mask"], split.encoder.positions)
    if texts:
        split.preprocessing, _, split.preprocessing_sample = texts
    return split


def _read(reader: str, path: str | Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Reads a model with one of transformers' classes. Returns it, and what was found."""
    try:
        # Graphs are made in float32 whatever a checkpoint is stored in; export lowers on request.
        with _without_bars():
            model, found = getattr(transformers, reader).from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{path}: transformers cannot read it ({first_line(error)})",
            fix="Check the checkpoint with transformers' from_pretrained.",
        ) from error
    return model, found


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers' own progress bars off stderr, which is the command line's."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _local(path: str | Path) -> Path:
    """The checkpoint's directory; a hub id's is fetched into (or found in) the hub's cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ExportError(f"{path} is a file", fix="Give a checkpoint directory or a hub id.")
    absent = ExportError(f"{path} does not exist", fix="Give a checkpoint directory or a hub id.")
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise absent
    import huggingface_hub

    try:
        for weights in ("*.safetensors", "*.bin"):
            found = huggingface_hub.snapshot_download(
                str(path),
                allow_patterns=["*.json", "*.txt", "*.jinja", weights],
                ignore_patterns=["*/*", "training_args.bin"],
            )
            if any(Path(found).glob(weights)):
                break
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: neither a directory nor to be had from the hub ({first_line(error)})",
            fix="Check the name and the network, or fetch it elsewhere and give the directory.",
        ) from error
    return Path(found)
