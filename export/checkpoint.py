"""Finds and reads checkpoints with transformers.

Exceptions of transformers for damaged or unsupported files become errors with the file's name.
Weights that transformers would ignore silently cause a warning or an error.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from edgeexit.errors import ExportError, first_line
from edgeexit.export import gguf_files
from edgeexit.export.device_tokenizer import has_tokenizer
from edgeexit.export.library_errors import translated
from edgeexit.export.peft_adapters import (
    Adapters,
    is_adapter,
    merge_adapters,
    open_adapters,
    refuse_adapter,
    warn_of_other_bases,
)
from edgeexit.export.stored_blocks import StoredRows, read_stored, settings_of

logger = logging.getLogger(__name__)

SHOWN = 3
"""Names of weights that a message shows."""
UNREADABLE = "transformers cannot read it"
CHECK_GGUF = "Check the file with transformers' from_pretrained(folder, gguf_file=...)."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of plain weights.

    Attributes:
        path: What the caller gave, for messages.
        folder: Where it is.
        config: Its configuration, read by transformers.
        adapters: peft adapters to merge into it.
        quantised: ``quantization_config`` of its configuration, if its weights are in few bits.
        gguf: The file, if it is a GGUF file; `folder` is where it is.
    """

    path: str | Path
    folder: Path
    config: transformers.PretrainedConfig
    adapters: Adapters | None = None
    quantised: Mapping[str, Any] | None = None
    gguf: Path | None = None

    @property
    def text_folder(self) -> Path:
        """The folder of its tokenizer: an adapter may have its own tokenizer."""
        own = None if self.adapters is None else self.adapters.tokenizer_folder
        if own is None and self.gguf is not None:
            return self._tokenizer_of_gguf
        return self.folder if own is None else own

    @functools.cached_property
    def _tokenizer_of_gguf(self) -> Path:
        assert self.gguf is not None
        with translated(self.path, "transformers cannot read its tokenizer", CHECK_GGUF):
            return gguf_files.tokenizer_of(self.gguf)

    @property
    def provenance(self) -> dict[str, str]:
        """Origin of the weights, for the manifest."""
        found = {"model_type": str(self.config.model_type)}
        if self.gguf is not None:
            found["quantised_by"] = "gguf"
        if self.quantised is not None:
            found["quantised_by"] = str(self.quantised.get("quant_method"))
        return found if self.adapters is None else found | {"merged_adapters": str(self.adapters)}


def open_checkpoint(
    path: str | Path, adapter: str | Path | Iterable[str | Path] | None = None
) -> Checkpoint:
    """Finds a checkpoint and the adapters to merge, and reads its configuration.

    Raises:
        ExportError: As `find_checkpoint` and `read_config`; or an adapter is invalid or damaged.
    """
    if gguf_files.is_gguf(path):
        return _open_gguf(path, adapter)
    folder = find_checkpoint(path)
    config, quantised = read_config(path, folder)
    adapters = open_adapters(adapter, find_checkpoint)
    if adapters is not None and adapters.classes not in (None, config.num_labels):
        config = copy.deepcopy(config)
        config.num_labels = adapters.classes  # names of other classes go with it
    if adapters is not None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = raw.get("_name_or_path")
        names = [path, folder.resolve(), *([own] if isinstance(own, str) and own else [])]
        warn_of_other_bases(adapters, path, names)
    return Checkpoint(path, folder, config, adapters, quantised)


def _open_gguf(path: str | Path, adapter: object) -> Checkpoint:
    file = Path(path).resolve()
    if adapter:
        raise ExportError(
            f"{path}: adapters are merged into the weights of checkpoints, not of GGUF files",
            fix="Give the checkpoint that it was made from.",
        )
    gguf_files.require_gguf(file)
    with translated(path, UNREADABLE, CHECK_GGUF):
        return Checkpoint(path, file.parent, gguf_files.config_of(file), gguf=file)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint's directory. A hub id is downloaded to the hub's cache if it is not there.

    Raises:
        ExportError: The directory does not exist, or the hub does not have the id.
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
            fix="Check the name and the network, or download it elsewhere and give the directory.",
        ) from error
    return Path(found)


def read_config(
    path: str | Path, folder: Path
) -> tuple[transformers.PretrainedConfig, Mapping[str, Any] | None]:
    """The configuration of a checkpoint, and how its weights are quantised, if they are.

    Args:
        path: What the caller gave, for messages.
        folder: Its directory.

    Raises:
        ExportError: The folder is not a checkpoint, is an adapter, or has weights that are
            quantised in a way that is not known.
    """
    if (folder / "manifest.json").is_file():
        raise ExportError(f"{path} is a bundle", fix="Give the checkpoint it was made from.")
    if is_adapter(folder):
        raise refuse_adapter(path, folder)
    if not (folder / "config.json").exists() and (other := _of_another_kind(folder)):
        raise ExportError(f"{path}: {other[0]}", fix=other[1])
    fix = "Give a directory with config.json, as save_pretrained writes."
    with translated(path, UNREADABLE, fix, folder=folder):
        # Checked first: transformers would require the quantiser's library.
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("config.json is not a JSON object")
        if quantised := raw.get("quantization_config") or raw.get("compression_config"):
            settings_of(path, quantised)
        if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
            raise ExportError(
                f"{path}: its model is custom Python code (auto_map in config.json), which is not "
                "run",
                fix="Export it to ONNX with exit outputs and give that file, or give it as "
                "module:function.",
            )
        found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if quantised:
        for name in ("quantization_config", "compression_config"):
            found.__dict__.pop(name, None)  # transformers would ask for the quantiser's library
        return found, quantised
    _refuse_packed(path, folder)
    return found, None


