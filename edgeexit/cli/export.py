"""``edgeexit export``: a checkpoint, a torch model or an ONNX file becomes a bundle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.common import (
    Progress,
    add_current_directory,
    json_option,
    print_json,
    progress_bar,
    size,
    verbosity_options,
)
from edgeexit.errors import DataError, ExportError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeexit.bundle.reader import Bundle
    from edgeexit.export.contract import DecodeModel, ExitModel

NEEDED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")
DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "int8": "int8",
}


@click.command("export")
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="Checkpoint directory, hub id, module:function, or file.onnx.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle.")
@click.option("--task", help="Refuse a checkpoint made for another task.")
@click.option(
    "--exits",
    metavar="LIST",
    help='Checkpoints: layers, as in 3,6,9, or "all". ONNX: outputs in order, the last one last.',
)
@click.option(
    "--untrained-exits",
    metavar="LIST",
    help="Layers that get new, random exits: to measure latency before training.",
)
@click.option(
    "--adapters",
    metavar="LIST",
    help="Language models: exits with layers of their own before the head; default: those saved "
    'with the checkpoint, "none": without. Beside --untrained-exits: new ones too.',
)
@click.option(
    "--opset",
    type=int,
    help="ONNX opset of the graphs; default: 20; ONNX files keep theirs from 18 up.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="What the graphs compute in; default: float32, ONNX files keep theirs.",
)
@click.option(
    "--calibration-data",
    metavar="DATA",
    help="With --dtype int8: what to measure the ranges of activations on; any form that `trace "
    "--data` takes.",
)
@click.option("--name", help="Name of the bundle; default: that of the model.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="ONNX: .npz with sample inputs; default: random ones.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="ONNX: a text file with one class name per line; checkpoints bring theirs.",
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle that is there.")
@json_option
@verbosity_options
def command(
    model: str,
    output: Path,
    task: str | None,
    exits: str | None,
    untrained_exits: str | None,
    adapters: str | None,
    opset: int | None,
    dtype: str | None,
    calibration_data: str | None,
    name: str | None,
    data: Path | None,
    labels: Path | None,
    overwrite: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Split a model at its exits into a bundle.

    \b
    edgeexit export -m checkpoint -o bundle
    edgeexit export -m checkpoint --untrained-exits 3,6,9 -o bundle
    edgeexit export -m model.onnx --exits logits_3,logits_6,logits -o bundle
    edgeexit export -m my_package.model:make -o bundle
    edgeexit export -m checkpoint --dtype int8 --calibration-data train.npz -o bundle
    """
    from edgeexit.bundle.writer import check_output

    check_output(output, overwrite=overwrite)
    _require_extra()
    options: dict[str, Any] = {"overwrite": overwrite}
    if dtype is not None:
        options["dtype"] = DTYPES[dtype]
    if (calibration_data is not None) != (options.get("dtype") == "int8"):
        raise UsageError(
            "--dtype int8 and --calibration-data go together: ranges of activations are measured",
            fix="Give both, or neither.",
        )
    if opset is not None:
        options["opset"] = opset
    with progress_bar(quiet) as progress:
        progress("reading the model", 0, 0)
        if model.endswith(".onnx"):
            if adapters is not None:
                raise UsageError(
                    "--adapters is for checkpoints of language models", fix="Leave it out."
                )
            bundle = _onnx(
                model, output, exits, untrained_exits, task, name, data, labels, options, progress
            )
        else:
            for option, value in (("--data", data), ("--labels", labels)):
                if value is not None:
                    raise UsageError(
                        f"{option} is for ONNX files; this model brings its own",
                        fix="Leave it out.",
                    )
            split = _torch(model, exits, untrained_exits, adapters, task, name)
            bundle = _export(split, output, calibration_data, options, progress)
    found = bundle.exits()
    made = sum(file.bytes for file in bundle.manifest.files.values())
    if as_json:
        print_json(
            {
                "bundle": str(output),
                "digest": bundle.digest,
                "name": bundle.manifest.name,
                "exits": [leave.name for leave in found],
                "bytes": made,
                "weights_bytes": bundle.weights_bytes,
            }
        )
    elif not quiet:
        click.echo(
            f"{output}: {len(found)} exits ({', '.join(leave.name for leave in found)}), "
            f"{size(made)}, weights {size(bundle.weights_bytes)}"
        )


