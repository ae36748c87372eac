"""Splits an ONNX graph at its exits.

Segment *i* computes what exit *i* needs and no earlier exit needs. A tensor that a later segment
uses crosses the cut, unless it is cheap: masks and shapes are computed again from the program's
inputs (without the rows that have exited), constants are folded again, and a DequantizeLinear is
copied to both sides so that the quantised tensor crosses. `read_onnx` and `axis_names` prepare the
graph; `prove_rows` finds the row axis of every tensor.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeexit.bundle.manifest import SCORES, Tensor
from edgeexit.errors import ExportError
from edgeexit.export.cut.axis_names import drop_shape_inputs
from edgeexit.export.cut.nature import Nature
from edgeexit.export.cut.read_onnx import DTYPES, valid_name
from edgeexit.export.trace.scores import append_scores
from edgeexit.export.trace.torch_graph import IR_VERSION

logger = logging.getLogger(__name__)

ANSWER = "logits"
"""Name of the program's output, which every exit and the unsplit model give."""


@dataclass(frozen=True)
class Piece:
    """A segment cut out of the graph.

    Attributes:
        name: Its name in the chain.
        model: Its graph: inputs, carried tensors, the exit's logits, the exit's scores.
        inputs: Names of its inputs: program inputs, then tensors that cross.
        exit: The exit's name, which is also the name of its logits.
        scores: Score -> tensor name.
    """

    name: str
    model: ir.Model
    inputs: tuple[str, ...]
    exit: str
    scores: dict[str, str]


@dataclass(frozen=True)
class Cut:
    """A graph cut into segments. `tensors` describes inputs, crossing tensors and exits by name, as
    far as shape inference knows them; row axes are not known yet and set to 0."""

    inputs: tuple[str, ...]
    pieces: tuple[Piece, ...]
    unsplit: ir.Model
    tensors: dict[str, Tensor]


def cut(model: ir.Model, what: str, *, probabilities: bool = False) -> Cut:
    """Cuts a normalised model.

    Args:
        model: Normalised, with resolved shapes and float32 outputs; only its names are changed.
        what: Name of the file, for messages.
        probabilities: Whether exits give probabilities instead of logits.

    Raises:
        ExportError: The exits are not ordered, or bundles do not support the type of a tensor that
            crosses.
    """
    graph = model.graph
    exits = list(graph.outputs)
    nature = Nature(graph)
    needs = [_ancestors(value, nature) for value in exits]
    _check_order(exits, needs, nature, what)
    home: dict[ir.Node, int] = {}
    for number, needed in enumerate(needs):
        for node in needed:
            home.setdefault(node, number)
    later: set[ir.Value] = set()
    plan: list[tuple[list[ir.Value], list[ir.Value]]] = []
    place = {node: position for position, node in enumerate(graph)}

    def ordered(values: Iterable[ir.Value]) -> list[ir.Value]:
        return sorted(values, key=lambda value: (place[_maker(value)], value.index() or 0))

    for number in range(len(exits) - 1, -1, -1):
        carried = [value for value in later if home[_maker(value)] == number]
        taken, crossing = _frontier([exits[number], *carried], number, home, nature)
        inputs = [value for value in graph.inputs if value in taken]
        plan.append(([*inputs, *ordered(crossing)], ordered(carried)))
        later |= crossing
    plan.reverse()
    _name_crossing(graph, ordered(later))
    for value in later:
        if value.dtype not in DTYPES:
            raise ExportError(
                f"{what}: {value.name} crosses a cut; bundles do not support {_kind(value)}",
                fix="Choose other exits, or give the file from before an optimiser changed it.",
            )
    axes = {d.value for v in graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim)}
    tensors = {
        value.name or "": _describe(value, axes, what)
        for value in [*graph.inputs, *exits, *ordered(later)]
    }
    pieces = [
        _piece(
            _extract(
                model,
                taken,
                [*(value for value in made if value is not exit_), exit_],
                f"segment_{number}",
            ),
            probabilities=probabilities,
        )
        for number, ((taken, made), exit_) in enumerate(zip(plan, exits, strict=True), start=1)
    ]
    unsplit = _extract(model, list(graph.inputs), [exits[-1]], "unsplit")
    drop_shape_inputs(unsplit)
    _drop_inner_shapes(unsplit.graph)
    _rename_answer(unsplit.graph, what)
    names = _used_inputs(graph.inputs, pieces, unsplit.graph, what)
    for value in graph.inputs:
        if value.name not in names:
            del tensors[value.name or ""]
    return Cut(inputs=names, pieces=tuple(pieces), unsplit=unsplit, tensors=tensors)


