"""Describes a bundle as plain data: components, exits, tensors at boundaries, weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edgeexit.bundle.files import read_npz
from edgeexit.bundle.manifest import (
    ITEM_BYTES,
    Chain,
    Component,
    Exit,
    Gather,
    PromptState,
    Run,
    Step,
    Tensor,
    TokenState,
    Variant,
)
from edgeexit.bundle.onnx_wire import read_graph_file
from edgeexit.bundle.reader import Bundle
from edgeexit.measure.check import REFERENCE


def axis_sizes(bundle: Bundle, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes of the symbolic axes for one row: as given, else as in the reference sample."""
    sizes: dict[str, int] = {}
    if REFERENCE in bundle.manifest.samples:
        samples = read_npz(bundle.file(REFERENCE))
        for tensor in bundle.manifest.inputs:
            shape = samples[f"input/{tensor.name}"].shape
            sizes |= {a: n for a, n in zip(tensor.axes, shape, strict=True) if isinstance(a, str)}
    return sizes | {"batch": 1} | dict(given or {})


def describe(bundle: Bundle, sizes: Mapping[str, int]) -> dict[str, Any]:
    """All data of `edgeexit inspect`. Sizes are in bytes; None if an axis size is unknown.

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
        "writes": manifest.decoding is not None,
        "steps": [_step(step) for step in manifest.steps],
        "inputs": [_tensor(tensor) for tensor in manifest.inputs],
        "outputs": [_tensor(tensor) for tensor in manifest.outputs],
        "axis_sizes": dict(sizes),
        "limits": manifest.limits,
        "capacity": manifest.decoding and manifest.decoding.capacity,
        "layers_without_attention": _without_attention(bundle),
        "chains": {name: _chain(bundle, chain, sizes) for name, chain in manifest.chains.items()},
        "weights_bytes": weights_bytes(bundle),
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
        "files": len(manifest.files) + 1,
        "labels": manifest.labels,
        "preprocessing": msgspec.to_builtins(manifest.preprocessing),
        "images": _images(bundle),
        "choices": _choices(bundle),
        "tokenizer": manifest.tokenizer,
        "chat": msgspec.to_builtins(manifest.chat),
        "provenance": manifest.provenance,
    }


def _without_attention(bundle: Bundle) -> list[int]:
    """Numbers of the layers that keep nothing per token, as far as names tell: export names states
    ``layer_N/...`` and exits ``exit_N``, after the layer that they belong to."""
    if bundle.manifest.decoding is None:
        return []
    chain = bundle.manifest.last_chain
    states = [
        state for name in chain.components for state in bundle.manifest.components[name].states
    ]
    kept = _numbers("layer", [state.name for state in states if isinstance(state, TokenState)])
    read = [state.tensor.name for state in states if isinstance(state, PromptState)]
    layers = {*kept, *_numbers("layer", read), *_numbers("exit", [e.name for e in chain.stops])}
    return sorted(set(range(1, max(layers) + 1)) - kept) if kept else []


def _numbers(kind: str, names: Sequence[str]) -> set[int]:
    """The numbers in ``KIND_N`` at the beginning of names."""
    found = (re.match(rf"{kind}_([0-9]{{1,4}})(/|$)", name) for name in names)
    return {int(match[1]) for match in found if match is not None}


def _choices(bundle: Bundle) -> dict[str, Any]:
    """What a text may begin with: per choice, its options and their default."""
    decoding = bundle.manifest.decoding
    if decoding is None:
        return {}
    return {
        name: {"options": list(choice.options), "default": choice.default}
        for name, choice in decoding.choices.items()
    }


def _images(bundle: Bundle) -> dict[str, Any] | None:
    """Images in prompts, or one with each prompt; None if the model takes none, or only as
    inputs."""
    manifest, name = bundle.manifest, bundle.manifest.vision_chain
    groups = [] if manifest.decoding is None else list(manifest.decoding.groups.values())
    written = next((group.image for group in groups if group.image is not None), None)
    if name is None or (written is None and groups):
        return None
    preprocessing = manifest.image_preprocessing
    tiles = None if preprocessing is None else preprocessing.tiles
    most = 1 if tiles is None else tiles.most
    tokens = manifest.chains[name].outputs[0].axes[1]
    assert isinstance(tokens, int)
    return {
        "tokens": tokens,
        "most_tiles": most,
        "most_tokens": tokens * (most + (most > 1)),
        "placeholder": None if written is None else written.placeholder,
        "in_front": written is not None and written.in_front,
    }


def weights_bytes(bundle: Bundle) -> int:
    """Bytes of a bundle's weights: the weight store, which holds each tensor once, and tensors too
    small for it. Graphs hold those themselves; they are counted in the first form of every
    component, not again in other forms and in the unsplit graphs."""
    manifest = bundle.manifest
    unsplit = {name for chain in manifest.chains.values() for name in chain.unsplit}
    graphs = set()
    for name, component in manifest.components.items():
        if name not in unsplit:
            graphs.add(component.variants[0].graph)
            graphs |= {variant.graph for variant in component.projections[:1]}
    read = (read_graph_file(bundle.file(graph).read_bytes()) for graph in sorted(graphs))
    return bundle.weights_bytes + sum(graph.inline_bytes for graph in read)


def bytes_by_part(bundle: Bundle) -> dict[str, Any]:
    """Bytes of each part of a model: weights per chain (those of exits and makers of states
    included; what parts share counts in each), tables of embeddings, states per token of a row, and
    what the chains before the text pass on for a row."""
    manifest = bundle.manifest
    weights: dict[str, int] = {}
    for name, chain in manifest.chains.items():
        names = [*chain.components]
        names += [call.component for exit_ in chain.exits for call in exit_.path]
        states = [state for own in names for state in manifest.components[own].states]
        names += [state.maker for state in states if isinstance(state, PromptState)]
        graphs = [manifest.components[own].variants[0].graph for own in dict.fromkeys(names)]
        weights[name] = sum(_graph(bundle, graph)["weights_bytes"] for graph in graphs)
    tables = {(s.offset, s.size): s for s in manifest.steps if isinstance(s, Gather)}.values()
    earlier = [s.chain for s in manifest.steps if isinstance(s, Run) and s.when == "input"]
    sizes = axis_sizes(bundle, {"batch": 1})
    return {
        "weights": weights,
        "tables": sum(
            s.size * int(s.output.axes[-1] or 0) * ITEM_BYTES[s.output.dtype] for s in tables
        ),
        "states_per_token": sum(
            _state_bytes(manifest.components[name]) for name in manifest.last_chain.components
        ),
        "passed_on": {
            tensor.name: tensor_bytes(tensor, sizes)
            for name in earlier
            for tensor in manifest.chains[name].outputs
        },
    }


def _step(step: Step) -> str:
    """A step of the program, for people."""
    if isinstance(step, Run):
        return f"run {step.chain} ({step.when})"
    if isinstance(step, Gather):
        return f"gather {step.output.name} for {step.ids} ({step.when})"
    return f"place {step.source} at {step.group} of {step.target} (prompt)"


def _chain(bundle: Bundle, chain: Chain, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Components in order, each with the tensors behind it and its exits."""
    components = bundle.manifest.components
    made: dict[str, Tensor] = {}
    found = []
    for number, name in enumerate(chain.components):
        component = components[name]
        made |= {tensor.name: tensor for tensor in component.outputs}
        later = _taken(bundle, chain, chain.components[number + 1 :])
        crossing = [_one_row(bundle, made[tensor]) for tensor in made if tensor in later]
        parts = [tensor_bytes(tensor, sizes) for tensor in crossing]
        found.append(
            {
                "name": name,
                **_component(bundle, component),
                "exits": [_exit(bundle, e) for e in chain.exits if e.behind == name],
                "boundary": [
                    _tensor(tensor) | {"bytes": size}
                    for tensor, size in zip(crossing, parts, strict=True)
                ],
                "boundary_bytes": None if None in parts else sum(p for p in parts if p is not None),
            }
        )
    return {
        "rows": chain.rows,
        "outputs": [_tensor(tensor) for tensor in chain.outputs],
        "components": found,
        "unsplit": [graph for name in chain.unsplit for graph in _graphs(bundle, components[name])],
    }


