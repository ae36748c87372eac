"""Writes int8 bundles: products of weights and activations in 8 bits, everything else in float32.

ONNX Runtime's quantiser quantises each component that a chain of the float32 bundle runs. Ranges of
activations are measured on the outputs of the float32 components before it. The unsplit graphs are
quantised with the same data, so their ranges are the same. Exit heads, adapters, scores,
normalisations, products of two activations (in attention) and states stay in float32. Scales are
symmetric, and per channel for weights, as TensorRT requires. Components have one form, the one that
every engine runs, and no projection.

The bundle's reference is the output of the quantised graphs for the sample. The bundle also stores
the exits' float32 outputs for other data, so that ``edgeexit check`` can count what changed.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeexit.bundle.manifest import Chain, Component, Exit, Gather, Manifest, Place, Step
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import ExportError, first_line
from edgeexit.export.describe import LOGITS, Precision
from edgeexit.export.evaluate import host_session
from edgeexit.export.passes.calibration import Rows, count, split, stacked
from edgeexit.export.samples import REFERENCE, reference_sample, write_samples
from edgeexit.export.trace.torch_graph import save_graph
from edgeexit.export.walk import Walk, table_of
from edgeexit.export.weights import WeightStore

FLOAT32_SAMPLE = "float32"
QUANTISED = ["MatMul", "Gemm", "Conv"]


def quantise_bundle(
    whole: Bundle, folder: Path, batches: Iterable[Rows], tell: Callable[[str], None]
) -> Manifest:
    """Writes a float32 bundle in int8.

    Args:
        whole: The float32 bundle.
        folder: Gets graphs, weights, samples and the tokenizer.
        batches: Inputs of the program. `edgeexit.export.passes.calibration` takes some to measure
            ranges on, and others whose float32 outputs are stored.
        tell: Called with the name of each step, for progress.

    Returns:
        The manifest to commit.

    Raises:
        ExportError: The quantiser refuses the model.
        UsageError: There is too little data.
    """
    manifest = whole.manifest
    first, rest = split(batches, manifest)
    with tempfile.TemporaryDirectory(prefix="edgeexit-") as scratch:
        quantised = _Quantised(whole, folder, Path(scratch), first, rest, tell)
        steps = [quantised.step(step) for step in manifest.steps]
    tell("heads, adapters and the rest")
    samples = [
        write_samples(folder, REFERENCE, quantised.reference),
        write_samples(folder, FLOAT32_SAMPLE, quantised.float32),
    ]
    return msgspec.structs.replace(
        manifest,
        components={name: quantised.component(name) for name in manifest.components},
        steps=steps,
        samples=samples + _copy_rest(whole, folder),
        files={},
        provenance=manifest.provenance | {"calibration_rows": str(count(first))},
    )


class _Quantised:
    """A bundle that is being quantised, step by step of its program.

    Args:
        whole: The float32 bundle.
        folder: The new bundle's folder.
        scratch: Folder for temporary files.
        first, rest: Batches to measure ranges on, and batches to compare.

    Attributes:
        reference: The quantised graphs' outputs for the float32 bundle's sample.
        float32: The exits' float32 outputs for the batches to compare.
    """

    def __init__(
        self,
        whole: Bundle,
        folder: Path,
        scratch: Path,
        first: Sequence[Rows],
        rest: Sequence[Rows],
        tell: Callable[[str], None],
    ) -> None:
        self.whole, self.folder, self.scratch, self.tell = whole, folder, scratch, tell
        self._store = WeightStore(folder)
        self._done: dict[str, Component] = {}
        self._texts = whole.manifest.decoding is not None
        with np.load(whole.file(f"samples/{REFERENCE}.npz"), allow_pickle=False) as file:
            sample = {t.name: np.array(file[f"input/{t.name}"]) for t in whole.manifest.inputs}
        inputs = {name: stacked([np.asarray(batch[name]) for batch in rest]) for name in rest[0]}
        self.reference = reference_sample(sample, {}, every_token=self._texts)
        self.float32 = reference_sample(inputs, {}, every_token=self._texts)
        self._ranges, self._compared = Walk.of(whole, first), Walk.of(whole, rest)
        # The sample, and again behind each early exit of an earlier chain: ``EXIT/`` -> walk.
        self._small = {"": Walk.of(whole, [sample])}

    def step(self, step: Step) -> Step:
        """Quantises what a step runs. Returns the step of the new bundle."""
        manifest = self.whole.manifest
        assert not isinstance(step, Place)  # `export` refuses it
        if isinstance(step, Gather):
            table = table_of(self.whole, step)
            for walk in self._walks:
                walk.look_up(step, table)
            offset = self._store.place(ir.tensor(np.array(table)))
            return msgspec.structs.replace(step, offset=offset)
        chain = manifest.chains[step.chain]
        self._quantise_chain(chain, answering=chain is manifest.last_chain)
        return step

    def component(self, name: str) -> Component:
        """A component of the new bundle: quantised, or the last of its forms unchanged."""
        if name not in self._done:
            component = self.whole.manifest.components[name]
            graph = ir.load(self.whole.file(component.variants[-1].graph))
            self._write(name, graph, precision=component.variants[-1].precision)
        return self._done[name]

    def _quantise_chain(self, chain: Chain, *, answering: bool) -> None:
        alone, small = self._ranges.branch(), self._small[""].branch()
        for name in chain.unsplit:
            self._quantise(name, chain, alone)
            alone.run(name)
            small.run(name, self._path(name))
        if chain.unsplit and answering and not self._texts:
            [known] = small.known
            self.reference |= {f"unsplit/{t.name}": known[t.name] for t in chain.outputs}
        early: dict[str, Walk] = {}
        for number, name in enumerate(chain.components):
            self._quantise(name, chain, self._ranges)
            for walk in self._small.values():
                walk.run(name, self._path(name))
            self._ranges.run(name)
            self._compared.run(name)
            for exit_ in (exit_ for exit_ in chain.stops if exit_.behind == name):
                self._record(exit_)
                if answering:
                    self._compare(exit_)
                elif exit_ is not chain.stops[-1]:
                    early[f"{exit_.name}/"] = self._small[""].behind(chain, exit_)
            for walk in self._walks:
                walk.forget(chain, number)
        for walk in self._walks if not answering else ():
            walk.hand_on(chain)
        self._small |= early

    @property
    def _walks(self) -> list[Walk]:
        return [self._ranges, self._compared, *self._small.values()]

    def _record(self, exit_: Exit) -> None:
        """Stores an exit's outputs for the sample."""
        for early, walk in self._small.items():
            [outputs] = walk.ask(exit_)
            named = {f"{early}{exit_.name}": outputs}
            self.reference |= reference_sample({}, named, every_token=self._texts)

    def _compare(self, exit_: Exit) -> None:
        """Stores an exit's float32 outputs, without logits of whole texts, which are too large."""
        parts = self._compared.ask(exit_)
        outputs = {name: stacked([part[name] for part in parts]) for name in parts[0]}
        sample = reference_sample({}, {exit_.name: outputs}, every_token=self._texts)
        for name in (LOGITS, "gap") if self._texts else ():
            sample.pop(f"{exit_.name}/{name}", None)
        self.float32 |= sample

    def _quantise(self, name: str, chain: Chain, walk: Walk) -> None:
        """Writes a component in int8, with ranges measured on its inputs in a walk."""
        self.tell(f"{name}, int8")
        component = self.whole.manifest.components[name]
        model = ir.load(self.whole.file(component.variants[-1].graph))
        for number, node in enumerate(model.graph.all_nodes()):
            node.name = f"{node.name}.{number}"  # the quantiser finds nodes by name
        excluded = heads(model.graph, component, chain, name)
        source, target = self.scratch / "float32.onnx", self.scratch / "int8.onnx"
        ir.save(model, source, external_data="float32.data")
        quantise(source, target, walk.feeds(name), excluded, name)
        self._write(name, ir.load(target), precision="int8")
        for file in self.scratch.iterdir():
            file.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"graphs/{name}.onnx"

    def _write(self, name: str, model: ir.Model, precision: Precision) -> None:
        passes.RemoveUnusedOpsetsPass()(model)
        self._store.externalize(model.graph)
        save_graph(model, str(self._path(name)))
        component = self.whole.manifest.components[name]
        variant = msgspec.structs.replace(
            component.variants[-1], graph=f"graphs/{name}.onnx", precision=precision
        )
        self._done[name] = msgspec.structs.replace(component, variants=[variant], projection=None)


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


