"""A decoder into a bundle: every segment and adapter in every form, the shared head, the table of
embeddings.

`export_decoder` takes a `DecodeModel` and writes what `edgeexit.export.write.export_model` writes
for one pass, with one graph per form of a segment over the same stored weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from edgeexit.bundle.manifest import (
    LENGTHS,
    SCORES,
    Chain,
    Decoding,
    Embedding,
    Manifest,
    Tensor,
    Variant,
)
from edgeexit.bundle.manifest import Exit as ManifestExit
from edgeexit.bundle.manifest import Segment as ManifestSegment
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.errors import ExportError, UsageError
from edgeexit.export.contract import CachedSegment, DecodeModel, Form
from edgeexit.export.passes.ort_fusions import fuse
from edgeexit.export.text_files import TextFiles, write_text_files
from edgeexit.export.trace import torch_graph
from edgeexit.export.trace.half import decoder_to_half
from edgeexit.export.trace.layer_graphs import Pieces
from edgeexit.export.trace.scores import append_scores
from edgeexit.export.weights import WeightStore
from edgeexit.export.write import (
    Progress,
    check_options,
    counter,
    provenance,
    write_samples,
)

SAMPLE_ROWS = 3
HEAD = "head"
TOKEN = Tensor(name="token", dtype="int64", axes=["batch"])
_EXAMPLE_SIZES = {"batch": 2, "new": 3, "past": 16}


def export_decoder(
    model: DecodeModel,
    output: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    opset: int = torch_graph.DEFAULT_OPSET,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Splits a decoder at its exits and writes the bundle.

    Args:
        model: What to split.
        output: The bundle's directory; must not exist unless `overwrite`.
        dtype: ``float32`` or ``float16``: what the graphs compute in, and what caches and
            boundaries hold. Logits and scores stay float32.
        opset: ONNX opset of every graph, but for forms that need a newer one.

    Raises:
        ExportError: The model cannot be split; nothing is left behind.
        OutputExistsError: `output` exists.
    """
    check_options(dtype, opset)
    _check(model)
    if dtype == "float16":
        model = decoder_to_half(model, torch.float16)
    adapters = [part.adapter for part in model.segments if part.adapter is not None]
    parts = [*model.segments, *adapters, model.unsplit]
    skipped = [part for part in model.segments if part.projection is not None]
    tell = counter(progress, sum(len(part.forms) for part in parts) + len(skipped) + 2)
    with BundleWriter(output, overwrite=overwrite) as writer, torch.no_grad():
        store, pieces = WeightStore(writer.folder), Pieces()
        made: dict[str, list[Variant]] = {}
        for part in parts:
            made[part.name] = []
            for number, form in enumerate(part.forms):
                tell(f"{part.name}, form {number + 1} of {len(part.forms)}")
                suffix = "" if number == len(part.forms) - 1 else f".{form.caches}"
                path = f"graphs/{part.name}{suffix}.onnx"
                graph = graph_of_form(part, form, opset, pieces)
                if part is model.unsplit:
                    _add_token(graph.graph)
                store.externalize(graph.graph)
                torch_graph.save_graph(graph, str(writer.folder / path))
                made[part.name].append(
                    Variant(
                        graph=path,
                        requires=list(form.requires),
                        precision=dtype,  # type: ignore[arg-type]
                        caches=form.caches,
                        lengths=list(form.lengths),
                    )
                )
        projections = {}
        for part in skipped:
            tell(f"{part.name}, projection")
            path = f"graphs/{part.name}.projection.onnx"
            graph = _projection(part, opset, pieces)
            store.externalize(graph.graph)
            torch_graph.save_graph(graph, str(writer.folder / path))
            projections[part.name] = Variant(graph=path, precision=dtype)  # type: ignore[arg-type]
        tell("head")
        logits = model.head.outputs[0]
        scores = {score: f"{HEAD}/{score}" for score in SCORES}
        state = model.head.inputs[0]
        example = {state.name: _example(state)}
        graph = torch_graph.graph_from_module(
            model.head.module,
            model.head.inputs,
            model.head.outputs,
            example,
            opset=opset,
            what=HEAD,
        )
        [value] = graph.graph.outputs
        graph.graph.outputs.extend(append_scores(graph.graph, value, HEAD).values())
        _add_token(graph.graph)
        store.externalize(graph.graph)
        torch_graph.save_graph(graph, str(writer.folder / f"graphs/{HEAD}.onnx"))
        offset = store.place(ir.tensor(model.embedding.contiguous()))
        tell("samples and manifest")
        samples = [write_samples(writer.folder, "reference", _reference(model))]
        text = TextFiles()
        if model.tokenizer_folder is not None:
            text = write_text_files(Path(model.tokenizer_folder), writer.folder)
        stop_tokens = dict.fromkeys([*model.stop_tokens, *text.stop_tokens])
        head = ManifestSegment(
            name=HEAD,
            variants=[Variant(graph=f"graphs/{HEAD}.onnx", precision=dtype)],  # type: ignore[arg-type]
            inputs=list(model.head.inputs),
            outputs=[
                logits,
                TOKEN,
                *(Tensor(name=t, dtype="float32", axes=["batch"]) for t in scores.values()),
            ],
        )
        return writer.commit(
            Manifest(
                format="1.1",
                requires=["decode", "adapters"] if adapters else ["decode"],
                name=model.name,
                task=model.task,
                program="decode",
                inputs=[Tensor(name="tokens", dtype="int64", axes=["batch", "new"])],
                outputs=[logits, TOKEN],
                chains={
                    "main": Chain(
                        segments=[
                            _segment(part, made[part.name], projections.get(part.name), scores)
                            for part in model.segments
                        ]
                    )
                },
                unsplit=made[model.unsplit.name],
                heads={HEAD: head} | {part.name: _part(part, made[part.name]) for part in adapters},
                decoding=Decoding(
                    embedding=Embedding(
                        tokens="tokens",
                        output=model.embedded,
                        vocabulary=model.embedding.shape[0],
                        offset=offset,
                    ),
                    positions=model.positions,
                    head=HEAD,
                    stop_tokens=list(stop_tokens),
                ),
                files={},
                limits=dict(model.limits),
                tokenizer=text.tokenizer,
                chat=text.chat,
                samples=samples,
                provenance=provenance() | dict(model.provenance) | {"opset": str(opset)},
            )
        )


