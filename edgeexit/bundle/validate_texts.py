"""Checks the chain that writes text: its components pass on exactly one state per token.

Decoding may pause a token between any two components and keeps only that state of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from edgeexit.bundle.layout import EXPORT_AGAIN, MANIFEST
from edgeexit.bundle.manifest import Component, Decoding, Exit, Gather, Manifest, Tensor
from edgeexit.errors import BundleError


def check_text_chain(manifest: Manifest, decoding: Decoding) -> None:
    """Refuses components that pass on, or take, more than one state per token.

    Raises:
        BundleError: With the component or exit, and the tensor.
    """
    chain = manifest.chains.get(decoding.chain)
    tables = [s.output.name for s in manifest.steps if isinstance(s, Gather) and s.when == "token"]
    if chain is None or not tables:
        return  # `edgeexit.bundle.validate` refuses it
    feeds = {decoding.positions.name}
    feeds |= {group.mask for group in decoding.groups.values() if group.mask is not None}
    where = f"{MANIFEST}: chain {decoding.chain}"
    scores = {tensor for exit_ in chain.stops for tensor in exit_.scores.values()}
    states = _check_row(manifest.components, where, chain.components, tables, feeds, scores)
    _check_row(manifest.components, f"{where}, unsplit", chain.unsplit, tables, feeds, ())
    for exit_ in chain.stops:
        _check_path(manifest.components, f"{where}, exit {exit_.name}", exit_, states, feeds)


def _check_row(
    components: Mapping[str, Component],
    where: str,
    names: Sequence[str],
    tables: Sequence[str],
    feeds: Collection[str],
    scores: Collection[str],
) -> dict[str, str]:
    """Checks components that run in sequence. Returns component -> the state that it passes on,
    beside scores of exits."""
    coming = list(tables)
    states: dict[str, str] = {}
    for number, name in enumerate(names):
        component, here = components[name], f"{where}, component {name}"
        _check_taken(here, _of_tokens(component.inputs), coming, feeds)
        made = [name for name in _of_tokens(component.outputs) if name not in scores]
        if len(made) > 1 or (not made and number + 1 < len(names)):
            raise BundleError(
                f"{here} passes on {', '.join(made) or 'nothing'} per token, not one state",
                fix="Components of this chain pass on one state per token. Export again.",
            )
        coming = made
        if made:
            states[name] = made[0]
    return states


def _check_path(
    components: Mapping[str, Component],
    where: str,
    exit_: Exit,
    states: Mapping[str, str],
    feeds: Collection[str],
) -> None:
    coming = [states[exit_.behind]] if exit_.behind in states else []
    for call in exit_.path[:-1]:
        component, here = components[call.component], f"{where}, {call.component}"
        taken = _of_tokens(component.inputs)
        _check_taken(here, [call.inputs.get(name, name) for name in taken], coming, feeds)
        coming = _of_tokens(component.outputs)
        if len(coming) != 1:
            raise BundleError(
                f"{here} passes on {', '.join(coming) or 'nothing'} per token, not one state",
                fix=EXPORT_AGAIN,
            )
    for call in exit_.path[-1:]:
        inputs = components[call.component].inputs
        taken = [call.inputs.get(tensor.name, tensor.name) for tensor in inputs]
        if taken != coming:
            raise BundleError(
                f"{where}: {call.component} takes {', '.join(taken) or 'nothing'}",
                fix=f"The last component of a path takes only the state {', '.join(coming)}. "
                "Export again.",
            )


def _of_tokens(tensors: Sequence[Tensor]) -> list[str]:
    return [tensor.name for tensor in tensors if "new" in tensor.axes]


def _check_taken(
    where: str, taken: Sequence[str], coming: Sequence[str], feeds: Collection[str]
) -> None:
    if far := [name for name in taken if name not in coming and name not in feeds]:
        raise BundleError(
            f"{where} takes {far[0]} per token, which the component before does not pass on",
            fix="Pass it on in the state from component to component. Export again.",
        )


__all__ = ["check_text_chain"]
