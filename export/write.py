"""Exports a model: traces, lowers to a precision, quantises and writes the bundle.

`export` takes a `SplitModel` and returns the bundle, opened and checked: for classifiers, models
that write text, and both with encoders. `edgeexit.export.cut.export_onnx` exports an ONNX file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeexit import __version__
from edgeexit.bundle.manifest import File, ImagePreprocessing, Manifest, Place
from edgeexit.bundle.reader import Bundle, sha256_of
from edgeexit.bundle.writer import BundleWriter, check_output
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.contract import SplitModel, Stack, Table, Values
from edgeexit.export.describe import Precision, check, derived_of, manifest_of
from edgeexit.export.passes.quantise import quantise_bundle
from edgeexit.export.passes.quantisers import ActivationInt8, FewBits
from edgeexit.export.passes.weight_bits import WeightBits
from edgeexit.export.samples import REFERENCE, check_finite, torch_reference, write_samples
from edgeexit.export.text_files import TextFiles, write_text_files
from edgeexit.export.trace.component_graphs import graph_of_form, graph_of_projection
from edgeexit.export.trace.half import to_half
from edgeexit.export.trace.layer_graphs import Pieces
from edgeexit.export.trace.torch_graph import DEFAULT_OPSET, save_graph
from edgeexit.export.weights import WeightStore

logger = logging.getLogger(__name__)

OPSETS = range(18, 24)
Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, of)`` during an export."""
Calibration = Callable[[Bundle], Iterable[Mapping[str, NDArray[Any]]]]
"""Called with the float32 bundle; returns batches of inputs."""


