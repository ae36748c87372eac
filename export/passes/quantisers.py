"""The ways to quantise a component (`Quantising`); `edgeexit.export.passes.quantise` applies one to
a bundle.

- `ActivationInt8`: products of weights and activations in int8 (`edgeexit.export.passes.
  static_int8`), for components of chains. Ranges of activations are measured on the outputs of the
  float32 components before it. Components have one form, the one that every engine runs, and no
  projection.
- `FewBits`: weights in 4 or 8 bits (`edgeexit.export.passes.weight_bits`), in all components and
  forms, and tables of embeddings. A form that needs no operators of ONNX Runtime's own is written
  in two styles (`edgeexit.export.passes.block_products`).
"""

from __future__ import annotations

import abc
import itertools
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from edgeexit.bundle.blocks import FLOATS, Table
from edgeexit.bundle.manifest import Chain, Component, Gather, Manifest, TableBlocks
from edgeexit.errors import UsageError
from edgeexit.export.describe import LOGITS, Precision
from edgeexit.export.passes.block_products import REQUIRES, Style
from edgeexit.export.passes.calibration import Rows, split
from edgeexit.export.passes.gptq import second_moments
from edgeexit.export.passes.static_int8 import QUANTISED, quantise
from edgeexit.export.passes.weight_bits import (
    Quantiser,
    WeightBits,
    measured_inputs,
    rewrite,
)
from edgeexit.export.stored_blocks import StoredRows
from edgeexit.export.walk import Walk
from edgeexit.export.weights import WeightStore

MOST_BATCHES = 128
"""Read of the data that `FewBits` compares."""


class Quantising(abc.ABC):
    """A way to quantise components.

    Attributes:
        precision: Of the graphs that it writes.
        one_form: Whether components keep only the form that every engine runs, and no projection.
        styles: Operators with which a form is written, a graph for each, and the features that they
            need; the outputs of the first are the bundle's sample.
    """

    precision: Precision
    one_form: bool
    styles: Mapping[Style, frozenset[str]]

    @abc.abstractmethod
    def graph(
        self,
        model: ir.Model,
        component: Component,
        chain: Chain | None,
        name: str,
        walk: Walk,
        style: Style,
    ) -> bool:
        """Quantises a graph in place, whose nodes have unique names.

        Args:
            model: Float32.
            component, name: Its component.
            chain: The chain that runs it, as a segment or as the unsplit model; None: it is on the
                path of exits, or makes states.
            walk: Has the component's inputs; not if `chain` is None.
            style: One of `styles`.

        Returns:
            Whether the graph changed.
        """

    @abc.abstractmethod
    def table(self, step: Gather, table: Table, store: WeightStore) -> Gather:
        """Stores a table of rows that are not quantised. Returns the step of the new bundle."""

    @abc.abstractmethod
    def split(self, batches: Iterable[Rows], manifest: Manifest) -> tuple[list[Rows], list[Rows]]:
        """Batches to measure on, and batches to compare; either may be empty."""


class ActivationInt8(Quantising):
    """Weights and activations of chains' components in int8."""

    precision, one_form = "int8", True
    styles: Mapping[Style, frozenset[str]] = {"standard": frozenset()}

    def graph(
        self,
        model: ir.Model,
        component: Component,
        chain: Chain | None,
        name: str,
        walk: Walk,
        style: Style,
    ) -> bool:
        if chain is None:
            return False
        excluded = heads(model.graph, component, chain, name)
        with tempfile.TemporaryDirectory(prefix="edgeexit-") as scratch:
            source, target = Path(scratch, "float32.onnx"), Path(scratch, "int8.onnx")
            ir.save(model, source, external_data="float32.data")
            quantise(source, target, walk.feeds(name), excluded, name)
            made = ir.load(target)
            ir.external_data.load_to_model(made)
        model.graph = made.graph
        return True

    def table(self, step: Gather, table: Table, store: WeightStore) -> Gather:
        offset = store.place(ir.tensor(np.array(table.rows)))
        return msgspec.structs.replace(step, offset=offset)

    def split(self, batches: Iterable[Rows], manifest: Manifest) -> tuple[list[Rows], list[Rows]]:
        return split(batches, manifest)