def _one_row(bundle: Bundle, tensor: Tensor) -> Tensor:
    """A tensor of a file with a fixed batch of 1, whose first axis then has no name."""
    if bundle.manifest.limits.get("batch") != 1 or tensor.axes[:1] != [None]:
        return tensor
    return msgspec.structs.replace(tensor, axes=[1, *tensor.axes[1:]])


def _taken(bundle: Bundle, chain: Chain, names: Sequence[str]) -> set[str]:
    """Tensors that components, and the paths of exits behind them, take."""
    components = bundle.manifest.components
    taken = {tensor.name for name in names for tensor in components[name].inputs}
    calls = [call for exit_ in chain.exits if exit_.behind in names for call in exit_.path]
    for call in calls:
        inputs = components[call.component].inputs
        taken |= {call.inputs.get(tensor.name, tensor.name) for tensor in inputs}
    return taken


def _component(bundle: Bundle, component: Component) -> dict[str, Any]:
    prompt = [state for state in component.states if isinstance(state, PromptState)]
    return {
        "graphs": _graphs(bundle, component),
        "projections": _variants(bundle, component.projections),
        "inputs": [tensor.name for tensor in component.inputs],
        "state_bytes_per_token": _state_bytes(component),
        "prompt_states": [{"name": state.tensor.name, "made_by": state.maker} for state in prompt],
    }


