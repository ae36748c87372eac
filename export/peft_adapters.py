"""Merges peft adapters (LoRA and the like) into the weights of their base model.

An adapter is a folder with ``adapter_config.json`` and its own weights. A bundle has one set of
weights, so peft merges adapters one after the other. Outputs of the merged model are compared with
those of the model with separate adapters before the export.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from edgeexit.errors import ExportError
from edgeexit.export.device_tokenizer import has_tokenizer
from edgeexit.export.library_errors import translated

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOLERANCE = 1e-3
"""Tolerance between merged model and separate adapter, relative to the largest output: float32
rounds the sum of both weights once."""

_HEAD = re.compile(r"classifier(\.out_proj|\.1)?\.bias")
"""Of every family of classifiers."""
_TASKS = {
    "SEQ_CLS": "Classification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "ConditionalGeneration",
}
"""peft's task type -> end of the names of transformers' classes for it."""
_AGAIN = "Copy the adapter again, as peft's save_pretrained wrote it."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_adapter_config(path: str | Path, folder: Path) -> dict[str, Any]:
    """Reads the configuration of an adapter.

    Args:
        path: What the caller gave, for messages.
        folder: Where it is.

    Raises:
        ExportError: The configuration or the weights are missing or damaged.
    """
    if not is_adapter(folder):
        raise ExportError(
            f"{path}: not a peft adapter, there is no {CONFIG}",
            fix="Give the folder that peft's save_pretrained wrote.",
        )
    with translated(f"{path}: {CONFIG}", "cannot be read", _AGAIN):
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
            raise ValueError("it names no peft_type")
    if found.get("layer_replication"):
        raise ExportError(
            f"{path}: the adapter repeats layers of its base (layer_replication in its {CONFIG}), "
            "each with weights of its own, so it cannot be merged into the base",
            fix="Train an adapter without layer_replication.",
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ExportError(f"{path}: {WEIGHTS[0]} is not there", fix=_AGAIN)
    return found


def refuse_adapter(path: str | Path, folder: Path) -> ExportError:
    """The error for a checkpoint that is an adapter, or has one beside its weights."""
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = str(about.get("peft_type", "peft"))
        base = str(about.get("base_model_name_or_path") or "its base model")
    except (OSError, ValueError, RecursionError, AttributeError):
        kind, base = "peft", "its base model"
    if (folder / "config.json").is_file():
        return ExportError(
            f"{path}: {CONFIG} is beside the weights: the {kind} adapter would be ignored",
            fix=f"Move the adapter's files into a folder of their own and add --adapter FOLDER "
            f"(adapter=...), or move {CONFIG} away to export the weights without it.",
        )
    return ExportError(
        f"{path}: a {kind} adapter without the weights it belongs to ({base})",
        fix=f"Give the base and the adapter: edgeexit export -m BASE --adapter {path} "
        "(from_pretrained(base, adapter=...)).",
    )


@dataclass(frozen=True)
class Adapters:
    """Adapters to merge into one model, in order.

    Attributes:
        paths: What the caller gave, for messages.
        folders: The folder of each adapter.
        kinds: The peft type of each adapter.
        bases: The base that each adapter's configuration names; empty where it names none.
        tasks: The task type of each adapter; empty where its configuration has none.
        weights: Names, in the base, of all weights in the adapters.
        classes: Number of classes of an adapter's classifier; None if no adapter has one.
    """

    paths: tuple[str | Path, ...]
    folders: tuple[Path, ...]
    kinds: tuple[str, ...]
    bases: tuple[str, ...]
    tasks: tuple[str, ...]
    weights: frozenset[str]
    classes: int | None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the last adapter with a tokenizer."""
        return next((folder for folder in reversed(self.folders) if has_tokenizer(folder)), None)

    def __str__(self) -> str:
        names = (Path(path).resolve().name for path in self.paths)
        return ", ".join(f"{n} ({kind})" for n, kind in zip(names, self.kinds, strict=True))


def open_adapters(
    given: str | Path | Iterable[str | Path] | None, find: Callable[[str | Path], Path]
) -> Adapters | None:
    """Opens and checks adapters, in the order of merging; None if there are none.

    Args:
        find: Returns the folder of a path or hub id.

    Raises:
        ExportError: A folder is not an adapter, or is damaged; or adapters have classifiers with
            different numbers of classes.
    """
    paths = (given,) if isinstance(given, (str, Path)) else tuple(given or ())
    if not paths:
        return None
    if importlib.util.find_spec("peft") is None:
        raise ExportError(
            "adapters need peft, which is not installed",
            fix='Install it: pip install "edgeexit[export]".',
        )
    folders = tuple(find(path) for path in paths)
    abouts = [
        read_adapter_config(path, folder) for path, folder in zip(paths, folders, strict=True)
    ]
    names: set[str] = set()
    classes: dict[int, str | Path] = {}
    replaced: dict[str, str | Path] = {}
    for path, folder in zip(paths, folders, strict=True):
        with translated(path, "its weights cannot be read", _AGAIN, folder=folder, required=CONFIG):
            weights = _weights(folder)
        names |= {_plain(name) for name in weights}
        for key, value in weights.items():
            if value.ndim == 1 and _HEAD.fullmatch(_plain(key)):
                classes[len(value)] = path
        _warn_of_replaced(path, weights, replaced)
    if len(classes) > 1:
        (one, first), (other, second) = list(classes.items())[:2]
        raise ExportError(
            f"{first} has a classifier for {one} classes, {second} one for {other}: a bundle has "
            "one classifier",
            fix="Export one bundle per adapter.",
        )
    kinds, bases, tasks = (
        tuple(str(about.get(key) or "") for about in abouts)
        for key in ("peft_type", "base_model_name_or_path", "task_type")
    )
    return Adapters(
        paths, folders, kinds, bases, tasks, frozenset(names), next(iter(classes), None)
    )


