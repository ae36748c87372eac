"""Classifiers: their exits have heads of their own, which must be trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.checkpoint import Checkpoint, read_labels, read_model
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.exits.origins import Origin, note_origins, origins_of
from edgeexit.export.exits.saved import (
    EXITS_CONFIG,
    SavedExits,
    example_layers,
    listed,
    load_exits,
)
from edgeexit.export.image_processors import image_preprocessing
from edgeexit.export.preprocessing import text_preprocessing
from edgeexit.export.pretrained.common import depth_of_config, name_of, tell_of_tokenizer, trunk_of

logger = logging.getLogger(__name__)

FAMILIES = {
    "bert": ("bert", "AutoModelForSequenceClassification", "text-classification"),
    "roberta": ("bert", "AutoModelForSequenceClassification", "text-classification"),
    "distilbert": ("distilbert", "AutoModelForSequenceClassification", "text-classification"),
    "vit": ("vit", "AutoModelForImageClassification", "image-classification"),
    "resnet": ("resnet", "AutoModelForImageClassification", "image-classification"),
}
"""transformers' model type -> (module of this package, class that reads it, task)."""


def read_classifier(
    checkpoint: Checkpoint,
    found: SavedExits,
    exits: Iterable[int] | None,
    module_name: str,
    reader: str,
    task: str,
    *,
    untrained: bool,
) -> ExitClassifier:
    """A classifier; its exits have heads of their own."""
    path, folder, config = checkpoint.path, checkpoint.folder, checkpoint.config
    saved, labels = found.layers, read_labels(path, config)
    if exits is None and saved is None:
        layers = listed(example_layers(depth_of_config(config)))
        raise ExportError(
            f"{path}: the checkpoint has no exits ({EXITS_CONFIG} is missing)",
            fix="Train exits with edgeexit.export.methods and save_pretrained, or give "
            f"--untrained-exits {layers} (untrained=True) to "
            "measure latency before training.",
        )
    model, missing_weights, stored = read_model(reader, checkpoint)
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
    trunk = trunk_of(checkpoint, module_name, model, *sizes)
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
    classifier.eval()
    classifier.name, classifier.task = name_of(path), task
    classifier.labels = labels
    classifier.provenance = dict(checkpoint.provenance)
    classifier.stored = stored
    note_origins(classifier, _origins(classifier, found))
    if missing_weights:
        classifier.provenance["head"] = "untrained"
    if images:
        classifier.preprocessing, classifier.preprocessing_sample = (images[0],), images[1]
    elif task == "text-classification":
        names = [tensor.name for tensor in trunk.inputs]
        tell_of_tokenizer(checkpoint)
        if texts := text_preprocessing(checkpoint.text_folder, names, trunk.limits["seq"]):
            text, classifier.tokenizer, sample = texts
            classifier.preprocessing = (text,)
            classifier.preprocessing_sample = sample
    return classifier


def _origins(classifier: ExitClassifier, found: SavedExits) -> dict[str, Origin]:
    """What is known about the exits. A head that is not saved is new, so it is untrained."""
    layers = classifier.exit_layers
    return origins_of(layers, found.layers, found.origins, prefix="exit", otherwise="untrained")


__all__ = ["FAMILIES", "read_classifier"]
