"""Writes quantised bundles: a float32 bundle's graphs with products in fewer bits.

Each component is quantised as `edgeexit.export.passes.quantisers` says. The unsplit graphs are
quantised with the same data as the segments, so their ranges of activations are the same.

The bundle's reference is the output of the quantised graphs for the sample. The bundle also stores
the exits' float32 outputs for other data, if there are any, so that ``edgeexit check`` can count
what changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeexit.bundle.manifest import (
    Chain,
    Component,
    Exit,
    Gather,
    Manifest,
    Place,
    Step,
    Variant,
)
from edgeexit.bundle.next_tokens import NEXT_LOG_PROB, log_probs, next_tokens
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import ExportError
from edgeexit.export.describe import LOGITS
from edgeexit.export.evaluate import run_graph
from edgeexit.export.passes.block_products import REQUIRES, Style
from edgeexit.export.passes.calibration import Rows, count, stacked
from edgeexit.export.passes.quantisers import Quantising
from edgeexit.export.samples import REFERENCE, reference_sample, write_samples
from edgeexit.export.trace.torch_graph import save_graph
from edgeexit.export.walk import Known, Walk, table_in, table_of
from edgeexit.export.weights import WeightStore

FLOAT32_SAMPLE = "float32"


def quantise_bundle(
    whole: Bundle,
    folder: Path,
    quantising: Quantising,
    batches: Iterable[Rows],
    tell: Callable[[str], None],
) -> Manifest:
    """Writes a float32 bundle in fewer bits.

    Args:
        whole: The float32 bundle.
        folder: Gets graphs, weights, samples and the tokenizer.
        quantising: How.
        batches: Inputs of the program. `edgeexit.export.passes.calibration` takes some to measure
            on, and others whose float32 outputs are stored.
        tell: Called with the name of each step, for progress.

    Returns:
        The manifest to commit.

    Raises:
        ExportError: The model cannot be quantised.
        UsageError: There is too little data.
    """
    manifest = whole.manifest
    first, rest = quantising.split(batches, manifest)
    quantised = _Quantised(whole, folder, quantising, first, rest, tell)
    steps = [quantised.step(step) for step in manifest.steps]
    tell("heads, adapters and the rest")
    components = {name: quantised.component(name) for name in manifest.components}
    if not quantised.changed:
        raise ExportError(
            f"{manifest.name}: it has no product with weights that could be quantised",
            fix="Export it in float32 or float16.",
        )
    samples = [write_samples(folder, REFERENCE, quantised.reference)]
    if rest:
        samples.append(write_samples(folder, FLOAT32_SAMPLE, quantised.float32))
    return msgspec.structs.replace(
        manifest,
        components=components,
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
        quantising: How.
        first, rest: Batches to measure on, and batches to compare.

    Attributes:
        reference: The quantised graphs' outputs for the float32 bundle's sample.
        float32: The exits' float32 outputs for the batches to compare.
        changed: Whether any graph was.
    """

    def __init__(
        self,
        whole: Bundle,
        folder: Path,
        quantising: Quantising,
        first: Sequence[Rows],
        rest: Sequence[Rows],
        tell: Callable[[str], None],
    ) -> None:
        self.whole, self.folder, self.tell = whole, folder, tell
        self._quantising = quantising
        self.changed = False
        self._store = WeightStore(folder)
        self._done: dict[str, Component] = {}
        self._sampled: dict[str, str] = {}  # component -> the graph that the sample is made with
        self._texts = whole.manifest.decoding is not None
        with np.load(whole.file(f"samples/{REFERENCE}.npz"), allow_pickle=False) as file:
            sample = {t.name: np.array(file[f"input/{t.name}"]) for t in whole.manifest.inputs}
        inputs = {n: stacked([np.asarray(one[n]) for one in rest]) for n in (rest or [{}])[0]}
        self.reference = reference_sample(sample, {}, every_token=self._texts)
        self.float32 = reference_sample(inputs, {}, every_token=self._texts)
        self._ranges, self._compared = Walk.of(whole, first), Walk.of(whole, rest)
        # The sample, and again behind each early exit of an earlier chain: ``EXIT/`` -> walk.
        self._small = {"": Walk(whole.manifest, [sample], self._run)}

    def step(self, step: Step) -> Step:
        """Quantises what a step runs. Returns the step of the new bundle."""
        manifest = self.whole.manifest
        if isinstance(step, Place):
            for walk in self._walks:
                walk.place(step)
            return step
        if isinstance(step, Gather):
            table = table_of(self.whole, step)
            made = self._quantising.table(step, table, self._store)
            small = table_in(self.folder / WEIGHTS, made)
            for walk in self._walks:
                walk.look_up(step, table.take if walk in self._float32 else small.take)
            return made
        chain = manifest.chains[step.chain]
        self._quantise_chain(chain, answering=chain is manifest.last_chain)
        return step

    def component(self, name: str) -> Component:
        """A component of the new bundle that no chain runs."""
        if name not in self._done:
            self._quantise(name, None, self._ranges)
        return self._done[name]

    def _quantise_chain(self, chain: Chain, *, answering: bool) -> None:
        alone, small = self._ranges.branch(), self._small[""].branch()
        early: dict[str, Walk] = {}
        for number, name in enumerate(chain.components):
            self._quantise(name, chain, self._ranges)
            for walk in self._walks:
                walk.run(name)
            for exit_ in (exit_ for exit_ in chain.stops if exit_.behind == name):
                self._record(exit_)
                if answering:
                    self._compare(exit_)
                elif exit_ is not chain.stops[-1]:
                    early[f"{exit_.name}/"] = self._small[""].behind(chain, exit_)
            for walk in self._walks:
                walk.forget(chain, number)
        # Behind the segments: these have less to hold at once while data is measured.
        for name in chain.unsplit:
            self._quantise(name, chain, alone)
            alone.run(name)
            small.run(name)
        if chain.unsplit and answering and not self._texts:
            [known] = small.known
            self.reference |= {f"unsplit/{t.name}": known[t.name] for t in chain.outputs}
        for walk in self._walks if not answering else ():
            walk.hand_on(chain)
        self._small |= early

    @property
    def _float32(self) -> list[Walk]:
        return [self._ranges, self._compared]

    @property
    def _walks(self) -> list[Walk]:
        return [*self._float32, *self._small.values()]

    def _run(self, name: str, feeds: list[Known]) -> list[Known]:
        """Runs a quantised component."""
        self.component(name)
        return run_graph(self.folder / self._sampled[name], feeds)

    def _record(self, exit_: Exit) -> None:
        """Stores an exit's outputs for the sample."""
        for early, walk in self._small.items():
            [outputs] = walk.ask(exit_)
            named = {f"{early}{exit_.name}": outputs}
            self.reference |= reference_sample({}, named, every_token=self._texts)

    def _compare(self, exit_: Exit) -> None:
        """Stores an exit's float32 outputs, without logits of whole texts, which are too large."""
        parts = self._compared.ask(exit_)
        if not parts:
            return
        outputs = {name: stacked([part[name] for part in parts]) for name in parts[0]}
        sample = reference_sample({}, {exit_.name: outputs}, every_token=self._texts)
        if (decoding := self.whole.manifest.decoding) is not None and LOGITS in outputs:
            following = next_tokens(self.float32[f"input/{decoding.tokens}"])
            sample[f"{exit_.name}/{NEXT_LOG_PROB}"] = log_probs(outputs[LOGITS], following)
        for name in (LOGITS, "gap") if self._texts else ():
            sample.pop(f"{exit_.name}/{name}", None)
        self.float32 |= sample

    def _quantise(self, name: str, chain: Chain | None, walk: Walk) -> None:
        """Writes a component's graphs; `chain` and `walk`: as for `Quantising.graph`."""
        component, one = self.whole.manifest.components[name], self._quantising.one_form
        self.tell(f"{name}, {self._quantising.precision}")
        given = component.variants[-1:] if one else component.variants
        # The last form first: it is the one that data runs through.
        variants = self._forms(name, chain, walk, given[::-1])
        projections = self._forms(name, None, walk, [] if one else component.projections)
        self._done[name] = msgspec.structs.replace(
            component, variants=variants, projections=projections
        )

    def _forms(
        self, name: str, chain: Chain | None, walk: Walk, given: Sequence[Variant]
    ) -> list[Variant]:
        """Writes forms of a component in every style, last form first. Returns the first style's
        in their order, then those of the next."""
        made: dict[Style, list[Variant]] = {style: [] for style in self._quantising.styles}
        first = next(iter(made))
        for variant in given:
            own = [first] if REQUIRES["onnxruntime"] in variant.requires else made
            for style in own:
                form = self._form(name, chain, walk, variant, style)
                made[style].insert(0, form)
                self._sampled.setdefault(name, form.graph)
                if form.precision == variant.precision:
                    break
        return [form for forms in made.values() for form in forms]

    def _form(
        self, name: str, chain: Chain | None, walk: Walk, variant: Variant, style: Style
    ) -> Variant:
        """Writes a graph of a component."""
        component, styles = self.whole.manifest.components[name], self._quantising.styles
        model = ir.load(self.whole.file(variant.graph))
        for number, node in enumerate(model.graph.all_nodes()):
            node.name = f"{node.name}.{number}"  # the quantiser finds nodes by name
        changed = self._quantising.graph(model, component, chain, name, walk, style)
        self.changed |= changed
        path = f"graphs/{name}.onnx" if self._quantising.one_form else variant.graph
        if style != next(iter(styles)):
            path = f"{path.removesuffix('.onnx')}.{style}.onnx"
        passes.RemoveUnusedOpsetsPass()(model)
        self._store.externalize(model.graph)
        save_graph(model, str(self.folder / path))
        if not changed:
            return msgspec.structs.replace(variant, graph=path)
        return msgspec.structs.replace(
            variant,
            graph=path,
            precision=self._quantising.precision,
            requires=sorted({*variant.requires, *styles[style]}),
        )


def _copy_rest(whole: Bundle, folder: Path) -> list[str]:
    """Copies the tokenizer, chat templates and further samples. Returns the samples."""
    samples = []
    for name in whole.manifest.files:
        if not name.startswith("graphs/") and name != WEIGHTS and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole.file(name), folder / name)
            samples += [name] if name.startswith("samples/") else []
    return samples


__all__ = ["quantise_bundle"]
