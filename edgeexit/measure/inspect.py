"""What is in a bundle, as plain data: segments, exits, what crosses each boundary, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from edgeexit.bundle.manifest import Chain, Exit, Segment, Tensor
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.bundle.reader import Bundle
from edgeexit.measure.check import REFERENCE
from edgeexit.measure.data import read_npz


def axis_sizes(bundle: Bundle, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes of the symbolic axes for one row: those given, else those of the reference sample."""
    sizes: dict[str, int] = {}
    if REFERENCE in bundle.manifest.samples:
        samples = read_npz(bundle.file(REFERENCE))
        for tensor in bundle.manifest.inputs:
            shape = samples[f"input/{tensor.name}"].shape
            sizes |= {a: n for a, n in zip(tensor.axes, shape, strict=True) if isinstance(a, str)}
    return sizes | {"batch": 1} | dict(given or {})


def describe(bundle: Bundle, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Everything `edgeexit inspect` shows. Sizes in bytes; None where an axis is not known.

    Args:
        bundle: The opened bundle.
        sizes: Size of every symbolic axis, from `axis_sizes`.
    """
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "digest": bundle.digest,
        "format": manifest.format,
        "task": manifest.task,
        "program": manifest.program,
        "inputs": [_tensor(tensor) for tensor in manifest.inputs],
        "outputs": [_tensor(tensor) for tensor in manifest.outputs],
        "axis_sizes": dict(sizes),
        "limits": manifest.limits,
        "chains": {name: _chain(bundle, chain, sizes) for name, chain in manifest.chains.items()},
        "unsplit": [_graph(bundle, variant.graph) for variant in manifest.unsplit],
        "weights_bytes": bundle.weights_bytes,
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
        "files": len(manifest.files) + 1,
        "labels": manifest.labels,
        "preprocessing": msgspec.to_builtins(manifest.preprocessing),
        "tokenizer": manifest.tokenizer,
        "chat": msgspec.to_builtins(manifest.chat),
        "policy": msgspec.to_builtins(manifest.policy),
        "provenance": manifest.provenance,
    }


def _chain(bundle: Bundle, chain: Chain, sizes: Mapping[str, int]) -> dict[str, Any]:
    program = {tensor.name for tensor in bundle.manifest.inputs}
    made: dict[str, Tensor] = {}
    segments = []
    for number, segment in enumerate(chain.segments):
        made |= {tensor.name: tensor for tensor in segment.outputs}
        later = {t.name for part in chain.segments[number + 1 :] for t in part.inputs} - program
        crossing = [made[name] for name in made if name in later]
        parts = [tensor_bytes(tensor, sizes) for tensor in crossing]
        segments.append(
            {
                "name": segment.name,
                "graphs": _graphs(bundle, segment),
                "projection": None
                if segment.projection is None
                else _graph(bundle, segment.projection.graph),
                "inputs": [tensor.name for tensor in segment.inputs],
                "exits": [
                    {
                        "name": leave.name,
                        "outputs": list(leave.outputs),
                        "scores": list(leave.scores),
                        "adapter": _adapter(bundle, leave),
                    }
                    for leave in segment.exits
                ],
                "boundary": [
                    _tensor(tensor) | {"bytes": size}
                    for tensor, size in zip(crossing, parts, strict=True)
                ],
                "cache_bytes_per_token": _cache_bytes(segment),
                "boundary_bytes": None if None in parts else sum(p for p in parts if p is not None),
            }
        )
    return {"rows": chain.rows, "segments": segments}


def _graphs(bundle: Bundle, segment: Segment) -> list[dict[str, Any]]:
    return [
        {"precision": variant.precision, "requires": variant.requires}
        | ({"caches": variant.caches} if segment.caches else {})
        | _graph(bundle, variant.graph)
        for variant in segment.variants
    ]


def _adapter(bundle: Bundle, leave: Exit) -> dict[str, Any] | None:
    """The layers with caches that an exit has for itself, if it has any."""
    if leave.adapter is None:
        return None
    part = bundle.manifest.heads[leave.adapter]
    return {
        "name": part.name,
        "graphs": _graphs(bundle, part),
        "cache_bytes_per_token": _cache_bytes(part),
    }


def _cache_bytes(segment: Segment) -> int:
    """What a part's caches take for one token of one row."""
    sizes = {"batch": 1, "past": 1}
    tensors = [Tensor(name=c.name, dtype=c.dtype, axes=c.axes) for c in segment.caches]
    return sum(tensor_bytes(tensor, sizes) or 0 for tensor in tensors)


def tensor_bytes(tensor: Tensor, sizes: Mapping[str, int]) -> int | None:
    """Bytes of a tensor for given axis sizes; None when one of its axes is not known."""
    shape = [sizes.get(axis) if isinstance(axis, str) else axis for axis in tensor.axes]
    if any(size is None for size in shape):
        return None
    item = 2 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).itemsize
    return math.prod(size for size in shape if size is not None) * item


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "axes": tensor.axes}


def _graph(bundle: Bundle, name: str) -> dict[str, Any]:
    path = bundle.file(name)
    found = read_graph_file(path.read_bytes())
    stored = {(tensor.offset, tensor.length or 0) for tensor in found.externals}
    return {
        "graph": name,
        "graph_bytes": path.stat().st_size,
        "weights_bytes": sum(length for _, length in stored),
    }
