"""Exports an ONNX file with ordered exit outputs: `export_onnx` reads, normalises and cuts it,
compares the segments with it, and writes the bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.manifest import Chain, Component, Exit, Manifest, Run, Tensor, Variant
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.cut.axis_names import resolve_shapes
from edgeexit.export.cut.compare_samples import compare_samples
from edgeexit.export.cut.cut import ANSWER, Cut, annotate, cut
from edgeexit.export.cut.find_rows import BATCH, Rows, find_rows, name_axes, set_rows, told_rows
from edgeexit.export.cut.opsets import EXPORT_AGAIN
from edgeexit.export.cut.probabilities import Outputs, gives_probabilities
from edgeexit.export.cut.prove_rows import Proof, prove_rows
from edgeexit.export.cut.read_onnx import float_outputs, normalise, precision_of, read_onnx
from edgeexit.export.cut.run_file import OnnxFile, file_answers, open_file
from edgeexit.export.describe import FORMAT, Precision
from edgeexit.export.evaluate import close, tolerance_of
from edgeexit.export.library_errors import translated
from edgeexit.export.samples import (
    REFERENCE,
    SAMPLE_ROWS,
    check_finite,
    reference_sample,
    write_samples,
)
from edgeexit.export.trace import torch_graph
from edgeexit.export.weights import WeightStore
from edgeexit.export.write import Progress, counter, provenance

UNSPLIT = "unsplit"
NOT_FINITE = (
    "Check the model's weights and the samples for NaN; float16 overflows above 65504. If "
    "generated inputs do not suit the model, give real ones: --data."
)
Arrays = dict[str, NDArray]


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
    outputs: Outputs | None = None,
    rows: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Cuts an ONNX file at its exits and writes the bundle.

    The bundle keeps the file's opset (below 18 it is converted to 18) and precision; exits and
    scores are always float32. The segments' outputs are compared with the file's before the bundle
    is written.

    Args:
        path: The ONNX file; its weights may be stored in files beside it.
        output: The bundle's directory; must not exist unless `overwrite`.
        exits: Names of the tensors that hold an exit's logits ``[batch, classes]``, from shallow to
            deep; the last one is the model's own output. Inner tensors are accepted too.
        name: The bundle's name; None: the file's name.
        samples: Input name -> array with two rows or more, to compute the reference from; None:
            inputs are generated.
        labels: Names of the classes.
        outputs: What exits give: ``logits`` or ``probabilities``. None: find out
            (`edgeexit.export.cut.probabilities`).
        rows: Input or exit -> its row axis; None: find it by running the file. A fixed axis of an
            input becomes dynamic, if the file's outputs stay the same.

    Raises:
        UsageError: `path`, `exits`, `rows` or `samples` are invalid.
        ExportError: The file cannot be cut there; nothing is left behind.
        OutputExistsError: `output` exists.
    """
    check_exits(exits)
    tell = counter(progress, len(exits) + 4)
    with BundleWriter(output, overwrite=overwrite) as writer:
        tell("reading")
        source = _read(path, exits, rows or {}, samples, writer.folder)
        inputs = source.rows.inputs
        fix = "Copy the file and its weights again, or export it again."
        with translated(source.what, "its weights cannot be read", fix):
            WeightStore(writer.folder).externalize(source.model.graph)
        tell("running the file on samples")
        answers = _answers(source, labels)
        probabilities = gives_probabilities(source.model.graph, answers, outputs, source.what)
        pieces = cut(source.model, source.what, probabilities=probabilities)
        precision = precision_of(source.model)
        inputs = {name: inputs[name] for name in pieces.inputs}
        proof = _write_segments(source, pieces, writer.folder, inputs, answers, precision, tell)
        tell("samples and manifest")
        reference = {name: a.astype(np.float32, copy=False) for name, a in source.reference.items()}
        last = reference[pieces.pieces[-1].exit]
        named = {exit_: {ANSWER: logits} for exit_, logits in reference.items()}
        sample = reference_sample(
            inputs,
            named | {UNSPLIT: {ANSWER: last}},
            every_token=False,
            probabilities=probabilities,
        )
        paths = _paths(pieces, writer.folder)
        proof = compare_samples(pieces, paths, inputs, sample, proof, precision, source.what)
        described = _manifest(source, pieces, proof, precision)
        return writer.commit(
            msgspec.structs.replace(
                described,
                name=name or described.name,
                task=task,
                labels=list(labels),
                samples=[write_samples(writer.folder, REFERENCE, sample)],
            )
        )


