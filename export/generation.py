"""Reads a checkpoint's generation settings (``generation_config.json``) with transformers.

Supported settings become defaults in the bundle; a warning lists unsupported settings, and token
ids that the model does not have.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from edgeexit.bundle.manifest import GenerationDefaults
from edgeexit.errors import ExportError
from edgeexit.export.library_errors import translated

logger = logging.getLogger(__name__)

UNHEEDED: dict[str, tuple[Any, ...]] = {
    "max_length": (20,),  # the default of older versions
    "max_new_tokens": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "sequence_bias": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid"),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "condition_on_prev_tokens": (False,),
    "compression_ratio_threshold": (),
    "logprob_threshold": (),
    "no_speech_threshold": (),
}
"""Unsupported settings that change the text of transformers -> values without effect, besides None
and an empty list."""

UNHEEDED_DRAWING: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
}
"""The same for settings that have an effect only with sampling."""

LARGEST = sys.float_info.max

_RANGES = {
    "temperature": (0.0, False, LARGEST, "0 or more"),
    "top_k": (0, False, LARGEST, "0 (all) or more"),
    "top_p": (0.0, True, 1.0, "more than 0, at most 1"),
    "repetition_penalty": (0.0, True, LARGEST, "more than 0"),
}
"""Setting -> lowest value, whether it is excluded, highest value, and the range in words."""


def generation_of(
    model: PreTrainedModel, path: str | Path, heeded: Collection[str] = ()
) -> GenerationDefaults | None:
    """A model's own settings for generation; None for greedy decoding.

    Warnings list unsupported settings that change the text of transformers, and token ids that the
    model does not have.

    Args:
        heeded: Settings that the model's family heeds itself.

    Raises:
        ExportError: A setting is out of range.
    """
    config, file = model.generation_config, _file_of(path)
    draws = bool(config.do_sample)
    _tell_unheeded(model, draws, file, heeded)
    _tell_unknown_ids(model, file)
    with translated(file, "its settings cannot be used", "Correct or remove the file."):
        made = GenerationDefaults(
            temperature=float(_or(config.temperature, 1.0)) if draws else 0.0,
            top_k=int(_or(config.top_k, 50)) if draws else 0,
            top_p=float(_or(config.top_p, 1.0)) if draws else 1.0,
            repetition_penalty=float(_or(config.repetition_penalty, 1.0)),
            suppressed=_known_ids(model, config.suppress_tokens)[0],
            suppressed_first=_known_ids(model, config.begin_suppress_tokens)[0],
        )
    for name, (lowest, excluded, highest, range_) in _RANGES.items():
        value = getattr(made, name)
        if not lowest <= value <= highest or (excluded and value == lowest):
            raise ExportError(
                f"{file}: {name} is {value:g}, out of range ({range_})",
                fix="Correct it, or remove it for the default.",
            )
    if len(set(made.suppressed)) == _vocabulary(model):
        raise ExportError(
            f"{file}: suppress_tokens holds every token of the model, so nothing can be written",
            fix="Correct it.",
        )
    return None if made == GenerationDefaults() else made


def _file_of(path: str | Path) -> Path:
    """The file that the settings come from; older checkpoints have them in ``config.json``."""
    own = Path(path) / "generation_config.json"
    config = Path(path) / "config.json"
    return config if config.is_file() and not own.is_file() else own


def _tell_unheeded(
    model: PreTrainedModel, draws: bool, file: Path, heeded: Collection[str]
) -> None:
    known: Mapping[str, tuple[Any, ...]] = UNHEEDED | (UNHEEDED_DRAWING if draws else {})
    config = model.generation_config
    given = {name: getattr(config, name, None) for name in known}
    left = [
        f"{name}={value}"
        for name, value in given.items()
        if value is not None and value not in known[name] and value != [] and name not in heeded
    ]
    if not model.config.is_encoder_decoder and config.forced_bos_token_id is not None:
        left.append(f"forced_bos_token_id={config.forced_bos_token_id}")
    if left:
        logger.warning(
            "%s: these settings are not supported and have no effect: %s", file, ", ".join(left)
        )


def _tell_unknown_ids(model: PreTrainedModel, file: Path) -> None:
    for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        if unknown := _known_ids(model, getattr(model.generation_config, name))[1]:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            logger.warning(
                "%s: %s: the model has no token %s%s (it has 0 to %d); ignored, as transformers "
                "does",
                file,
                name,
                unknown[0],
                more,
                _vocabulary(model) - 1,
            )


def _known_ids(model: PreTrainedModel, given: Any) -> tuple[list[int], list[int]]:
    """Token ids of a setting that the model has, and those that it does not have."""
    many = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
    ids = [int(token) for token in many]
    size = _vocabulary(model)
    return [t for t in ids if 0 <= t < size], [t for t in ids if not 0 <= t < size]


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


__all__ = ["generation_of"]
