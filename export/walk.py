"""Runs a program on the workstation, one component at a time, without policies: every row and token
passes every component, and a text runs at once from empty states.

Export uses it to compute a model's reference (with torch modules), the data that ranges of
activations are measured on (with float32 graphs) and the reference of an int8 bundle (with
quantised graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit.bundle.blocks import Table
from edgeexit.bundle.manifest import (
    LENGTHS,
    Chain,
    Component,
    Exit,
    Gather,
    Manifest,
    Place,
    TokenState,
)
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.export.evaluate import run_graph

Known = dict[str, Any]
"""Tensor name -> value, a numpy array or a torch tensor."""
Evaluate = Callable[[str, list[Known]], list[Known]]
"""``evaluate(component, feeds)`` returns the component's outputs for each feed."""


class Walk:
    """Runs separate batches through a program.

    Args:
        manifest: The program; the last form of each component is used.
        batches: Inputs of the program.
        evaluate: Runs components.

    Attributes:
        known: Per batch, the tensors that were computed and not yet forgotten.
    """

    def __init__(
        self, manifest: Manifest, batches: Sequence[Mapping[str, Any]], evaluate: Evaluate
    ) -> None:
        self.manifest, self.evaluate = manifest, evaluate
        self.known: list[Known] = [dict(batch) for batch in batches]
        for known in self.known:
            if manifest.decoding is not None:
                shape = known[manifest.decoding.tokens].shape
                places = np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape)
                known[manifest.decoding.positions.name] = np.ascontiguousarray(places)
                for group in manifest.decoding.groups.values():
                    if group.mask is not None:
                        known[group.mask] = known[manifest.decoding.tokens] == group.token

    @classmethod
    def of(cls, bundle: Bundle, batches: Sequence[Mapping[str, Any]]) -> Walk:
        """A walk through a bundle's graphs."""

        def evaluate(name: str, feeds: list[Known]) -> list[Known]:
            variant = bundle.manifest.components[name].variants[-1]
            return run_graph(bundle.file(variant.graph), feeds)

        return cls(bundle.manifest, batches, evaluate)

    def branch(self) -> Walk:
        """A copy that continues from here; this walk does not change."""
        other = Walk(self.manifest, (), self.evaluate)
        other.known = [dict(known) for known in self.known]
        return other

    def look_up(self, step: Gather, table: Callable[[Any], Any]) -> None:
        """Runs a step that looks up ids in a table: ``table(ids)`` gives its rows."""
        for known in self.known:
            known[step.output.name] = table(known[step.ids])

    def place(self, step: Place) -> None:
        """Runs a step that puts rows of one tensor where another has the tokens of a group."""
        decoding = self.manifest.decoding
        assert decoding is not None
        token = decoding.groups[step.group].token
        for known in self.known:
            placed, rows = np.array(known[step.target]), np.asarray(known[step.source])
            places = known[decoding.tokens] == token
            placed[places] = rows.reshape(-1, rows.shape[-1])[: np.count_nonzero(places)]
            known[step.target] = placed

    def feeds(self, name: str, names: Mapping[str, str] | None = None) -> list[Known]:
        """Inputs of a component, lengths and states included.

        Args:
            name: The component.
            names: Input -> tensor that it takes, where the names differ.
        """
        component = self.manifest.components[name]
        if not self.known:
            return []
        for state in component.states:
            if isinstance(state, TokenState) or state.made is not None:
                continue
            if state.tensor.name not in self.known[0]:
                self.run(state.maker)
        return [_feed(component, known, names or {}) for known in self.known]

    def run(
        self, name: str, graph: Path | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        """Runs a component, or another graph instead. `names`: see `feeds`."""
        component = self.manifest.components[name]
        if not (feeds := self.feeds(name, names)):
            return
        made = self.evaluate(name, feeds) if graph is None else run_graph(graph, feeds)
        first = component.inputs[0].name
        for known, feed, answers in zip(self.known, feeds, made, strict=True):
            # If a component takes tokens as rows, its outputs get the shape of texts again.
            given = known[(names or {}).get(first, first)]
            shape = given.shape[:2] if given.ndim > feed[first].ndim else None
            for tensor in component.outputs:
                if (value := answers.get(tensor.name)) is not None:
                    value = value if shape is None else value.reshape(*shape, *value.shape[1:])
                    known[tensor.name] = value

    def ask(self, exit_: Exit) -> list[Known]:
        """An exit's scores and outputs, per batch."""
        walk = self.branch()
        for call in exit_.path:
            walk.run(call.component, names=call.inputs)
        named = {**exit_.scores, **exit_.outputs}
        return [{n: known[t] for n, t in named.items() if t in known} for known in walk.known]

    def hand_on(self, chain: Chain, exit_: Exit | None = None) -> None:
        """Passes the outputs of a chain's exit to later steps; None: those of the last exit."""
        answers = self.ask(chain.exits[-1] if exit_ is None else exit_)
        for known, outputs in zip(self.known, answers, strict=True):
            known |= {tensor.name: outputs[tensor.name] for tensor in chain.outputs}

    def behind(self, chain: Chain, exit_: Exit) -> Walk:
        """A copy that continues behind the chain, which stopped at an early exit."""
        other = self.branch()
        other.hand_on(chain, exit_)
        return other

    def forget(self, chain: Chain, number: int) -> None:
        """Drops tensors that nothing needs after the chain's component of this number."""
        later = set(chain.components[number + 1 :])
        exits = [exit_ for exit_ in chain.exits if exit_.behind in later]
        later |= self.manifest.components.keys() - set(chain.components)
        kept = {t.name for name in later for t in self.manifest.components[name].inputs}
        kept |= {name for e in exits for call in e.path for name in call.inputs.values()}
        kept |= set(chain.exits[-1].outputs.values())
        for step in self.manifest.steps:
            kept |= {step.ids} if isinstance(step, Gather) else set()
            kept |= {step.source, step.target} if isinstance(step, Place) else set()
        for known in self.known:
            for name in known.keys() - kept:
                del known[name]


def table_of(bundle: Bundle, step: Gather) -> Table:
    """A step's table, memory-mapped."""
    return table_in(bundle.file(WEIGHTS), step)


def table_in(store: Path, step: Gather) -> Table:
    """A step's table in a weight store, memory-mapped."""
    return Table.of(step, np.memmap(store, np.uint8, "r"), np.dtype(step.output.dtype))


def _feed(component: Component, known: Known, names: Mapping[str, str]) -> Known:
    feed: Known = {}
    for tensor in component.inputs:
        value = known[names.get(tensor.name, tensor.name)]
        flat = value.ndim > len(tensor.axes)
        feed[tensor.name] = value.reshape(-1, *value.shape[2:]) if flat else value
    rows = len(feed[component.inputs[0].name])
    places = {t.name: t.axes.index("new") for t in component.inputs if "new" in t.axes}
    new = max((feed[name].shape[place] for name, place in places.items()), default=0)
    lengths = {"past": 0, "last": new - 1, "most": new, "prompt": new}
    for kind in component.variants[-1].lengths:
        dtype, axes = LENGTHS[kind]
        feed[f"lengths/{kind}"] = np.full([rows] * len(axes), lengths[kind], dtype)
    for state in component.states:
        if isinstance(state, TokenState):
            # A past of one entry, all of it beyond the length.
            sizes = {"batch": rows}
            shape = [sizes.get(a, 1) if isinstance(a, str) else int(a or 1) for a in state.axes]
            feed[state.past] = np.zeros(shape, state.dtype)
        elif state.made is not None:
            sizes_of = [int(size or 1) for size in state.tensor.axes[1:]]
            feed[state.tensor.name] = np.zeros([rows, *sizes_of], state.tensor.dtype)
        else:
            feed[state.tensor.name] = known[state.tensor.name]
    return feed


__all__ = ["Known", "Walk", "table_in", "table_of"]
