"""Checks of a manifest that need no files.

`check_structure` checks names first: every reference must exist, and every component must be used.
Then `edgeexit.bundle.validate_steps` checks the program step by step, and at last the rules for
programs that write text are checked. `graph_signatures` lists the expected inputs and outputs of
each graph file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgeexit.bundle.layout import (
    EXPORT_AGAIN,
    MANIFEST,
    RECOPY,
    check_relative,
)
from edgeexit.bundle.manifest import (
    Chain,
    Component,
    Decoding,
    Gather,
    Manifest,
    PromptState,
    Run,
    Tensor,
    TextPreprocessing,
    TokenState,
)
from edgeexit.bundle.tensor_forms import check_rows, describe
from edgeexit.bundle.validate_images import check_images
from edgeexit.bundle.validate_speech import check_audio, check_choices, special_tokens
from edgeexit.bundle.validate_steps import check_steps
from edgeexit.bundle.validate_texts import check_text_chain
from edgeexit.errors import BundleError, IntegrityError


def check_structure(manifest: Manifest) -> None:
    """Checks all of a manifest that can be checked without its files.

    Raises:
        BundleError, IntegrityError: With the cause and the place.
    """
    _check_files(manifest)
    _check_inputs(manifest)
    _check_components(manifest)
    _check_chains(manifest)
    if manifest.decoding is not None:
        _check_feeds(manifest, manifest.decoding)
    check_steps(manifest)
    check_images(manifest)
    check_audio(manifest)
    if manifest.decoding is not None:
        _check_decoding(manifest, manifest.decoding)
    elif any(isinstance(step, Run | Gather) and step.when != "input" for step in manifest.steps):
        raise BundleError(
            f"{MANIFEST}: a step runs for every token, but the program writes no text",
            fix=EXPORT_AGAIN,
        )


def graph_signatures(manifest: Manifest) -> Iterable[tuple[str, set[str], set[str]]]:
    """Every graph file with the names of its expected inputs and outputs."""
    for component in manifest.components.values():
        inputs = {tensor.name for tensor in component.inputs}
        outputs = {tensor.name for tensor in component.outputs}
        past, present, read, made = set(), set(), set(), set()
        for state in component.states:
            if isinstance(state, TokenState):
                past.add(state.past)
                present.add(state.present)
                continue
            read.add(state.tensor.name)
            if state.made is not None:
                made.add(state.made)
        for variant in component.variants:
            lengths = {f"lengths/{kind}" for kind in variant.lengths}
            yield variant.graph, inputs | lengths | past | read, outputs | present | made
        for variant in component.projections:
            yield variant.graph, inputs, present


def _check_files(manifest: Manifest) -> None:
    """Checks that file names stay inside the bundle and that used files are listed."""
    for name in manifest.files:
        check_relative(name)
    wanted = [name for name, _, _ in graph_signatures(manifest)]
    wanted += manifest.samples
    wanted += [manifest.tokenizer] if manifest.tokenizer else []
    wanted += manifest.chat.templates.values() if manifest.chat else []
    for name in wanted:
        if name not in manifest.files:
            raise IntegrityError(f"{MANIFEST}: {name} is used but not listed in files", fix=RECOPY)
    if manifest.text_preprocessing is not None and not manifest.tokenizer:
        raise BundleError(f"{MANIFEST}: text preprocessing needs a tokenizer", fix=EXPORT_AGAIN)
    if manifest.chat is not None and not manifest.tokenizer:
        raise BundleError(f"{MANIFEST}: chat templates need a tokenizer", fix=EXPORT_AGAIN)


def _check_inputs(manifest: Manifest) -> None:
    """Checks that an input has rows, that preprocessing makes known inputs, and limits."""
    if not any("batch" in tensor.axes for tensor in manifest.inputs):
        raise BundleError(f"{MANIFEST}: no input has an axis named batch", fix=EXPORT_AGAIN)
    made: list[str | None] = []
    for one in manifest.preprocessing:
        is_text = isinstance(one, TextPreprocessing)
        made += [one.ids, one.mask, one.types] if is_text else [one.input]  # type: ignore[union-attr]
    if len(manifest.preprocessing) > len({type(one) for one in manifest.preprocessing}):
        raise BundleError(f"{MANIFEST}: two preprocessings of one kind", fix=EXPORT_AGAIN)
    inputs = {tensor.name for tensor in manifest.inputs}
    for name in made:
        if name is not None and name not in inputs:
            raise BundleError(
                f"{MANIFEST}: preprocessing makes {name}, which is not an input", fix=EXPORT_AGAIN
            )
    for axis, size in manifest.limits.items():
        if size < 1:
            raise BundleError(f"{MANIFEST}: the limit of {axis} is {size} (< 1)", fix=EXPORT_AGAIN)


def _check_components(manifest: Manifest) -> None:
    """Checks that named components exist, that all are used, and each component by itself."""
    used: set[str] = set()
    for where, name in _named_components(manifest):
        if name not in manifest.components:
            raise BundleError(f"{where}: there is no component {name}", fix=EXPORT_AGAIN)
        used.add(name)
    if unused := sorted(manifest.components.keys() - used):
        raise BundleError(f"{MANIFEST}: nothing uses the component {unused[0]}", fix=EXPORT_AGAIN)
    for name, component in manifest.components.items():
        where = f"{MANIFEST}: component {name}"
        _check_component(where, component)
        for state in component.states:
            if isinstance(state, PromptState) and state.made:
                _check_own_state(where, name, component, state)


def _named_components(manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Every component that a chain, the path of an exit or a state names, with the place."""
    chained = []
    for chain_name, chain in manifest.chains.items():
        where = f"{MANIFEST}: chain {chain_name}"
        chained += [(where, name) for name in [*chain.components, *chain.unsplit]]
        for exit_ in chain.exits:
            chained += [(f"{where}, exit {exit_.name}", call.component) for call in exit_.path]
    yield from chained
    for where, name in chained:
        yield from ((f"{where}, component {name}", maker) for maker in _makers(manifest, [name]))


