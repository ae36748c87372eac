"""Lists the engines that a bundle needs: one per component, with the shapes that it must accept.

`work_of` is a pure function of the manifest. The profiles of a component depend on its use:

- in a chain that runs once per request: the axes of the program's inputs;
- in the chain that writes text: profiles for single tokens and for prompts;
- makers of prompt states and gates: prompts only;
- heads: rows of any number of texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgeexit.bundle.manifest import (
    LENGTHS,
    Axis,
    Chain,
    Component,
    Manifest,
    Run,
    StateForm,
    Variant,
    When,
)
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError, UsageError
from edgeexit.runtime.build.profiles import (
    DRAFTED,
    Asked,
    Range,
    Ranges,
    Shapes,
    Sizes,
    decode_profiles,
    few_or_many,
    row_buckets,
    shapes_of,
    usual_ranges,
)
from edgeexit.runtime.executor.blocks import CHUNK
from edgeexit.runtime.executor.components import (
    graph_outputs,
    made_by_others,
    prompt_states,
    token_states,
)

REFERENCE = "samples/reference.npz"

LONGEST_NAME = 120
"""Longest graph name, in characters, that is used as the plan's name; longer names are hashed,
because file names are limited to 255."""

Use = Literal["input", "prompt", "token", "states"]
"""How a component runs: once per request, over a whole prompt, over prompts and then token by
token, or over the states of selected tokens."""


@dataclass(frozen=True)
class Work:
    """One engine to build.

    Attributes:
        where: Name for messages: the component, or its projection.
        variant: The graph.
        outputs: Outputs to keep.
        profiles: Per profile, shapes of the inputs.
        fixed: Named axis -> the size that it is fixed to.
        largest: Named axis -> its largest size over all profiles.
    """

    where: str
    variant: Variant
    outputs: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    fixed: Sizes
    largest: Sizes

    @property
    def file(self) -> str:
        """File name of the plan."""
        name = Path(self.variant.graph).name.removesuffix(".onnx")
        if len(name) > LONGEST_NAME:
            name = hashlib.sha256(name.encode()).hexdigest()[:32]
        return f"{name}.plan"


def work_of(
    manifest: Manifest,
    features: frozenset[str],
    asked: Asked,
    sample: Sizes,
    *,
    chunk: int = CHUNK,
    unsplit: bool = True,
    form: StateForm | None = None,
    tunes: bool = False,
) -> list[Work]:
    """The engines that a bundle needs.

    Args:
        manifest: The bundle's.
        features: Features of the engine library; see `Variant`.
        asked: Sizes that the user requests.
        sample: Sizes of the axes in the bundle's sample.
        chunk: New tokens per row in one run over a prompt.
        unsplit: Build the baseline too.
        form: Form of token states: ``fixed`` or ``append``. None: the first that the library can
            build.
        tunes: The library times kernels for the usual shape (`Library.tunes`): rows then have
            several profiles, unless the user gives the usual number of rows.

    Raises:
        UsageError: Sizes do not fit the bundle.
        EngineError: A component has no variant that the library can build.
    """
    capacity = _capacity(manifest, asked)
    if manifest.decoding is not None:
        asked = _with_new_tokens(manifest, asked, chunk, capacity)
    ranges = usual_ranges(manifest, asked, sample)
    profiles = _profiles(ranges, capacity, tunes=tunes and "batch" not in asked.opt)
    works = []
    paths = [exit_.path for chain in manifest.chains.values() for exit_ in chain.exits]
    on_paths = {call.component for path in paths for call in path}
    for name, uses in _uses(manifest, unsplit=unsplit).items():
        component = manifest.components[name]
        variant = _usable(name, component, features, form)
        own = [ranges for use in uses for ranges in profiles[use]]
        works.append(_component(name, component, variant, own, capacity))
        if component.projections:
            one = {**ranges, "new": Range(1, 1, 1)}
            profile = profiles["prompt"][0] if name in on_paths else one
            works.append(_projection(name, component, features, profile))
    return works


def _capacity(manifest: Manifest, asked: Asked) -> int:
    """Largest number of tokens of a text; 0 if the program does not write text."""
    if manifest.decoding is None:
        return 0
    limit = manifest.limits.get("positions")
    capacity = asked.capacity or manifest.decoding.capacity or limit or 0
    if not 2 <= capacity <= (limit or capacity):
        raise UsageError(
            f"--capacity {capacity} is out of range ({f'2 to {limit}' if limit else '2 or more'})",
            fix=f"The model's limit is {limit} tokens; use at most that."
            if limit
            else "Use 2 or more.",
        )
    return capacity


def _with_new_tokens(manifest: Manifest, asked: Asked, chunk: int, capacity: int) -> Asked:
    """The requested sizes, with the largest number of new tokens per run."""
    assert manifest.decoding is not None
    tokens = manifest.decoding.tokens
    if not asked.min.get("new", 1) == asked.opt.get("new", 1) == 1:
        raise UsageError(
            f"--min-shapes, --opt-shapes: {tokens} must have 1 token per row (engines are tuned "
            "for one new token and for prompts)",
            fix=f"Give the number of rows and 1 token: {tokens}:4x1.",
        )
    if (new := asked.max.get("new", 1)) > capacity:
        raise UsageError(
            f"--max-shapes: {new} new tokens exceed the capacity of {capacity}",
            fix=f"Give at most {capacity}, or a larger --capacity"
            + (f" (up to {limit})." if (limit := manifest.limits.get("positions")) else "."),
        )
    most = capacity if _whole_prompts(manifest) else min(chunk, capacity)
    return dataclasses.replace(asked, max={"new": most, **asked.max})


def _profiles(ranges: Ranges, capacity: int, *, tunes: bool) -> dict[Use, list[Ranges]]:
    """Per use, the profiles of a component: ranges of all axes that it may have."""
    profiles: dict[Use, list[Ranges]] = {"input": [ranges]}
    if tunes and "batch" in ranges:
        profiles["input"] = [{**ranges, "batch": bucket} for bucket in row_buckets(ranges["batch"])]
    if not capacity:
        return profiles
    rows, new = ranges["batch"], ranges["new"].max
    buckets = few_or_many(rows) if tunes else [rows]
    steps = decode_profiles(rows, buckets, new, capacity)
    profiles["token"] = [{**ranges, **profile} for profile in steps]
    profiles["prompt"] = [{**ranges, **steps[-1], "batch": rows, "new": Range(1, new, new)}]
    states = Range(1, rows.opt, max(rows.max * min(DRAFTED, capacity), new))
    buckets = few_or_many(states) if tunes else [states]
    profiles["states"] = [{**ranges, "batch": bucket} for bucket in buckets]
    return profiles


def _uses(manifest: Manifest, *, unsplit: bool) -> dict[str, list[Use]]:
    """Component -> its uses, in the order of the program; unsplit components come last."""
    uses_of: dict[str, list[Use]] = {}
    runs = [(manifest.chains[step.chain], step) for step in manifest.steps if isinstance(step, Run)]
    for chain, step in runs:
        for name, use in _chain_uses(manifest, chain, step.when):
            uses_of.setdefault(name, []).append(use)
    for chain, step in runs if unsplit else ():
        for name in [*chain.unsplit, *_makers(manifest, chain.unsplit)]:
            use = step.when if name in chain.unsplit else "prompt"
            uses_of.setdefault(name, []).append(use)
    return {name: list(dict.fromkeys(uses)) for name, uses in uses_of.items()}


def _chain_uses(manifest: Manifest, chain: Chain, when: When) -> Iterator[tuple[str, Use]]:
    for name in chain.components:
        yield name, when
    for exit_ in chain.exits:
        for call in exit_.path:
            if when == "input":
                yield call.component, when
            elif exit_.action == "drop":
                yield call.component, "prompt"
            else:
                takes_tokens = _takes_tokens(manifest.components[call.component])
                yield call.component, when if takes_tokens else "states"
    on_paths = [call.component for exit_ in chain.exits for call in exit_.path]
    for name in _makers(manifest, [*chain.components, *on_paths]):
        yield name, "prompt"


def _makers(manifest: Manifest, components: Sequence[str]) -> list[str]:
    """The components that compute the prompt states of these components."""
    states = (made_by_others(manifest.components[name]) for name in components)
    return list(dict.fromkeys(state.maker for own in states for state in own))


def _takes_tokens(component: Component) -> bool:
    """Whether a component reads the new tokens of every row."""
    return any("new" in tensor.axes for tensor in component.inputs)


def _whole_prompts(manifest: Manifest) -> bool:
    """Whether a maker or a gate reads all tokens of a prompt, or a component makes a state of them,
    so that prompts pass in one run (`edgeexit.runtime.executor.gates`)."""
    assert manifest.decoding is not None
    chain = manifest.chains[manifest.decoding.chain]
    running = [*chain.components, *chain.unsplit]
    if any(s.made for name in running for s in prompt_states(manifest.components[name])):
        return True
    readers = _makers(manifest, running)
    readers += [call.component for e in chain.exits if e.action == "drop" for call in e.path]
    return any(_takes_tokens(manifest.components[name]) for name in readers)


def _usable(
    name: str, component: Component, features: frozenset[str], form: StateForm | None
) -> Variant:
    """The first variant of a component that the library can build, of the requested form."""
    if not token_states(component):
        form = None
    return _first(name, component.variants, features, form)


def _first(
    what: str, variants: Sequence[Variant], features: frozenset[str], form: StateForm | None
) -> Variant:
    for variant in variants:
        if set(variant.requires) <= features and form in (None, variant.states):
            return variant
    known = ", ".join(
        f"{variant.states} (needs {' and '.join(variant.requires) or 'nothing'})"
        for variant in variants
    )
    raise EngineError(
        f"{what} has no form {f'{form} ' if form else ''}that this TensorRT can build: {known}",
        fix="Use --states append, which every version can build. The form fixed needs float16 or "
        "bfloat16, and TensorRT 10.15 or newer, or TensorRT-RTX.",
    )


def _component(
    name: str, component: Component, variant: Variant, profiles: Sequence[Ranges], capacity: int
) -> Work:
    """The engine of a component."""
    axes: dict[str, Sequence[Axis]] = {tensor.name: tensor.axes for tensor in component.inputs}
    axes |= {state.tensor.name: state.tensor.axes for state in prompt_states(component)}
    states = token_states(component)
    axes |= {state.past: state.axes for state in states}
    axes |= {f"lengths/{kind}": LENGTHS[kind][1] for kind in variant.lengths}
    fixed: dict[str, int] = {}
    if states and variant.states == "fixed":
        fixed = {"past": capacity}
        profiles = [{**own, "past": Range(capacity, capacity, capacity)} for own in profiles]
    outputs = tuple(graph_outputs(component))
    shapes = _different([shapes_of(axes, own, name) for own in profiles])
    return Work(name, variant, outputs, shapes, fixed, _largest(profiles, axes))


def _projection(name: str, component: Component, features: frozenset[str], profile: Ranges) -> Work:
    """The engine of a component's projection; `largest` leaves its tokens out, because they do not
    limit the other engines."""
    where = f"projection of {name}"
    variant = _first(where, component.projections, features, None)
    axes = {tensor.name: tensor.axes for tensor in component.inputs}
    outputs = tuple(state.present for state in token_states(component))
    largest = {axis: most for axis, most in _largest([profile], axes).items() if axis != "new"}
    return Work(where, variant, outputs, (shapes_of(axes, profile, where),), {}, largest)


def _different(shapes: Sequence[Shapes]) -> tuple[Shapes, ...]:
    """The profiles without duplicates: they differ only in axes that the component may lack."""
    return tuple(own for number, own in enumerate(shapes) if own not in shapes[:number])


def _largest(profiles: Sequence[Ranges], tensors: Mapping[str, Sequence[Axis]]) -> dict[str, int]:
    """The largest sizes of the named axes of these tensors over all profiles."""
    axes = {axis for own in tensors.values() for axis in own if isinstance(axis, str)}
    largest: dict[str, int] = {}
    for ranges in profiles:
        for axis in axes & ranges.keys():
            largest[axis] = max(ranges[axis].max, largest.get(axis, 0))
    return dict(sorted(largest.items()))


def sample_sizes(bundle: Bundle) -> dict[str, int]:
    """Sizes of the named axes in the bundle's reference sample, used as usual sizes. Empty if there
    is no sample."""
    if REFERENCE not in bundle.manifest.samples:
        return {}
    sizes: dict[str, int] = {}
    with np.load(bundle.file(REFERENCE), allow_pickle=False) as sample:
        for tensor in bundle.manifest.inputs:
            if (name := f"input/{tensor.name}") in sample:
                pairs = zip(tensor.axes, sample[name].shape, strict=False)
                sizes |= {axis: size for axis, size in pairs if isinstance(axis, str)}
    return sizes


__all__ = ["Use", "Work", "sample_sizes", "work_of"]
