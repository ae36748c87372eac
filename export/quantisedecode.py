"""int8 bundles of language models: products of weights and activations in 8 bits, in the layers.

The shared head, adapters, normalisations, attention's own products and the caches stay in float32.
The model is exported in float32 first; then every segment and unsplit are quantised over the same
texts, each with the states that the float32 segments before it hand over, so that their ranges are
the same. They have one form of the caches, the one that every engine runs (``append``).
"""

from __future__ import annotations

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

from edgeexit.bundle import WEIGHTS, Bundle
from edgeexit.bundlewriter import BundleWriter, check_output
from edgeexit.errors import UsageError
from edgeexit.export import graphs
from edgeexit.export.contract import DecodeModel
from edgeexit.export.decode import export_decoder
from edgeexit.export.package import Progress, counter
from edgeexit.export.quantise import QUANTISED, quantise
from edgeexit.export.rows import run_graph
from edgeexit.export.store import WeightStore
from edgeexit.manifest import LENGTHS, Manifest, Segment, Variant

CALIBRATION_TEXTS = 64
"""Texts that set the ranges of activations."""

Texts = Sequence[NDArray[np.int64]]
Feeds = list[dict[str, NDArray[Any]]]


def export_int8_decoder(
    model: DecodeModel,
    output: str | os.PathLike[str],
    *,
    calibration: Callable[[Bundle], Iterable[NDArray[np.int64]]],
    opset: int = graphs.DEFAULT_OPSET,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Splits a decoder at its exits and writes the bundle in int8.

    Args:
        model: What to split.
        output: The bundle's directory; must not exist unless `overwrite`.
        calibration: Gives texts, each as token ids ``[seq]``, for the float32 bundle that it is
            handed. The first `CALIBRATION_TEXTS` set the ranges of activations.
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
        texts = _texts(calibration(whole), model)
        with BundleWriter(output, overwrite=overwrite) as writer:
            store = WeightStore(writer.folder)
            [chain] = whole.manifest.chains.values()
            first, where = _feeds(model, texts), model.positions.name
            feeds, segments = first, []
            for part in chain.segments:
                tell(f"{part.name}, int8")
                given = [_with_caches(one, part) for one in feeds]
                source = whole.file(part.variants[-1].graph)
                _write(_quantised(source, given, scratch, []), writer.folder, part.name, store)
                segments.append(
                    msgspec.structs.replace(part, variants=[_variant(part)], projection=None)
                )
                state = part.outputs[0].name
                made = run_graph(source, given)
                feeds = [
                    {state: answers[state], where: one[where]}
                    for answers, one in zip(made, feeds, strict=True)
                ]
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
            graph = _quantised(
                source, [_with_caches(one, unsplit) for one in first], scratch, _head(source)
            )
            _write(graph, writer.folder, unsplit.name, store)
            tell("head, adapters and the rest")
            heads = {}
            for name, part in whole.manifest.heads.items():
                variant = part.variants[-1]
                _write(ir.load(whole.file(variant.graph)), writer.folder, name, store)
                heads[name] = msgspec.structs.replace(part, variants=[variant], projection=None)
            offset = store.place(ir.tensor(model.embedding.contiguous()))
            _copy_rest(whole, writer.folder)
            decoding = whole.manifest.decoding
            assert decoding is not None
            embedding = msgspec.structs.replace(decoding.embedding, offset=offset)
            manifest: Manifest = msgspec.structs.replace(
                whole.manifest,
                chains={"main": msgspec.structs.replace(chain, segments=segments)},
                unsplit=[_variant(unsplit)],
                heads=heads,
                decoding=msgspec.structs.replace(decoding, embedding=embedding),
                files={},
                provenance=whole.manifest.provenance | {"calibration_texts": str(len(texts))},
            )
            return writer.commit(manifest)


def _texts(given: Iterable[NDArray[np.int64]], model: DecodeModel) -> Texts:
    """The first texts, none of them longer than the model takes."""
    texts: list[NDArray[np.int64]] = []
    for text in given:
        if len(text):
            texts.append(np.asarray(text, np.int64)[: model.limits["positions"] - 1])
        if len(texts) == CALIBRATION_TEXTS:
            break
    if not texts:
        raise UsageError(
            f"{model.name}: int8 needs texts to measure the ranges of activations",
            fix=f"Give --calibration-data with some texts ({CALIBRATION_TEXTS} are used).",
        )
    return texts


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


def _quantised(source: Path, feeds: Feeds, scratch: Path, excluded: list[str]) -> ir.Model:
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
    return made


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
    graphs.save_graph(model, str(folder / f"graphs/{name}.onnx"))


def _copy_rest(whole: Bundle, folder: Path) -> None:
    """Samples, tokenizer, chat templates: all but graphs and weights."""
    for name in whole.manifest.files:
        if not name.startswith("graphs/") and name != WEIGHTS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole.file(name), folder / name)


__all__ = ["CALIBRATION_TEXTS", "export_int8_decoder"]