def _require_extra() -> None:
    """Refuses to begin where the extra `export` is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"exporting needs {', '.join(missing)}, which this environment does not have",
            fix='Export on the workstation, or install it: pip install "edgeexit[export]".',
        )


def _onnx(
    model: str,
    output: Path,
    exits: str | None,
    untrained_exits: str | None,
    task: str | None,
    name: str | None,
    data: Path | None,
    labels: Path | None,
    options: dict[str, Any],
    progress: Progress,
) -> Bundle:
    if untrained_exits is not None:
        raise UsageError(
            "--untrained-exits: an ONNX file cannot be given new exits",
            fix="Add the exits before the model becomes ONNX, and name its outputs with --exits.",
        )
    for option in ("dtype", "opset"):
        if option in options:
            raise UsageError(
                f"--{option}: an ONNX file keeps its own",
                fix=f"Leave --{option} out, or convert the file before.",
            )
    if exits is None:
        raise UsageError(
            f"{model}: which outputs are exits?",
            fix="Name them in order, the model's own last: --exits logits_3,logits_6,logits.",
        )
    if not Path(model).is_file():
        raise UsageError(f"{model} does not exist", fix="Give an ONNX file.")
    from edgeexit.export import export_onnx
    from edgeexit.measure.data import read_npz

    extra: dict[str, Any] = {}
    if task is not None:
        extra["task"] = task
    if name is not None:
        extra["name"] = name
    if data is not None:
        if not data.is_file():
            raise DataError(
                f"{data} does not exist", fix="Give a .npz keyed by the model's inputs."
            )
        extra["samples"] = read_npz(data)
    if labels is not None:
        try:
            extra["labels"] = labels.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{labels}: cannot be read ({error})", fix="Give a text file, one label per line."
            ) from error
    names = [part.strip() for part in exits.split(",") if part.strip()]
    return export_onnx(model, output, exits=names, progress=progress, **extra, **options)


def _torch(
    model: str,
    exits: str | None,
    untrained_exits: str | None,
    adapters: str | None,
    task: str | None,
    name: str | None,
) -> ExitModel | DecodeModel:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if ":" in model and not Path(model).exists():
        if exits is not None or untrained_exits is not None or adapters is not None:
            raise UsageError(
                f"{model}: the function says itself where its exits are",
                fix="Leave out --exits, --untrained-exits and --adapters.",
            )
        split = _from_function(model)
    else:
        split = _from_checkpoint(model, exits, untrained_exits, adapters)
    if task is not None and task != split.task:
        raise UsageError(
            f"--task {task}: {model} is made for {split.task}", fix="Leave --task out."
        )
    if name is not None:
        import dataclasses

        split = dataclasses.replace(split, name=name)
    return split


def _export(
    split: ExitModel | DecodeModel,
    output: Path,
    calibration_data: str | None,
    options: dict[str, Any],
    progress: Progress,
) -> Bundle:
    from edgeexit.export import (
        DecodeModel,
        export_decoder,
        export_int8,
        export_int8_decoder,
        export_model,
    )

    if calibration_data is None:
        if isinstance(split, DecodeModel):
            return export_decoder(split, output, progress=progress, **options)
        return export_model(split, output, progress=progress, **options)
    import numpy as np

    from edgeexit.measure.bench.decode_bench import read_prompts
    from edgeexit.measure.data import open_data

    if ":" not in calibration_data and not Path(calibration_data).exists():
        raise UsageError(
            f"--calibration-data {calibration_data}: does not exist",
            fix="Give a file, a folder of images, or module:function.",
        )

    def rows(bundle: Bundle) -> Iterator[Mapping[str, Any]]:
        add_current_directory()
        return (batch.inputs for batch in open_data(calibration_data, bundle).batches(8))

    def texts(bundle: Bundle) -> Iterator[NDArray[np.int64]]:
        if calibration_data.endswith(".npz"):
            return (row for batch in rows(bundle) for row in batch["tokens"])
        add_current_directory()
        return map(np.array, read_prompts(calibration_data, bundle))

    options.pop("dtype")
    if isinstance(split, DecodeModel):
        return export_int8_decoder(split, output, calibration=texts, progress=progress, **options)
    return export_int8(split, output, calibration=rows, progress=progress, **options)


def _from_function(spec: str) -> ExitModel | DecodeModel:
    from edgeexit.export.contract import DecodeModel, ExitModel
    from edgeexit.measure.data import load_function

    add_current_directory()
    made = load_function(spec, "--model")()
    if hasattr(made, "exit_model"):
        made = made.exit_model()
    if not isinstance(made, (ExitModel, DecodeModel)):
        raise UsageError(
            f"--model {spec}: it returned a {type(made).__name__}",
            fix="Return an edgeexit.export.ExitModel, or a model with a method exit_model().",
        )
    return made


def _from_checkpoint(
    model: str, exits: str | None, untrained_exits: str | None, adapters: str | None
) -> ExitModel | DecodeModel:
    from edgeexit.export.pretrained import from_pretrained

    if exits is not None and untrained_exits is not None:
        raise UsageError("--exits and --untrained-exits together", fix="Give one of them.")
    option, text = (
        ("--exits", exits) if untrained_exits is None else ("--untrained-exits", untrained_exits)
    )
    layers: list[int] | None = None
    if text is not None:
        layers = _all_layers(model) if text.strip() == "all" else _layers(text, option)
    chosen: list[int] | None = None
    if adapters is not None:
        chosen = [] if adapters.strip() == "none" else _layers(adapters, "--adapters", "none")
    untrained = untrained_exits is not None
    return from_pretrained(model, exits=layers, adapters=chosen, untrained=untrained).exit_model()


def _layers(text: str, option: str, word: str = "all") -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise UsageError(
                f"{option}: {part!r} is not a layer number",
                fix=f'Give numbers, as in {option} 3,6,9, or "{word}".',
            )
    return [int(part) for part in parts]


def _all_layers(model: str) -> list[int]:
    """Every layer of a checkpoint; `from_pretrained` without new exits tells how many there are."""
    from edgeexit.export.pretrained import from_pretrained

    return list(range(1, from_pretrained(model, exits=[], untrained=True).depth))