@dataclass(frozen=True)
class _Source:
    """An ONNX file, ready to be cut.

    Attributes:
        path: The file.
        what: Its name, for messages.
        model: Normalised, with resolved shapes and float32 exits.
        rows: The row axis, sample inputs, and the file's outputs for them with unfused operators.
        reference: The file's outputs with ONNX Runtime's default optimisation.
    """

    path: Path
    what: str
    model: ir.Model
    rows: Rows
    reference: Arrays


def _read(
    path: str | os.PathLike[str],
    exits: Sequence[str],
    told: Mapping[str, int],
    samples: Mapping[str, NDArray] | None,
    folder: Path,
) -> _Source:
    what = Path(path).name
    model = read_onnx(path)
    own_inputs = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
    model = normalise(model, exits, what, turned={n: told[n] for n in exits if n in told})
    if len(own_inputs) != len(model.graph.inputs):
        raise ExportError(
            f"{what}: not a complete ONNX model: {len(own_inputs)} inputs without weights, "
            f"{len(model.graph.inputs)} after weights were removed",
            fix="Copy or export the file again.",
        )
    inputs = {old: v.name or "" for old, v in zip(own_inputs, model.graph.inputs, strict=True)}
    name_axes(model.graph, what, samples, inputs)
    named = {inputs.get(name, name): axis for name, axis in told.items()}
    opened = told_rows(model.graph, named, exits, what)
    file = OnnxFile(
        path=Path(path),
        inputs=inputs,
        exits={old: v.name or "" for old, v in zip(exits, model.graph.outputs, strict=True)},
        told=told,
    )
    run = open_file(file, model, folder)
    rows = find_rows(
        model.graph,
        run,
        SAMPLE_ROWS,
        samples,
        inputs,
        what,
        told=named,
        step=max(opened.values(), default=1),
    )
    reference = file_answers(file, model, folder, rows, opened)
    set_rows(model.graph, rows)
    with translated(what, "its shapes cannot be inferred", EXPORT_AGAIN):
        resolve_shapes(model)
    float_outputs(model.graph, what)
    return _Source(path=Path(path), what=what, model=model, rows=rows, reference=reference)


def _answers(source: _Source, labels: Sequence[str]) -> Arrays:
    """The file's outputs at every exit, checked; sets the shapes of the graph's exits."""
    answers, rows = dict(source.rows.exits), source.rows.count
    for exit_, fused in source.reference.items():
        worse = (
            fused
            if np.isfinite(fused).sum() < np.isfinite(answers[exit_]).sum()
            else answers[exit_]
        )
        check_finite({f"{exit_}/{ANSWER}": worse}, source.what, NOT_FINITE)
    for value in source.model.graph.outputs:
        name = value.name or ""
        answers[name] = _check_logits(value, answers[name], rows, source.what)
    _check_classes(answers, source.what)
    classes = next(iter(answers.values())).shape[-1]
    if labels and len(labels) != classes:
        raise UsageError(
            f"{len(labels)} labels for the {classes} classes of {source.what}",
            fix="Give one label per class, in the order of the logits.",
        )
    return answers


def _write_segments(
    source: _Source,
    pieces: Cut,
    folder: Path,
    inputs: Mapping[str, NDArray],
    answers: Mapping[str, NDArray],
    precision: str,
    tell: Callable[[str], None],
) -> Proof:
    """Writes the graphs, and compares the segments' outputs with the file's."""
    paths = _paths(pieces, folder)
    for piece, place in zip(pieces.pieces, paths, strict=True):
        tell(f"segment {piece.name}")
        torch_graph.save_graph(piece.model, str(place))
    tell("comparing the segments with the file")
    tolerance = tolerance_of(source.model.graph, precision)
    proof = prove_rows(pieces, paths, inputs, source.what, tolerance)
    for exit_, expected in answers.items():
        if not close(proof.values[exit_], expected, tolerance):
            raise _differs(exit_, proof.values[exit_], expected, source.what)
    scores = [name for piece in pieces.pieces for name in piece.scores.values()]
    answer = proof.tensors[pieces.pieces[-1].exit]
    for name in scores:
        proof.tensors[name] = Tensor(name=name, dtype="float32", axes=["batch"])
    for piece, place in zip(pieces.pieces, paths, strict=True):
        annotate(piece.model, proof.tensors)
        torch_graph.save_graph(piece.model, str(place))
    annotate(pieces.unsplit, proof.tensors | {ANSWER: answer})
    torch_graph.save_graph(pieces.unsplit, str(folder / f"graphs/{UNSPLIT}.onnx"))
    return proof


