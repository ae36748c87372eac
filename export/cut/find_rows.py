"""Which axis of an ONNX file's inputs counts rows: found by running it, or told by the user.

A file names its axes as its exporter pleased: rows may be first or not, be called ``N`` in one
input and ``unk__7`` in the next, and two inputs may count different things (images and texts). So
the file runs with inputs whose axes differ in size, and once more with one row less: the axis that
the exits' first axis follows is the row axis. `edgeexit.export.cut.prove_rows` shows for every
tensor inside whether rows can leave one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.errors import ExportError, UsageError
from edgeexit.export.cut.sample_inputs import sample_inputs

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray]
Run = Callable[[Mapping[str, NDArray]], Arrays]
"""Runs the file on inputs and gives its exits, both under their names in the graph."""
BATCH = "batch"
OPENED = "edgeexit_rows"
"""What an axis is called that the user opened."""
_RE_EXPORT = (
    "Export it again with a dynamic batch: torch.onnx.export(..., dynamo=True, "
    'dynamic_shapes={{"{0}": {{0: "batch"}}}}) or dynamic_axes={{"{0}": {{0: "batch"}}}}. If the '
    "graph takes any number of rows although it does not say so: --rows {0}:0."
)


@dataclass(frozen=True)
class Rows:
    """How an ONNX file counts rows.

    Attributes:
        inputs: Inputs to run the graph with.
        exits: What the file gives for them at every exit.
        count: How many rows there are.
        names: Axes of the inputs that count rows, by the names that `name_axes` gave.
        axes: Input -> its row axis, where that is a fixed axis of 1.
        one: Whether the file takes one row at a time.
        sizes: Axes that give the number of classes, and are fixed therefore -> size.
    """

    inputs: Arrays
    exits: Arrays
    count: int
    names: frozenset[str] = frozenset()
    axes: Mapping[str, int] = field(default_factory=dict)
    one: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


def name_axes(
    graph: ir.Graph,
    what: str,
    samples: Mapping[str, NDArray] | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Gives every axis of the inputs whose size is open a name. Those that have none get one of
    their own, and so do those that have the name of an axis of another size in the samples.

    Args:
        samples, names: As for `find_rows`.
    """
    given = {(names or {}).get(name, name): np.shape(a) for name, a in (samples or {}).items()}
    sizes: dict[str, int] = {}
    if not graph.inputs:
        raise ExportError(f"{what}: it has no inputs", fix="Give a model that takes some.")
    for value in graph.inputs:
        if value.shape is None:
            raise ExportError(
                f"{what}: input {value.name} has no shape",
                fix="Export it again with the shapes of its inputs.",
            )
        if 0 in value.shape:
            raise ExportError(
                f"{what}: input {value.name} has an axis of size 0 ({_dims(value)}), and ONNX "
                "Runtime takes nothing of another size",
                fix="Give the axis a name: onnx.load, set dim_param of its shape, onnx.save.",
            )
        shape = given.get(value.name or "", ())
        dims: list[int | str] = []
        for axis, size in enumerate(value.shape):
            own = f"{value.name}_axis_{axis}"
            name = size if isinstance(size, int) else size.value or own
            if isinstance(name, str) and axis < len(shape):
                name = own if sizes.setdefault(name, shape[axis]) != shape[axis] else name
            dims.append(name)
        value.shape = ir.Shape(dims)


