"""Components opened on an engine: which variant, and with which of their outputs.

An engine computes every output that a graph has, so a component is opened with what is asked of it
and no more, and again when more is asked: a score, an exit's answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeexit.bundle.manifest import (
    Chain,
    Component,
    Exit,
    Manifest,
    PromptState,
    StateForm,
    TokenState,
    Variant,
)
from edgeexit.bundle.reader import Bundle, Unchanged
from edgeexit.errors import EngineError, UsageError
from edgeexit.runtime.engines.base import Engine, Graph

EVERY_SCORE = "*"
"""Asks an exit for every score that it has."""
NO_SCORE = ""
"""Asks an exit for its answer alone."""


@dataclass
class Opened:
    """A component on an engine.

    Attributes:
        outputs: Names of the outputs that its graph computes as it is open now.
    """

    name: str
    component: Component
    variant: Variant
    path: Path
    graph: Graph | None = None
    outputs: frozenset[str] = frozenset()


class Components:
    """A bundle's components on one engine; each is opened when it is first needed.

    Args:
        bundle: The opened bundle.
        engine: What executes them.
        form: Of token states; None: the fastest that the engine runs.
    """

    def __init__(self, bundle: Bundle, engine: Engine, form: StateForm | None = None) -> None:
        self.bundle, self.engine, self.form = bundle, engine, form
        self._unchanged = Unchanged(bundle)
        self._known: dict[str, Opened] = {}
        self._projections: dict[str, Graph] = {}

    def __getitem__(self, name: str) -> Opened:
        """A component and its variant; its graph may not be open yet."""
        known = self._known.get(name)
        if known is None:
            component = self.bundle.manifest.components[name]
            form = self.form if token_states(component) else None
            variant = choose_variant(name, component, self.engine, form, self.bundle)
            path = self.bundle.file(variant.graph).absolute()
            known = self._known[name] = Opened(name, component, variant, path)
        return known

    def open(self, wanted: Mapping[str, Collection[str]]) -> list[str]:
        """Opens components so that they give these outputs at least. One that lacks some is opened
        again, with these alone; if one fails, all stays as it was.

        Returns:
            Names of those that were opened, or opened again.
        """
        late = [
            opened
            for name, outputs in wanted.items()
            if (opened := self[name]).graph is None or not opened.outputs.issuperset(outputs)
        ]
        if not late:
            return []
        if any(opened.graph is not None for opened in self._known.values()):
            self._unchanged.require_unchanged([opened.variant.graph for opened in late])
        orders: list[tuple[Path, list[str] | None]] = []
        together: list[frozenset[str]] = []
        for opened in late:
            given = graph_outputs(opened.component)
            chosen = [name for name in given if name in wanted[opened.name]]
            together.append(frozenset(chosen))
            orders.append((opened.path, chosen if len(chosen) < len(given) else None))
        graphs = self.engine.open_all(orders)
        for opened, graph, outputs in zip(late, graphs, together, strict=True):
            opened.graph, opened.outputs = graph, outputs
        return [opened.name for opened in late]

    def graph(self, name: str) -> Graph:
        """A component's graph, opened with everything if it is not open yet."""
        opened = self[name]
        if opened.graph is None:
            self.open({name: graph_outputs(opened.component)})
        assert opened.graph is not None
        return opened.graph

    def projection(self, name: str) -> Graph:
        """A component's projection."""
        if name not in self._projections:
            variant = self.bundle.manifest.components[name].projection
            assert variant is not None
            self._projections[name] = self.engine.open(self.bundle.file(variant.graph))
        return self._projections[name]


def graph_outputs(component: Component) -> list[str]:
    """Everything that a component's graph gives: its outputs, and what its token states become."""
    present = [state.present for state in token_states(component)]
    return [*(tensor.name for tensor in component.outputs), *present]


def token_states(component: Component) -> list[TokenState]:
    """What a component keeps of every token."""
    return [state for state in component.states if isinstance(state, TokenState)]


def prompt_states(component: Component) -> list[PromptState]:
    """What a component reads of a prompt."""
    return [state for state in component.states if isinstance(state, PromptState)]


