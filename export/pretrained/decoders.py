"""Causal language models: their exits share the model's own head, so any layer can have one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.checkpoint import Checkpoint, read_model
from edgeexit.export.exits.decoder import ExitDecoder
from edgeexit.export.exits.origins import Origin, note_origins, origins_of
from edgeexit.export.exits.saved import (
    EXITS_CONFIG,
    SAVE_AGAIN,
    SavedExits,
    load_exits,
    load_named,
    name_layers,
)
from edgeexit.export.exits.skipped_attention import SkippedAttention
from edgeexit.export.generation import generation_of
from edgeexit.export.library_errors import translated
from edgeexit.export.pretrained.common import (
    depth_of_config,
    name_of,
    tell_of_tokenizer,
    trunk_of,
)

DECODERS = {"llama": "llama", "qwen2": "llama", "qwen3": "llama", "opt": "opt"}
"""transformers' model type -> module of `edgeexit.export.families`."""


def read_decoder(
    checkpoint: Checkpoint,
    found: SavedExits,
    exits: Iterable[int] | None,
    adapters: Iterable[int] | Mapping[int, int] | None,
    *,
    untrained: bool,
) -> ExitDecoder:
    """A causal language model; its exits share its own head, so any layer can have one."""
    path, config = checkpoint.path, checkpoint.config
    saved = found.layers
    if exits is None and saved is None:
        raise ExportError(
            f"{path}: the checkpoint does not say where its exits are",
            fix=f"{name_layers(depth_of_config(config))} (--exits).",
        )
    model, missing_weights, stored = read_model("AutoModelForCausalLM", checkpoint)
    if missing_weights:
        raise ExportError(
            f"{path}: the checkpoint has no weights for {missing_weights[0]}",
            fix="Give a whole causal language model.",
        )
    trunk = trunk_of(checkpoint, DECODERS[config.model_type], model)
    chosen = list(saved or [] if exits is None else exits)
    decoder = ExitDecoder(model, trunk, chosen, adapters_of(found, chosen, adapters))
    load_skipped(checkpoint, decoder, found)
    load_adapters(checkpoint, decoder, found, untrained=untrained)
    decoder.eval()
    decoder.name = name_of(path)
    decoder.tokenizer_folder = checkpoint.text_folder
    tell_of_tokenizer(checkpoint)
    decoder.generation = generation_of(model, path)
    decoder.provenance = dict(checkpoint.provenance)
    decoder.stored = stored
    note_origins(decoder, origins_of_decoder(decoder, found, untrained=untrained))
    return decoder


def adapters_of(
    saved: SavedExits, exits: Collection[int], given: Iterable[int] | Mapping[int, int] | None
) -> Iterable[int] | Mapping[int, int]:
    """The adapters that a decoder gets: those given, or those that are saved for its exits."""
    if given is not None:
        return given
    return {layer: size for layer, size in saved.adapters.items() if layer in exits}


def load_adapters(
    checkpoint: Checkpoint, decoder: ExitDecoder, found: SavedExits, *, untrained: bool
) -> None:
    """Loads the adapters of a decoder's exits; the checkpoint has to have all that are not new."""
    sizes, held = decoder.adapter_sizes, found.adapters
    loaded = [layer for layer, size in sizes.items() if held.get(layer) == size]
    if (missing := [layer for layer in sizes if layer not in loaded]) and not untrained:
        raise UsageError(
            f"{checkpoint.path}: the checkpoint has no adapter of {sizes[missing[0]]} layer(s) for "
            f"the exit behind layer {missing[0]} (it has {_sizes(held)})",
            fix="Choose these exits, or use --untrained-exits (untrained=True) for new adapters.",
        )
    if loaded:
        load_exits(decoder.adapters, loaded, checkpoint.folder)


def load_skipped(checkpoint: Checkpoint, decoder: ExitDecoder, found: SavedExits) -> None:
    """Removes attentions that the checkpoint has none of, and loads the adapters in their place."""
    if not found.removed:
        return
    with translated(checkpoint.path, "its list of removed attentions does not fit", SAVE_AGAIN):
        try:
            decoder.skipped = skipped = SkippedAttention(
                decoder.layers, decoder.trunk.width, found.pia, found.removed
            )
        except UsageError as error:  # it does not know the file
            place = checkpoint.folder / EXITS_CONFIG
            raise ExportError(f"{place}: {error.what}", fix=SAVE_AGAIN) from error
    if len(skipped.pia):
        load_named(skipped.pia, skipped.pia, checkpoint.folder)


def origins_of_decoder(
    decoder: ExitDecoder, found: SavedExits, *, untrained: bool
) -> dict[str, Origin]:
    """What is known about the exits of a decoder. Any layer can have one, so exits that are not
    saved may be trained (LayerSkip), too; a new adapter is not."""
    otherwise: Origin = "untrained" if untrained else "unknown"
    sizes = decoder.adapter_sizes
    saved = [n for n in found.layers or () if sizes.get(n) == found.adapters.get(n)]
    layers = decoder.exit_layers
    origins = origins_of(layers, saved, found.origins, prefix="exit", otherwise=otherwise)
    new = [f"exit_{layer}" for layer in sizes if layer not in saved]
    return origins | dict.fromkeys(new, "untrained")


def _sizes(held: Mapping[int, int]) -> str:
    """Adapters of a checkpoint in words."""
    found = [f"{size} behind layer {layer}" for layer, size in held.items()]
    return ", ".join(found) or "none"


__all__ = [
    "DECODERS",
    "adapters_of",
    "load_adapters",
    "load_skipped",
    "origins_of_decoder",
    "read_decoder",
]
