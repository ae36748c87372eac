"""Finds the axis of an ONNX file's inputs that counts rows, by running the file.

Axis names do not show it: the row axis may not be the first, it may be ``N`` in one input and
``unk__7`` in the next, and two inputs may count different things (images and texts). So the file
runs with inputs whose axes differ in size, and once more with one row less: the row axis is the one
that the exits' first axis follows. The user can also give it (``--rows``).
`edgeexit.export.cut.prove_rows` checks for every inner tensor whether rows can exit one by one.
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
"""Runs the file on inputs and returns its exits, both by their names in the graph."""
BATCH = "batch"
OPENED = "edgeexit_rows"
"""Name of a fixed axis that the user declared as the row axis (``--rows``)."""
_RE_EXPORT = (
    "Export it again with a dynamic batch: torch.onnx.export(..., dynamo=True, "
    'dynamic_shapes={{"{0}": {{{1}: "batch"}}}}) or dynamic_axes={{"{0}": {{{1}: "batch"}}}}. If '
    "the graph takes any number of rows although its shape is fixed: --rows {0}:{1}."
)


@dataclass(frozen=True)
class Rows:
    """The row axis of an ONNX file, with samples.

    Attributes:
        inputs: Sample inputs.
        exits: The file's output for them at every exit.
        count: Number of rows of the samples.
        names: Names of the input axes that count rows (see `name_axes`).
        axes: Input -> its row axis, where that is a fixed axis of 1.
        one: Whether the file takes one row at a time.
        sizes: Axis -> size, for axes that set the number of classes; they become fixed.
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
    """Names every dynamic axis of the inputs. An axis without a name gets a unique one; so does an
    axis whose name belongs to an axis of another size in the samples.

    Args:
        samples, names: As for `find_rows`.
    """
    given = {(names or {}).get(name, name): np.shape(a) for name, a in (samples or {}).items()}
    sizes: dict[str, int] = {}
    if not graph.inputs:
        raise ExportError(f"{what}: it has no inputs", fix="Give a model with inputs.")
    for value in graph.inputs:
        if value.shape is None:
            raise ExportError(
                f"{what}: input {value.name} has no shape",
                fix="Export it again with the shapes of its inputs.",
            )
        if 0 in value.shape:
            raise ExportError(
                f"{what}: input {value.name} has an axis of size 0 ({_dims(value)}); ONNX Runtime "
                "accepts no other size",
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
        graph: The normalised graph, after `name_axes`.
        run: Runs the file.
        rows: Number of rows to generate.
        samples: The user's inputs; None: inputs are generated.
        names: Name of an input in the user's file -> its name in the graph.
        what: Name of the file, for messages.
        told: Input or exit -> row axis given by the user and checked by `told_rows`.
        step: Rows that the file takes at a time, where `told_rows` opened a fixed axis.

    Raises:
        UsageError: The user's row axis is wrong, or there are too few samples.
        ExportError: No axis counts rows, or the number of rows is fixed and not 1.
    """
    by_user = [_dims(v)[told[v.name or ""]] for v in graph.inputs if told and v.name in told]
    inner = {d for value in graph.inputs for d in _symbols(value)[1:] if d}
    first = [d for v in graph.inputs if (dims := _symbols(v)) and (d := dims[0]) and d not in inner]
    likely: list[str] = [str(d) for d in by_user] or first
    rows = -(-rows // step) * step
    inputs = sample_inputs(graph, dict.fromkeys(likely, rows), samples, names)
    if step > 1:
        inputs = _whole_steps(graph, inputs, likely, step)
    exits = _run_told(run, inputs, rows, what, by_user=bool(by_user))
    count = _count(exits, what)
    open_axes = list(dict.fromkeys(d for v in graph.inputs for d in _symbols(v) if d))
    if by_user:
        chosen = list(dict.fromkeys(likely))
        if count != _size(graph, inputs, chosen[0]):
            raise UsageError(
                f"--rows: for {_size(graph, inputs, chosen[0])} rows of the inputs, the exits of "
                f"{what} give {count}",
                fix="Give another axis, or leave --rows out: export then looks for the row axis.",
            )
    else:
        likely = [d for d in open_axes if _size(graph, inputs, d) == count]
        if not likely:
            return _fixed(graph, inputs, exits, count, what)
        chosen = likely if len(likely) == 1 else _followed(graph, run, inputs, count, likely)
        if not chosen:
            raise ExportError(
                f"{what}: no row axis found: the input axes {', '.join(likely)} have {count} "
                "entries, but the exits follow neither one of them nor all",
                fix=f"Give the row axis, as in --rows {graph.inputs[0].name}:0, and real inputs "
                "with --data.",
            )
    if count < 2:
        raise UsageError(
            f"samples: there is {'only one row' if count else 'no row'}",
            fix="Give two or more: the row axis is found by leaving rows out.",
        )
    classes = _classes(graph, run, inputs, exits, set(open_axes) - set(chosen))
    for name, size in classes.items():
        logger.warning(
            "%s: the axis %s sets the number of classes; it is fixed to %d, its size in the "
            "samples (--data)",
            what,
            name,
            size,
        )
    return Rows(inputs, exits, count, frozenset(chosen), sizes=classes)


def _whole_steps(graph: ir.Graph, inputs: Arrays, likely: Sequence[str], step: int) -> Arrays:
    """Cuts the inputs to a multiple of `step` rows."""
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
    """Checks the row axes that the user gives, and makes fixed ones dynamic. Returns these: input
    -> its fixed number of rows.

    Args:
        told: Input or exit -> its row axis.
        exits: Names of the exits.

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
            f"--rows: the inputs have different fixed numbers of rows ({opened})",
            fix="Name axes of the same size.",
        )
    return opened


