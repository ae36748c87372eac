"""``edgeexit export`` for ONNX files: reads the options that only they have."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexit.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.reader import Bundle


def export_file(
    model: str, output: Path, options: Mapping[str, Any], writing: dict[str, Any]
) -> Bundle:
    """Exports an ONNX file."""
    refused = {
        "adapters": ("adapters are for checkpoints of language models", "Leave it out."),
        "encoder_exits": ("not supported for ONNX files", "Leave it out."),
        "untrained_exits": (
            "not supported for ONNX files",
            "Add exits before the conversion to ONNX, and name their outputs with --exits.",
        ),
        "dtype": ("not supported for ONNX files", "Leave it out, or convert the file first."),
        "weights": ("not supported for ONNX files", "Leave it out, or quantise the file first."),
        "opset": ("not supported for ONNX files", "Leave it out, or convert the file first."),
    }
    for name, (why, fix) in refused.items():
        if {**options, **writing}.get(name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: {why}", fix=fix)
    if options["merged"]:
        raise UsageError("--adapter is for checkpoints, not for ONNX files", fix="Leave it out.")
    if options["exits"] is None:
        raise UsageError(
            f"{model}: --exits is missing: which outputs are exits is unknown",
            fix="Name them in order, the model's last output at the end: "
            "--exits logits_3,logits_6,logits.",
        )
    if not Path(model).is_file():
        raise UsageError(f"{model} does not exist", fix="Give an ONNX file.")
    from edgeexit.bundle.files import read_npz
    from edgeexit.export import export_onnx

    own = ("task", "name", "outputs")
    extra = {name: options[name] for name in own if options[name] is not None}
    data, labels = options["data"], options["labels"]
    if options["rows"]:
        extra["rows"] = dict(map(_row_axis, options["rows"]))
    if data is not None:
        if not data.is_file():
            raise DataError(
                f"{data} does not exist", fix="Give a .npz keyed by the model's inputs."
            )
        extra["samples"] = read_npz(data)
    if labels is not None:
        extra["labels"] = _labels(labels)
    return export_onnx(model, output, exits=_names(options["exits"]), **extra, **writing)


def _row_axis(text: str) -> tuple[str, int]:
    """An input's name and the index of its row axis. Names may contain colons."""
    name, _, axis = text.rpartition(":")
    if not name or not (axis.isascii() and axis.isdigit()):
        raise UsageError(
            f"--rows {text}: not NAME:AXIS", fix="Give an input and an axis: --rows images:0."
        )
    return name, int(axis)


def _labels(path: Path) -> list[str]:
    """Reads class names, one per line. Ignores a byte order mark and blank lines at the end."""
    try:
        names = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", fix="Give a text file, one label per line."
        ) from error
    names = [name.strip() for name in names]
    if "" in names:
        raise DataError(
            f"{path}: line {names.index('') + 1} is blank", fix="Give one label per line."
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"{path}: two classes have the name {repeated[0]!r} (lines "
            f"{', '.join(str(n) for n, name in enumerate(names, 1) if name == repeated[0])})",
            fix="Give every class a unique name.",
        )
    return names


def _names(text: str) -> list[str]:
    """Splits names at commas; a name with a comma is written in double quotes."""
    [row] = csv.reader([text], skipinitialspace=True)
    return [name.strip() for name in row if name.strip()]


__all__ = ["export_file"]
