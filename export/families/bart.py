"""BART for conditional generation: encoder and decoder, learned positions, post-norm layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BartForConditionalGeneration, PreTrainedModel

from edgeexit.errors import ExportError
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.exits.encoder import EncoderTrunk, unread_of
from edgeexit.export.families.llama import stop_tokens
from edgeexit.export.trace.attention import Heads, read_source, split_heads


def trunk(model: BartForConditionalGeneration) -> tuple[EncoderTrunk, DecoderTrunk]:
    """Describes a BART model: its encoder and its decoder."""
    return halves(model, model.model, model.final_logits_bias[0])


def halves(
    model: PreTrainedModel, base: Any, bias: torch.Tensor | None = None
) -> tuple[EncoderTrunk, DecoderTrunk]:
    """Describes encoder and decoder of a BART model that may be part of a larger one.

    Args:
        model: The model, which has the vocabulary projection ``lm_head``.
        base: Its ``BartModel``.
        bias: Added to logits ``[vocabulary]``; optional.
    """
    config = base.config
    size = config.d_model // config.encoder_attention_heads
    words = base.encoder.embed_tokens
    encoder = EncoderTrunk(
        embedding=words.weight,
        embedding_scale=float(words.embed_scale),
        stem=source_stem(base),
        layers=[_EncoderLayer(layer, size) for layer in base.encoder.layers],
        positions=config.max_position_embeddings,
        start_tokens=start_tokens(model),
        pad_token=config.pad_token_id or 0,
    )
    words = base.decoder.embed_tokens
    heads = config.decoder_attention_heads
    decoder = DecoderTrunk(
        embedding=words.weight,
        embedding_scale=float(words.embed_scale),
        stem=_Stem(base.decoder),
        layers=[_Layer(layer) for layer in base.decoder.layers],
        head=_Head(model.lm_head, bias),
        heads=Heads(queries=heads, keys=heads, size=config.d_model // heads),
        width=config.d_model,
        positions=config.max_position_embeddings,
        stop_tokens=stop_tokens(model),
    )
    return encoder, decoder


def source_stem(base: Any, first: int = 0) -> nn.Module:
    """The encoder's stem: adds position embeddings, and normalises.

    Args:
        base: A ``BartModel``.
        first: Position of the first token.
    """
    return _Source(base.encoder, first)


def start_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids that a text begins with: the start token, and a forced first token if there is
    one.

    Raises:
        ExportError: There is no start token, or one of them is not a token id of the model.
    """
    generation, config = model.generation_config, model.config
    start = generation.decoder_start_token_id
    start = config.decoder_start_token_id if start is None else start
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ExportError(
            "the model has no start token for the decoder's text",
            fix="Set decoder_start_token_id in its config.json.",
        )
    given = {"decoder_start_token_id": start}
    if generation.forced_bos_token_id is not None:
        given["forced_bos_token_id"] = generation.forced_bos_token_id
    size = model.get_input_embeddings().weight.shape[0]
    for name, token in given.items():
        if type(token) is not int or not 0 <= token < size:
            raise ExportError(
                f"{name} is {token!r}, not a token id of the model (0 to {size - 1})",
                fix="Correct it in generation_config.json or config.json.",
            )
    return tuple(given.values())


class _Places(nn.Module):
    """Adds position embeddings, whose table has an offset of two rows, and normalises."""

    def __init__(self, half: nn.Module) -> None:
        super().__init__()
        self.table = half.embed_positions.weight  # type: ignore[union-attr]
        self.offset = int(half.embed_positions.offset)  # type: ignore[union-attr,arg-type]
        self.norm = half.layernorm_embedding

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        places = nn.functional.embedding(positions + self.offset, self.table)  # type: ignore[arg-type]
        return self.norm(embedded + places)  # type: ignore[operator]


class _Stem(_Places):
    """Maps a token's scaled embedding to the decoder's first state."""


class _Source(_Places):
    """Maps a source's scaled embeddings to the encoder's first state."""

    def __init__(self, half: nn.Module, first: int) -> None:
        super().__init__(half)
        self.first = first

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        last = self.first + embedded.shape[1]
        positions = torch.arange(self.first, last, device=embedded.device)
        return super().forward(embedded, positions.unsqueeze(0))


class _EncoderLayer(nn.Module):
    """An encoder layer, which attends to the whole source without its padding."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer = layer
        self.size = size

    def forward(self, state: torch.Tensor, read: torch.Tensor | None) -> torch.Tensor:
        layer, attention = self.layer, self.layer.self_attn
        k, v = (
            split_heads(x, -1, self.size)
            for x in (attention.k_proj(state), attention.v_proj(state))  # type: ignore[union-attr,operator]
        )
        attended = read_source(attention.q_proj(state), k, v, unread_of(read))  # type: ignore[union-attr,operator]
        state = layer.self_attn_layer_norm(state + attention.out_proj(attended))  # type: ignore[operator,union-attr]
        return _feed_forward(layer, state)


class _Layer(nn.Module):
    """A decoder layer, split around self-attention and cross-attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def before(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = self.layer.self_attn
        return attention.q_proj(state), attention.k_proj(state), attention.v_proj(state)  # type: ignore[operator,union-attr]

    def between(
        self, state: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layer
        state = layer.self_attn_layer_norm(state + layer.self_attn.out_proj(attended))  # type: ignore[operator,union-attr]
        return state, layer.encoder_attn.q_proj(state)  # type: ignore[operator,union-attr]

    def cross(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.layer.encoder_attn
        return attention.k_proj(encoded), attention.v_proj(encoded)  # type: ignore[operator,union-attr]

    def after(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        state = state + layer.encoder_attn.out_proj(attended)  # type: ignore[operator,union-attr]
        return _feed_forward(layer, layer.encoder_attn_layer_norm(state))  # type: ignore[operator]


def _feed_forward(layer: nn.Module, state: torch.Tensor) -> torch.Tensor:
    update = layer.fc2(layer.activation_fn(layer.fc1(state)))  # type: ignore[operator]
    return layer.final_layer_norm(state + update)  # type: ignore[operator]


class _Head(nn.Module):
    """Vocabulary projection and its bias."""

    def __init__(self, projection: nn.Module, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.projection = projection
        self.bias = None if bias is None else nn.Buffer(bias)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        logits = self.projection(state)
        return logits if self.bias is None else logits + self.bias