def _check(model: DecodeModel) -> None:
    """Refuses what no exporter could make sense of."""
    if len(model.segments) < 2:
        raise UsageError(
            f"{model.name}: there is no early exit", fix="Name layers: exits=[2, 4] (--exits 2,4)."
        )
    if model.segments[-1].adapter is not None:
        raise ExportError(
            f"{model.name}: the last segment has an adapter, but its exit answers as the model",
            fix="Make its layers a part of the segment.",
        )
    adapters = [part.adapter for part in model.segments if part.adapter is not None]
    names = [part.name for part in [*model.segments, *adapters, model.unsplit]] + [HEAD]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ExportError(
            f"{model.name}: there are two parts named {repeated[0]}",
            fix="Names are unique in a model: graphs are named after them.",
        )


def graph_of_form(
    part: CachedSegment, form: Form, opset: int, pieces: Pieces | None = None
) -> ir.Model:
    """One form of a part, with its inputs named as the manifest says.

    Args:
        part, form: What to trace.
        opset: That of the graph, unless the form needs a newer one.
        pieces: What was traced before, of parts that have layers alike.
    """
    pieces = Pieces() if pieces is None else pieces
    opset = max(opset, form.opset)
    lengths = [
        Tensor(name=f"lengths/{kind}", dtype=LENGTHS[kind][0], axes=LENGTHS[kind][1],  # type: ignore[arg-type]
               row_axis=0 if LENGTHS[kind][1] else None)
        for kind in form.lengths
    ]  # fmt: skip
    past = [Tensor(name=c.past, dtype=c.dtype, axes=c.axes) for c in part.caches]
    present = _present(part, "new" if form.caches == "append" else "past")
    entry = [*part.inputs, *lengths, past[0]]
    values = {tensor.name: _example(tensor) for tensor in [*entry, *past]}
    model = pieces.graph(
        form.stack, entry, part.outputs, past, present, values, opset=opset, what=part.name
    )
    if "onnxruntime-operators" in form.requires:
        fuse(model)
    return model


