"""Checks the steps of a program in the order in which they run: every tensor must be computed once,
before its use, and with the expected dtype and axes.

All steps share one namespace. Later steps see only the outputs of a chain, not the tensors inside
it. Tensors of components on the path of an exit are visible to that exit only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from edgeexit.bundle.blocks import FLOATS, table_parts
from edgeexit.bundle.layout import EXPORT_AGAIN, MANIFEST, RECOPY, WEIGHTS
from edgeexit.bundle.manifest import (
    Axis,
    Call,
    Chain,
    Component,
    Exit,
    Gather,
    Manifest,
    Place,
    PromptState,
    Run,
    Tensor,
    TokenGroup,
    When,
)
from edgeexit.bundle.tensor_forms import Tensors, check_answer, check_rows, describe
from edgeexit.errors import BundleError, IntegrityError

_FREQUENCY: dict[When, str] = {"input": "once per request", "token": "for every token"}


def check_steps(manifest: Manifest) -> None:
    """Checks the program of a manifest whose names `edgeexit.bundle.validate` has checked.

    Raises:
        BundleError, IntegrityError: With the step, component or exit, and the tensor.
    """
    walk = _Walk(manifest)
    for number, step in enumerate(manifest.steps, start=1):
        if isinstance(step, Gather):
            walk.gather(f"{MANIFEST}: step {number}", step)
        elif isinstance(step, Place):
            walk.place(f"{MANIFEST}: step {number}", step)
        else:
            walk.run(f"{MANIFEST}: chain {step.chain}", step)


@dataclass
class _Scope:
    """The chain that is being checked, or the same chain without exits.

    Attributes:
        where: Its name in messages.
        components: Its components in order.
        inside: Outputs of the components so far.
        makers: Every tensor computed in it -> the component that computes it.
    """

    where: str
    chain: str
    components: Sequence[str]
    when: When
    inside: Tensors = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)


class _Walk:
    """The tensors known between two steps.

    Attributes:
        known: Program inputs, feeds, rows of tables, and outputs of chains.
        handed: Output of a chain -> the chain.
        taken: Known tensors that a chain has used so far.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.known: Tensors = {}
        self.handed: dict[str, str] = {}
        self.taken: set[str] = set()
        self._made_when: dict[str, When] = {}
        decoding = manifest.decoding
        self.groups: dict[str, TokenGroup] = {} if decoding is None else decoding.groups
        for tensor in manifest.inputs:
            tokens = decoding is not None and tensor.name == decoding.tokens
            self._add(f"{MANIFEST}: inputs", tensor, "token" if tokens else "input")
        if decoding is not None:
            self._add(f"{MANIFEST}: decoding", decoding.positions, "token")
        for group in self.groups.values():
            if group.mask is not None:
                mask = Tensor(name=group.mask, dtype="bool", axes=["batch", "new"])
                self._add(f"{MANIFEST}: decoding", mask, "token")

    def gather(self, where: str, step: Gather) -> None:
        """Checks a table's ids, its place in the weight store, and its output."""
        inputs = {tensor.name: tensor for tensor in self.manifest.inputs}
        ids, output, store = inputs.get(step.ids), step.output, self.manifest.files.get(WEIGHTS)
        if ids is None or ids.dtype not in ("int64", "int32"):
            raise BundleError(f"{where}: no input of ids is named {step.ids}", fix=EXPORT_AGAIN)
        width = output.axes[-1] if output.axes else None
        if not isinstance(width, int) or output.axes[:-1] != ids.axes:
            raise BundleError(
                f"{where}: ids {ids.axes} do not give {output.name} {output.axes}",
                fix="The output has the axes of the ids and a fixed width. Export again.",
            )
        if store is None:
            raise BundleError(f"{where}: there is no {WEIGHTS} for its table", fix=EXPORT_AGAIN)
        blocks = step.blocks
        if blocks is not None and (width % blocks.block or output.dtype not in FLOATS):
            raise BundleError(
                f"{where}: a table of {output.dtype} {width} wide cannot be in blocks of "
                f"{blocks.block}",
                fix=EXPORT_AGAIN,
            )
        end = max(first + size for first, size in table_parts(step).values())
        if end > store.bytes:
            raise IntegrityError(
                f"{where}: the table is outside the weight store (it would end at byte {end} of "
                f"{store.bytes})",
                fix=RECOPY,
            )
        self._check_time(where, ids, step.when)
        self._add(where, output, step.when)

    def place(self, where: str, step: Place) -> None:
        """Checks that rows of the source fit among the tokens of the target."""
        if step.group not in self.groups:
            raise BundleError(f"{where}: there is no token group {step.group}", fix=EXPORT_AGAIN)
        gathered = {s.output.name for s in self.manifest.steps if isinstance(s, Gather)}
        source, target = self.known.get(step.source), self.known.get(step.target)
        if source is None or step.source not in self.handed:
            raise BundleError(
                f"{where}: no earlier chain has the output {step.source}", fix=EXPORT_AGAIN
            )
        if target is None or step.target not in gathered:
            raise BundleError(
                f"{where}: {step.target} is not the output of an earlier table", fix=EXPORT_AGAIN
            )
        if step.target in self.taken:
            raise BundleError(
                f"{where} changes {step.target} after a chain has taken it", fix=EXPORT_AGAIN
            )
        same = source.dtype == target.dtype and source.axes[-1:] == target.axes[-1:]
        if not same or len(source.axes) != 3 or source.axes[0] != "batch":
            raise BundleError(
                f"{where}: rows of {describe(source)} do not fit into {describe(target)}",
                fix="The source is [batch, tokens, width] with the target's width and dtype. "
                "Export again.",
            )

    def run(self, where: str, step: Run) -> None:
        """Checks a chain, the same chain without exits, and its outputs."""
        chain = self.manifest.chains[step.chain]
        scope = _Scope(where, step.chain, chain.components, step.when)
        for name in chain.components:
            self._component(scope, name)
            for exit_ in chain.exits:
                if exit_.behind == name:
                    self._exit(scope, chain, exit_)
        unsplit = _Scope(f"{where}, unsplit", step.chain, chain.unsplit, step.when)
        for name in chain.unsplit:
            self._component(unsplit, name)
        if chain.unsplit:
            last = self.manifest.components[chain.unsplit[-1]]
            given = {tensor.name: tensor for tensor in last.outputs}
            check_answer(unsplit.where, chain, {t.name: t.name for t in chain.outputs}, given)
        for tensor in chain.outputs:
            check_rows(f"{where}: {tensor.name}", tensor)
            if chain.rows == "independent" and len(chain.stops) > 1 and tensor.row_axis is None:
                raise BundleError(
                    f"{where}: rows are independent, but {tensor.name} has no row axis",
                    fix=EXPORT_AGAIN,
                )
            self._add(where, tensor, step.when)
            self.handed[tensor.name] = step.chain

    def _add(self, where: str, tensor: Tensor, when: When) -> None:
        """Makes a tensor known to all later steps."""
        if tensor.name in self.known:
            raise BundleError(f"{where}: {tensor.name} is made twice", fix=EXPORT_AGAIN)
        check_rows(f"{where}: {tensor.name}", tensor)
        self.known[tensor.name] = tensor
        self._made_when[tensor.name] = when

    def _component(self, scope: _Scope, name: str) -> None:
        component, where = self.manifest.components[name], f"{scope.where}, component {name}"
        for tensor in component.inputs:
            self._take(scope, where, tensor, tensor.name, scope.inside)
        made = self._states(scope, where, component, {tensor.name for tensor in component.inputs})
        scope.inside |= made | self._made(scope, where, name)

    def _states(
        self, scope: _Scope, where: str, component: Component, taken: Collection[str]
    ) -> Tensors:
        """Checks the states of a component that takes these tensors. Returns the outputs of the
        makers of its states."""
        if scope.when == "input" and any(variant.lengths for variant in component.variants):
            raise BundleError(
                f"{where} takes lengths of texts, but its chain runs once per request",
                fix=EXPORT_AGAIN,
            )
        made: Tensors = {}
        for state in component.states:
            if isinstance(state, PromptState) and state.made:
                continue  # made in the component's own run
            if isinstance(state, PromptState):
                made |= self._prompt_state(scope, where, state, taken)
            elif scope.when == "input":
                raise BundleError(
                    f"{where}: the state {state.name} grows with every token, but the chain runs "
                    f"{_FREQUENCY[scope.when]}",
                    fix=EXPORT_AGAIN,
                )
        return made

    def _prompt_state(
        self, scope: _Scope, where: str, state: PromptState, taken: Collection[str]
    ) -> Tensors:
        maker, tensor = self.manifest.components[state.maker], state.tensor
        if scope.when == "input":
            raise BundleError(
                f"{where}: {tensor.name} is made of a prompt, but the chain runs once per request",
                fix=EXPORT_AGAIN,
            )
        if tensor not in maker.outputs:
            raise BundleError(
                f"{where}: {state.maker} does not make {describe(tensor)}", fix=EXPORT_AGAIN
            )
        if "new" in tensor.axes:
            raise BundleError(
                f"{where}: {describe(tensor)} is kept for a whole text and has the axis new",
                fix=EXPORT_AGAIN,
            )
        where = f"{where}, maker {state.maker}"
        if maker.states:
            raise BundleError(f"{where}: it has states of its own", fix=EXPORT_AGAIN)
        for wanted in maker.inputs:
            if wanted.name in scope.inside and wanted.name not in taken:
                raise BundleError(
                    f"{where} takes {wanted.name}, which is not an input of the component",
                    fix=EXPORT_AGAIN,
                )
            self._take(scope, where, wanted, wanted.name, scope.inside)
        return self._made(scope, where, state.maker)

    def _made(self, scope: _Scope, where: str, name: str) -> Tensors:
        """The outputs of a component. Refuses names that something else has computed before."""
        outputs = {tensor.name: tensor for tensor in self.manifest.components[name].outputs}
        for tensor in outputs:
            if tensor in self.known or scope.makers.setdefault(tensor, name) != name:
                raise BundleError(f"{where}: {tensor} is made twice", fix=EXPORT_AGAIN)
        return outputs

    def _exit(self, scope: _Scope, chain: Chain, exit_: Exit) -> None:
        where = f"{scope.where}, exit {exit_.name}"
        given = {t.name: t for t in self.manifest.components[exit_.behind].outputs}
        local = dict(scope.inside)
        for call in exit_.path:
            given = self._call(scope, where, call, local)
            local |= given
        giver = exit_.path[-1].component if exit_.path else exit_.behind
        before = {t.name: t for t in self.manifest.components[exit_.behind].outputs}
        for tensor in exit_.outputs.values():
            if tensor not in given:
                raise BundleError(
                    f"{where} names {tensor}, which is not an output of {giver}", fix=EXPORT_AGAIN
                )
        for score, tensor in exit_.scores.items():
            found, axes = given.get(tensor), ["batch"]
            if found is None and exit_.path:  # known before the path runs
                found = before.get(tensor)
                axes = ["batch"] if scope.when == "input" else ["batch", "new"]
            if found is None:
                raise BundleError(
                    f"{where} names {tensor}, which is not an output of {giver}", fix=EXPORT_AGAIN
                )
            if (found.dtype, found.axes) != ("float32", axes):
                raise BundleError(
                    f"{where}: the score {score} is {describe(found)}, not float32 "
                    f"[{', '.join(axes)}]",
                    fix=EXPORT_AGAIN,
                )
        if exit_.action == "drop":
            self._check_drop(scope, where, exit_)
            return
        if exit_.tokens is not None:
            raise BundleError(
                f"{where} answers, so it cannot drop the token group {exit_.tokens}",
                fix=EXPORT_AGAIN,
            )
        check_answer(where, chain, exit_.outputs, given)

    def _call(self, scope: _Scope, where: str, call: Call, local: Tensors) -> Tensors:
        """Checks a component on the path of an exit. If its inputs have no axis ``new``, it takes
        selected tokens as rows."""
        component, where = self.manifest.components[call.component], f"{where}, {call.component}"
        if unknown := sorted(call.inputs.keys() - {tensor.name for tensor in component.inputs}):
            raise BundleError(f"{where} has no input {unknown[0]}", fix=EXPORT_AGAIN)
        chosen = not any("new" in tensor.axes for tensor in component.inputs)
        taken = {t.name: call.inputs.get(t.name, t.name) for t in component.inputs}
        for tensor in component.inputs:
            self._take(scope, where, tensor, taken[tensor.name], local, chosen=chosen)
        self._states(scope, where, component, taken.values())
        return self._made(scope, where, call.component)

    def _check_drop(self, scope: _Scope, where: str, exit_: Exit) -> None:
        if exit_.tokens not in self.groups:
            raise BundleError(f"{where}: there is no token group {exit_.tokens}", fix=EXPORT_AGAIN)
        if scope.when == "input":
            raise BundleError(
                f"{where} drops tokens of a prompt, but the chain runs once per request",
                fix=EXPORT_AGAIN,
            )
        if len(exit_.scores) != bool(exit_.path) or exit_.outputs:
            raise BundleError(
                f"{where}: an exit that drops tokens has a path and one score, or neither, and no "
                "outputs",
                fix=EXPORT_AGAIN,
            )

    def _take(
        self,
        scope: _Scope,
        where: str,
        wanted: Tensor,
        name: str,
        inside: Tensors,
        *,
        chosen: bool = False,
    ) -> None:
        """Checks that a tensor exists with the expected dtype and axes."""
        there = inside.get(name)
        if there is None:
            there = self.known.get(name)
            if there is None:
                raise self._missing(scope, where, name)
            self._check_time(where, there, scope.when)
            self.taken.add(name)
        axes: Sequence[Axis] = there.axes
        if chosen:
            axes = [axis for axis in axes if axis != "new"]
        # The row axis is the axis named batch in both, so row_axis needs no comparison.
        if (there.dtype, axes) != (wanted.dtype, wanted.axes):
            raise BundleError(
                f"{where} takes {describe(wanted)}, but {describe(there)} is given",
                fix=EXPORT_AGAIN,
            )

    def _check_time(self, where: str, tensor: Tensor, when: When) -> None:
        """Refuses a tensor that does not exist yet when a step runs."""
        made = self._made_when[tensor.name]
        if when == "input" and made == "token":
            raise BundleError(
                f"{where} runs {_FREQUENCY[when]}, but {tensor.name} is made {_FREQUENCY[made]}",
                fix=EXPORT_AGAIN,
            )

    def _missing(self, scope: _Scope, where: str, name: str) -> BundleError:
        """The error for a missing tensor, with the cause."""
        chains, own = self.manifest.chains, scope.chain
        order = [step.chain for step in self.manifest.steps if isinstance(step, Run)]
        makers = [c for c in order if c != own and name in self._made_by(chains[c])]
        later = [c for c in makers if order.index(c) > order.index(own)]
        handed_on = {tensor.name for tensor in chains[own].outputs}
        if name in self._outputs_of(scope.components):
            why = "which the chain computes only later"
        elif later and handed_on & self._taken_by(chains[later[0]]):
            why = (
                f"which the chain {later[0]} computes from an output of {own}: the chains depend "
                "on each other"
            )
        elif later:
            why = f"which the later chain {later[0]} computes"
        elif makers:
            why = f"which is not an output of the chain {makers[0]} that computes it"
        else:
            why = "which nothing computes before"
        return BundleError(f"{where} takes {name}, {why}", fix=EXPORT_AGAIN)

    def _made_by(self, chain: Chain) -> set[str]:
        handed_on = {tensor.name for tensor in chain.outputs}
        return handed_on | self._outputs_of(chain.components)

    def _taken_by(self, chain: Chain) -> set[str]:
        components = [self.manifest.components[name] for name in chain.components]
        return {tensor.name for component in components for tensor in component.inputs}

    def _outputs_of(self, names: Sequence[str]) -> set[str]:
        components = [self.manifest.components[name] for name in names]
        return {tensor.name for component in components for tensor in component.outputs}


__all__ = ["check_steps"]
