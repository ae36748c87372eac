"""Reads a checkpoint's generation settings (``generation_config.json``) with transformers.

Supported settings become defaults in the bundle; a warning lists unsupported settings.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from edgeexit.bundle.manifest import GenerationDefaults
from edgeexit.export.library_errors import translated

logger = logging.getLogger(__name__)

UNHEEDED = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
}
"""Unsupported settings that change the tokens of transformers -> their value without effect."""

UNHEEDED_DRAWING = {
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}
"""The same for settings that have an effect only with sampling."""


def generation_of(model: PreTrainedModel, path: str | Path) -> GenerationDefaults | None:
    """A model's own settings for generation; None for greedy decoding.

    A warning lists unsupported settings that change the tokens of transformers.
    """
    config = model.generation_config
    draws = bool(config.do_sample)
    known = UNHEEDED | (UNHEEDED_DRAWING if draws else {})
    given = {name: getattr(config, name, None) for name in known}
    left = [
        f"{name}={value}"
        for name, value in given.items()
        if value is not None and value != known[name] and value != []
    ]
    if left:
        logger.warning(
            "%s: these settings of generation_config.json are not supported and have no effect: %s",
            path,
            ", ".join(left),
        )
    file = Path(path) / "generation_config.json"
    with translated(file, "its settings cannot be used", "Correct or remove the file."):
        made = GenerationDefaults(
            temperature=float(_or(config.temperature, 1.0)) if draws else 0.0,
            top_k=int(_or(config.top_k, 50)) if draws else 0,
            top_p=float(_or(config.top_p, 1.0)) if draws else 1.0,
            repetition_penalty=float(_or(config.repetition_penalty, 1.0)),
            suppressed=[int(token) for token in config.suppress_tokens or []],
        )
    return None if made == GenerationDefaults() else made


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


__all__ = ["generation_of"]
