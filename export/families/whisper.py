"""Whisper: an encoder of log-mel features with two convolutions and fixed positions, and a decoder
with learned positions; pre-norm layers in both.

Behind the start token stand tokens of the language, of the task, and one that says that the text
has no times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from edgeexit.bundle.manifest import Axis, StartChoice, Timestamps
from edgeexit.errors import ExportError
from edgeexit.export.exits.decoder_trunk import DecoderTrunk
from edgeexit.export.exits.encoder import EncoderTrunk
from edgeexit.export.exits.speech_encoder_decoder import SpeechTrunk
from edgeexit.export.families.llama import stop_tokens
from edgeexit.export.trace.attention import Heads, read_source, split_heads

_OLD = (
    "Take the newer generation_config.json of this checkpoint: the old one lacks language tokens."
)


def trunk(model: WhisperForConditionalGeneration) -> SpeechTrunk:
    """Describes a Whisper model."""
    config, base = model.config, model.model
    source = base.encoder
    heads = config.decoder_attention_heads
    axes: tuple[Axis, ...] = ("batch", config.max_source_positions, config.d_model)
    choices, timestamps = start_choices(model), times(model)
    return SpeechTrunk(
        encoder=EncoderTrunk(
            embedding=None,
            stem=_Sound(source),
            layers=[
                _EncoderLayer(layer, config.d_model // config.encoder_attention_heads)
                for layer in source.layers
            ],
            positions=None,
            start_tokens=(_token(model, "decoder_start_token_id"), *_fixed(model, choices)),
            norm=source.layer_norm,
            state_axes=axes,
        ),
        decoder=DecoderTrunk(
            embedding=base.decoder.embed_tokens.weight,
            stem=_Stem(base.decoder.embed_positions.weight),
            layers=[_Layer(layer) for layer in base.decoder.layers],
            head=_Head(base.decoder.layer_norm, model.proj_out),
            heads=Heads(queries=heads, keys=heads, size=config.d_model // heads),
            width=config.d_model,
            positions=config.max_target_positions,
            stop_tokens=stop_tokens(model),
        ),
        mels=config.num_mel_bins,
        frames=config.max_source_positions * source.conv1.stride[0] * source.conv2.stride[0],
        choices=choices,
        timestamps=timestamps,
        settings=("forced_decoder_ids", "max_length"),
    )


def start_choices(model: WhisperForConditionalGeneration) -> dict[str, StartChoice]:
    """The choices of language and task, with the defaults of the generation settings; none for a
    model of one language.

    Raises:
        ExportError: The settings lack the tokens of languages, or name a language without one.
    """
    settings = model.generation_config
    languages = getattr(settings, "lang_to_id", None) or {}
    tasks = getattr(settings, "task_to_id", None) or {}
    if getattr(settings, "is_multilingual", None) is False:
        return {}
    forced = _forced(model)
    language, task = (getattr(settings, name, None) for name in ("language", "task"))
    if not languages:
        if language is not None or (forced and forced[0] is None):
            raise ExportError(
                "the generation settings have no lang_to_id, so the language cannot be chosen",
                fix=_OLD,
            )
        return {}
    codes = {name.strip("<|>"): _checked(model, name, token) for name, token in languages.items()}
    if language is not None:
        language = _code(str(language), codes)
    elif task is None and forced and forced[0] is not None:
        language = next((code for code, token in codes.items() if token == forced[0]), None)
    if task is None:
        task = next((name for name, token in tasks.items() if token in forced[1:]), "transcribe")
    if tasks and task not in tasks:
        raise ExportError(
            f"the generation settings name the task {task!r}, which task_to_id does not have",
            fix="Correct generation_config.json.",
        )
    found = {
        "language": StartChoice(
            options={code: [token] for code, token in sorted(codes.items())},
            default=language,
            aliases={name: code for name, code in TO_LANGUAGE_CODE.items() if code in codes},
        )
    }
    if tasks:
        options = {name: [_checked(model, name, token)] for name, token in tasks.items()}
        found["task"] = StartChoice(options=options, default=task)
    return found


def times(model: WhisperForConditionalGeneration) -> Timestamps | None:
    """The tokens that say times; None if the settings do not say where they begin."""
    settings = model.generation_config
    without = getattr(settings, "no_timestamps_token_id", None)
    size = model.config.vocab_size
    if without is None or not 0 <= without < size - 1:
        return None
    ends = settings.eos_token_id
    return Timestamps(
        first=without + 1,
        without=without,
        end=_checked(model, "eos_token_id", ends[0] if isinstance(ends, list) else ends),
        latest=getattr(settings, "max_initial_timestamp_index", None),
    )


def _forced(model: WhisperForConditionalGeneration) -> list[int | None]:
    """Tokens that the settings force behind the start token; None for one that is detected."""
    found = getattr(model.generation_config, "forced_decoder_ids", None)
    found = getattr(model.config, "forced_decoder_ids", None) if found is None else found
    forced: list[int | None] = []
    for place, token in found or ():
        if place == len(forced) + 1:
            forced.append(token)
    return forced


def _fixed(
    model: WhisperForConditionalGeneration, choices: dict[str, StartChoice]
) -> tuple[int, ...]:
    """Forced tokens of a model without choices, but that of texts without times."""
    without = getattr(model.generation_config, "no_timestamps_token_id", None)
    forced = () if choices else _forced(model)
    return tuple(token for token in forced if token is not None and token != without)


def _code(language: str, codes: dict[str, int]) -> str:
    plain = language.lower().strip("<|>")
    code = TO_LANGUAGE_CODE.get(plain, plain)
    if code not in codes:
        raise ExportError(
            f"the generation settings name the language {language!r}, for which lang_to_id has no "
            "token",
            fix="Correct generation_config.json.",
        )
    return code


def _token(model: WhisperForConditionalGeneration, name: str) -> int:
    token = getattr(model.generation_config, name, None)
    token = getattr(model.config, name, None) if token is None else token
    return _checked(model, name, token)


def _checked(model: WhisperForConditionalGeneration, name: str, token: Any) -> int:
    size = model.config.vocab_size
    if type(token) is not int or not 0 <= token < size:
        raise ExportError(
            f"{name} is {token!r}, not a token id of the model (0 to {size - 1})",
            fix="Correct it in generation_config.json or config.json.",
        )
    return token


class _Sound(nn.Module):
    """Maps features to the encoder's first state: two convolutions, of which the second halves the
    frames, and fixed positions."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.first, self.second = encoder.conv1, encoder.conv2
        self.positions = encoder.embed_positions

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self.first.weight.dtype)  # type: ignore[arg-type,union-attr]
        features = nn.functional.gelu(self.first(features))  # type: ignore[operator]
        features = nn.functional.gelu(self.second(features))  # type: ignore[operator]
        return features.transpose(1, 2) + self.positions.weight  # type: ignore[operator,union-attr]


