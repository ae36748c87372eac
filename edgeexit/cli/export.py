"""``edgeexit export``: makes a bundle from a checkpoint, a torch model or an ONNX file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.calibration_data import read_calibration_data
from edgeexit.cli.common import add_current_directory, print_json, progress_bar, size, warn
from edgeexit.cli.export_onnx import export_file
from edgeexit.cli.options import draft_vocabularies, output_options
from edgeexit.cli.weight_options import weight_bits, weight_options
from edgeexit.errors import ExportError, UsageError

if TYPE_CHECKING:
    from edgeexit.bundle.reader import Bundle
    from edgeexit.export.contract import SplitModel

NEEDED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")
DTYPES = {
    "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
    "int8": "int8",
}  # fmt: skip
OF_CHECKPOINTS = {
    "exits": "--exits",
    "untrained_exits": "--untrained-exits",
    "adapters": "--adapters",
    "encoder_exits": "--encoder-exits",
    "image_encoder_exits": "--image-encoder-exits",
    "tower_exits": "--tower-exits",
    "image_drops": "--drop-image-tokens",
    "gates": "--gates",
    "draft_vocabularies": "--draft-vocabulary",
    "max_tiles": "--max-tiles",
}
"""Parameters that say which exits a checkpoint gets -> their options."""


@click.command("export")
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="Checkpoint directory, hub id, file.gguf, module:function, or file.onnx.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle to write."
)
@click.option("--task", help="Refuse a checkpoint made for another task.")
@click.option(
    "--exits",
    metavar="LIST",
    help='Checkpoints: layers, as in 3,6,9, or "all". ONNX: names of the exit outputs in order.',
)
@click.option(
    "--untrained-exits",
    metavar="LIST",
    help="Layers with new, random exits, to measure latency before training; exits saved with the "
    "checkpoint are ignored.",
)
@click.option(
    "--adapters",
    metavar="LIST",
    help="Language models: exits with their own layers (adapters) before the head; default: those "
    'saved with the checkpoint; "none": no adapters. With --untrained-exits: new adapters '
    "(default: none).",
)
@click.option(
    "--adapter",
    "merged",
    multiple=True,
    metavar="DIR",
    help="Checkpoints: a peft adapter (LoRA) to merge into the weights; may be given several "
    "times.",
)
@click.option(
    "--draft-vocabulary",
    "draft_vocabularies",
    multiple=True,
    metavar="EXIT=FILE",
    help="Models that write text: an exit computes only the tokens whose ids a JSON file lists, as "
    "in exit_2=ids.json; may be given several times. Default: as saved with the checkpoint.",
)
@click.option(
    "--encoder-exits",
    metavar="LIST",
    help="Encoder-decoders: encoder layers with an exit; default: those saved with the checkpoint, "
    "or none.",
)
@click.option(
    "--image-encoder-exits",
    metavar="LIST",
    help="Florence-2: the encoder reads image and text apart, with exits behind these layers for "
    'the image ("none": no exits); --encoder-exits are then those for the text.',
)
@click.option(
    "--tower-exits",
    metavar="LIST",
    help="Vision-language models: layers of the vision tower with an exit; default: those saved "
    "with the checkpoint, or none.",
)
@click.option(
    "--drop-image-tokens",
    "image_drops",
    metavar="LIST",
    help="Vision-language models: layers behind which image tokens can leave, besides the exit "
    "layers.",
)
@click.option(
    "--gates",
    metavar="LIST",
    help="Vision-language models: layers with a gate that decides for every prompt whether its "
    'image tokens leave; default: those saved with the checkpoint; "none": no gates.',
)
@click.option(
    "--max-tiles",
    type=click.IntRange(min=1),
    help="Vision-language models: cut an image into at most this many tiles; default: as the "
    "checkpoint's processor does.",
)
@click.option(
    "--opset",
    type=int,
    help="ONNX opset of the graphs; default: 20. ONNX files keep their opset (18 or newer).",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Precision of the graphs; default: float32. ONNX files keep their precision.",
)
@weight_options
@click.option(
    "--calibration-data",
    metavar="DATA",
    help="--dtype int8: data to measure activation ranges on, in any format of `trace --data`. "
    "--weights: data whose float32 answers `check` compares.",
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
    help="ONNX: a text file with one class name per line.",
)
@click.option(
    "--outputs",
    type=click.Choice(["logits", "probabilities"]),
    help="ONNX: type of the exit outputs; default: probabilities after a Softmax, else logits.",
)
@click.option(
    "--rows",
    multiple=True,
    metavar="NAME:AXIS",
    help="ONNX: row axis of an input or exit, as in images:0; default: detected by running the "
    "file. A fixed axis becomes dynamic. May be given several times.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@output_options
def command(
    model: str,
    output: Path,
    dtype: str | None,
    opset: int | None,
    overwrite: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Split a model at its exits into a bundle.

    Examples:

    \b
    edgeexit export -m checkpoint -o bundle
    edgeexit export -m checkpoint --untrained-exits 3,6,9 -o bundle
    edgeexit export -m base --adapter lora --exits 8,16 -o bundle
    edgeexit export -m llava --untrained-exits 6,12 --tower-exits 8 --max-tiles 1 -o bundle
    edgeexit export -m model.onnx --exits logits_3,logits_6,logits -o bundle
    edgeexit export -m my_package.model:make -o bundle
    edgeexit export -m checkpoint --exits 6 --weights int4 -o bundle
    edgeexit export -m checkpoint --dtype int8 --calibration-data train.npz -o bundle
    """
    from edgeexit.bundle.writer import check_output
    from edgeexit.measure.inspect import weights_bytes

    check_output(output, overwrite=overwrite)
    _require_extra()
    writing: dict[str, Any] = {"overwrite": overwrite}
    writing |= {} if dtype is None else {"dtype": DTYPES[dtype]}
    writing |= {} if opset is None else {"opset": opset}
    bits, int8 = weight_bits(options), writing.get("dtype") == "int8"
    writing |= {} if bits is None else {"weights": bits}
    if bits is None and (options["calibration_data"] is not None) != int8:
        raise UsageError(
            "--dtype int8 and --calibration-data require each other",
            fix="Give both, or neither.",
        )
    with progress_bar(quiet) as progress:
        progress("reading the model", 0, 0)
        writing["progress"] = progress
        read = export_file if model.endswith(".onnx") else _torch
        bundle = read(model, output, options, writing)
    exits = [exit_.name for chain in bundle.manifest.chains.values() for exit_ in chain.exits]
    weights = weights_bytes(bundle)
    made = sum(file.bytes for file in bundle.manifest.files.values())
    if as_json:
        print_json(
            {
                "bundle": str(output),
                "digest": bundle.digest,
                "name": bundle.manifest.name,
                "exits": exits,
                "bytes": made,
                "weights_bytes": weights,
            }
        )
    elif not quiet:
        click.echo(
            f"{output}: {len(exits)} exits ({', '.join(exits)}), {size(made)}, "
            f"weights {size(weights)}"
        )
        if said := _about_exits(bundle, output):
            warn(said)


