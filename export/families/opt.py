"""OPT causal models: learned positions, pre-norm or post-norm layers, a plain MLP with biases."""

from __future__ import annotations

import torch
from torch import nn
from transformers import OPTForCausalLM

from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.families.llama import stop_tokens
from edgeexit.export.trace.attention import Heads


def trunk(model: OPTForCausalLM) -> DecoderTrunk:
    """Describes an OPT model."""
    config, decoder = model.config, model.model.decoder
    return DecoderTrunk(
        embedding=decoder.embed_tokens.weight,
        stem=_Stem(decoder.project_in, decoder.embed_positions),
        layers=[_Layer(layer) for layer in decoder.layers],
        head=_Head(decoder.final_layer_norm, decoder.project_out, model.lm_head),
        heads=Heads(
            queries=config.num_attention_heads,
            keys=config.num_attention_heads,
            size=config.hidden_size // config.num_attention_heads,
        ),
        width=config.hidden_size,
        positions=config.max_position_embeddings,
        stop_tokens=stop_tokens(model),
    )


class _Stem(nn.Module):
    """Adds position embeddings, whose table has an offset of two rows."""

    def __init__(self, project: nn.Module | None, positions: nn.Module) -> None:
        super().__init__()
        self.project = nn.Identity() if project is None else project
        self.table = positions.weight
        self.offset = int(positions.offset)  # type: ignore[arg-type]

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        places = nn.functional.embedding(positions + self.offset, self.table)  # type: ignore[arg-type]
        return self.project(embedded) + places


class _Layer(nn.Module):
    """A decoder layer, split around its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.first = bool(layer.do_layer_norm_before)

    def before(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer, attention = self.layer, self.layer.self_attn
        x = layer.self_attn_layer_norm(state) if self.first else state  # type: ignore[operator]
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)  # type: ignore[operator,union-attr]

    def after(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        state = state + layer.self_attn.out_proj(attended)  # type: ignore[operator,union-attr]
        if not self.first:
            state = layer.self_attn_layer_norm(state)  # type: ignore[operator]
        x = layer.final_layer_norm(state) if self.first else state  # type: ignore[operator]
        state = state + layer.fc2(layer.activation_fn(layer.fc1(x)))  # type: ignore[operator]
        return state if self.first else layer.final_layer_norm(state)  # type: ignore[operator]


class _Head(nn.Module):
    """Final norm and projection to the embedding's width (each optional), vocabulary projection."""

    def __init__(
        self, norm: nn.Module | None, project: nn.Module | None, projection: nn.Module
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.project = nn.Identity() if project is None else project
        self.projection = projection

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.projection(self.project(self.norm(state)))
