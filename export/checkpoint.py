"""Reading checkpoints: found, whole, and with nothing in them that the model would not take.

transformers reads the files. Whatever it raises over a damaged or a foreign one becomes an error
that names the file; what it would leave out without a word is said, or refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from edgeexit.errors import ExportError, first_line

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"
ADAPTER = "adapter_config.json"
SHOWN = 3
"""Names of weights that a message shows."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint's directory; a hub id's is fetched into (or found in) the hub's cache.

    Raises:
        ExportError: There is none, or the hub does not give it.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ExportError(f"{path} is a file", fix="Give a checkpoint directory or a hub id.")
    absent = ExportError(f"{path} does not exist", fix="Give a checkpoint directory or a hub id.")
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise absent
    import huggingface_hub

    try:
        for weights in ("*.safetensors", "*.bin"):
            found = huggingface_hub.snapshot_download(
                str(path),
                allow_patterns=["*.json", "*.txt", "*.jinja", "*.model", weights],
                ignore_patterns=["*/*", "training_args.bin"],
            )
            if any(Path(found).glob(weights)):
                break
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: neither a directory nor found on the hub ({first_line(error)})",
            fix="Check the name and the network, or fetch it elsewhere and give the directory.",
        ) from error
    return Path(found)


def read_config(path: str | Path, folder: Path) -> transformers.PretrainedConfig:
    """The configuration of a checkpoint of plain weights.

    Args:
        path: What the caller gave, for messages.
        folder: Where it lies.

    Raises:
        ExportError: It is no checkpoint, its weights are quantised, or they are an adapter's.
    """
    if (folder / "manifest.json").is_file():
        raise ExportError(f"{path} is a bundle already", fix="Give the checkpoint it was made of.")
    if (folder / ADAPTER).is_file():
        raise _adapter(path, folder)
    with _translated(path, folder, "Give a directory with config.json, as save_pretrained writes."):
        # Looked at first, for transformers would ask for the quantiser's library.
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("config.json is not a JSON object")
        if quantised := raw.get("quantization_config") or raw.get("compression_config"):
            raise _quantised(path, quantised)
        return transformers.AutoConfig.from_pretrained(folder)


def read_model(
    reader: str, path: str | Path, folder: Path
) -> tuple[transformers.PreTrainedModel, list[str]]:
    """Reads a model with one of transformers' classes, in float32.

    Weights of the checkpoint that it has no place for are named in a warning.

    Returns:
        The model, and the names of weights that the checkpoint does not have.

    Raises:
        ExportError: A file is damaged, or transformers cannot read it.
    """
    fix = "Check the checkpoint with transformers' from_pretrained."
    with _translated(path, folder, fix), _without_bars():
        # Graphs are made in float32 whatever a checkpoint is stored in; export lowers on request.
        model, found = getattr(transformers, reader).from_pretrained(
            folder,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told apart below
        )
    if wrong := sorted(str(one[0]) for one in found["mismatched_keys"]):
        raise ExportError(
            f"{path}: {_some(wrong)} {'have' if len(wrong) > 1 else 'has'} another shape than "
            "config.json says",
            fix="Give the configuration that belongs to the weights.",
        )
    if left := sorted(found["unexpected_keys"]):
        logger.warning(
            "%s: %d weights of the checkpoint are not used, for the model of config.json (%s) has "
            "no place for them: %s",
            path,
            len(left),
            type(model).__name__,
            _some(left),
        )
    return model, sorted(found["missing_keys"])


def read_labels(path: str | Path, config: transformers.PretrainedConfig) -> tuple[str, ...]:
    """A classifier's names of classes, one per logit; a number where a class has no name.

    Raises:
        ExportError: Its logits are not those of classes of which one is right.
    """
    if config.problem_type == "multi_label_classification":
        raise ExportError(
            f"{path}: a multi-label classifier (problem_type in config.json); scores, exits and "
            "accuracy here are those of models that choose one class",
            fix="Export it to ONNX and serve it unsplit, or train one with a single label.",
        )
    if config.problem_type == "regression" or config.num_labels == 1:
        raise ExportError(
            f"{path}: its one output is a number (regression), which has no classes to be sure of",
            fix="Export it to ONNX and serve it unsplit.",
        )
    named = {int(key): str(value) for key, value in (config.id2label or {}).items()}
    found = tuple(named.get(number) or str(number) for number in range(config.num_labels))
    if missing := [number for number in range(config.num_labels) if not named.get(number)]:
        others = sorted(named.keys() - set(range(config.num_labels)))
        logger.warning(
            "%s: id2label in config.json has no name for class %d of %d%s; it is called by its "
            "number",
            path,
            missing[0],
            config.num_labels,
            f", and one for class {others[0]}" if others else "",
        )
    if twice := [name for name in dict.fromkeys(found) if found.count(name) > 1]:
        logger.warning(
            "%s: id2label in config.json has the name %r twice: labels in data that are given by "
            "name count as class %d",
            path,
            twice[0],
            found.index(twice[0]),
        )
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _adapter(path: str | Path, folder: Path) -> ExportError:
    """What to do about weights that belong on top of others."""
    try:
        about = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        kind = str(about.get("peft_type", "PEFT"))
        base = str(about.get("base_model_name_or_path") or "its base model")
    except (OSError, ValueError, AttributeError):
        kind, base = "PEFT", "its base model"
    if (folder / "config.json").is_file():
        what = f"{path}: {ADAPTER} lies beside the weights: a {kind} adapter that would be left out"
        other = f", or move {ADAPTER} away to export the weights without it"
    else:
        what = f"{path}: a {kind} adapter without the weights it belongs to ({base})"
        other = ""
    return ExportError(
        what,
        fix="Merge it first with peft (AutoPeftModelForCausalLM or the like): from_pretrained("
        f"folder).merge_and_unload().save_pretrained(merged){other}.",
    )


def _quantised(path: str | Path, about: Any) -> ExportError:
    kind = about.get("quant_method") if isinstance(about, dict) else None
    return ExportError(
        f"{path}: its weights are quantised already ({kind or 'quantization_config'} in "
        "config.json)",
        fix="Give the checkpoint that it was made of; --dtype int8 quantises while exporting.",
    )


@contextlib.contextmanager
def _translated(path: str | Path, folder: Path, fix: str) -> Iterator[None]:
    """Turns whatever transformers and safetensors raise into an error that names the file."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # they let through what any library below them raises
        if found := damaged_file(folder):
            raise ExportError(
                f"{path}: {found}", fix="Fetch that file again; git lfs pull gets the real ones."
            ) from error
        raise ExportError(
            f"{path}: transformers cannot read it ({type(error).__name__}: {first_line(error)})",
            fix=fix,
        ) from error


def damaged_file(folder: Path) -> str | None:
    """Which file of a checkpoint cannot be what its name says, and why; None if none is seen."""
    if not (folder / "config.json").is_file():
        return "there is no config.json"
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin") or not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file.name} is a Git LFS pointer, not the file itself"
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="np"):
                    pass
        except (ValueError, OSError, RecursionError, safetensors.SafetensorError) as error:
            return f"{file.name} is not whole ({first_line(error)})"
    return None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers' own progress bars off stderr, which is the command line's."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


__all__ = ["damaged_file", "find_checkpoint", "read_config", "read_labels", "read_model"]