def _makers(manifest: Manifest, names: Iterable[str]) -> set[str]:
    """The components that compute prompt states of these components for them."""
    components = [manifest.components[name] for name in names if name in manifest.components]
    states = [state for component in components for state in component.states]
    return {state.maker for state in states if isinstance(state, PromptState) and not state.made}


def _check_component(where: str, component: Component) -> None:
    for tensor in [*component.inputs, *component.outputs]:
        check_rows(f"{where}: {tensor.name}", tensor)
    tokens = [state for state in component.states if isinstance(state, TokenState)]
    prompts = [state for state in component.states if isinstance(state, PromptState)]
    for state in tokens:
        check_rows(f"{where}: the state {state.name}", state)
        form = ["batch", int, "past", int]
        if [int if isinstance(axis, int) else axis for axis in state.axes] != form:
            raise BundleError(
                f"{where}: the state {state.name} has the axes {state.axes}",
                fix="Axes of states are [batch, heads, past, size] with numbers for heads and "
                "size. Export again.",
            )
    lengths = {f"lengths/{kind}" for variant in component.variants for kind in variant.lengths}
    taken = [tensor.name for tensor in component.inputs] + [state.past for state in tokens]
    taken += [*(state.tensor.name for state in prompts), *lengths]
    given = [tensor.name for tensor in component.outputs] + [state.present for state in tokens]
    given += [state.made for state in prompts if state.made]
    for what, names in (
        ("inputs", taken),
        ("outputs", given),
        ("states", [state.name for state in tokens]),
    ):
        _check_distinct(names, f"{where}: two {what} are named")
    if any(variant.lengths for variant in component.projections):
        raise BundleError(f"{where} has a projection that takes lengths", fix=EXPORT_AGAIN)
    if component.projections and not tokens:
        raise BundleError(f"{where} has a projection, but no token states", fix=EXPORT_AGAIN)


def _check_own_state(where: str, name: str, component: Component, state: PromptState) -> None:
    """Checks a prompt state that its component makes itself."""
    if state.maker != name:
        raise BundleError(
            f"{where}: {state.made} is said to be made by {state.maker}, not by the component",
            fix=EXPORT_AGAIN,
        )
    first, *sizes = state.tensor.axes
    if first != "batch" or not all(isinstance(size, int) for size in sizes):
        raise BundleError(
            f"{where}: {describe(state.tensor)} is no state of rows, [batch, ...] with numbers",
            fix=EXPORT_AGAIN,
        )
    if not all("prompt" in variant.lengths for variant in component.variants):
        raise BundleError(
            f"{where} makes {state.made} of a prompt, but does not take lengths/prompt",
            fix=EXPORT_AGAIN,
        )


