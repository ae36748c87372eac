"""An ONNX file with ordered exit outputs becomes a bundle: read, normalised, cut, compared.

`export_onnx` writes one; `cut_file` is its work, for those who describe the bundle themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from edgeexit.bundle.manifest import Chain, Manifest, Tensor, Variant
from edgeexit.bundle.manifest import Exit as ManifestExit
from edgeexit.bundle.manifest import Segment as ManifestSegment
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.cut.axis_names import resolve_shapes
from edgeexit.export.cut.cut import ANSWER, annotate, cut
from edgeexit.export.cut.prove_rows import close, prove_rows, run_graph, sample_inputs, tolerance_of
from edgeexit.export.cut.read_onnx import float_outputs, normalise, precision_of, read_onnx
from edgeexit.export.trace import torch_graph
from edgeexit.export.trace.scores import reference_scores
from edgeexit.export.weights import WeightStore
from edgeexit.export.write import Progress, counter, provenance, write_samples

SAMPLE_ROWS = 4


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
    tell = counter(progress, len(exits) + 4)
    with BundleWriter(output, overwrite=overwrite) as writer:
        manifest = cut_file(path, writer.folder, exits, samples=samples, labels=labels, tell=tell)
        described = msgspec.structs.replace(manifest, name=name or manifest.name, task=task)
        return writer.commit(described)


def cut_file(
    path: str | os.PathLike[str],
    folder: Path,
    exits: Sequence[str],
    *,
    samples: Mapping[str, np.ndarray] | None = None,
    labels: Sequence[str] = (),
    tell: Callable[[str], None] = lambda what: None,
) -> Manifest:
    """Cuts an ONNX file into the folder of a bundle that is being written.

    Args:
        path, exits, samples, labels: As for `export_onnx`.
        folder: Gets graphs, weights and samples.
        tell: Told what is being done.

    Returns:
        The manifest to commit; its name is the file's.
    """
    what = Path(path).name
    tell("reading")
    model = read_onnx(path)
    own_inputs = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
    own_outputs = {value.name for value in model.graph.outputs}
    model = normalise(model, exits, what)
    resolve_shapes(model)
    float_outputs(model.graph, what)
    names = {old: v.name or "" for old, v in zip(own_inputs, model.graph.inputs, strict=True)}
    leaves = {old: v.name or "" for old, v in zip(exits, model.graph.outputs, strict=True)}
    store = WeightStore(folder)
    store.externalize(model.graph)
    inputs = sample_inputs(model.graph, SAMPLE_ROWS, samples, names)
    tell("running the file on samples")
    if own_outputs.issuperset(exits):
        [made] = run_graph(path, [{old: inputs[new] for old, new in names.items()}])
        answers = {new: made[old] for old, new in leaves.items()}
    else:
        whole = folder / "graphs/whole.onnx"
        torch_graph.save_graph(model, str(whole))
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
    paths = [folder / f"graphs/{piece.name}.onnx" for piece in pieces.pieces]
    for piece, place in zip(pieces.pieces, paths, strict=True):
        tell(f"segment {piece.name}")
        torch_graph.save_graph(piece.model, str(place))
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
        torch_graph.save_graph(piece.model, str(place))
    answer = msgspec.structs.replace(tensors[pieces.pieces[-1].exit], name=ANSWER)
    annotate(pieces.unsplit, tensors | {ANSWER: answer})
    torch_graph.save_graph(pieces.unsplit, str(folder / "graphs/unsplit.onnx"))
    tell("samples and manifest")
    arrays = {f"input/{key}": value for key, value in inputs.items()}
    for leave, logits in answers.items():
        arrays[f"{leave}/{ANSWER}"] = logits
        arrays |= {f"{leave}/{s}": value for s, value in reference_scores(logits).items()}
    arrays[f"unsplit/{ANSWER}"] = answers[pieces.pieces[-1].exit]
    sample_file = write_samples(folder, "reference", arrays)
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
    return Manifest(
        format="1.0",
        name=Path(path).stem,
        task="classification",
        program="forward",
        inputs=[tensors[key] for key in pieces.inputs],
        outputs=[answer],
        chains={
            "main": Chain(segments=parts, rows="independent" if proof.independent else "together")
        },
        unsplit=[Variant(graph="graphs/unsplit.onnx", precision=precision)],
        files={},
        labels=list(labels),
        samples=[sample_file],
        provenance=provenance() | {"source": what, "opset": opset},
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