def _used_inputs(
    inputs: Sequence[ir.Value], pieces: Sequence[Piece], unsplit: ir.Graph, what: str
) -> tuple[str, ...]:
    """The program's inputs that a segment takes; the bundle leaves out the others."""
    taken = {name for piece in pieces for name in piece.inputs}
    for name in [value.name for value in inputs if value.name not in taken]:
        logger.warning("%s: no exit needs the input %s; the bundle leaves it out", what, name)
    for value in [value for value in unsplit.inputs if value.name not in taken]:
        unsplit.inputs.remove(value)
    return tuple(value.name or "" for value in inputs if value.name in taken)


def _piece(part: ir.Model, *, probabilities: bool) -> Piece:
    """Adds scores to a segment's graph, whose last output is the exit's, and describes it."""
    drop_shape_inputs(part)
    _drop_inner_shapes(part.graph)
    logits = part.graph.outputs[-1]
    name = part.graph.name or ""
    scores = append_scores(part.graph, logits, logits.name or "", probabilities=probabilities)
    part.graph.outputs.extend(scores.values())
    return Piece(
        name=name,
        model=part,
        inputs=tuple(value.name or "" for value in part.graph.inputs),
        exit=logits.name or "",
        scores={score: f"{logits.name}/{score}" for score in SCORES},
    )