def _run_told(run: Run, inputs: Arrays, rows: int, what: str, *, by_user: bool) -> Arrays:
    """Runs the file. If it fails with the user's row axis, that is the likely cause."""
    try:
        return run(inputs)
    except ExportError as error:
        if not by_user:
            raise
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        why = error.what.removeprefix(f"{what}: ")
        raise UsageError(
            f"--rows: {what} cannot run with {rows} rows on that axis ({shapes}): {why}",
            fix="Give another axis, or leave --rows out: export then looks for the row axis.",
        ) from error


def set_rows(graph: ir.Graph, rows: Rows) -> None:
    """Renames the row axes to ``batch``, also inside the graph, and other axes of that name."""
    renamed: dict[str, str | int] = {BATCH: f"{BATCH}_axis"}
    renamed |= dict.fromkeys(rows.names, BATCH) | dict(rows.sizes)
    for value in graph.inputs:
        dims = [d if d is None else renamed.get(str(d), d) for d in _dims(value)]
        if (axis := rows.axes.get(value.name or "")) is not None:
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
    """Number of rows that the last exit gives."""
    for name, logits in exits.items():
        if logits.dtype.kind not in "fV":
            raise ExportError(
                f"{what}: exit {name} gives {logits.dtype.name}, not floating-point logits",
                fix="Name the tensor of class logits that it is computed from.",
            )
        if logits.ndim != 2:
            raise ExportError(
                f"{what}: exit {name} gives {list(logits.shape)}, not [rows, classes]",
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
    """Handles a file with a fixed number of rows: accepts 1, refuses any other number."""
    last = list(exits)[-1]
    if count == 1:
        for axis in range(max(value.ndim for value in inputs.values())):
            axes = {
                value.name or "": axis
                for value in graph.inputs
                if len(dims := _dims(value)) > axis and dims[axis] == 1
            }
            if axes:
                logger.warning("%s: it takes one row at a time, so the bundle does too", what)
                return Rows(inputs, exits, 1, axes=axes, one=True)
        raise ExportError(
            f"{what}: exit {last} gives one row, and no axis of an input counts rows",
            fix="Export it again with a batch axis as the first axis of its inputs.",
        )
    fixed = [(v, a) for v in graph.inputs for a, size in enumerate(_dims(v)) if size == count]
    if not fixed:
        raise ExportError(
            f"{what}: exit {last} gives {count} rows, and no axis of an input has that size",
            fix="Name a tensor with one row of class logits per input; if another axis of the exit "
            f"counts rows, give it: --rows {last}:1.",
        )
    value, axis = min(fixed, key=lambda pair: pair[1])
    raise ExportError(
        f"{what}: the number of rows is fixed to {count} (axis {axis} of input {value.name}, "
        f"{_dims(value)}), so rows cannot exit one by one",
        fix=_RE_EXPORT.format(value.name, axis),
    )


def _followed(
    graph: ir.Graph, run: Run, inputs: Arrays, count: int, likely: Sequence[str]
) -> list[str]:
    """The axes, among those of one size, that the exits follow: one, or all that must be equal."""
    tied = []
    for name in likely:
        remaining = _rows_without(graph, run, inputs, [name])
        if remaining == count - 1:
            return [name]
        if remaining is None:
            tied.append(name)
    return tied if tied and _rows_without(graph, run, inputs, tied) == count - 1 else []


def _classes(
    graph: ir.Graph, run: Run, inputs: Arrays, exits: Arrays, others: set[str]
) -> dict[str, int]:
    """Axis -> size, for axes that set the number of classes."""
    classes = list(exits.values())[-1].shape[1]
    sizes = {}
    for name in sorted(others):
        size = _size(graph, inputs, name)
        if size == classes and size > 2:
            try:
                fewer = run(_without(graph, inputs, [name]))
            except ExportError:
                continue
            if list(fewer.values())[-1].shape[1] != classes:
                sizes[name] = size
    return sizes


def _rows_without(graph: ir.Graph, run: Run, inputs: Arrays, names: Sequence[str]) -> int | None:
    """Rows that the last exit gives when these axes lose their last entry; None if the file does
    not run."""
    try:
        return len(list(run(_without(graph, inputs, names)).values())[-1])
    except ExportError:
        return None


def _without(graph: ir.Graph, inputs: Arrays, names: Sequence[str]) -> Arrays:
    fewer = dict(inputs)
    for value in graph.inputs:
        for axis, symbol in enumerate(_symbols(value)):
            if symbol in names:
                array = fewer[value.name or ""]
                fewer[value.name or ""] = np.take(array, range(array.shape[axis] - 1), axis)
    return fewer


__all__ = ["BATCH", "Rows", "find_rows", "name_axes", "set_rows", "told_rows"]