class FewBits(Quantising):
    """Weights in 4 or 8 bits.

    Args:
        settings: How weights are stored.
        stored: Rows that the checkpoint holds in few bits already, which stay as they are.
    """

    one_form = False
    styles: Mapping[Style, frozenset[str]] = {
        style: frozenset({feature}) for style, feature in REQUIRES.items()
    }

    def __init__(self, settings: WeightBits, stored: StoredRows | None = None) -> None:
        self._settings = settings
        self._quantiser = Quantiser(settings)
        if stored is not None:
            self._quantiser.stored, self._quantiser.lenient = stored.find, True
        least = min(settings.bits, 8 if stored is None else stored.least)
        self.precision = "int4" if least == 4 else "int8"

    def graph(
        self,
        model: ir.Model,
        component: Component,
        chain: Chain | None,
        name: str,
        walk: Walk,
        style: Style,
    ) -> bool:
        settings = self._settings
        of_heads: set[str] = set()
        if chain is not None:
            of_heads = {*heads(model.graph, component, chain, name)}
        elif any(tensor.name.endswith(LOGITS) for tensor in component.outputs):
            of_heads = {str(node.name) for node in model.graph}

        def bits_of(node: ir.Node) -> int | None:
            return settings.head_bits if node.name in of_heads else settings.bits

        moments = None
        if chain is not None and settings.method == "gptq":
            inputs = measured_inputs(model, self._quantiser, bits_of)
            moments = second_moments(model, inputs, walk.feeds(name)) if inputs else None
        return rewrite(model, self._quantiser, bits_of, moments, style) > 0

    def table(self, step: Gather, table: Table, store: WeightStore) -> Gather:
        bits, rows = self._settings.head_bits, np.array(table.rows)
        floats = rows.astype(np.float32) if step.output.dtype in FLOATS else None
        if bits is None or floats is None or not self._quantiser.takes(floats):
            return msgspec.structs.replace(step, offset=store.place(ir.tensor(rows)))
        made = self._quantiser.blocks(floats, bits, f"the table of {step.ids}")
        zero = made.zero_points
        return msgspec.structs.replace(
            step,
            offset=store.place(ir.tensor(made.numbers)),
            blocks=TableBlocks(
                bits=4 if made.bits == 4 else 8,
                block=made.block,
                scales=store.place(ir.tensor(made.scales)),
                zero_points=None if zero is None else store.place(ir.tensor(zero)),
            ),
        )

    def split(self, batches: Iterable[Rows], manifest: Manifest) -> tuple[list[Rows], list[Rows]]:
        given = list(itertools.islice(batches, MOST_BATCHES))
        if not given and self._settings.method == "gptq":
            raise UsageError(
                f"{manifest.name}: gptq measures on data what weights are multiplied with",
                fix="Give --calibration-data with some texts or rows, or use another method.",
            )
        return split(given, manifest) if given else ([], [])


def heads(graph: ir.Graph, component: Component, chain: Chain, name: str) -> list[str]:
    """Nodes of exit heads in a component's graph.

    Args:
        graph: The component's graph.
        component, name: The component.
        chain: The chain that runs it, as a segment or as the unsplit model.

    Returns:
        Names of the nodes that only the component's exits need. In the last component exits need
        all nodes; there it is the last product, which belongs to the head.
    """
    exits = [e for e in chain.exits if e.behind == name and not e.path and LOGITS in e.outputs]
    answers = {tensor for e in exits for tensor in [*e.outputs.values(), *e.scores.values()]}
    if name in chain.unsplit[-1:] and any(tensor.name == LOGITS for tensor in chain.outputs):
        answers |= {tensor.name for tensor in chain.outputs}
    if not answers:
        return []
    made = {value.name: value for value in graph.outputs}
    carried = [made[tensor.name] for tensor in component.outputs if tensor.name not in answers]
    only = _ancestors([made[tensor] for tensor in answers])
    if carried:
        return sorted(str(node.name) for node in only - _ancestors(carried))
    products = [node for node in graph if node in only and node.op_type in QUANTISED]
    return [str(node.name) for node in products[-1:]]


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    entered: set[ir.Node] = set()
    open_ = list(values)
    while open_:
        node = open_.pop().producer()
        if node is not None and node not in entered:
            entered.add(node)
            open_ += [value for value in node.inputs if value is not None]
    return entered


__all__ = ["ActivationInt8", "FewBits", "Quantising"]