def find_rows(
    graph: ir.Graph,
    run: Run,
    rows: int,
    samples: Mapping[str, NDArray] | None,
    names: Mapping[str, str],
    what: str,
    *,
    told: Mapping[str, int] | None = None,
    step: int = 1,
) -> Rows:
    """Finds the axes that count rows, by running the file.

    Args:
        graph: As `edgeexit.export.cut.read_onnx.normalise` leaves it, its axes named.
        run: Runs the file.
        rows: How many rows to make up.
        samples: The user's inputs; None: inputs are made up.
        names: Name of an input in the user's file -> its name in the graph.
        what: The file, for messages.
        told: Input or exit -> its row axis, where the user tells it (`told_rows` checked them).
        step: How many rows the file takes at a time, where the user opened a fixed axis.

    Raises:
        ExportError: No axis counts rows, or their number is fixed and not one.
    """
    by_user = [_dims(v)[told[v.name or ""]] for v in graph.inputs if told and v.name in told]
    inner = {d for value in graph.inputs for d in _symbols(value)[1:] if d}
    first = [d for v in graph.inputs if (dims := _symbols(v)) and (d := dims[0]) and d not in inner]
    likely: list[str] = [str(d) for d in by_user] or first
    rows = -(-rows // step) * step
    inputs = sample_inputs(graph, dict.fromkeys(likely, rows), samples, names)
    if step > 1:
        inputs = _whole_steps(graph, inputs, likely, step)
    exits = run(inputs)
    count = _count(exits, what)
    open_axes = list(dict.fromkeys(d for v in graph.inputs for d in _symbols(v) if d))
    if by_user:
        chosen = list(dict.fromkeys(likely))
        if count != _size(graph, inputs, chosen[0]):
            raise UsageError(
                f"--rows: for {_size(graph, inputs, chosen[0])} rows of the inputs, the exits of "
                f"{what} give {count}",
                fix="Leave --rows out to see which axis the exits follow, or name another.",
            )
    else:
        likely = [d for d in open_axes if _size(graph, inputs, d) == count]
        if not likely:
            return _fixed(graph, inputs, exits, count, what)
        chosen = likely if len(likely) == 1 else _followed(graph, run, inputs, count, likely)
        if not chosen:
            raise ExportError(
                f"{what}: the axes {', '.join(likely)} of its inputs all have {count} entries, and "
                "the exits follow none of them alone, nor all",
                fix="Say which axis of which input counts rows, as in "
                f"--rows {graph.inputs[0].name}:0; give real inputs with --data.",
            )
    if count < 2:
        raise UsageError(
            "samples: there is only one row",
            fix="Give two or more, to see how rows are told apart.",
        )
    classes = _classes(graph, run, inputs, exits, set(open_axes) - set(chosen))
    for name, size in classes.items():
        logger.warning(
            "%s: the number of classes is the size of the axis %s: fixed to %d, as in the samples "
            "(--data)",
            what,
            name,
            size,
        )
    return Rows(inputs, exits, count, frozenset(chosen), sizes=classes)


def _whole_steps(graph: ir.Graph, inputs: Arrays, likely: Sequence[str], step: int) -> Arrays:
    """As many rows as the file takes in whole runs."""
    count = _size(graph, inputs, likely[0])
    if count < step:
        raise UsageError(
            f"samples: there are {count} rows, the file takes {step} at a time",
            fix=f"Give {step} or more.",
        )
    spare = count % step
    for _ in range(spare):
        inputs = _without(graph, inputs, likely)
    return inputs


def told_rows(
    graph: ir.Graph, told: Mapping[str, int], exits: Sequence[str], what: str
) -> dict[str, int]:
    """Checks the row axes that the user tells, and opens those that are fixed. Returns these:
    input -> its number of rows.

    Args:
        told: Input or exit -> its row axis.
        exits: The exits, which may be told too.

    Raises:
        UsageError: There is no such input, or it has no such axis.
    """
    inputs = {value.name or "": value for value in graph.inputs}
    opened = {}
    for name, axis in told.items():
        if name in exits:
            continue
        if name not in inputs:
            raise UsageError(
                f"--rows {name}:{axis}: {what} has no input and no exit {name}",
                fix=f"Its inputs are {', '.join(inputs)}.",
            )
        dims = _dims(inputs[name])
        if not 0 <= axis < len(dims):
            raise UsageError(
                f"--rows {name}:{axis}: {name} has {len(dims)} axes, {dims}",
                fix="Count axes from 0.",
            )
        if isinstance(size := dims[axis], int):
            opened[name] = size
            dims[axis] = OPENED
            inputs[name].shape = ir.Shape(dims)
    if len(set(opened.values())) > 1:
        raise UsageError(
            f"--rows: the inputs have fixed numbers of rows that differ ({opened})",
            fix="Name axes of one size.",
        )
    return opened


def set_rows(graph: ir.Graph, found: Rows) -> None:
    """Names the axes that count rows ``batch``, also inside the graph; no other is called so."""
    renamed: dict[str, str | int] = {BATCH: f"{BATCH}_axis"}
    renamed |= dict.fromkeys(found.names, BATCH) | dict(found.sizes)
    for value in graph.inputs:
        dims = [d if d is None else renamed.get(str(d), d) for d in _dims(value)]
        if (axis := found.axes.get(value.name or "")) is not None:
            dims[axis] = BATCH
        value.shape = ir.Shape(dims)
    inputs = set(graph.inputs)
    for node in graph.all_nodes():
        for value in node.outputs:
            if value not in inputs and value.shape is not None:
                value.shape = ir.Shape(
                    [d if d is None else renamed.get(str(d), d) for d in _dims(value)]
                )


def _dims(value: ir.Value) -> list[int | str | None]:
    return [d if isinstance(d, int) else d.value for d in value.shape or ()]


def _symbols(value: ir.Value) -> list[str | None]:
    return [d if isinstance(d, str) else None for d in _dims(value)]


def _count(exits: Mapping[str, NDArray], what: str) -> int:
    """How many rows the last exit gives."""
    for name, made in exits.items():
        if made.dtype.kind not in "fV":
            raise ExportError(
                f"{what}: exit {name} gives {made.dtype.name}, not floating-point logits",
                fix="Name the tensor of class logits from which that is computed.",
            )
        if made.ndim != 2:
            raise ExportError(
                f"{what}: exit {name} gives {list(made.shape)}, not [rows, classes]",
                fix="Name a tensor with one row of class logits (two classes or more) per input.",
            )
    return len(list(exits.values())[-1])


def _size(graph: ir.Graph, inputs: Mapping[str, NDArray], name: str) -> int:
    return next(
        inputs[value.name or ""].shape[axis]
        for value in graph.inputs
        for axis, symbol in enumerate(_symbols(value))
        if symbol == name
    )


def _fixed(graph: ir.Graph, inputs: Arrays, exits: Arrays, count: int, what: str) -> Rows:
    """A file that takes a number of rows that nothing changes: one, or it is refused."""
    last = list(exits)[-1]
    if count == 1:
        for axis in range(max(value.ndim for value in inputs.values())):
            axes = {
                value.name or "": axis
                for value in graph.inputs
                if len(dims := _dims(value)) > axis and dims[axis] == 1
            }
            if axes:
                logger.warning("%s: it takes one row at a time, and so does the bundle", what)
                return Rows(inputs, exits, 1, axes=axes, one=True)
        raise ExportError(
            f"{what}: exit {last} gives one row, and no axis of an input counts rows",
            fix="Export it again with a first axis for rows in its inputs.",
        )
    first = next((v for v in graph.inputs if (dims := _dims(v)) and dims[0] == count), None)
    if first is None:
        raise ExportError(
            f"{what}: exit {last} gives {count} rows, and no axis of an input has as many",
            fix="Name a tensor with one row of class logits per input; if another axis of the exit "
            f"counts rows, say so: --rows {last}:1.",
        )
    raise ExportError(
        f"{what}: the number of rows is fixed to {count} (input {first.name} is {_dims(first)}), "
        "so no row can leave before another",
        fix=_RE_EXPORT.format(first.name),
    )


def _followed(
    graph: ir.Graph, run: Run, inputs: Arrays, count: int, likely: Sequence[str]
) -> list[str]:
    """Which axes of the same size the exits follow: one of them alone, or those that must agree."""
    tied = []
    for name in likely:
        found = _rows_without(graph, run, inputs, [name])
        if found == count - 1:
            return [name]
        if found is None:
            tied.append(name)
    return tied if tied and _rows_without(graph, run, inputs, tied) == count - 1 else []


def _classes(
    graph: ir.Graph, run: Run, inputs: Arrays, exits: Arrays, others: set[str]
) -> dict[str, int]:
    """Axes whose size is the number of classes."""
    classes = list(exits.values())[-1].shape[1]
    found = {}
    for name in sorted(others):
        size = _size(graph, inputs, name)
        if size == classes and size > 2:
            try:
                fewer = run(_without(graph, inputs, [name]))
            except ExportError:
                continue
            if list(fewer.values())[-1].shape[1] != classes:
                found[name] = size
    return found


def _rows_without(graph: ir.Graph, run: Run, inputs: Arrays, names: Sequence[str]) -> int | None:
    """How many rows the last exit gives when these axes lose their last entry; None: it does not
    run then."""
    try:
        return len(list(run(_without(graph, inputs, names)).values())[-1])
    except ExportError:
        return None


def _without(graph: ir.Graph, inputs: Arrays, names: Sequence[str]) -> Arrays:
    fewer = dict(inputs)
    for value in graph.inputs:
        for axis, symbol in enumerate(_symbols(value)):
            if symbol in names:
                held = fewer[value.name or ""]
                fewer[value.name or ""] = np.take(held, range(held.shape[axis] - 1), axis)
    return fewer


__all__ = ["BATCH", "Rows", "find_rows", "name_axes", "set_rows", "told_rows"]