def _exit(bundle: Bundle, exit_: Exit) -> dict[str, Any]:
    """An exit and the components of its path."""
    return {
        "name": exit_.name,
        "action": exit_.action,
        "outputs": list(exit_.outputs),
        "scores": list(exit_.scores),
        "tokens": exit_.tokens,
        "path": [
            {
                "name": call.component,
                **_component(bundle, bundle.manifest.components[call.component]),
            }
            for call in exit_.path
        ],
    }


def _graphs(bundle: Bundle, component: Component) -> list[dict[str, Any]]:
    tokens = any(isinstance(state, TokenState) for state in component.states)
    found = _variants(bundle, component.variants)
    states: list[dict[str, Any]] = [
        {"states": variant.states} if tokens else {} for variant in component.variants
    ]
    return [one | own for one, own in zip(found, states, strict=True)]


def _variants(bundle: Bundle, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    return [
        {"precision": variant.precision, "requires": variant.requires}
        | _graph(bundle, variant.graph)
        for variant in variants
    ]


def _state_bytes(component: Component) -> int:
    """Bytes of a component's states per token and row."""
    tensors = [
        Tensor(name=state.name, dtype=state.dtype, axes=state.axes)
        for state in component.states
        if isinstance(state, TokenState)
    ]
    return sum(tensor_bytes(tensor, {"batch": 1, "past": 1}) or 0 for tensor in tensors)


def tensor_bytes(tensor: Tensor, sizes: Mapping[str, int]) -> int | None:
    """Bytes of a tensor for given axis sizes; None if an axis size is unknown."""
    shape = [sizes.get(axis) if isinstance(axis, str) else axis for axis in tensor.axes]
    if any(size is None for size in shape):
        return None
    return math.prod(size for size in shape if size is not None) * ITEM_BYTES[tensor.dtype]


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "axes": tensor.axes}


def _graph(bundle: Bundle, name: str) -> dict[str, Any]:
    path = bundle.file(name)
    found = read_graph_file(path.read_bytes())
    stored = {(tensor.offset, tensor.length or 0) for tensor in found.externals}
    return {
        "graph": name,
        "graph_bytes": path.stat().st_size,
        "weights_bytes": sum(length for _, length in stored) + found.inline_bytes,
    }
