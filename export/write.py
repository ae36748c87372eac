"""Everything into a bundle: graphs, weights, samples, manifest.

`export_model` takes the segment contract, one segment in memory at a time, and gives the bundle
back opened and checked. `edgeexit.export.cut.export_onnx` writes the same bundle from an ONNX file.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from edgeexit import __version__
from edgeexit.bundle.manifest import Chain, Manifest, Tensor, Variant
from edgeexit.bundle.manifest import Exit as ManifestExit
from edgeexit.bundle.manifest import Segment as ManifestSegment
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.contract import Exit, ExitModel, Segment
from edgeexit.export.trace import torch_graph
from edgeexit.export.trace.half import to_float16
from edgeexit.export.trace.scores import reference_scores
from edgeexit.export.weights import WeightStore

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
    opset: int = torch_graph.DEFAULT_OPSET,
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
                graph = torch_graph.graph_from_segment(segment, values, opset=opset)
                _write(graph, store, writer.folder / path)
                made = segment.module(*(values[tensor.name] for tensor in segment.inputs))
                made = made if isinstance(made, tuple) else (made,)
                values |= {t.name: v for t, v in zip(segment.outputs, made, strict=True)}
                reference |= _reference(segment, values)
                parts.append(_manifest_segment(segment, path, dtype))
            chains[chain_name] = Chain(segments=parts)
        tell("unsplit")
        graph = torch_graph.graph_from_module(
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


def check_options(dtype: str, opset: int) -> None:
    """Refuses a precision or opset that no graph here can have."""
    if dtype not in ("float32", "float16"):
        raise UsageError(f"dtype {dtype!r} is not known", fix="Use float32 or float16.")
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} cannot be written (18 to {OPSETS[-1]} can)",
            fix=f"Use {torch_graph.DEFAULT_OPSET}, which every supported engine reads.",
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


def _write(model: ir.Model, store: WeightStore, path: Path) -> None:
    store.externalize(model.graph)
    torch_graph.save_graph(model, str(path))


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
        for tensor in torch_graph.score_tensors(leave).values()
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
        name=leave.name, outputs=dict(leave.outputs), scores=torch_graph.score_tensors(leave)
    )


def _check_example(model: ExitModel, inputs: Mapping[str, torch.Tensor]) -> None:
    for tensor in model.inputs:
        value = inputs.get(tensor.name)
        if value is None:
            raise ExportError(
                f"{model.name}: example() gives no {tensor.name}",
                fix="Give an example for every input.",
            )
        expected = torch_graph.TORCH_DTYPES.get(tensor.dtype)
        if value.dtype != expected or value.ndim != len(tensor.axes):
            raise ExportError(
                f"{model.name}: example() gives {tensor.name} as {value.dtype} with {value.ndim} "
                f"axes, the contract says {tensor.dtype}{tensor.axes}",
                fix="Make the two agree.",
            )