def _paths(pieces: Cut, folder: Path) -> list[Path]:
    return [folder / f"graphs/{piece.name}.onnx" for piece in pieces.pieces]


def _manifest(source: _Source, pieces: Cut, proof: Proof, precision: Precision) -> Manifest:
    """The manifest, without name, task, labels and samples."""
    tensors = proof.tensors
    inputs = [tensors[name] for name in pieces.inputs]
    answer = msgspec.structs.replace(tensors[pieces.pieces[-1].exit], name=ANSWER)

    def component(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Component:
        variant = Variant(graph=f"graphs/{name}.onnx", precision=precision)
        return Component(variants=[variant], inputs=inputs, outputs=outputs)

    components = {
        piece.name: component(
            piece.name,
            [tensors[name] for name in piece.inputs],
            [tensors[value.name or ""] for value in piece.model.graph.outputs],
        )
        for piece in pieces.pieces
    }
    chain = Chain(
        components=list(components),
        outputs=[answer],
        exits=[
            Exit(
                name=piece.exit,
                behind=piece.name,
                outputs={ANSWER: piece.exit},
                scores=piece.scores,
            )
            for piece in pieces.pieces
        ],
        unsplit=[UNSPLIT],
        rows="independent" if proof.independent else "together",
    )
    whole = component(UNSPLIT, inputs, [answer])
    return Manifest(
        format=FORMAT,
        name=source.path.stem,
        task="classification",
        inputs=inputs,
        components=components | {UNSPLIT: whole},
        chains={"main": chain},
        steps=[Run(chain="main")],
        files={},
        limits={BATCH: 1} if source.rows.one else {},
        provenance=provenance()
        | {"source": source.what, "opset": str(source.model.graph.opset_imports[""])},
    )


def check_exits(exits: Sequence[str]) -> None:
    """Refuses invalid names of exits."""
    if isinstance(exits, str):
        raise UsageError("exits is one string", fix=f"Give a list: exits={exits.split(',')}.")
    for exit_ in exits:
        if not isinstance(exit_, str) or not exit_:
            raise UsageError(f"exits: {exit_!r} is not a name", fix="Give names of outputs.")
        if list(exits).count(exit_) > 1:
            raise UsageError(
                f"exits: {exit_} is given twice",
                fix="Name each exit once; in --exits, put a name with a comma in double quotes.",
            )
    if len(exits) < 2:
        raise UsageError(
            f"exits: there is no early exit ({', '.join(exits) or 'none'} given)",
            fix="Name two outputs or more, from shallow to deep, the model's output last, as in "
            "--exits logits_3,logits_6,logits.",
        )


def _check_logits(value: ir.Value, found: np.ndarray, rows: int, what: str) -> np.ndarray:
    """Sets an exit's shape from its values; refuses values that are not logits per row."""
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
    for exit_, found in early:
        if found.shape != logits.shape:
            raise ExportError(
                f"{what}: exit {exit_} has {found.shape[1]} classes, the last exit ({last}) "
                f"{logits.shape[1]}",
                fix="Name tensors with logits of the same classes.",
            )


def _differs(exit_: str, found: np.ndarray, expected: np.ndarray, what: str) -> ExportError:
    if found.shape == expected.shape:
        off = f"by up to {np.nanmax(np.abs(found.astype(np.float64) - expected)):.3g}"
    else:
        off = f"shape {list(found.shape)}, not {list(expected.shape)}"
    return ExportError(
        f"{what}: exit {exit_} of the segments differs from the original model ({off})",
        fix="This is a bug in edgeexit; please report it with the tool that wrote the file.",
    )