def _about_exits(bundle: Bundle, output: Path) -> str:
    """What is known about the training of a bundle's exits; empty if they were trained."""
    if bundle.exits_untrained:
        return "the exits are untrained: measure latency only, their answers are meaningless"
    hears = bundle.manifest.audio_preprocessing is not None
    if bundle.exits_unknown and len(bundle.manifest.last_chain.exits) == 1:
        given = "--audio FILE" if hears else "--prompt TEXT"
        return (
            "nothing says that the model was trained to leave the encoder early. To compare texts: "
            f"edgeexit run {output} {given}, with and without --encoder-threshold 0.98"
        )
    if bundle.exits_unknown and bundle.manifest.decoding is None:
        return (
            "nothing says that these exits were trained: the checkpoint lists them, but not "
            f"whether they were. To measure them: edgeexit bench {output} --data ROWS"
        )
    if bundle.exits_unknown:
        return (
            "nothing says that these exits were trained: the checkpoint does not list them. They "
            "share the model's own head, which predicts well from early layers only after a "
            f"training such as LayerSkip. To measure them: edgeexit bench {output} --data TEXTS"
            f"{_fields(bundle)}, or edgeexit trace {output} --data TEXTS"
            f"{_fields(bundle, 'target')} -o tokens.npz and edgeexit calibrate tokens.npz"
        )
    return ""


def _fields(bundle: Bundle, *beside: str) -> str:
    """What lines of --data hold, where an encoder reads the prompts; `beside`: with these."""
    decoding, sounds = bundle.manifest.decoding, bundle.manifest.audio_preprocessing
    fields = [f'"{name}"' for name in ("text" if sounds is None else "audio", *beside)]
    encodes = decoding is not None and decoding.start_tokens
    return f" (lines with {' and '.join(fields)})" if encodes else ""