class _Stem(nn.Module):
    """Adds position embeddings to the decoder's tokens."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return embedded + nn.functional.embedding(positions, self.table)


class _EncoderLayer(nn.Module):
    """An encoder layer, which attends to the whole window."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer = layer
        self.size = size

    def forward(self, state: torch.Tensor, read: torch.Tensor | None) -> torch.Tensor:
        layer, attention = self.layer, self.layer.self_attn
        x = layer.self_attn_layer_norm(state)  # type: ignore[operator]
        k, v = (
            split_heads(made, -1, self.size)
            for made in (attention.k_proj(x), attention.v_proj(x))  # type: ignore[union-attr,operator]
        )
        attended = read_source(attention.q_proj(x), k, v, None)  # type: ignore[union-attr,operator]
        return _feed_forward(layer, state + attention.out_proj(attended))  # type: ignore[union-attr,operator]


class _Layer(nn.Module):
    """A decoder layer, split around self-attention and cross-attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def before(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = self.layer.self_attn
        x = self.layer.self_attn_layer_norm(state)  # type: ignore[operator]
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)  # type: ignore[operator,union-attr]

    def between(
        self, state: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layer
        state = state + layer.self_attn.out_proj(attended)  # type: ignore[operator,union-attr]
        return state, layer.encoder_attn.q_proj(layer.encoder_attn_layer_norm(state))  # type: ignore[operator,union-attr]

    def cross(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.layer.encoder_attn
        return attention.k_proj(encoded), attention.v_proj(encoded)  # type: ignore[operator,union-attr]

    def after(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        attention = self.layer.encoder_attn
        return _feed_forward(self.layer, state + attention.out_proj(attended))  # type: ignore[operator,union-attr]


def _feed_forward(layer: nn.Module, state: torch.Tensor) -> torch.Tensor:
    x = layer.final_layer_norm(state)  # type: ignore[operator]
    return state + layer.fc2(layer.activation_fn(layer.fc1(x)))  # type: ignore[operator]


class _Head(nn.Module):
    """Final norm and vocabulary projection."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(state))


__all__ = ["start_choices", "times", "trunk"]
