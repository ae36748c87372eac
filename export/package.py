"""Everything into a bundle: graphs, weights, samples, manifest.

`export_model` takes the segment contract, `export_onnx` an ONNX graph with exit outputs; both write
the same bundle, one segment in memory at a time, and give it back opened and checked.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import torch

from edgeexit import __version__
from edgeexit.bundle import Bundle
from edgeexit.bundlewriter import BundleWriter
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import graphs
from edgeexit.export.contract import Exit, ExitModel, Segment
from edgeexit.export.cut import ANSWER, annotate, cut
from edgeexit.export.onnxfile import float_outputs, normalise, precision_of, read_onnx
from edgeexit.export.precision import to_float16
from edgeexit.export.rows import close, prove_rows, run_graph, sample_inputs, tolerance_of
from edgeexit.export.scores import reference_scores
from edgeexit.export.shapes import resolve_shapes
from edgeexit.export.store import WeightStore
from edgeexit.manifest import Chain, Manifest, Tensor, Variant
from edgeexit.manifest import Exit as ManifestExit
from edgeexit.manifest import Segment as ManifestSegment

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 4
OPSETS = range(18, 24)
Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, of)`` while a bundle is made."""


def export_model(
    model: ExitModel,
    output: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    opset: int = graphs.DEFAULT_OPSET,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Splits a model at its exits and writes the bundle.

    Args:
        model: What to split.
        output: The bundle's directory; must not exist unless `overwrite`.
        dtype: ``float32`` or ``float16``: what the graphs compute in. Inputs, answers and scores
            stay float32.
        opset: ONNX opset. 20 is read by ONNX Runtime 1.23 and TensorRT 10.3.

    Raises:
        ExportError: The model cannot be split; nothing is left behind.
        OutputExistsError: `output` exists.
    """
    check_options(dtype, opset)
    model.check()
    if dtype == "float16":
        model = to_float16(model)
    steps = sum(len(segments) for segments in model.chains.values()) + 2
    tell = counter(progress, steps)
    with BundleWriter(output, overwrite=overwrite) as writer, torch.no_grad():
        store = WeightStore(writer.folder)
        inputs = model.example(SAMPLE_ROWS)
        _check_example(model, inputs)
        reference: dict[str, np.ndarray] = {}
        chains = {}
        for chain_name, segments in model.chains.items():
            values: dict[str, torch.Tensor] = dict(inputs)
            parts = []
            for segment in segments:
                tell(f"segment {segment.name}")
                prefix = "" if len(model.chains) == 1 else f"{chain_name}."
                path = f"graphs/{prefix}{segment.name}.onnx"
                graph = graphs.graph_from_segment(segment, values, opset=opset)
                _write(graph, store, writer.folder / path)
                made = segment.module(*(values[tensor.name] for tensor in segment.inputs))
                made = made if isinstance(made, tuple) else (made,)
                values |= {t.name: v for t, v in zip(segment.outputs, made, strict=True)}
                reference |= _reference(segment, values)
                parts.append(_manifest_segment(segment, path, dtype))
            chains[chain_name] = Chain(segments=parts)
        tell("unsplit")
        graph = graphs.graph_from_module(
            model.unsplit, model.inputs, model.outputs, inputs, opset=opset, what="unsplit"
        )
        _write(graph, store, writer.folder / "graphs/unsplit.onnx")
        made = model.unsplit(*(inputs[tensor.name] for tensor in model.inputs))
        made = made if isinstance(made, tuple) else (made,)
        reference |= {
            f"unsplit/{t.name}": v.numpy() for t, v in zip(model.outputs, made, strict=True)
        }
        tell("samples and manifest")
        arrays = {f"input/{name}": value.numpy() for name, value in inputs.items()} | reference
        samples = [write_samples(writer.folder, "reference", arrays)]
        if model.preprocessing_sample is not None:
            raw = model.preprocessing_sample
            samples.append(write_samples(writer.folder, "preprocessing", raw))
        tokenizer = None
        if model.tokenizer_file is not None:
            tokenizer = "tokenizer/tokenizer.json"
            (writer.folder / "tokenizer").mkdir()
            shutil.copyfile(model.tokenizer_file, writer.folder / tokenizer)
        return writer.commit(
            Manifest(
                format="1.0",
                name=model.name,
                task=model.task,
                program=model.program,
                inputs=list(model.inputs),
                outputs=list(model.outputs),
                chains=chains,
                unsplit=[Variant(graph="graphs/unsplit.onnx", precision=dtype)],  # type: ignore[arg-type]
                files={},
                limits=dict(model.limits),
                labels=list(model.labels),
                preprocessing=model.preprocessing,
                tokenizer=tokenizer,
                samples=samples,
                provenance=provenance() | dict(model.provenance) | {"opset": str(opset)},
            )
        )


def export_onnx(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    exits: Sequence[str],
    name: str | None = None,
    task: str = "classification",
    overwrite: bool = False,
    samples: Mapping[str, np.ndarray] | None = None,
    labels: Sequence[str] = (),
    progress: Progress | None = None,
) -> Bundle:
    """Cuts an ONNX file at its exits and writes the bundle.

    The file's opset is kept (below 18 it is converted to 18), and so is its precision; exits and
    scores are float32 always. What the segments answer is compared with the file before anything is
    kept.

    Args:
        path: The ONNX file; its weights may lie in files beside it.
        output: The bundle's directory; must not exist unless `overwrite`.
        exits: Names of the tensors that hold an exit's logits ``[batch, classes]``, from shallow to
            deep; the last one is the model's answer. Tensors inside the graph may be named too.
        name: The bundle's name; the file's, if left out.
        samples: Input name -> array with two rows or more, to compute the reference from; inputs
            are made up if left out.
        labels: Names of the classes.

    Raises:
        UsageError: `path`, `exits` or `samples` cannot be meant.
        ExportError: The file cannot be cut there; nothing is left behind.
        OutputExistsError: `output` exists.
    """
    check_exits(exits)
    what = Path(path).name
    tell = counter(progress, len(exits) + 4)
    with BundleWriter(output, overwrite=overwrite) as writer:
        tell("reading")
        model = read_onnx(path)
        own_inputs = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
        own_outputs = {value.name for value in model.graph.outputs}
        model = normalise(model, exits, what)
        resolve_shapes(model)
        float_outputs(model.graph, what)
        names = {old: v.name or "" for old, v in zip(own_inputs, model.graph.inputs, strict=True)}
        leaves = {old: v.name or "" for old, v in zip(exits, model.graph.outputs, strict=True)}
        store = WeightStore(writer.folder)
        store.externalize(model.graph)
        inputs = sample_inputs(model.graph, SAMPLE_ROWS, samples, names)
        tell("running the file on samples")
        if own_outputs.issuperset(exits):
            [made] = run_graph(path, [{old: inputs[new] for old, new in names.items()}])
            answers = {new: made[old] for old, new in leaves.items()}
        else:
            whole = writer.folder / "graphs/whole.onnx"
            graphs.save_graph(model, str(whole))
            [answers] = run_graph(whole, [inputs])
            whole.unlink()
        rows = len(next(inputs[v.name or ""] for v in model.graph.inputs if _has_rows(v)))
        for value in model.graph.outputs:
            answers[value.name or ""] = _check_logits(value, answers[value.name or ""], rows, what)
        _check_classes(answers, what)
        classes = next(iter(answers.values())).shape[-1]
        if labels and len(labels) != classes:
            raise UsageError(
                f"{len(labels)} labels for the {classes} classes of {what}",
                fix="Give one label per class, in the order of the logits.",
            )
        pieces = cut(model, what)
        paths = [writer.folder / f"graphs/{piece.name}.onnx" for piece in pieces.pieces]
        for piece, place in zip(pieces.pieces, paths, strict=True):
            tell(f"segment {piece.name}")
            graphs.save_graph(piece.model, str(place))
        tell("comparing the segments with the file")
        precision = precision_of(model)
        tolerance = tolerance_of(model.graph, precision)
        proof = prove_rows(pieces, paths, inputs, what, tolerance)
        for leave, expected in answers.items():
            if not close(proof.values[leave], expected, tolerance):
                raise _differs(leave, proof.values[leave], expected, what)
        tensors = proof.tensors | {
            scored: Tensor(name=scored, dtype="float32", axes=["batch"])
            for piece in pieces.pieces
            for scored in piece.scores.values()
        }
        for piece, place in zip(pieces.pieces, paths, strict=True):
            annotate(piece.model, tensors)
            graphs.save_graph(piece.model, str(place))
        answer = msgspec.structs.replace(tensors[pieces.pieces[-1].exit], name=ANSWER)
        annotate(pieces.unsplit, tensors | {ANSWER: answer})
        graphs.save_graph(pieces.unsplit, str(writer.folder / "graphs/unsplit.onnx"))
        tell("samples and manifest")
        arrays = {f"input/{key}": value for key, value in inputs.items()}
        for leave, logits in answers.items():
            arrays[f"{leave}/{ANSWER}"] = logits
            arrays |= {f"{leave}/{s}": value for s, value in reference_scores(logits).items()}
        arrays[f"unsplit/{ANSWER}"] = answers[pieces.pieces[-1].exit]
        sample_file = write_samples(writer.folder, "reference", arrays)
        parts = [
            ManifestSegment(
                name=piece.name,
                variants=[Variant(graph=f"graphs/{piece.name}.onnx", precision=precision)],
                inputs=[tensors[key] for key in piece.inputs],
                outputs=[tensors[value.name or ""] for value in piece.model.graph.outputs],
                exits=[
                    ManifestExit(name=piece.exit, outputs={ANSWER: piece.exit}, scores=piece.scores)
                ],
            )
            for piece in pieces.pieces
        ]
        opset = str(model.graph.opset_imports[""])
        return writer.commit(
            Manifest(
                format="1.0",
                name=name or Path(path).stem,
                task=task,
                program="forward",
                inputs=[tensors[key] for key in pieces.inputs],
                outputs=[answer],
                chains={
                    "main": Chain(
                        segments=parts, rows="independent" if proof.independent else "together"
                    )
                },
                unsplit=[Variant(graph="graphs/unsplit.onnx", precision=precision)],
                files={},
                labels=list(labels),
                samples=[sample_file],
                provenance=provenance() | {"source": what, "opset": opset},
            )
        )


def check_exits(exits: Sequence[str]) -> None:
    """Refuses names of exits that cannot be meant."""
    if isinstance(exits, str):
        raise UsageError("exits is one string", fix=f"Give a list: exits={exits.split(',')}.")
    for leave in exits:
        if not isinstance(leave, str) or not leave:
            raise UsageError(f"exits: {leave!r} is not a name", fix="Give names of outputs.")
        if list(exits).count(leave) > 1:
            raise UsageError(f"exits: {leave} is given twice", fix="Name each exit once.")
    if len(exits) < 2:
        raise UsageError(
            f"exits: there is no early exit ({', '.join(exits) or 'none'} given)",
            fix="Name two outputs or more, from shallow to deep, the model's answer last, as in "
            "--exits logits_3,logits_6,logits.",
        )


def check_options(dtype: str, opset: int) -> None:
    """Refuses a precision or opset that no graph here can have."""
    if dtype not in ("float32", "float16"):
        raise UsageError(f"dtype {dtype!r} is not known", fix="Use float32 or float16.")
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} cannot be written (18 to {OPSETS[-1]} can)",
            fix=f"Use {graphs.DEFAULT_OPSET}, which every supported engine reads.",
        )


def provenance() -> dict[str, str]:
    """What made the bundle: versions, without names of people or machines."""
    found = {"edgeexit": __version__}
    for package in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def counter(progress: Progress | None, steps: int) -> Callable[[str], None]:
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        logger.info("%s", what)
        if progress is not None:
            progress(what, done, steps)
        done += 1

    return tell


def _has_rows(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 0 and value.shape[0] == "batch"


def _check_logits(value: ir.Value, found: np.ndarray, rows: int, what: str) -> np.ndarray:
    """Completes the shape of an exit from what it gave; refuses what is not logits by row."""
    if found.ndim != 2 or found.shape[0] != rows or found.shape[1] < 2:
        raise ExportError(
            f"{what}: exit {value.name} gives {list(found.shape)} for {rows} rows, not "
            "[rows, classes]",
            fix="Name a tensor with one row of class logits (two classes or more) per input.",
        )
    value.shape = ir.Shape(["batch", found.shape[1]])
    return found.astype(np.float32, copy=False)


def _check_classes(answers: Mapping[str, np.ndarray], what: str) -> None:
    *early, (last, logits) = answers.items()
    for leave, found in early:
        if found.shape != logits.shape:
            raise ExportError(
                f"{what}: exit {leave} has {found.shape[1]} classes, the last exit ({last}) "
                f"{logits.shape[1]}",
                fix="Exits answer the same question; name tensors with logits of the same classes.",
            )


def _differs(leave: str, found: np.ndarray, expected: np.ndarray, what: str) -> ExportError:
    off = float(np.nanmax(np.abs(found.astype(np.float64) - expected)))
    return ExportError(
        f"{what}: at exit {leave} the segments answer otherwise than the file (by up to {off:.3g})",
        fix="This is a bug in edgeexit; please report it with the tool that wrote the file.",
    )


def _write(model: ir.Model, store: WeightStore, path: Path) -> None:
    store.externalize(model.graph)
    graphs.save_graph(model, str(path))


def write_samples(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes one file of samples; returns its path in the bundle."""
    (folder / "samples").mkdir(exist_ok=True)
    path = f"samples/{name}.npz"
    np.savez(folder / path, **arrays)  # type: ignore[arg-type]
    return path


def _reference(segment: Segment, values: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Reference outputs and scores of a segment's exits, as ``<exit>/<output or score>``."""
    found: dict[str, np.ndarray] = {}
    for leave in segment.exits:
        for name, tensor in leave.outputs.items():
            found[f"{leave.name}/{name}"] = values[tensor].numpy()
        if "logits" in leave.outputs:
            scores = reference_scores(values[leave.outputs["logits"]].numpy())
            found |= {f"{leave.name}/{score}": value for score, value in scores.items()}
        found |= {f"{leave.name}/{s}": values[tensor].numpy() for s, tensor in leave.scores.items()}
    return found


def _manifest_segment(segment: Segment, path: str, dtype: str) -> ManifestSegment:
    scores = [
        Tensor(name=tensor, dtype="float32", axes=["batch"])
        for leave in segment.exits
        for tensor in graphs.score_tensors(leave).values()
        if tensor not in leave.scores.values()
    ]
    return ManifestSegment(
        name=segment.name,
        variants=[Variant(graph=path, precision=dtype)],  # type: ignore[arg-type]
        inputs=list(segment.inputs),
        outputs=[*segment.outputs, *scores],
        caches=list(segment.caches),
        exits=[_manifest_exit(leave) for leave in segment.exits],
    )


def _manifest_exit(leave: Exit) -> ManifestExit:
    return ManifestExit(
        name=leave.name, outputs=dict(leave.outputs), scores=graphs.score_tensors(leave)
    )


def _check_example(model: ExitModel, inputs: Mapping[str, torch.Tensor]) -> None:
    for tensor in model.inputs:
        value = inputs.get(tensor.name)
        if value is None:
            raise ExportError(
                f"{model.name}: example() gives no {tensor.name}",
                fix="Give an example for every input.",
            )
        expected = graphs.TORCH_DTYPES.get(tensor.dtype)
        if value.dtype != expected or value.ndim != len(tensor.axes):
            raise ExportError(
                f"{model.name}: example() gives {tensor.name} as {value.dtype} with {value.ndim} "
                f"axes, the contract says {tensor.dtype}{tensor.axes}",
                fix="Make the two agree.",
            )