def export(
    model: SplitModel,
    output: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    opset: int = DEFAULT_OPSET,
    calibration: Calibration | None = None,
    weights: WeightBits | Literal["float32"] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Splits a model at its exits and writes the bundle.

    Args:
        model: The model to split.
        output: The bundle's directory; must not exist unless `overwrite`.
        dtype: ``float32``, ``float16`` or ``int8``: what the graphs compute in. A program's inputs,
            answers and scores stay float32; of an int8 bundle also exit heads, adapters, states and
            whatever is no product with weights (`edgeexit.export.passes.quantise`).
        opset: ONNX opset of every graph, but for forms that need a newer one. 20 is read by ONNX
            Runtime 1.23 and TensorRT 10.3.
        calibration: With ``int8``: gives batches of inputs, on which ranges of activations are
            measured. With `weights`, if given: batches whose float32 answers are kept, to compare.
        weights: How weights are stored in 4 or 8 bits (`edgeexit.export.passes.weight_bits`), for
            ONNX Runtime and TensorRT; everything else is in `dtype`. None: as the checkpoint has
            them; what it has in few bits stays so in float32 bundles (`SplitModel.stored`), and
            other products get 8 bits. ``float32``: that becomes float32, too.

    Raises:
        ExportError: The model cannot be split; no partial files remain.
        UsageError: An option cannot be used, or there is too little data.
        OutputExistsError: `output` exists.
    """
    if weights == "float32":
        model, weights = dataclasses.replace(model, stored=None), None
    check_options(dtype, opset, calibration, weights)
    check(model)
    if model.stored is not None and weights is None and dtype == "float32":
        weights = WeightBits(bits=8)
    components = model.components
    count = sum(len(one.forms) + (one.projection is not None) for one in components) + 1
    if calibration is None and weights is None:
        tell = counter(progress, count)
        return _write(model, output, cast("Precision", dtype), opset, overwrite, tell)
    quantising = ActivationInt8() if weights is None else FewBits(weights, model.stored)
    if weights is None:
        check_int8(model)
    else:
        check_blocks(model, weights)
    check_output(Path(output), overwrite=overwrite)
    tell = counter(progress, count + len(components) + 2)
    with tempfile.TemporaryDirectory(prefix="edgeexit-") as scratch:
        given: Precision = "float32" if dtype == "int8" else cast("Precision", dtype)
        whole = _write(model, Path(scratch) / given, given, opset, False, tell)
        tell("calibration data")
        data = () if calibration is None else calibration(whole)
        with BundleWriter(output, overwrite=overwrite) as writer:
            made = quantise_bundle(whole, writer.folder, quantising, data, tell)
            return writer.commit(made)


def _write(
    model: SplitModel,
    output: str | os.PathLike[str],
    precision: Precision,
    opset: int,
    overwrite: bool,
    tell: Callable[[str], None],
) -> Bundle:
    """Writes the bundle of a model that was checked."""
    if precision == "float16":
        model = to_half(model)
    manifest = manifest_of(model, precision, provenance() | {"opset": str(opset)})
    with BundleWriter(output, overwrite=overwrite) as writer, torch.no_grad():
        text = _text_files(model, writer.folder)  # first: it is fast and may refuse
        store = WeightStore(writer.folder)
        reference, values = torch_reference(model, manifest)
        half = " Or it overflows in float16: use --dtype float32." if precision == "float16" else ""
        check_finite(reference, model.name, f"Check the model's weights for NaN.{half}")
        for path, graph in _graphs(model, manifest, values, opset, tell):
            store.externalize(graph.graph)
            save_graph(graph, str(writer.folder / path))
        steps = [
            step.step(store.place(ir.tensor(step.weight.contiguous())))
            if isinstance(step, Table)
            else step
            for step in model.steps
        ]
        tell("samples and manifest")
        samples = [write_samples(writer.folder, REFERENCE, reference)]
        if model.preprocessing_sample is not None:
            raw = model.preprocessing_sample
            samples.append(write_samples(writer.folder, "preprocessing", raw))
        decoding = manifest.decoding
        if decoding is not None:
            stop_tokens = dict.fromkeys([*decoding.stop_tokens, *text.stop_tokens])
            decoding = msgspec.structs.replace(decoding, stop_tokens=list(stop_tokens))
        return writer.commit(
            msgspec.structs.replace(
                manifest,
                steps=steps,
                decoding=decoding,
                samples=samples,
                tokenizer=text.tokenizer,
                chat=text.chat,
            )
        )


def _graphs(
    model: SplitModel,
    manifest: Manifest,
    values: Mapping[str, Values],
    opset: int,
    tell: Callable[[str], None],
) -> Iterator[tuple[str, ir.Model]]:
    """Traces the graphs of a model one by one, so that memory holds one at a time."""
    pieces, derived = Pieces(), derived_of(model)
    for component in model.components:
        described = manifest.components[component.name]
        count = len(component.forms)
        pairs = zip(component.forms, described.variants, strict=True)
        for number, (form, variant) in enumerate(pairs, start=1):
            tell(component.name + (f", form {number} of {count}" if count > 1 else ""))
            yield (
                variant.graph,
                graph_of_form(
                    component,
                    form,
                    opset=opset,
                    pieces=pieces,
                    values=values.get(component.name),
                    derived=derived[component.name],
                ),
            )
        for projection in described.projections:
            tell(f"{component.name}, projection")
            graph = graph_of_projection(component, opset=opset, pieces=pieces)
            yield projection.graph, graph


def describe_bundle(model: SplitModel, folder: Path) -> Bundle:
    """Writes a bundle without graphs to `folder`, for reading data before the export: inputs,
    preprocessing and tokenizer."""
    check(model)
    text = _text_files(model, folder)
    files = {
        path.relative_to(folder).as_posix(): File(sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }
    manifest = msgspec.structs.replace(
        manifest_of(model, "float32"), tokenizer=text.tokenizer, chat=text.chat, files=files
    )
    digest = hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()
    return Bundle(path=folder, manifest=manifest, digest=digest)


def _text_files(model: SplitModel, folder: Path) -> TextFiles:
    if model.tokenizer_folder is not None:
        return write_text_files(Path(model.tokenizer_folder), folder)
    if model.tokenizer is None:
        return TextFiles()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_bytes(model.tokenizer)
    return TextFiles(tokenizer="tokenizer/tokenizer.json")


def check_options(
    dtype: str,
    opset: int,
    calibration: Calibration | None = None,
    weights: WeightBits | None = None,
) -> None:
    """Refuses an unsupported precision or opset."""
    if dtype not in ("float32", "float16", "int8"):
        raise UsageError(f"dtype {dtype!r} is not known", fix="Use float32, float16 or int8.")
    if weights is not None and not isinstance(weights, WeightBits):
        raise UsageError(
            f"weights are {weights!r}", fix='Give WeightBits(4), WeightBits(8), "float32" or None.'
        )
    if weights is not None and dtype == "int8":
        raise UsageError(
            f"dtype {dtype} and weights in {weights.bits} bits exclude each other",
            fix="Leave dtype out, or use float16 for a GPU: what everything but weights is.",
        )
    if (dtype == "int8") != (calibration is not None) and weights is None:
        raise UsageError(
            f"dtype {dtype!r} {'needs' if calibration is None else 'takes no'} calibration",
            fix="Give calibration with dtype int8, and only then.",
        )
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} is out of range (18 to {OPSETS[-1]})",
            fix=f"Use {DEFAULT_OPSET}, which every supported engine reads.",
        )


def check_blocks(model: SplitModel, weights: WeightBits) -> None:
    """Refuses blocks that do not divide the rows of a model's weights, before it is traced."""
    if model.stored is not None:
        return  # such weights stay in floats
    for component in model.components:
        body = component.forms[-1].body
        parts = [*body.layers, body.head] if isinstance(body, Stack) else [body]
        for part in (part for part in parts if isinstance(part, torch.nn.Module)):
            for module in part.modules():
                if isinstance(module, torch.nn.Linear):
                    weights.block_of(module.in_features)


def check_int8(model: SplitModel) -> None:
    """Refuses a model whose activations cannot be quantised, before its data is read."""
    images = any(isinstance(one, ImagePreprocessing) for one in model.preprocessing)
    places = any(isinstance(step, Place) for step in model.steps)
    if places or (images and model.decoding is not None):
        raise ExportError(
            f"{model.name}: int8 is not supported for models that write text about images",
            fix="Use --weights int8 or int4, or export it in float32 or float16.",
        )


def provenance() -> dict[str, str]:
    """Versions of the exporting software, without names of people or machines."""
    found = {"edgeexit": __version__}
    for package in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def counter(progress: Progress | None, steps: int) -> Callable[[str], None]:
    """A function that logs the next step, and counts steps for `progress`."""
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        logger.info("%s", what)
        if progress is not None:
            progress(what, done, steps)
        done += 1

    return tell


__all__ = ["Calibration", "Progress", "describe_bundle", "export"]
