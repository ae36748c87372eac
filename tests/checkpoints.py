"""Small checkpoints of every family, made from a configuration: nothing is fetched.

Weights are drawn wide, so that logits differ from row to row and a wrong mask or position shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

CLASSES = 3
LAYERS = 3
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TEXT = {"vocab_size": 60, "max_position_embeddings": 50, "pad_token_id": 0}
TEXT_FAMILIES = ("bert", "roberta", "distilbert")
IMAGE_FAMILIES = ("vit", "resnet")
FAMILIES = (*TEXT_FAMILIES, *IMAGE_FAMILIES)
EXITS = {family: [2] for family in FAMILIES} | {"bert": [1, 2], "resnet": [1, 2]}
"""Layers that get an exit in the bundles that tests share."""


def make_model(family: str) -> transformers.PreTrainedModel:
    """A classifier of three layers (ResNet: four blocks in two stages) with random weights."""
    makers = {"bert": _bert, "roberta": _roberta, "distilbert": _distilbert}
    makers |= {"vit": _vit, "resnet": _resnet}
    torch.manual_seed(0)
    model = makers[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model


def save_checkpoint(family: str, folder: Path) -> Path:
    """Writes a checkpoint without exits, with the preprocessing of its family."""
    make_model(family).save_pretrained(folder)
    if family in TEXT_FAMILIES:
        save_tokenizer(folder)
    elif family == "vit":
        save_preprocessor(folder, image_processor_type="ViTImageProcessor", size=[8, 12])
    else:
        # As microsoft/resnet-50 spells it: one number, which means the shorter side, and crop_pct.
        config = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 28}
        config |= {"crop_pct": 0.875, "resample": 3, "do_normalize": True, "do_resize": True}
        config |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def save_preprocessor(folder: Path, **config: object) -> None:
    """Writes ``preprocessor_config.json``; `size` as [height, width]."""
    if isinstance(config.get("size"), list):
        height, width = config["size"]  # type: ignore[misc]
        config["size"] = {"height": height, "width": width}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer that knows some words and letters."""
    words = [
        "the",
        "film",
        "was",
        "better",
        "than",
        "anyone",
        "had",
        "hoped",
        "and",
        "i",
        "would",
        "watch",
        "it",
        "again",
        "tomorrow",
        "no",
    ]
    vocabulary = {
        t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, ".", ","])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(
        folder
    )


def _bert() -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**_SIZES, **_TEXT, num_labels=CLASSES)
    return transformers.BertForSequenceClassification(config)


def _roberta() -> transformers.PreTrainedModel:
    config = transformers.RobertaConfig(**_SIZES, **_TEXT, num_labels=CLASSES, type_vocab_size=1)
    return transformers.RobertaForSequenceClassification(config)


def _distilbert() -> transformers.PreTrainedModel:
    sizes = {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48}
    config = transformers.DistilBertConfig(**sizes, **_TEXT, num_labels=CLASSES)
    return transformers.DistilBertForSequenceClassification(config)


def _vit() -> transformers.PreTrainedModel:
    config = transformers.ViTConfig(**_SIZES, image_size=[8, 12], patch_size=4, num_labels=CLASSES)
    return transformers.ViTForImageClassification(config)


def _resnet() -> transformers.PreTrainedModel:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return transformers.ResNetForImageClassification(config)