def _projection(part: CachedSegment, opset: int, pieces: Pieces) -> ir.Model:
    assert part.projection is not None
    values = {tensor.name: _example(tensor) for tensor in part.inputs}
    what = f"{part.name}, projection"
    made = _present(part, "new")
    return pieces.graph(part.projection, part.inputs, [], [], made, values, opset=opset, what=what)


def _present(part: CachedSegment, grown: str) -> list[Tensor]:
    """What a graph gives of a part's caches: whole ones (``past``), or what is ``new``."""
    return [
        Tensor(name=c.present, dtype=c.dtype, axes=[grown if a == "past" else a for a in c.axes])
        for c in part.caches
    ]


def _example(tensor: Tensor) -> torch.Tensor:
    sizes = [_EXAMPLE_SIZES[a] if isinstance(a, str) else int(a or 1) for a in tensor.axes]
    return torch.zeros(sizes, dtype=torch_graph.TORCH_DTYPES[tensor.dtype])


def _add_token(graph: ir.Graph) -> None:
    """Adds the greedy token ``[batch]``, so that logits need not cross to the host."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    node = ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0})
    node.name = "token"
    graph.append(node)
    [token] = node.outputs
    token.name = TOKEN.name
    token.dtype = ir.DataType.INT64
    token.shape = ir.Shape(TOKEN.axes)
    graph.outputs.insert(1, token)


def _segment(
    part: CachedSegment,
    variants: list[Variant],
    projection: Variant | None,
    scores: Mapping[str, str],
) -> ManifestSegment:
    exits = []
    if part.exit is not None:
        exits.append(
            ManifestExit(
                name=part.exit,
                outputs={"logits": "logits", "token": TOKEN.name},
                scores=dict(scores),
                head=HEAD,
                state=part.outputs[-1].name,
                adapter=None if part.adapter is None else part.adapter.name,
            )
        )
    return _part(part, variants, projection, exits)


def _part(
    part: CachedSegment,
    variants: list[Variant],
    projection: Variant | None = None,
    exits: Sequence[ManifestExit] = (),
) -> ManifestSegment:
    return ManifestSegment(
        name=part.name,
        variants=variants,
        inputs=list(part.inputs),
        outputs=list(part.outputs),
        caches=list(part.caches),
        exits=list(exits),
        projection=projection,
    )


def _reference(model: DecodeModel) -> dict[str, np.ndarray]:
    """What torch says of some texts."""
    tokens = model.tokens(SAMPLE_ROWS)
    logits = {name: one.numpy() for name, one in model.reference(tokens).items()}
    return reference_of(tokens.numpy(), logits)


def reference_of(tokens: np.ndarray, logits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reference sample of a decoder.

    Args:
        tokens: Token ids ``[rows, seq]``.
        logits: Exit -> what it says of them ``[rows, seq, vocabulary]``.

    Returns:
        Token ids; per exit the logits of each row's last token, and for all of them the greedy
        token and how far its logit lies above the next.
    """
    found = {"input/tokens": tokens}
    for name, one in logits.items():
        found[f"{name}/logits"] = one[:, -1]
        found[f"{name}/token"] = one.argmax(-1)
        largest = np.partition(one, -2, axis=-1)[..., -2:]
        found[f"{name}/margin"] = largest[..., 1] - largest[..., 0]
    return found
