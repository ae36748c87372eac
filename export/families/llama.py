"""Llama, Qwen2 and Qwen3 causal models: pre-norm layers with RMS norm, rotary positions, a gated
MLP. Qwen2 has biases on queries, keys and values; Qwen3 normalises queries and keys.

Vision-language models have one of them inside: `text_trunk` describes the part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from edgeexit.errors import ExportError
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.trace.attention import Heads
from edgeexit.export.trace.without_attention import FeedForward

TEXT_MODELS = ("llama", "qwen2", "qwen3")
"""Model types that this module describes."""


def trunk(model: LlamaForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM) -> DecoderTrunk:
    """Describes a causal language model; all have the same parts with the same names."""
    return text_trunk(model.model, model.lm_head, stop_tokens(model))


def text_trunk(base: nn.Module, projection: nn.Module, stops: tuple[int, ...]) -> DecoderTrunk:
    """Describes a language model that may be part of a larger one.

    Args:
        base: Embedding, layers and last norm (transformers' ``LlamaModel`` and the like).
        projection: The vocabulary projection.
        stops: Token ids that end a text.
    """
    config: Any = base.config
    _refuse_what_is_not_covered(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderTrunk(
        embedding=base.embed_tokens.weight,  # type: ignore[union-attr,arg-type]
        stem=None,
        layers=[_Layer(layer) for layer in base.layers],  # type: ignore[union-attr]
        head=_Head(base.norm, projection),  # type: ignore[arg-type]
        heads=Heads(
            queries=config.num_attention_heads,
            keys=config.num_key_value_heads,
            size=size,
            rotary=_tables(base, size),
        ),
        width=config.hidden_size,
        positions=config.max_position_embeddings,
        stop_tokens=stops,
    )


def stop_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids that end a text: ``eos_token_id`` of the model's configuration and of its
    generation configuration, which often has the end of a turn. Ids that the model does not have
    (-1 for none) are left out.

    Raises:
        ExportError: An entry is not a number.
    """
    tokens: list[int] = []
    for config in (model.config, model.generation_config):
        given = getattr(config, "eos_token_id", None)
        many = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
        if wrong := [token for token in many if type(token) is not int]:
            raise ExportError(
                f"eos_token_id holds {wrong[0]!r}, not a token id",
                fix="Correct config.json and generation_config.json.",
            )
        tokens += many
    size = model.get_input_embeddings().weight.shape[0]
    return tuple(token for token in dict.fromkeys(tokens) if 0 <= token < size)


class _Layer(nn.Module):
    """A decoder layer, split around its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def before(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer, attention = self.layer, self.layer.self_attn
        x = layer.input_layernorm(state)  # type: ignore[operator]
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)  # type: ignore[operator,union-attr]
        if hasattr(attention, "q_norm"):
            q, k = _per_head(attention.q_norm, q), _per_head(attention.k_norm, k)  # type: ignore[union-attr,arg-type]
        return q, k, v

    def after(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        state = state + layer.self_attn.o_proj(attended)  # type: ignore[operator,union-attr]
        return state + layer.mlp(layer.post_attention_layernorm(state))  # type: ignore[operator]

    def silence(self) -> None:
        """Makes the layer's attention add nothing."""
        projection = self.layer.self_attn.o_proj  # type: ignore[union-attr]
        for parameter in projection.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)

    @property
    def feed_forward(self) -> FeedForward:
        """What the layer does behind its attention."""
        mlp, norm = self.layer.mlp, self.layer.post_attention_layernorm
        return FeedForward(
            norm=norm,  # type: ignore[arg-type]
            epsilon=norm.variance_epsilon,  # type: ignore[union-attr,arg-type]
            gate=mlp.gate_proj,  # type: ignore[union-attr,arg-type]
            up=mlp.up_proj,  # type: ignore[union-attr,arg-type]
            down=mlp.down_proj,  # type: ignore[union-attr,arg-type]
            activation=mlp.act_fn,  # type: ignore[union-attr,arg-type]
        )


def _per_head(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    size = weight.shape[0]
    return norm(x.unflatten(-1, (-1, size))).flatten(-2)


class _Head(nn.Module):
    """Final norm and vocabulary projection."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.projection = projection

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(state))


def _tables(base: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[positions, size / 2]``, computed by transformers' own module."""
    config: Any = base.config
    positions = torch.arange(config.max_position_embeddings)[None]
    with torch.no_grad():
        cos, sin = base.rotary_emb(torch.zeros(1), positions)  # type: ignore[operator]
    return cos[0, :, : size // 2].contiguous(), sin[0, :, : size // 2].contiguous()


def _refuse_what_is_not_covered(config: object) -> None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ExportError(
            f"the model's rotary positions ({kind}) change with the length of the text",
            fix="Use a model with fixed rotary positions (default, linear, yarn, llama3).",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            "the model rotates only a part of each head",
            fix="Use a model that rotates whole heads.",
        )
    kinds = getattr(config, "layer_types", None) or []
    if "sliding_attention" in kinds:
        raise ExportError(
            "the model has layers with sliding-window attention, which is not supported",
            fix="Use a model with full attention in every layer.",
        )