def _check_chains(manifest: Manifest) -> None:
    """Checks that one step runs each chain, and that its exits are in order."""
    names = [exit_.name for chain in manifest.chains.values() for exit_ in chain.exits]
    _check_distinct(names, f"{MANIFEST}: two exits are named")
    run = [step.chain for step in manifest.steps if isinstance(step, Run)]
    for name in run:
        if name not in manifest.chains:
            raise BundleError(
                f"{MANIFEST}: a step runs {name}, which is not a chain", fix=EXPORT_AGAIN
            )
    for name, chain in manifest.chains.items():
        if run.count(name) != 1:
            raise BundleError(
                f"{MANIFEST}: {run.count(name)} steps run the chain {name}, not one",
                fix=EXPORT_AGAIN,
            )
        _check_roles(manifest, f"{MANIFEST}: chain {name}", chain)
        _check_exit_order(f"{MANIFEST}: chain {name}", chain)


def _check_roles(manifest: Manifest, where: str, chain: Chain) -> None:
    """Checks that a component is part of a chain, of exit paths, or makes states: one of them."""
    _check_distinct(chain.components, f"{where} names", " twice")
    _check_distinct(chain.unsplit, f"{where}, unsplit names", " twice")
    on_paths: set[str] = set()
    for exit_ in chain.exits:
        path = [call.component for call in exit_.path]
        _check_distinct(path, f"{where}, exit {exit_.name} names", " twice")
        on_paths |= set(path)
    inside = set(chain.components)
    makers = _makers(manifest, inside | on_paths)
    others = (("is on the path of an exit", on_paths), ("makes states", makers))
    for what, names in others:
        if both := sorted(inside & names):
            raise BundleError(
                f"{where}: {both[0]} is a component of the chain and {what}", fix=EXPORT_AGAIN
            )
    if both := sorted(on_paths & makers) or sorted(
        set(chain.unsplit) & _makers(manifest, chain.unsplit)
    ):
        raise BundleError(
            f"{where}: {both[0]} makes states and is a component of its own", fix=EXPORT_AGAIN
        )
    for maker in sorted(_makers(manifest, on_paths)):
        taken = [
            tensor.name for tensor in manifest.components[maker].inputs if "new" in tensor.axes
        ]
        if taken:
            raise BundleError(
                f"{where}: {maker} makes states for the path of an exit of {taken[0]}, the tokens "
                "of a prompt, behind which the exit may first be asked",
                fix="Makers for exits take outputs of earlier steps. Export again.",
            )


def _check_exit_order(where: str, chain: Chain) -> None:
    """Checks that exits follow components of the chain, in order, and that the last answers."""
    places = {name: number for number, name in enumerate(chain.components)}
    for exit_ in chain.exits:
        if exit_.behind not in places:
            raise BundleError(
                f"{where}: exit {exit_.name} is behind {exit_.behind}, which is not in the chain",
                fix=EXPORT_AGAIN,
            )
    order = [places[exit_.behind] for exit_ in chain.exits]
    if order != sorted(order):
        raise BundleError(
            f"{where}: its exits are not in the order of components", fix=EXPORT_AGAIN
        )
    _check_distinct([e.behind for e in chain.stops], f"{where}: two exits answer behind")
    last = chain.exits[-1]
    if last.action != "stop" or last.behind != chain.components[-1]:
        raise BundleError(
            f"{where} does not end with an exit that answers",
            fix="The last exit stops and is behind the last component. Export again.",
        )
    if len(last.path) > 1:
        raise BundleError(
            f"{where}: the last exit, {last.name}, has an adapter",
            fix="The path of the last exit may have only a head. Export again.",
        )


