"""BERT and RoBERTa classifiers: post-norm layers, an additive mask, pooling of the first token."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertForSequenceClassification, RobertaForSequenceClassification

from edgeexit.bundle.manifest import Tensor
from edgeexit.export.exits.classifier import PlainLayer, Trunk
from edgeexit.export.families.text import AdditiveMask, first_token, text_example


def trunk(model: BertForSequenceClassification | RobertaForSequenceClassification) -> Trunk:
    """Describes a BERT or RoBERTa classifier; both have the same parts with different names."""
    config = model.config
    base = getattr(model, model.base_model_prefix)
    offset = 0 if base.__class__.__name__.startswith("Bert") else config.pad_token_id + 1
    width = config.hidden_size
    names = ["input_ids", "attention_mask"]
    if config.type_vocab_size > 1:
        names.append("token_type_ids")
    return Trunk(
        inputs=tuple(Tensor(name=name, dtype="int64", axes=["batch", "seq"]) for name in names),
        stem=_Stem(base.embeddings, offset if offset else None),
        layers=[PlainLayer(layer) for layer in base.encoder.layer],
        state_axes=[["batch", "seq", width]] * (config.num_hidden_layers + 1),
        context=(Tensor(name="mask", dtype="float32", axes=["batch", 1, 1, "seq"]),),
        pool=first_token,
        widths=[width] * config.num_hidden_layers,
        head=_Head(
            getattr(base, "pooler", None), model.classifier, getattr(model, "dropout", None)
        ),
        classes=config.num_labels,
        example=text_example(names, config.vocab_size, config.pad_token_id or 0),
        limits={"seq": config.max_position_embeddings - offset},
    )


class _Stem(nn.Module):
    """Maps token ids to embeddings, and the attention mask to an additive mask.

    RoBERTa counts the positions of tokens that are not padding, starting at `offset`. Here
    positions follow the mask, which gives the same numbers if padding is on the right.
    """

    def __init__(self, embeddings: nn.Module, offset: int | None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.offset = offset
        self.mask = AdditiveMask()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = None
        if self.offset is not None:
            kept = attention_mask.to(torch.int64)
            positions = torch.cumsum(kept, dim=1) * kept + (self.offset - 1)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        state = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=positions
        )
        return state, self.mask(attention_mask, state.dtype)


class _Head(nn.Module):
    """BERT: pooler and classifier. RoBERTa: its classification head, which includes pooling."""

    def __init__(
        self, pooler: nn.Module | None, classifier: nn.Module, dropout: nn.Module | None
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.dropout = nn.Identity() if dropout is None else dropout
        self.classifier = classifier

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.classifier(state if self.pooler is None else self.dropout(self.pooler(state)))
