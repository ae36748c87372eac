"""DistilBERT classifiers: post-norm layers like BERT's, no token types, two dense layers on top."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import DistilBertForSequenceClassification

from edgeexit.bundle.manifest import Axis, Tensor
from edgeexit.export.exits.classifier import PlainLayer, Trunk
from edgeexit.export.families.text import AdditiveMask, KeptMask, first_token, text_example


def trunk(model: DistilBertForSequenceClassification) -> Trunk:
    """Describes a DistilBERT classifier."""
    config, base = model.config, model.distilbert
    width = config.dim
    layers = base.transformer.layer
    # Eager attention takes a 0/1 mask in transformers 4 and an additive mask in transformers 5.
    additive = "attention_mask" in inspect.signature(layers[0].forward).parameters
    axes: list[Axis] = ["batch", 1, 1, "seq"] if additive else ["batch", "seq"]
    names = ["input_ids", "attention_mask"]
    return Trunk(
        inputs=tuple(Tensor(name=name, dtype="int64", axes=["batch", "seq"]) for name in names),
        stem=_Stem(base.embeddings, AdditiveMask() if additive else KeptMask()),
        layers=[PlainLayer(layer) for layer in layers],
        state_axes=[["batch", "seq", width]] * (config.n_layers + 1),
        context=(Tensor(name="mask", dtype="float32", axes=axes),),
        pool=first_token,
        widths=[width] * config.n_layers,
        head=_Head(model.pre_classifier, model.dropout, model.classifier),
        classes=config.num_labels,
        example=text_example(names, config.vocab_size, config.pad_token_id or 0),
        limits={"seq": config.max_position_embeddings},
    )


class _Stem(nn.Module):
    """Maps token ids to embeddings, and the attention mask to the form that the layers take."""

    def __init__(self, embeddings: nn.Module, mask: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.mask = mask

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.embeddings(input_ids)
        return state, self.mask(attention_mask, state.dtype)


class _Head(nn.Module):
    """Dense layer, ReLU and classifier, applied to the first token."""

    def __init__(self, dense: nn.Module, dropout: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.dropout = dropout
        self.classifier = classifier

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        pooled = torch.relu(self.dense(first_token(state)))
        return self.classifier(self.dropout(pooled))