def _of_another_kind(folder: Path) -> tuple[str, str] | None:
    """What a folder without ``config.json`` contains instead, and the fix."""
    names = sorted(one.name for one in folder.iterdir())
    give = "Give a directory with config.json and weights."
    if not names:
        return "the folder is empty", give
    if found := [name for name in names if name.endswith(".gguf")]:
        return f"{found[0]} is a GGUF file", f"Give the file itself: -m {folder / found[0]}."
    if found := [name for name in names if name.endswith(".onnx")]:
        return f"{found[0]} is an ONNX file", f"Give the file itself: -m {folder / found[0]}."
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return None
    if has_tokenizer(folder):
        return "the folder has a tokenizer, but no model", give
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    if inside:
        more = f" (and {len(inside) - 1} more)" if len(inside) > 1 else ""
        return "the checkpoint is in a folder inside", f"Give {folder / inside[0]}{more}."
    return None


def _refuse_packed(path: str | Path, folder: Path) -> None:
    """Refuses weights of 8 bits or fewer without a quantisation entry in config.json: their scale
    is unknown."""
    for file in sorted(folder.glob("*.safetensors")):
        fix = "Download the file again; git lfs pull replaces LFS pointers."
        with (
            translated(path, f"{file.name} is incomplete", fix, folder=folder),
            safetensors.safe_open(file, framework="np") as opened,
        ):
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                kind = opened.get_slice(name).get_dtype()
                if kind.startswith(("F8", "F4", "F6", "I8", "U8", "I4", "U4")):
                    raise ExportError(
                        f"{path}: {name} is stored as {kind}, but config.json has no "
                        "quantisation settings",
                        fix="Give the original checkpoint.",
                    )


def read_model(
    reader: str, checkpoint: Checkpoint
) -> tuple[transformers.PreTrainedModel, list[str], StoredRows | None]:
    """Reads a model with one of transformers' classes, in float32, and merges its adapters.

    A warning lists weights of the checkpoint that the model does not use.

    Returns:
        The model, the names of weights that neither the checkpoint nor an adapter has, and the
        integers of weights that are quantised.

    Raises:
        ExportError: A file is damaged, or transformers or peft cannot read it.
    """
    path, folder, adapters = checkpoint.path, checkpoint.folder, checkpoint.adapters
    fix = "Check the checkpoint with transformers' from_pretrained."
    with translated(path, UNREADABLE, fix, folder=folder), _without_bars():
        source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        kind, stored = getattr(transformers, reader), None
        if checkpoint.quantised is not None:
            state, rows = read_stored(path, folder, checkpoint.quantised)
            stored = rows if rows.matrices else None
            source = {"pretrained_model_name_or_path": None, "state_dict": state}
            if hasattr(kind, "from_config"):  # which needs a folder, as it chooses the class
                with torch.device("meta"):
                    kind = type(kind.from_config(checkpoint.config))
        if checkpoint.gguf is not None:
            stored = gguf_files.stored_rows(checkpoint.gguf)
            source["gguf_file"] = checkpoint.gguf.name
        # The model is read in float32 whatever the checkpoint's dtype; export lowers it on request.
        model, found = kind.from_pretrained(
            **source,
            config=checkpoint.config,
            attn_implementation="eager",
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below
        )
    brought = set() if adapters is None else adapters.weights
    if wrong := sorted({str(one[0]) for one in found["mismatched_keys"]} - brought):
        raise ExportError(
            f"{path}: {_some(wrong)} {'have' if len(wrong) > 1 else 'has'} another shape than "
            "config.json says",
            fix="Give the configuration of these weights.",
        )
    if left := sorted(found["unexpected_keys"]):
        logger.warning(
            "%s: %d weights of the checkpoint are not used by the model of config.json (%s): %s",
            path,
            len(left),
            type(model).__name__,
            _some(left),
        )
    missing = sorted(set(found["missing_keys"]) - brought)
    if adapters is not None and not missing:
        model = merge_adapters(model, adapters)
    return model, missing, stored


def read_labels(path: str | Path, config: transformers.PretrainedConfig) -> tuple[str, ...]:
    """Class names of a classifier, one per logit; a number for a class without a name.

    Raises:
        ExportError: The model is not a single-label classifier.
    """
    if config.problem_type == "multi_label_classification":
        raise ExportError(
            f"{path}: multi-label classifiers (problem_type in config.json) are not supported",
            fix="Export it to ONNX and serve it unsplit, or train one with a single label.",
        )
    if config.problem_type == "regression" or config.num_labels == 1:
        why = 'problem_type "regression"' if config.problem_type == "regression" else "one label"
        raise ExportError(
            f"{path}: regression models are not supported ({why} in config.json): their outputs "
            "are values, not classes",
            fix="Export it to ONNX and serve it unsplit.",
        )
    named = {int(key): str(value) for key, value in (config.id2label or {}).items()}
    found = tuple(named.get(number) or str(number) for number in range(config.num_labels))
    if broken := [name for name in found if any("\ud800" <= letter <= "\udfff" for letter in name)]:
        raise ExportError(
            f"{path}: id2label in config.json has the name {broken[0]!a}, not valid Unicode",
            fix="Correct it.",
        )
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


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Disables progress bars of transformers on stderr."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


__all__ = ["Checkpoint", "find_checkpoint", "open_checkpoint", "read_labels", "read_model"]