def outputs_asked(
    manifest: Manifest, chain: Chain, asked: Sequence[str | None]
) -> dict[str, set[str]]:
    """Component -> the outputs that it must give for a chain and its exits.

    Args:
        manifest: The bundle's.
        chain: Whose components.
        asked: Per exit that stops, what is asked of it: a score, `NO_SCORE`, `EVERY_SCORE`, or None
            where the exit is not asked at all. The last one always answers.
    """
    known, stops = manifest.components, chain.stops
    wanted = {name: set(graph_outputs(known[name])) for name in chain.components}
    taken = {tensor.name for name in chain.components for tensor in known[name].inputs}
    for exit_ in stops:
        if not exit_.path:
            answers = {*exit_.outputs.values(), *exit_.scores.values()}
            wanted[exit_.behind] -= answers - taken
    for number, (exit_, ask) in enumerate(zip(stops, asked, strict=True)):
        if ask is None:
            if number < len(stops) - 1:
                continue
            ask = NO_SCORE
        for call in exit_.path[:-1]:
            wanted[call.component] = set(graph_outputs(known[call.component]))
        giver = exit_.path[-1].component if exit_.path else exit_.behind
        states = {state.present for state in token_states(known[giver])}
        scores = {exit_.scores[name] for name in scores_asked(exit_, ask)}
        wanted[giver] = wanted.get(giver, states) | scores | {*exit_.outputs.values()}
    return wanted


def scores_asked(exit_: Exit, ask: str) -> list[str]:
    """Names of the scores that are asked of an exit: of the last one only those that it has."""
    if ask == EVERY_SCORE:
        return list(exit_.scores)
    return [ask] if ask in exit_.scores else []


def exit_calls(chain: Chain) -> dict[str, list[Exit]]:
    """Component -> the exits behind it."""
    found: dict[str, list[Exit]] = {name: [] for name in chain.components}
    for exit_ in chain.exits:
        found[exit_.behind].append(exit_)
    return found


def unsplit_chain(chain: Chain) -> Chain:
    """The same chain as one graph without exits.

    Raises:
        UsageError: The bundle has none.
    """
    if not chain.unsplit:
        raise UsageError("the bundle has no unsplit graph of this chain", fix="Export it again.")
    last = chain.unsplit[-1]
    outputs = {tensor.name: tensor.name for tensor in chain.outputs}
    only = Exit(name="unsplit", behind=last, outputs=outputs)
    return Chain(components=chain.unsplit, outputs=chain.outputs, exits=[only])


def choose_variant(
    name: str,
    component: Component,
    engine: Engine,
    form: StateForm | None = None,
    bundle: Bundle | None = None,
) -> Variant:
    """The first form of a component whose requirements the engine meets, or the one that is asked
    for. Of engines that are built ahead, one that was built is preferred.

    Raises:
        UsageError: The component does not have the form asked for.
        EngineError: The engine lacks something that the form needs, or every one does.
    """
    variants = [one for one in component.variants if form in (None, one.states)]
    if not variants:
        known = ", ".join(dict.fromkeys(one.states for one in component.variants))
        raise UsageError(
            f"{name} has no form {form!r} of its states (it has {known})",
            fix="Ask for one of those, or for none: the fastest is then taken.",
        )
    fitting = [variant for variant in variants if set(variant.requires) <= engine.features]
    if bundle is not None:
        fitting.sort(key=lambda variant: not engine.offers(bundle.file(variant.graph)))
    if fitting:
        return fitting[0]
    raise EngineError(
        f"{name} has no form for this engine (it has "
        f"{[variant.requires for variant in variants]}, the engine offers "
        f"{sorted(engine.features)})",
        fix="Export again with a newer edgeexit."
        if form is None
        else "Leave the form open, or use a newer version of the engine.",
    )


def inputs_taken(manifest: Manifest, chain: Chain) -> set[str]:
    """What a chain's components, the makers of their states and the paths of its exits take."""
    names = [*chain.components]
    for name in chain.components:
        names += [state.maker for state in prompt_states(manifest.components[name])]
    for exit_ in chain.exits:
        names += [call.component for call in exit_.path]
    return {tensor.name for name in names for tensor in manifest.components[name].inputs}


__all__ = [
    "EVERY_SCORE", "NO_SCORE", "Components", "Opened", "choose_variant", "exit_calls",
    "graph_outputs", "inputs_taken", "outputs_asked", "prompt_states", "scores_asked",
    "token_states", "unsplit_chain",
]  # fmt: skip
