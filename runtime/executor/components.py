"""Opens components on an engine: chooses the variant and the outputs of each.

An engine computes every output of a graph. So a component is opened with only the outputs that are
needed, and opened again when more are needed, such as a score or an exit's answer.
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
"""Requests every score of an exit."""
NO_SCORE = ""
"""Requests only the answer of an exit, without scores."""


@dataclass
class Opened:
    """A component on an engine.

    Attributes:
        outputs: Names of the outputs that its open graph computes.
    """

    name: str
    component: Component
    variant: Variant
    path: Path
    graph: Graph | None = None
    outputs: frozenset[str] = frozenset()


class Components:
    """A bundle's components on one engine. Each is opened when it is first needed.

    Args:
        bundle: The opened bundle.
        engine: The engine.
        form: Form of token states; None: the fastest that the engine supports.
    """

    def __init__(self, bundle: Bundle, engine: Engine, form: StateForm | None = None) -> None:
        self.bundle, self.engine, self.form = bundle, engine, form
        self._unchanged = Unchanged(bundle)
        self._known: dict[str, Opened] = {}
        self._projections: dict[str, Graph] = {}

    def __getitem__(self, name: str) -> Opened:
        """A component and its variant. Its graph may not be open yet."""
        known = self._known.get(name)
        if known is None:
            component = self.bundle.manifest.components[name]
            form = self.form if token_states(component) else None
            variant = choose_variant(name, component, self.engine, form, self.bundle)
            path = self.bundle.file(variant.graph).absolute()
            known = self._known[name] = Opened(name, component, variant, path)
        return known

    def open(self, wanted: Mapping[str, Collection[str]]) -> list[str]:
        """Opens components so that they compute at least these outputs. A component that lacks an
        output is opened again with these outputs only. If opening fails, nothing changes.

        Returns:
            Names of the components that were opened.
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
        """A component's graph. If it is not open yet, it is opened with all outputs."""
        opened = self[name]
        if opened.graph is None:
            self.open({name: graph_outputs(opened.component)})
        assert opened.graph is not None
        return opened.graph

    def projection(self, name: str) -> Graph:
        """The graph of a component's projection."""
        if name not in self._projections:
            variants = self.bundle.manifest.components[name].projections
            variant = _first(f"the projection of {name}", variants, self.engine, self.bundle)
            self._projections[name] = self.engine.open(self.bundle.file(variant.graph))
        return self._projections[name]


def graph_outputs(component: Component) -> list[str]:
    """All outputs of a component's graph: its outputs, and its updated states."""
    return [*(tensor.name for tensor in component.outputs), *updated_states(component)]


def updated_states(component: Component) -> list[str]:
    """Names of the states that a component's graph outputs."""
    present = [state.present for state in token_states(component)]
    return [*present, *(state.made for state in prompt_states(component) if state.made)]


def made_by_others(component: Component) -> list[PromptState]:
    """The prompt states of a component that another component makes."""
    return [state for state in prompt_states(component) if state.made is None]


def token_states(component: Component) -> list[TokenState]:
    """The states of a component that grow with every token."""
    return [state for state in component.states if isinstance(state, TokenState)]


def prompt_states(component: Component) -> list[PromptState]:
    """The states of a component that are computed once per prompt."""
    return [state for state in component.states if isinstance(state, PromptState)]


def outputs_asked(
    manifest: Manifest, chain: Chain, asked: Sequence[str | None]
) -> dict[str, set[str]]:
    """Component -> the outputs that a chain and its exits need from it.

    Args:
        manifest: The bundle's manifest.
        chain: The chain.
        asked: Per exit that stops: the score to compute, `NO_SCORE`, `EVERY_SCORE`, or None if the
            exit is not used. The last exit is always used.
    """
    known, stops = manifest.components, chain.stops
    wanted = {name: set(graph_outputs(known[name])) for name in chain.components}
    taken = {tensor.name for name in chain.components for tensor in known[name].inputs}
    for exit_ in stops:
        own = {exit_.scores[name] for name in scored_before_path(exit_, known)}
        if not exit_.path:
            own = {*exit_.outputs.values(), *exit_.scores.values()}
        wanted[exit_.behind] -= own - taken
    for number, (exit_, ask) in enumerate(zip(stops, asked, strict=True)):
        if ask is None:
            if number < len(stops) - 1:
                continue
            ask = NO_SCORE
        for call in exit_.path[:-1]:
            wanted[call.component] = set(graph_outputs(known[call.component]))
        giver = exit_.path[-1].component if exit_.path else exit_.behind
        states = set(updated_states(known[giver]))
        before = scored_before_path(exit_, known)
        wanted[giver] = wanted.get(giver, states) | {*exit_.outputs.values()}
        for name in scores_asked(exit_, ask):
            wanted[exit_.behind if name in before else giver].add(exit_.scores[name])
    return wanted


