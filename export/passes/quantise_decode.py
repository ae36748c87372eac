"""int8 bundles of language models: products of weights and activations in 8 bits, in the layers.

The shared head, adapters, normalisations, attention's own products and the caches stay in float32.
The model is exported in float32 first; then every segment and unsplit are quantised over the same
texts, each with the states that the float32 segments before it hand over, so that their ranges are
the same. They have one form of the caches, the one that every engine runs (``append``).

What the quantised graphs say of the sample is the reference of the bundle; what the exits say in
float32 of other texts is kept beside it, for ``edgeexit check`` to tell what quantising changed.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeexit.bundle.manifest import LENGTHS, Manifest, Segment, Variant
from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.bundle.writer import BundleWriter, check_output
from edgeexit.errors import UsageError
from edgeexit.export.contract import DecodeModel
from edgeexit.export.cut.prove_rows import run_graph
from edgeexit.export.passes.quantise import FLOAT32_SAMPLE, QUANTISED, quantise
from edgeexit.export.trace import torch_graph
from edgeexit.export.trace.scores import reference_scores
from edgeexit.export.weights import WeightStore
from edgeexit.export.write import Progress, counter, write_samples
from edgeexit.export.write_decode import export_decoder, reference_of

logger = logging.getLogger(__name__)

CALIBRATION_TEXTS = 64
"""Texts that set the ranges of activations."""
COMPARED_TEXTS, COMPARED_TOKENS = 16, 64
"""Texts behind those, and tokens of each, for which the bundle keeps the float32 answers."""

REFERENCE = "reference"
Texts = Sequence[NDArray[np.int64]]
Feeds = list[dict[str, NDArray[Any]]]


def export_int8_decoder(
    model: DecodeModel,
    output: str | os.PathLike[str],
    *,
    calibration: Callable[[Bundle], Iterable[NDArray[np.int64]]],
    opset: int = torch_graph.DEFAULT_OPSET,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Splits a decoder at its exits and writes the bundle in int8.

    Args:
        model: What to split.
        output: The bundle's directory; must not exist unless `overwrite`.
        calibration: Gives texts, each as token ids ``[seq]``, for the float32 bundle that it is
            handed. The first `CALIBRATION_TEXTS` set the ranges of activations; of those behind
            them (of the same, where there are no more) the float32 answers are kept.
        opset: ONNX opset.

    Raises:
        ExportError: The model cannot be split, or the quantiser refuses it; nothing is left behind.
        UsageError: There is no text.
        OutputExistsError: `output` exists.
    """
    check_output(Path(output), overwrite=overwrite)
    tell = counter(progress, 4 + 8 * len(model.segments))
    with tempfile.TemporaryDirectory(prefix="edgeexit-") as kept:
        scratch = Path(kept)
        whole = export_decoder(
            model, scratch / "float32", opset=opset, progress=lambda what, done, of: tell(what)
        )
        texts, others = _texts(calibration(whole), model)
        with BundleWriter(output, overwrite=overwrite) as writer:
            store = WeightStore(writer.folder)
            [chain] = whole.manifest.chains.values()
            sample = _sample(whole)
            ranges, compared = _Pass(model, whole, texts), _Pass(model, whole, others)
            quantised, segments = _Pass(model, whole, list(sample)), []
            for part in chain.segments:
                tell(f"{part.name}, int8")
                source = whole.file(part.variants[-1].graph)
                graph, target = _quantised(source, ranges.given(part), scratch, [])
                _write(graph, writer.folder, part.name, store)
                segments.append(
                    msgspec.structs.replace(part, variants=[_variant(part)], projection=None)
                )
                quantised.ask(part, quantised.run(part, target))
                compared.ask(part, compared.run(part, source))
                ranges.run(part, source)
            tell("unsplit, int8")
            caches = [cache for part in chain.segments for cache in part.caches]
            unsplit = Segment(
                name=model.unsplit.name,
                variants=whole.manifest.unsplit,
                inputs=[],
                outputs=[],
                caches=caches,
            )
            source = whole.file(unsplit.variants[-1].graph)
            first = [_with_caches(one, unsplit) for one in _feeds(model, texts)]
            graph, _ = _quantised(source, first, scratch, _head(source))
            _write(graph, writer.folder, unsplit.name, store)
            tell("head, adapters and the rest")
            heads = {}
            for name, part in whole.manifest.heads.items():
                variant = part.variants[-1]
                _write(ir.load(whole.file(variant.graph)), writer.folder, name, store)
                heads[name] = msgspec.structs.replace(part, variants=[variant], projection=None)
            offset = store.place(ir.tensor(model.embedding.contiguous()))
            samples = [
                write_samples(writer.folder, REFERENCE, reference_of(sample, quantised.logits())),
                write_samples(writer.folder, FLOAT32_SAMPLE, _float32(others, compared.logits())),
            ]
            samples += _copy_rest(whole, writer.folder)
            decoding = whole.manifest.decoding
            assert decoding is not None
            embedding = msgspec.structs.replace(decoding.embedding, offset=offset)
            manifest: Manifest = msgspec.structs.replace(
                whole.manifest,
                chains={"main": msgspec.structs.replace(chain, segments=segments)},
                unsplit=[_variant(unsplit)],
                heads=heads,
                decoding=msgspec.structs.replace(decoding, embedding=embedding),
                samples=samples,
                files={},
                provenance=whole.manifest.provenance | {"calibration_texts": str(len(texts))},
            )
            return writer.commit(manifest)