def _require_extra() -> None:
    """Raises `ExportError` if the extra `export` is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"export needs {', '.join(missing)}, not installed in this environment",
            fix='Export on the workstation, or install it: pip install "edgeexit[export]".',
        )


def _torch(model: str, output: Path, options: Mapping[str, Any], writing: dict[str, Any]) -> Bundle:
    """Exports a checkpoint or the model that a function returns."""
    for name in ("data", "labels", "outputs", "rows"):
        if options[name] not in (None, ()):
            raise UsageError(f"--{name} is for ONNX files only", fix="Leave it out.")
    split = _split(model, options)
    from edgeexit.export import export

    data = options["calibration_data"]
    if data is None:
        return export(split, output, **writing)
    if ":" not in data and not Path(data).exists():
        raise UsageError(
            f"--calibration-data {data}: does not exist",
            fix="Give a file, a folder of images, or module:function.",
        )
    batches = read_calibration_data(data, split, int8=writing.get("dtype") == "int8")
    return export(split, output, calibration=lambda bundle: batches, **writing)


def _split(model: str, options: Mapping[str, Any]) -> SplitModel:
    """Reads the model and its exits."""
    import dataclasses

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if ":" in model and not Path(model).exists():
        if given := [name for name in OF_CHECKPOINTS if options[name] not in (None, ())]:
            option = OF_CHECKPOINTS[given[0]]
            raise UsageError(
                f"{model}: {option} cannot be used with a function",
                fix="Leave it out: the function makes the exits.",
            )
        if options["merged"]:
            raise UsageError(
                "--adapter is for checkpoints", fix="Merge the adapter in the function."
            )
        split = _from_function(model)
    else:
        split = _from_checkpoint(model, options)
    if options["task"] not in (None, split.task):
        raise UsageError(
            f"--task {options['task']}: the task of {model} is {split.task}", fix="Leave it out."
        )
    if options["name"] is not None:
        split = dataclasses.replace(split, name=options["name"])
    return split


def _from_function(spec: str) -> SplitModel:
    from edgeexit.export.contract import SplitModel
    from edgeexit.measure.functions import load_function

    add_current_directory()
    made = load_function(spec, "--model")()
    if hasattr(made, "split_model"):
        made = made.split_model()
    if not isinstance(made, SplitModel):
        raise UsageError(
            f"--model {spec}: it returned a {type(made).__name__}",
            fix="Return an edgeexit.export.SplitModel, or a model with a method split_model().",
        )
    return made


def _from_checkpoint(model: str, options: Mapping[str, Any]) -> SplitModel:
    from edgeexit.export.pretrained import from_pretrained

    exits, untrained_exits = options["exits"], options["untrained_exits"]
    if exits is not None and untrained_exits is not None:
        raise UsageError("--exits and --untrained-exits exclude each other", fix="Give one.")
    option, text = (
        ("--exits", exits) if untrained_exits is None else ("--untrained-exits", untrained_exits)
    )
    layers: list[int] | None = None
    if text is not None:
        layers = _all_layers(model) if text.strip() == "all" else _layers(text, option)

    def given(name: str) -> list[int] | None:
        text = options[name]
        if text is None:
            return None
        return [] if text.strip() == "none" else _layers(text, OF_CHECKPOINTS[name], "none")

    return from_pretrained(
        model,
        exits=layers,
        adapters=given("adapters"),
        encoder_exits=given("encoder_exits"),
        image_encoder_exits=given("image_encoder_exits"),
        tower_exits=given("tower_exits"),
        image_drops=given("image_drops") or (),
        gates=given("gates"),
        draft_vocabularies=draft_vocabularies(options["draft_vocabularies"]),
        most_tiles=options["max_tiles"],
        adapter=options["merged"],
        untrained=untrained_exits is not None,
        saved_exits=untrained_exits is None,
    ).split_model()


def _layers(text: str, option: str, word: str = "all") -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise UsageError(
                f"{option}: {part!r} is not a layer number",
                fix=f'Give numbers, as in {option} 1,2, or "{word}".',
            )
    return [int(part) for part in parts]


def _all_layers(model: str) -> list[int]:
    """The numbers of all layers of a checkpoint but the last."""
    from edgeexit.export.pretrained import depth_of

    return list(range(1, depth_of(model)))
