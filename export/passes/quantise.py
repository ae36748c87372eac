"""int8 bundles: products of weights and activations in 8 bits, everything else in float32.

The model is exported in float32, put together again with all its exits, quantised by ONNX Runtime's
quantiser with ranges measured on the user's data, and cut anew by ancestry. So segments and unsplit
share every scale, and no cut comes between a QuantizeLinear and its DequantizeLinear. Scales are
symmetric and per channel for weights, which is what TensorRT takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter, check_output
from edgeexit.errors import ExportError, UsageError, first_line
from edgeexit.export.contract import ExitModel
from edgeexit.export.cut.export_onnx import cut_file
from edgeexit.export.cut.prove_rows import run_graph
from edgeexit.export.cut.read_onnx import quiet
from edgeexit.export.passes.merge import merge
from edgeexit.export.trace import torch_graph
from edgeexit.export.trace.scores import reference_scores
from edgeexit.export.write import Progress, counter, export_model, provenance, write_samples

CALIBRATION_ROWS = 256
COMPARED_ROWS, COMPARED_BYTES = 256, 4 << 20
"""Rows whose float32 answers the bundle keeps, so that a device can tell which decisions flip."""

FLOAT32_SAMPLE = "float32"
QUANTISED = ["MatMul", "Gemm", "Conv"]
Rows = Mapping[str, NDArray[Any]]


def export_int8(
    model: ExitModel,
    output: str | os.PathLike[str],
    *,
    calibration: Callable[[Bundle], Iterable[Rows]],
    opset: int = torch_graph.DEFAULT_OPSET,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Splits a model at its exits and writes the bundle in int8.

    Exit heads, scores, normalisations and products of two activations (attention's) stay in
    float32.

    Args:
        model: What to split: one chain whose exits give ``logits``.
        output: The bundle's directory; must not exist unless `overwrite`.
        calibration: Gives batches of inputs for the float32 bundle that it is handed. The first
            `CALIBRATION_ROWS` rows set the ranges of activations; those behind them are run in
            float32, and the answers kept in the bundle for ``edgeexit check``.
        opset: ONNX opset.

    Raises:
        ExportError: The model cannot be split, or the quantiser refuses it; nothing is left behind.
        UsageError: There is too little data.
        OutputExistsError: `output` exists.
    """
    check_output(Path(output), overwrite=overwrite)
    tell = counter(progress, 6 + sum(map(len, model.chains.values())))
    with tempfile.TemporaryDirectory(prefix="edgeexit-") as kept:
        folder = Path(kept)
        whole = export_model(
            model, folder / "float32", opset=opset, progress=lambda what, done, of: tell(what)
        )
        source, heads = _merged(whole, folder)
        first, rest = _split(calibration(whole), model.name)
        tell("ranges of activations")
        quantised = folder / "int8" / f"{model.name.replace('/', '_')}.onnx"
        quantised.parent.mkdir()
        quantise(source, quantised, first, heads)
        exits = [leave.name for leave in whole.exits()]
        with BundleWriter(output, overwrite=overwrite) as writer:
            manifest = cut_file(quantised, writer.folder, exits, samples=first[0], tell=tell)
            tell("answers in float32")
            samples = [*manifest.samples, _compare(source, writer.folder, rest, exits)]
            described = whole.manifest
            for name in (described.tokenizer, *described.samples):
                if name is not None and not (writer.folder / name).exists():
                    (writer.folder / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(whole.file(name), writer.folder / name)
                    samples += [name] if name.startswith("samples/") else []
            about = {"calibration_rows": str(_count(first)), "opset": str(opset)}
            return writer.commit(
                msgspec.structs.replace(
                    manifest,
                    name=described.name,
                    task=described.task,
                    limits=described.limits,
                    labels=described.labels,
                    preprocessing=described.preprocessing,
                    tokenizer=described.tokenizer,
                    samples=samples,
                    provenance=provenance() | dict(model.provenance) | about,
                )
            )


def _merged(bundle: Bundle, folder: Path) -> tuple[Path, list[str]]:
    """The float32 graph with every exit, named as the exits are, and the nodes of heads."""
    if len(bundle.manifest.chains) != 1:
        raise ExportError(
            f"{bundle.manifest.name}: only models of one chain become int8",
            fix="Export it in float32 or float16.",
        )
    [chain] = bundle.manifest.chains.values()
    logits = {leave.name: leave.outputs.get("logits", "") for leave in bundle.exits()}
    if missing := [name for name, tensor in logits.items() if not tensor]:
        raise ExportError(
            f"{bundle.manifest.name}: exit {missing[0]} gives no logits, by which int8 bundles are "
            "cut",
            fix="Export it in float32 or float16.",
        )
    parts = [ir.load(bundle.file(part.variants[0].graph)) for part in chain.segments]
    model = merge(parts, list(logits.values()), name=bundle.manifest.name)
    for value, name in zip(model.graph.outputs, logits, strict=True):
        value.name = name
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.name}.{number}"  # the quantiser finds nodes by name
    path = folder / "whole.onnx"
    ir.save(model, path, external_data="whole.data")
    return path, _heads(model.graph)