def annotate(model: ir.Model, tensors: dict[str, Tensor]) -> None:
    """Sets the shapes of a graph's inputs and outputs to the axes in `tensors`."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name in tensors:
            value.shape = ir.Shape(tensors[value.name].axes)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _walk(
    values: Iterable[ir.Value], nature: Nature, enter: Callable[[ir.Node], bool]
) -> tuple[set[ir.Node], set[ir.Value], set[ir.Value]]:
    """Walks back from values. Returns the nodes entered, the values of nodes not entered, and the
    values without a node (graph inputs and weights)."""
    entered: set[ir.Node] = set()
    outside: set[ir.Value] = set()
    roots: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None:
            roots.add(value)
        elif node in entered:
            continue
        elif enter(node):
            entered.add(node)
            stack += nature.inputs[node]
        else:
            outside.add(value)
    return entered, outside, roots


def _ancestors(value: ir.Value, nature: Nature) -> set[ir.Node]:
    return _walk([value], nature, lambda node: True)[0]


def _frontier(
    targets: Sequence[ir.Value], number: int, home: dict[ir.Node, int], nature: Nature
) -> tuple[set[ir.Value], set[ir.Value]]:
    """Inputs of segment `number` for its targets: graph inputs, and values that cross into it."""
    _, crossing, roots = _walk(
        targets, nature, lambda node: home[node] == number or nature.again(node)
    )
    return {value for value in roots if value.is_graph_input()}, crossing


def _check_order(
    exits: list[ir.Value], needs: list[set[ir.Node]], nature: Nature, what: str
) -> None:
    """Checks that exits are ordered: each one needs all operators on the path to the last exit that
    the exit before it needs, and more."""
    last = needs[-1] & nature.heavy
    shared = [needed & last for needed in needs]
    names = [value.name for value in exits]
    best = sorted(range(len(exits)), key=lambda number: len(shared[number]))
    nested = all(shared[a] < shared[b] for a, b in itertools.pairwise(best))
    if nested and shared[best[0]] and best != list(range(len(exits))):
        raise ExportError(
            f"{what}: exits are not ordered from shallow to deep",
            fix=f"Give them as --exits {','.join(str(names[number]) for number in best)}.",
        )
    costs = [len(needed & nature.heavy) for needed in needs]
    if max(costs) > costs[-1]:
        deepest = costs.index(max(costs))
        raise ExportError(
            f"{what}: exit {names[deepest]} is deeper than the last one, {names[-1]} "
            f"({costs[deepest]} heavy operators against {costs[-1]})",
            fix="Give the exits from shallow to deep, the model's output last.",
        )
    for number, part in enumerate(shared):
        if not part:
            raise ExportError(
                f"{what}: exit {names[number]} and the last one, {names[-1]}, share no computation",
                fix="Name outputs of one backbone, from shallow to deep, the model's output last.",
            )
    for number in range(1, len(exits)):
        before, after = shared[number - 1], shared[number]
        if before == after:
            raise ExportError(
                f"{what}: exits {names[number - 1]} and {names[number]} are at the same depth",
                fix="Keep one of them; the other saves nothing.",
            )
        if missing := before - after:
            example = min(node.outputs[0].name or "" for node in missing)
            raise ExportError(
                f"{what}: exits {names[number - 1]} and {names[number]} are not ordered: "
                f"{names[number - 1]} needs {len(missing)} operators on the way to the last exit "
                f"that {names[number]} does not need ({example})",
                fix="Leave out the exit on the side branch: all exits must be on one path.",
            )


def _name_crossing(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """Renames crossing tensors to names that the manifest accepts."""
    taken = {value.name for value in [*graph.inputs, *graph.initializers.values()] if value.name}
    for owner in graph.subgraphs():
        taken |= {v.name for v in [*owner.inputs, *owner.initializers.values()] if v.name}
    taken |= {value.name for node in graph.all_nodes() for value in node.outputs if value.name}
    for value in values:
        if not value.is_graph_output():
            own = value.name or ""
            taken.discard(own)
            value.name = valid_name(own, taken)


def _kind(value: ir.Value) -> str:
    return "an unknown type" if value.dtype is None else value.dtype.name.lower()


def _describe(value: ir.Value, known_axes: set[str | None], what: str) -> Tensor:
    name = value.name or ""
    if value.dtype not in DTYPES:
        raise ExportError(
            f"{what}: input {name}: bundles do not support {_kind(value)}",
            fix="Convert the input to numbers outside the model.",
        )
    axes: list[str | int | None] = []
    for size in value.shape if value.shape is not None else ():
        if isinstance(size, int):
            axes.append(size if size >= 1 else None)
        else:
            axes.append(size.value if size.value in known_axes else None)
    return Tensor(name=name, dtype=DTYPES[value.dtype], axes=axes)  # type: ignore[arg-type]


def _extract(
    model: ir.Model, inputs: list[ir.Value], outputs: list[ir.Value], name: str
) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.name = name
    # extract collects initializers in a set: sort them, so that bundles are reproducible.
    for weight in sorted(graph.initializers):
        value = graph.initializers.pop(weight)
        graph.register_initializer(value)
    part = ir.Model(graph, ir_version=IR_VERSION)
    passes.RemoveUnusedOpsetsPass()(part)
    return part


def _drop_inner_shapes(graph: ir.Graph) -> None:
    """Removes inner shapes: engines infer them again, and wrong or unknown ones do harm."""
    outside = {*graph.inputs, *graph.outputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value not in outside:
                value.shape = None


def _rename_answer(graph: ir.Graph, what: str) -> None:
    answer = graph.outputs[0]
    if answer.name == ANSWER:
        return
    if any(value.name == ANSWER for value in graph.inputs):
        raise ExportError(
            f"{what}: an input is named {ANSWER}, the name of the bundle's output",
            fix="Rename the input (onnx_ir or netron's editor can) and export again.",
        )
    for value in [*graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)]:
        if value.name == ANSWER:
            value.name = f"inner_{ANSWER}_{len(graph)}"
    answer.name = ANSWER
