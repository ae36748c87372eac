"""Makes a bundle's manifest from a contract, before anything is traced.

The exporter adds outputs that follow from class logits to components (`Derived`), so that modules
need not compute them. `check` validates a contract by validating its manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from edgeexit.bundle import manifest as structs
from edgeexit.bundle.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    SCORES,
    Chain,
    Exit,
    File,
    Manifest,
    Tensor,
    Variant,
)
from edgeexit.bundle.reader import WEIGHTS, decode_manifest
from edgeexit.bundle.validate import check_structure
from edgeexit.errors import BundleError, ExportError
from edgeexit.export.contract import Component, SplitModel, Table, exit_giver
from edgeexit.export.device_tokenizer import has_tokenizer

FORMAT = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"
LOGITS, TOKEN = "logits", "token"
Precision = Literal["float32", "float16", "bfloat16", "int8", "int4"]


@dataclass(frozen=True)
class Derived:
    """Outputs that are added to a component, computed from its logits.

    Attributes:
        logits: The tensor ``[batch, classes]``.
        scores: Prefix of the scores' names; None: no scores.
        token: Name of the greedy token; None: no token.
    """

    logits: str
    scores: str | None = None
    token: str | None = None

    @property
    def score_tensors(self) -> dict[str, str]:
        """Score -> tensor name."""
        return {} if self.scores is None else {s: f"{self.scores}/{s}" for s in SCORES}


def derived_at(model: SplitModel, exit_: Exit) -> Derived | None:
    """Outputs added for an exit; None if it has no logits."""
    if LOGITS not in exit_.outputs:
        return None
    giver, token = exit_giver(exit_), exit_.outputs.get(TOKEN)
    component = model.component(giver)
    if token in [tensor.name for tensor in component.outputs]:
        token = None
    # Exits may share a head; an exit without a path does not share its component.
    logits = component.scored or exit_.outputs[LOGITS]
    return Derived(logits, giver if exit_.path else exit_.name, token)


def derived_of(model: SplitModel) -> dict[str, list[Derived]]:
    """Component -> outputs added to it."""
    additions: dict[str, list[Derived]] = {component.name: [] for component in model.components}
    for chain in model.chains.values():
        for exit_ in chain.exits:
            derived, known = derived_at(model, exit_), additions[exit_giver(exit_)]
            known += [] if derived is None or derived in known else [derived]
        for name in chain.unsplit[-1:]:
            outputs = [tensor.name for tensor in model.component(name).outputs]
            wanted = TOKEN in [tensor.name for tensor in chain.outputs]
            if wanted and LOGITS in outputs and TOKEN not in outputs:
                additions[name].append(Derived(LOGITS, token=TOKEN))
    return additions


def manifest_of(
    model: SplitModel, precision: Precision, provenance: dict[str, str] | None = None
) -> Manifest:
    """The manifest, without files, samples, offsets of tables in the weight store, and what the
    tokenizer adds."""
    derived = derived_of(model)
    return Manifest(
        format=FORMAT,
        name=model.name,
        task=model.task,
        inputs=list(model.inputs),
        components={c.name: _component(c, derived[c.name], precision) for c in model.components},
        chains={name: _with_scores(model, chain) for name, chain in model.chains.items()},
        steps=[step.step(0) if isinstance(step, Table) else step for step in model.steps],
        files={},
        decoding=model.decoding,
        limits=dict(model.limits),
        labels=list(model.labels),
        preprocessing=list(model.preprocessing),
        provenance=dict(model.provenance) | (provenance or {}),
    )


def check(model: SplitModel) -> None:
    """Raises `ExportError` for the first invalid part of a contract."""
    for chain in model.chains.values():
        if not chain.exits:
            raise ExportError(
                f"{model.name}: the model has no exits",
                fix="Give every chain of the contract its exits, the last one included.",
            )
    names = [component.name for component in model.components]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ExportError(
            f"{model.name}: there are two components named {repeated[0]}",
            fix="Give every component its own name.",
        )
    if model.reference is None and any(c.token_states for c in model.components):
        raise ExportError(
            f"{model.name}: a model that writes text needs a reference",
            fix="Give reference=..., a function that returns the logits of its exits.",
        )
    _check_axes(model)
    folder = model.tokenizer_folder
    has_files = folder is not None and has_tokenizer(Path(folder))
    tokenizer = "tokenizer/tokenizer.json" if model.tokenizer or has_files else None
    try:
        manifest = manifest_of(model, "float32")
        graphs = [v.graph for c in manifest.components.values() for v in c.variants]
        graphs += [v.graph for c in manifest.components.values() for v in c.projections]
        file = File(sha256="0" * 64, bytes=1 << 62)
        files = dict.fromkeys([*graphs, WEIGHTS, *([tokenizer] if tokenizer else [])], file)
        manifest = msgspec.structs.replace(manifest, files=files, tokenizer=tokenizer)
        check_structure(decode_manifest(msgspec.json.encode(manifest)))
    except BundleError as error:
        raise ExportError(
            f"{model.name}: {error.what.removeprefix('manifest.json: ')}",
            fix="Correct the model's contract (edgeexit.export.contract).",
        ) from error


def _check_axes(model: SplitModel) -> None:
    """Refuses symbolic axes that neither inputs nor token states have, and that have no limit."""
    states = [state for component in model.components for state in component.token_states]
    known = {axis for tensor in model.inputs for axis in tensor.axes}
    known |= {axis for state in states for axis in state.axes} | model.limits.keys()
    for component in model.components:
        for tensor in component.outputs:
            if unknown := sorted({a for a in tensor.axes if isinstance(a, str)} - known):
                raise ExportError(
                    f"{model.name}: component {component.name}: {tensor.name} has the axis "
                    f"{unknown[0]!r}, which no input of the model has",
                    fix="Use the axis names of the model's inputs.",
                )


def _component(
    component: Component, derived: Sequence[Derived], precision: Precision
) -> structs.Component:
    outputs = list(component.outputs)
    for addition in derived:
        if addition.token is not None:
            position = 1 + [tensor.name for tensor in outputs].index(addition.logits)
            outputs.insert(position, Tensor(name=addition.token, dtype="int64", axes=["batch"]))
        scores = addition.score_tensors.values()
        outputs += [Tensor(name=name, dtype="float32", axes=["batch"]) for name in scores]
    variants = []
    for number, form in enumerate(component.forms, start=1):
        alike = [other.states for other in component.forms[:number]].count(form.states)
        suffix = f".{form.states}" + (f"-{alike}" if alike > 1 else "")
        variants.append(
            Variant(
                graph=f"graphs/{component.name}{suffix * (number < len(component.forms))}.onnx",
                requires=list(form.requires),
                precision=precision,
                states=form.states,
                lengths=list(form.lengths),
            )
        )
    projection = Variant(graph=f"graphs/{component.name}.projection.onnx", precision=precision)
    return structs.Component(
        variants=variants,
        inputs=list(component.inputs),
        outputs=outputs,
        states=list(component.states),
        projections=[] if component.projection is None else [projection],
    )


def _with_scores(model: SplitModel, chain: Chain) -> Chain:
    """A chain whose exits name the scores that the exporter adds."""
    exits = []
    for exit_ in chain.exits:
        derived = derived_at(model, exit_)
        scores = {} if derived is None else derived.score_tensors
        exits.append(msgspec.structs.replace(exit_, scores=scores | exit_.scores))
    return msgspec.structs.replace(chain, exits=exits)


__all__ = ["FORMAT", "LOGITS", "Derived", "Precision", "check", "derived_of", "manifest_of"]