def _heads(graph: ir.Graph) -> list[str]:
    """Nodes that only one exit needs, the last exit's product with its weights among them.

    Everything behind the last boundary is needed by the last exit alone; of that the head is what
    comes with and after the last product.
    """
    needs = [_ancestors(value) for value in graph.outputs]
    found: set[str] = set()
    for number, needed in enumerate(needs[:-1]):
        later = set[ir.Node]().union(*needs[number + 1 :])
        found |= {str(node.name) for node in needed - later}
    products = [node for node in graph if node in needs[-1] and node.op_type in QUANTISED]
    found |= {str(node.name) for node in products[-1:]}
    return sorted(found)


def _ancestors(value: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    open_ = [value]
    while open_:
        node = open_.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            open_ += [one for one in node.inputs if one is not None]
    return found


def _split(batches: Iterable[Rows], what: str) -> tuple[list[Rows], list[Rows]]:
    """Batches that set ranges, and batches to compare: others, where there are more."""
    first: list[Rows] = []
    rest: list[Rows] = []
    left = iter(batches)
    for batch in left:
        first.append(batch)
        if _count(first) >= CALIBRATION_ROWS:
            break
    held = 0
    for batch in left:
        rest.append(batch)
        held += sum(value.nbytes for value in batch.values())
        if _count(rest) >= COMPARED_ROWS or held >= COMPARED_BYTES:
            break
    if _count(first) < 2:
        raise UsageError(
            f"{what}: int8 needs data to measure the ranges of activations, two rows at least",
            fix=f"Give --calibration-data with some hundred rows ({CALIBRATION_ROWS} are used).",
        )
    return first, rest or first


def _count(batches: Iterable[Rows]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


def quantise(source: Path, target: Path, batches: Sequence[Rows], excluded: list[str]) -> None:
    """Quantises an ONNX file, with ranges of activations measured on these batches.

    Args:
        source: The file, in float32; names of its nodes are unique.
        target: Where the new one goes, with its weights beside it.
        batches: Inputs.
        excluded: Names of nodes that stay as they are; so do products of two activations.

    Raises:
        ExportError: The quantiser refuses it.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Rows] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(batch)

    try:
        with quiet(), _hushed():
            quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTISED,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*excluded, *_of_activations(source)],
                use_external_data_format=True,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
    except Exception as error:
        raise ExportError(
            f"{source.stem}: the quantiser refuses it ({first_line(error)})",
            fix="Export it in float32 or float16.",
        ) from error


def _of_activations(source: Path) -> list[str]:
    """Products that no weight takes part in: attention's own."""
    graph = ir.load(source).graph
    return [
        str(node.name)
        for node in graph
        if node.op_type in QUANTISED
        and not any(value is not None and value.is_initializer() for value in node.inputs[:2])
    ]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keeps the quantiser's advice, which it gives to the root logger, from users' terminals."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _compare(source: Path, folder: Path, batches: list[Rows], exits: list[str]) -> str:
    """Keeps inputs, and what every exit answers to them in float32."""
    made = run_graph(source, batches)
    arrays: dict[str, NDArray[Any]] = {}
    for name in batches[0]:
        arrays[f"input/{name}"] = _stacked([np.asarray(batch[name]) for batch in batches])
    for leave in exits:
        logits = _stacked([answers[leave] for answers in made])
        arrays[f"{leave}/logits"] = logits
        arrays |= {f"{leave}/{s}": value for s, value in reference_scores(logits).items()}
    return write_samples(folder, FLOAT32_SAMPLE, arrays)


def _stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of all batches. Batches of texts differ in length: the shorter ones get more padding,
    zeros, which their masks leave out."""
    most = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
    padded = [
        np.pad(part, [(0, 0), *((0, m - n) for m, n in zip(most, part.shape[1:], strict=True))])
        for part in parts
    ]
    return np.concatenate(padded)


__all__ = ["CALIBRATION_ROWS", "QUANTISED", "export_int8", "quantise"]