def _check_decoding(manifest: Manifest, decoding: Decoding) -> None:
    """Checks a program that writes text."""
    runs = [step for step in manifest.steps if isinstance(step, Run)]
    if (runs[-1].chain, runs[-1].when) != (decoding.chain, "token"):
        raise BundleError(
            f"{MANIFEST}: decoding names the chain {decoding.chain}, but the last step that runs a "
            f"chain runs {runs[-1].chain} (when: {runs[-1].when})",
            fix="The last chain runs for every token and writes the text. Export again.",
        )
    if others := [run.chain for run in runs[:-1] if run.when == "token"]:
        raise BundleError(
            f"{MANIFEST}: the chain {others[0]} runs for every token, but writes no text",
            fix="Only the chain that writes text runs for every token. Export again.",
        )
    check_text_chain(manifest, decoding)
    outputs = {tensor.name: tensor for tensor in manifest.chains[decoding.chain].outputs}
    token, logits = outputs.get("token"), outputs.get("logits")
    if token is None or (token.dtype, token.axes) != ("int64", ["batch"]):
        raise BundleError(
            f"{MANIFEST}: the chain {decoding.chain} does not give token int64 [batch]",
            fix=EXPORT_AGAIN,
        )
    axes = [] if logits is None else [int if isinstance(a, int) else a for a in logits.axes]
    if axes != ["batch", int]:
        raise BundleError(
            f"{MANIFEST}: the chain {decoding.chain} does not give logits [batch, vocabulary]",
            fix=EXPORT_AGAIN,
        )
    check_choices(decoding)
    _check_tokens(manifest, decoding)
    if "positions" not in manifest.limits and decoding.capacity is None:
        raise BundleError(
            f"{MANIFEST}: neither limits.positions nor decoding.capacity is given",
            fix=EXPORT_AGAIN,
        )
    if decoding.start_tokens and len(manifest.inputs) < 2:
        raise BundleError(
            f"{MANIFEST}: texts begin with start tokens, but there is no input for the prompt",
            fix=EXPORT_AGAIN,
        )


def _check_feeds(manifest: Manifest, decoding: Decoding) -> None:
    """Checks that token ids and positions are int64 ``[batch, new]``."""
    given: list[tuple[str, Tensor]] = [("positions", decoding.positions)]
    given += [("tokens", tensor) for tensor in manifest.inputs if tensor.name == decoding.tokens]
    if len(given) < 2:
        raise BundleError(f"{MANIFEST}: no input is named {decoding.tokens}", fix=EXPORT_AGAIN)
    for what, tensor in given:
        if (tensor.dtype, tensor.axes) != ("int64", ["batch", "new"]):
            raise BundleError(
                f"{MANIFEST}: {what} are {tensor.dtype}{tensor.axes}, not int64 [batch, new]",
                fix=EXPORT_AGAIN,
            )


def _check_tokens(manifest: Manifest, decoding: Decoding) -> None:
    """Checks that one table is looked up for every token, and that it has all named tokens."""
    tables = [s for s in manifest.steps if isinstance(s, Gather) and s.ids == decoding.tokens]
    if [table.when for table in tables] != ["token"]:
        raise BundleError(
            f"{MANIFEST}: {len(tables)} steps look up {decoding.tokens}, not one for every token",
            fix=EXPORT_AGAIN,
        )
    named = [("stop token", token) for token in decoding.stop_tokens]
    named += [("start token", token) for token in decoding.start_tokens]
    named += [(f"token of the group {n}", group.token) for n, group in decoding.groups.items()]
    if decoding.generation is not None:
        never = [*decoding.generation.suppressed, *decoding.generation.suppressed_first]
        named += [("suppressed token", token) for token in never]
    named += special_tokens(decoding)
    for what, token in named:
        if not 0 <= token < tables[0].size:
            raise BundleError(
                f"{MANIFEST}: the {what} {token} is outside the vocabulary (0 to "
                f"{tables[0].size - 1})",
                fix=EXPORT_AGAIN,
            )
    tokens = [str(group.token) for group in decoding.groups.values()]
    _check_distinct(tokens, f"{MANIFEST}: two token groups have the token")


def _check_distinct(names: Sequence[str], before: str, after: str = "") -> None:
    """Refuses a repeated name; the message is `before`, the name, `after`."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BundleError(f"{before} {repeated[0]}{after}", fix=EXPORT_AGAIN)


__all__ = ["check_relative", "check_structure", "graph_signatures"]
