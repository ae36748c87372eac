"""The user's ONNX file run as it is: what a bundle's answers are held against.

Nothing of what edgeexit does to a graph (opsets converted, functions inlined, shapes folded) is in
it, but that exits are made outputs, and that axes are opened where the user says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.errors import ExportError
from edgeexit.export.cut.find_rows import OPENED, Rows
from edgeexit.export.evaluate import TOLERANCES, close, open_graph
from edgeexit.export.trace.torch_graph import save_graph
from edgeexit.export.weights import WeightStore

Arrays = dict[str, NDArray]


@dataclass(frozen=True)
class OnnxFile:
    """A user's file, and how its names and axes are to be read.

    Attributes:
        path: The file.
        inputs: Name of an input in the file -> its name in the graph.
        exits: The same for exits.
        told: Input or exit, by its name in the file -> its row axis, where the user tells it.
    """

    path: Path
    inputs: Mapping[str, str]
    exits: Mapping[str, str]
    told: Mapping[str, int]


def open_file(
    file: OnnxFile,
    model: ir.Model,
    folder: Path,
    *,
    opened: bool = True,
    optimised: bool = False,
) -> Callable[[Mapping[str, NDArray]], Arrays]:
    """Opens a file. Returns what takes inputs and gives exits, both under their graph's names.

    Args:
        model: The same model, normalised: run in the file's place where an exit is made inside of a
            function, which the file has no name for.
        folder: The bundle's, for that.
        opened: Whether fixed axes that the user tells count rows take any number.
        optimised: As for `edgeexit.export.evaluate.open_graph`.
    """
    whole = onnx.load(file.path, load_external_data=False)
    made = {name for node in whole.graph.node for name in node.output}
    if not made.issuperset(file.exits):
        return _open_normalised(file, model, folder, optimised=optimised)
    outputs = {value.name for value in whole.graph.output}
    missing = [name for name in file.exits if name not in outputs]
    whole.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in missing)
    changed = bool(missing)
    for value in whole.graph.input if opened else ():
        dims = value.type.tensor_type.shape.dim
        axis = file.told.get(value.name)
        if axis is not None and axis < len(dims) and dims[axis].dim_value > 0:
            dims[axis].dim_param, changed = OPENED, True
    content = whole.SerializeToString() if changed else None
    run = open_graph(file.path, content=content, optimised=optimised)

    def run_file(inputs: Mapping[str, NDArray]) -> Arrays:
        made = run({old: inputs[new] for old, new in file.inputs.items()})
        return {new: _rows_first(made[old], file.told.get(old)) for old, new in file.exits.items()}

    return run_file


def _open_normalised(
    file: OnnxFile, model: ir.Model, folder: Path, *, optimised: bool
) -> Callable[[Mapping[str, NDArray]], Arrays]:
    WeightStore(folder).externalize(model.graph)
    place = folder / "graphs/whole.onnx"
    save_graph(model, str(place))
    run = open_graph(place, optimised=optimised)
    place.unlink()
    return run


def _rows_first(made: NDArray, axis: int | None) -> NDArray:
    return made if not axis or axis >= made.ndim else np.moveaxis(made, axis, 0)


def file_answers(
    file: OnnxFile, model: ir.Model, folder: Path, rows: Rows, opened: Mapping[str, int]
) -> Arrays:
    """What the file gives at every exit as ONNX Runtime runs it when nobody says otherwise.

    That is what the bundle's samples hold. Fused operators round in another way than single ones,
    some files' much: what a device computes is compared with what it would compute of the file.

    Args:
        rows: With inputs, and the answers of the file unfused.
        opened: Input whose fixed row axis was opened -> how many rows the file takes at a time.

    Raises:
        ExportError: The opened file gives others: it is made for that number of rows.
    """
    run = open_file(file, model, folder, opened=False, optimised=True)
    if not opened:
        return run(rows.inputs)
    size = min(opened.values())
    parts = []
    for start in range(0, rows.count - size + 1, size):
        part = dict(rows.inputs)
        for name in opened:
            part[name] = np.take(part[name], range(start, start + size), file_axis(file, name))
        parts.append(run(part))
    exits = {name: np.concatenate([part[name] for part in parts]) for name in rows.exits}
    for name, found in rows.exits.items():
        if not close(found, exits[name], 10 * TOLERANCES["float32"]):
            raise ExportError(
                f"{file.path.name}: exit {name} gives other answers for {rows.count} rows at once "
                f"than for {size} at a time; the graph is made for {size}",
                fix="Leave --rows out, or export the model again with a dynamic batch.",
            )
    return exits


def file_axis(file: OnnxFile, name: str) -> int:
    """The row axis that the user tells for an input, by its name in the graph."""
    return next(axis for old, axis in file.told.items() if file.inputs.get(old) == name)


__all__ = ["OnnxFile", "file_answers", "open_file"]