def quantise(
    source: Path, target: Path, batches: Sequence[Rows], excluded: list[str], what: str
) -> None:
    """Quantises an ONNX file, with ranges of activations measured on these batches.

    Args:
        source: The file, in float32; names of its nodes are unique.
        target: Path of the new file; its weights are written beside it.
        batches: Inputs.
        excluded: Names of nodes to leave in float32, besides products of two activations.
        what: The component, for messages.

    Raises:
        ExportError: The quantiser fails.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Rows] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(batch)

    try:
        with _hushed(), _any_pool():
            quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTISED,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*excluded, *_of_activations(source)],
                use_external_data_format=True,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
    except Exception as error:
        raise ExportError(
            f"{what}: the quantiser fails ({first_line(error)})",
            fix="Export it in float32 or float16.",
        ) from error


def _of_activations(source: Path) -> list[str]:
    """Names of the products without a weight: those in attention."""
    graph = ir.load(source).graph
    return [
        str(node.name)
        for node in graph
        if node.op_type in QUANTISED
        and not any(value is not None and value.is_initializer() for value in node.inputs[:2])
    ]


@contextlib.contextmanager
def _any_pool() -> Iterator[None]:
    """Lets the quantiser run in a process that has installed ONNX Runtime's global thread pool: its
    sessions ask for their own pools, which ONNX Runtime then refuses."""
    import onnxruntime
    from onnxruntime.quantization.calibrate import CalibraterBase

    def create(self: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.infer_session = host_session(self.augmented_model_path, options)

    original = CalibraterBase.create_inference_session
    CalibraterBase.create_inference_session = create
    try:
        yield
    finally:
        CalibraterBase.create_inference_session = original


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Hides the quantiser's advice, which it writes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _copy_rest(whole: Bundle, folder: Path) -> list[str]:
    """Copies the tokenizer, chat templates and further samples. Returns the samples."""
    samples = []
    for name in whole.manifest.files:
        if not name.startswith("graphs/") and name != WEIGHTS and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole.file(name), folder / name)
            samples += [name] if name.startswith("samples/") else []
    return samples


__all__ = ["QUANTISED", "quantise", "quantise_bundle"]