def _texts(given: Iterable[NDArray[np.int64]], model: DecodeModel) -> tuple[Texts, Texts]:
    """Texts that set ranges, none of them longer than the model takes; and texts to compare, all of
    one length."""
    texts: list[NDArray[np.int64]] = []
    for text in given:
        if len(text):
            texts.append(np.asarray(text, np.int64)[: model.limits["positions"] - 1])
        if len(texts) == CALIBRATION_TEXTS + COMPARED_TEXTS:
            break
    if not texts:
        raise UsageError(
            f"{model.name}: int8 needs texts to measure the ranges of activations",
            fix=f"Give --calibration-data with some texts ({CALIBRATION_TEXTS} are used).",
        )
    if len(texts) < CALIBRATION_TEXTS:
        logger.warning(
            "ranges of activations are measured on %d texts; %d are better",
            len(texts),
            CALIBRATION_TEXTS,
        )
    first, others = texts[:CALIBRATION_TEXTS], texts[CALIBRATION_TEXTS:] or texts
    length = min(COMPARED_TOKENS, int(np.median([len(text) for text in others])))
    others = [text[:length] for text in others if len(text) >= length][:COMPARED_TEXTS]
    return first, others


class _Pass:
    """Texts on their way through the segments, each by itself."""

    def __init__(self, model: DecodeModel, bundle: Bundle, texts: Texts) -> None:
        self._bundle, self._where = bundle, model.positions.name
        self._feeds = _feeds(model, texts)
        self._said: dict[str, Feeds] = {}  # exit -> what the head gives, a text each

    def logits(self) -> dict[str, NDArray[Any]]:
        """What the exits that were asked say, ``[rows, seq, vocabulary]``; texts of one length."""
        return {n: np.stack([one["logits"] for one in said]) for n, said in self._said.items()}

    def given(self, part: Segment) -> Feeds:
        """What a segment, the next one, is given."""
        return [_with_caches(one, part) for one in self._feeds]

    def run(self, part: Segment, graph: Path) -> Feeds:
        """Runs the next segment; returns what it makes."""
        made = run_graph(graph, self.given(part))
        state = part.outputs[0].name
        self._feeds = [
            {state: answers[state], self._where: one[self._where]}
            for answers, one in zip(made, self._feeds, strict=True)
        ]
        return made

    def ask(self, part: Segment, made: Feeds) -> None:
        """Asks the exit behind a segment, if there is one, of what the segment made."""
        heads = self._bundle.manifest.heads
        for leave in part.exits:
            states = [one[leave.state or part.outputs[-1].name] for one in made]
            if leave.adapter is not None:
                adapter = heads[leave.adapter]
                feeds = [
                    _with_caches({t.name: (one | feed)[t.name] for t in adapter.inputs}, adapter)
                    for one, feed in zip(made, self._feeds, strict=True)
                ]
                found = run_graph(self._bundle.file(adapter.variants[-1].graph), feeds)
                states = [one[adapter.outputs[0].name] for one in found]
            head = heads[leave.head or ""]
            [state] = head.inputs
            graph = self._bundle.file(head.variants[-1].graph)
            self._said[leave.name] = run_graph(graph, [{state.name: one[0]} for one in states])