def _warn_of_replaced(
    path: str | Path, weights: Iterable[str], replaced: dict[str, str | Path]
) -> None:
    """Warns of whole modules (``modules_to_save``) that an earlier adapter has, too."""
    whole = sorted({_plain(name) for name in weights if "lora_" not in name and "ia3_" not in name})
    if twice := [name for name in whole if name in replaced]:
        logger.warning(
            "%s: %s replaces that of %s: both adapters were saved with it (modules_to_save)",
            path,
            twice[0],
            replaced[twice[0]],
        )
    replaced |= dict.fromkeys(whole, path)


def warn_of_other_bases(adapters: Adapters, base: str | Path, names: Iterable[str | Path]) -> None:
    """Warns of adapters that were made for another base.

    Args:
        base: What the caller gave, for messages.
        names: All names that the base is known by: paths and hub ids. Only their last parts are
            compared, because an adapter names its base as its author loaded it.
    """
    known = {_last_part(name) for name in names}
    for path, named in zip(adapters.paths, adapters.bases, strict=True):
        if named and _last_part(named) not in known:
            logger.warning(
                "%s: the adapter was made for %s (base_model_name_or_path in its %s), the base "
                "given is %s: unless both have the same weights, the merged model is meaningless",
                path,
                named,
                CONFIG,
                base,
            )


def _last_part(name: str | Path) -> str:
    r"""The part of a path or hub id that names the model.

    >>> [_last_part(name) for name in ("org/Talker", "C:\\models\\talker\\", "talker/checkpoint")]
    ['talker', 'talker', 'talker']
    >>> _last_part("hub/models--org--talker/snapshots/0a1b2c")
    'talker'
    """
    parts = [part for part in re.split(r"[/\\]", str(name).lower()) if part not in ("", ".")]
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1].rpartition("--")[2]
    generic = len(parts) > 1 and parts[-1] == "checkpoint"
    return "" if not parts else parts[-2 if generic else -1]


def merge_adapters(
    model: transformers.PreTrainedModel, adapters: Adapters
) -> transformers.PreTrainedModel:
    """The model with all adapters merged into its weights.

    Raises:
        ExportError: An adapter does not fit the model, or cannot be merged.
    """
    for path, task in zip(adapters.paths, adapters.tasks, strict=True):
        if task in _TASKS and not type(model).__name__.endswith(_TASKS[task]):
            raise ExportError(
                f"{path}: an adapter for {task} (task_type in its {CONFIG}), but the base is read "
                f"as {type(model).__name__}",
                fix="Give an adapter for the task of the base.",
            )
    for path, folder, kind in zip(adapters.paths, adapters.folders, adapters.kinds, strict=True):
        model = _merge(model.eval(), path, folder, kind)
    return model


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from peft import load_peft_weights

    return dict(load_peft_weights(str(folder), device="cpu"))


def _plain(name: str) -> str:
    """The name of a weight in the base.

    >>> _plain("base_model.model.classifier.modules_to_save.weight")
    'classifier.weight'
    """
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(modules_to_save|original_module)(\.default)?", "", name)


def _merge(
    model: transformers.PreTrainedModel, path: str | Path, folder: Path, kind: str
) -> transformers.PreTrainedModel:
    import peft

    fix = "Give the base that the adapter was trained on (base_model_name_or_path in its "
    fix += (
        f"{CONFIG}), after resize_token_embeddings if its vocabulary grew in training, and check "
    )
    fix += "it with peft's PeftModel.from_pretrained."
    does = f"peft cannot put this {kind} adapter on {type(model).__name__}"
    with warnings.catch_warnings(), translated(path, does, fix), torch.no_grad():
        warnings.simplefilter("ignore")  # missing weights are checked below
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
        merge = getattr(adapted.base_model, "merge_and_unload", None)
        if adapted.active_peft_config.is_prompt_learning or merge is None:
            raise ExportError(
                f"{path}: a {kind} adapter adds inputs or layers, so it cannot be merged",
                fix="Export the base without it, or train an adapter that can be merged (LoRA).",
            )
        loaded = adapted.load_adapter(str(folder), "default")
        for names, what in (
            (loaded.unexpected_keys, "weights that the base does not have:"),
            (loaded.missing_keys, "no weights for"),
        ):
            if names:
                raise ExportError(
                    f"{path}: the adapter has {what} {_plain(sorted(names)[0])}"
                    + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                    fix=fix,
                )
        inputs = _inputs(model)
        expected = adapted.eval()(**inputs).logits
        merged = merge(safe_merge=True)
        found = merged.eval()(**inputs).logits
    off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not off <= TOLERANCE:
        raise ExportError(
            f"{path}: outputs of the merged {kind} adapter differ from those of the separate "
            f"adapter (by {off:.3g} of the largest)",
            fix="If the embedding and the head share weights, train the adapter on neither of "
            "them; otherwise train an adapter that can be merged.",
        )
    return merged


def _inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Example inputs of a model."""
    random = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 64)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (2, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=random)}
    ids = torch.randint(0, config.vocab_size, (2, 5), generator=random)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return made | ({"decoder_input_ids": ids[:, :3]} if config.is_encoder_decoder else {})


__all__ = [
    "Adapters",
    "is_adapter",
    "merge_adapters",
    "open_adapters",
    "refuse_adapter",
    "warn_of_other_bases",
]
