"""Runs the user's ONNX file as it is, to compare a bundle's outputs with it.

The file runs without edgeexit's changes (opset conversion, inlined functions, folded shapes). Only
exits become outputs, and fixed row axes that the user gives become dynamic.
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
from edgeexit.export.library_errors import translated
from edgeexit.export.trace.torch_graph import save_graph
from edgeexit.export.weights import WeightStore

Arrays = dict[str, NDArray]


@dataclass(frozen=True)
class OnnxFile:
    """A user's file, and how its names map to the graph.

    Attributes:
        path: The file.
        inputs: Name of an input in the file -> its name in the graph.
        exits: Name of an exit in the file -> its name in the graph.
        told: Input or exit, by its name in the file -> row axis given by the user.
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
    """Opens a file. Returns a function from inputs to exits, both by their names in the graph.

    Args:
        model: The same model, normalised. It runs instead of the file if an exit is inside a
            function, where the file has no name for it.
        folder: The bundle's folder; stores that model meanwhile.
        opened: Whether to make fixed row axes that the user gives dynamic.
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
    fix = "Copy the file and its weights again, or export it again."
    with translated(file.path.name, "its weights cannot be read", fix):
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
    """The file's outputs at every exit, with the default settings of ONNX Runtime.

    They become the bundle's samples. Fused operators round differently from single ones, in some
    files by much; a device's results are compared with what it would compute from the file.

    Args:
        rows: Inputs, and the file's outputs for them without fusion.
        opened: Input whose fixed row axis was made dynamic -> rows that the file takes at a time.

    Raises:
        ExportError: The file gives different outputs for another number of rows.
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
    for name, unfused in rows.exits.items():
        if not close(unfused, exits[name], 10 * TOLERANCES["float32"]):
            raise ExportError(
                f"{file.path.name}: exit {name} gives different outputs for {rows.count} rows at "
                f"once than for {size} at a time; the graph only works for {size}",
                fix="Leave --rows out, or export the model again with a dynamic batch.",
            )
    return exits


def file_axis(file: OnnxFile, name: str) -> int:
    """The row axis that the user gives for an input, by its name in the graph."""
    return next(axis for old, axis in file.told.items() if file.inputs.get(old) == name)


__all__ = ["OnnxFile", "file_answers", "open_file"]
