"""How a checkpoint says that text is to be written: its ``generation_config.json``, as
transformers reads it.

What the runtime does goes into the bundle as its defaults; what it does not do is named.
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
"""Settings that change which tokens transformers writes, and their values without effect."""

UNHEEDED_DRAWING = {
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}
"""Those that do so where tokens are drawn."""


def generation_of(model: PreTrainedModel, path: str | Path) -> GenerationDefaults | None:
    """A model's own settings for generation; None where the likeliest token is taken.

    A warning names settings that change what transformers writes and are not heeded here.
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
            "%s: text is written token by token from the model's logits; these settings of its "
            "generation_config.json are not heeded: %s",
            path,
            ", ".join(left),
        )
    file = Path(path) / "generation_config.json"
    with translated(file, "its settings cannot be used", "Correct it, or move it away."):
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