def _float32(texts: Texts, logits: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Per exit, greedy tokens and scores ``[rows, seq]`` of these texts."""
    found: dict[str, NDArray[Any]] = {"input/tokens": np.stack(texts)}
    for name, one in logits.items():
        found[f"{name}/token"] = one.argmax(-1)
        found |= {f"{name}/{score}": v for score, v in reference_scores(one).items()}
    return found


def _sample(bundle: Bundle) -> NDArray[np.int64]:
    """Token ids ``[rows, seq]`` of the reference sample."""
    with np.load(bundle.file(f"samples/{REFERENCE}.npz"), allow_pickle=False) as file:
        return np.asarray(file["input/tokens"], np.int64)


def _feeds(model: DecodeModel, texts: Texts) -> Feeds:
    """What the first segment takes of each text: states ``[1, seq, width]`` and positions."""
    table = model.embedding.numpy()
    return [
        {
            model.embedded.name: table[text][None],
            model.positions.name: np.arange(len(text), dtype=np.int64)[None],
        }
        for text in texts
    ]


def _with_caches(feed: Mapping[str, NDArray[Any]], part: Segment) -> dict[str, NDArray[Any]]:
    """The inputs of a part whose caches are empty: one place, of which nothing counts."""
    found = dict(feed) | {"lengths/past": np.zeros(1, LENGTHS["past"][0])}
    for cache in part.caches:
        shape = [1 if isinstance(axis, str) else int(axis or 1) for axis in cache.axes]
        found[cache.past] = np.zeros(shape, cache.dtype)
    return found


def _quantised(
    source: Path, feeds: Feeds, scratch: Path, excluded: list[str]
) -> tuple[ir.Model, Path]:
    """A graph in int8, and its file, which is there until the next one is made."""
    model = ir.load(source)
    names = _rename(model.graph)
    folder = scratch / "quantising"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ir.save(model, folder / source.name, external_data="float32.data")
    target = folder / f"int8.{source.name}"
    quantise(folder / source.name, target, feeds, [names[name] for name in excluded])
    made = ir.load(target)
    for value in made.graph.initializers.values():  # before the folder is used again
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype)
    return made, target


def _rename(graph: ir.Graph) -> dict[str, str]:
    """Makes names of nodes unique, by which the quantiser finds them. Returns old -> new, of the
    last node with a name."""
    names = {}
    for number, node in enumerate(graph.all_nodes()):
        old, node.name = str(node.name), f"{node.name}.{number}"
        names[old] = node.name
    return names


def _head(source: Path) -> list[str]:
    """The product with the vocabulary, the last one of unsplit: as in the shared head."""
    products = [node for node in ir.load(source).graph if node.op_type in QUANTISED]
    return [str(products[-1].name)]


def _variant(part: Segment) -> Variant:
    last = part.variants[-1]
    return msgspec.structs.replace(
        last, graph=f"graphs/{part.name}.onnx", precision="int8", requires=[]
    )


def _write(model: ir.Model, folder: Path, name: str, store: WeightStore) -> None:
    store.externalize(model.graph)
    torch_graph.save_graph(model, str(folder / f"graphs/{name}.onnx"))


def _copy_rest(whole: Bundle, folder: Path) -> list[str]:
    """Tokenizer, chat templates, and samples that are not there yet, which it returns."""
    samples = []
    for name in whole.manifest.files:
        if not name.startswith("graphs/") and name != WEIGHTS and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole.file(name), folder / name)
            samples += [name] if name.startswith("samples/") else []
    return samples


__all__ = ["CALIBRATION_TEXTS", "export_int8_decoder"]
