"""T5 and mT5 for conditional generation: an encoder and a decoder, relative positions, pre-norm
layers with RMS norm. The decoder reads the encoder's state after the encoder's last norm. Versions
differ in the feed-forward part (plain or gated) and in the head (the embedding with scaled states,
or separate weights).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.exits.encoder import EncoderTrunk, unread_of
from edgeexit.export.families.bart import start_tokens
from edgeexit.export.families.llama import stop_tokens
from edgeexit.export.trace.attention import Heads, read_source, split_heads
from edgeexit.export.trace.relative_bias import RelativeBias

CAPACITY = 512
"""Default limit of a text, in tokens, if the configuration has no ``n_positions``; relative
positions set no limit."""


def trunk(
    model: T5ForConditionalGeneration | MT5ForConditionalGeneration,
) -> tuple[EncoderTrunk, DecoderTrunk]:
    """Describes a T5 model: its encoder and its decoder."""
    config = model.config
    encoder = EncoderTrunk(
        embedding=model.encoder.embed_tokens.weight,
        stem=nn.Identity(),
        layers=[_EncoderLayer(layer, config.d_kv) for layer in model.encoder.block],
        positions=None,
        start_tokens=start_tokens(model),
        pad_token=config.pad_token_id or 0,
        bias=_bias(model.encoder),
        norm=model.encoder.final_layer_norm,
    )
    decoder = DecoderTrunk(
        embedding=model.decoder.embed_tokens.weight,
        stem=None,
        layers=[_Layer(layer) for layer in model.decoder.block],
        head=_Head(model),
        heads=Heads(
            queries=config.num_heads,
            keys=config.num_heads,
            size=config.d_kv,
            bias=_bias(model.decoder),
            scale=1.0,
        ),
        width=config.d_model,
        positions=None,
        stop_tokens=stop_tokens(model),
        capacity=getattr(config, "n_positions", None) or CAPACITY,
        float32=tuple(model._keep_in_fp32_modules or ()),
    )
    return encoder, decoder


def _bias(stack: nn.Module) -> RelativeBias:
    """The bias that a stack's first layer stores for all layers, with transformers' buckets."""
    attention = stack.block[0].layer[0].SelfAttention  # type: ignore[index,union-attr]
    farthest = attention.relative_attention_max_distance
    ahead = 0 if attention.is_decoder else farthest
    buckets = attention._relative_position_bucket(
        -torch.arange(-ahead, farthest + 1),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=farthest,
    )
    return RelativeBias(attention.relative_attention_bias.weight, buckets, ahead)


class _EncoderLayer(nn.Module):
    """An encoder layer, which attends to the whole source without its padding."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        attention, self.feed_forward = layer.layer  # type: ignore[misc]
        self.attention = _Attention(attention)
        self.size = size

    def forward(self, state: torch.Tensor, read: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attention(state)
        k, v = (split_heads(x, -1, self.size) for x in (k, v))
        attended = read_source(q, k, v, unread_of(read), scale=1.0, bias=bias)
        return self.feed_forward(state + self.attention.output(attended))  # type: ignore[operator]


class _Layer(nn.Module):
    """A decoder layer, split around self-attention and cross-attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        attention, cross, self.feed_forward = layer.layer  # type: ignore[misc]
        self.attention, self.cross_attention = _Attention(attention), _Attention(cross)

    def before(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.attention(state)

    def between(
        self, state: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = state + self.attention.output(attended)  # type: ignore[operator]
        return state, self.cross_attention.query(self.cross_attention.norm(state))  # type: ignore[operator]

    def cross(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cross_attention.key(encoded), self.cross_attention.value(encoded)  # type: ignore[operator]

    def after(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(state + self.cross_attention.output(attended))  # type: ignore[operator]


class _Attention(nn.Module):
    """The norm and the projections of an attention. The bias is left out: only the first layer of a
    stack has it, and without it all layers are alike."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        inner = part.SelfAttention if hasattr(part, "SelfAttention") else part.EncDecAttention
        self.norm = part.layer_norm
        self.query, self.key, self.value, self.output = inner.q, inner.k, inner.v, inner.o  # type: ignore[union-attr]

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.norm(state)  # type: ignore[operator]
        return self.query(x), self.key(x), self.value(x)  # type: ignore[operator]


class _Head(nn.Module):
    """Final norm and vocabulary projection; T5 1.0 scales states between the two."""

    def __init__(self, model: T5ForConditionalGeneration | MT5ForConditionalGeneration) -> None:
        super().__init__()
        self.norm, self.projection = model.decoder.final_layer_norm, model.lm_head
        self.scale = _scale_of(model)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        state = self.norm(state)
        return self.projection(state if self.scale == 1.0 else state * self.scale)


@torch.no_grad()
def _scale_of(model: T5ForConditionalGeneration | MT5ForConditionalGeneration) -> float:
    """The factor of states before the projection. It is found by running one token, because
    versions of transformers use different settings of the configuration."""
    token, source = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, model.config.d_model)
    state = model.decoder(input_ids=token, encoder_hidden_states=source).last_hidden_state
    logits = model(encoder_outputs=(source,), decoder_input_ids=token).logits
    scale = float(model.config.d_model**-0.5)
    ratio = float(logits.norm() / model.lm_head(state).norm())
    return scale if ratio < (1 + scale) / 2 else 1.0