def has_own_head(chain: Chain, exit_: Exit) -> bool:
    """Whether an exit has a head that the last exit does not have, such as one over a draft
    vocabulary."""
    own, last = ([call.component for call in e.path[-1:]] for e in (exit_, chain.stops[-1]))
    return own != last


def opened_early(chain: Chain, asked: Sequence[str | None] | None = None) -> list[str | None]:
    """What is asked of the exits of a chain that writes text before it does. A head that the last
    exit does not have is opened when it is asked, because it computes logits only where they are
    asked, too.

    Args:
        asked: As for `outputs_asked`; None: answers without scores.
    """
    asked = [NO_SCORE] * len(chain.stops) if asked is None else asked
    return [
        None if ask != EVERY_SCORE and has_own_head(chain, exit_) else ask
        for exit_, ask in zip(chain.stops, asked, strict=True)
    ]


def scored_before_path(exit_: Exit, components: Mapping[str, Component]) -> set[str]:
    """Scores of an exit with a path that are outputs of the component in front of it. If one of
    them decides, the path runs only where rows stop."""
    if not exit_.path:
        return set()
    given = {tensor.name for tensor in components[exit_.path[-1].component].outputs}
    return {name for name, tensor in exit_.scores.items() if tensor not in given}


def scores_asked(exit_: Exit, ask: str) -> list[str]:
    """Names of the requested scores that an exit has; the last exit may lack the score."""
    if ask == EVERY_SCORE:
        return list(exit_.scores)
    return [ask] if ask in exit_.scores else []


def exit_calls(chain: Chain) -> dict[str, list[Exit]]:
    """Component -> the exits behind it."""
    exits: dict[str, list[Exit]] = {name: [] for name in chain.components}
    for exit_ in chain.exits:
        exits[exit_.behind].append(exit_)
    return exits


def unsplit_chain(chain: Chain) -> Chain:
    """The same chain as one graph without exits.

    Raises:
        UsageError: The bundle has no unsplit graph of the chain.
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
    """The first variant of a component that the engine can run, of the requested form if there is
    one. With TensorRT, a variant whose engine was built is preferred.

    Raises:
        UsageError: The component does not have the requested form.
        EngineError: The engine does not meet the requirements of any of these variants.
    """
    variants = [variant for variant in component.variants if form in (None, variant.states)]
    if not variants:
        known = ", ".join(dict.fromkeys(variant.states for variant in component.variants))
        raise UsageError(
            f"{name} has no states of the form {form!r} (it has {known})",
            fix="Use one of these forms, or leave out states: the fastest form is then used.",
        )
    return _first(name, variants, engine, bundle, form)


def _first(
    what: str,
    variants: Sequence[Variant],
    engine: Engine,
    bundle: Bundle | None,
    form: StateForm | None = None,
) -> Variant:
    fitting = [variant for variant in variants if set(variant.requires) <= engine.features]
    if bundle is not None:
        fitting.sort(key=lambda variant: not engine.offers(bundle.file(variant.graph)))
    if fitting:
        return fitting[0]
    raise EngineError(
        f"{what} has no form for this engine (its forms need "
        f"{[variant.requires for variant in variants]}, the engine offers "
        f"{sorted(engine.features)})",
        fix="Export again with a newer edgeexit."
        if form is None
        else "Leave out states, or use a newer version of the engine.",
    )


def inputs_taken(manifest: Manifest, chain: Chain) -> set[str]:
    """Input tensors of a chain's components, of its exits, and of the makers of their states."""
    names = [*chain.components]
    names += [call.component for exit_ in chain.exits for call in exit_.path]
    states = [state for name in names for state in made_by_others(manifest.components[name])]
    names += [state.maker for state in states]
    return {tensor.name for name in names for tensor in manifest.components[name].inputs}


__all__ = [
    "EVERY_SCORE", "NO_SCORE", "Components", "Opened", "choose_variant", "exit_calls",
    "graph_outputs", "has_own_head", "inputs_taken", "made_by_others", "opened_early",
    "outputs_asked", "prompt_states", "scored_before_path", "scores_asked", "token_states",
    "unsplit_chain",
]  # fmt: skip
