"""Engines of every example in every form, built ahead of time for three desktop GPUs.

Takes some minutes, so it is no part of `make test` but of ``make slow``; both run before
anything lands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeexit.bundle.manifest import StateForm
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.measure.data import open_data
from edgeexit.runtime.build.build import build_engines
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import sample_sizes, work_of
from edgeexit.runtime.engines.tensorrt.engine_cache import EngineSet
from edgeexit.runtime.engines.tensorrt.library import Library, find_library
from tests import encoder_decoders, speech_models
from tests.decoders import make_decoder
from tests.vision_models import FAMILIES, save_checkpoint

ROOT = Path(__file__).parents[2]
TARGETS = [86, 89, 120]
CAPACITY = 512
pytestmark = pytest.mark.slow

Examples = Callable[[str, str], Bundle]


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return find_library(rtx=True)


@pytest.fixture(scope="session")
def examples(once: Callable[[str, Callable[[Path], object]], Path]) -> Examples:
    """``examples(name, dtype)``: an example's checkpoint as a bundle."""

    def get(name: str, dtype: str) -> Bundle:
        return open_bundle(once(f"{name}-{dtype}", functools.partial(_export, name, dtype)))

    return functools.cache(get)


def _export(name: str, dtype: str, folder: Path) -> None:
    from edgeexit.export import export
    from edgeexit.export.passes.weight_bits import WeightBits
    from edgeexit.export.pretrained import from_pretrained

    def data(bundle: Bundle) -> Any:
        if bundle.manifest.decoding is not None:
            return ({"tokens": text[None]} for text in _texts())
        source = f"{ROOT}/examples/digits/data.py:validation"
        return (batch.inputs for batch in open_data(source, bundle).batches(8))

    model = from_pretrained(ROOT / "examples" / name / "checkpoint").split_model()
    weights, within, precision = dtype.partition(" in ")
    if within:
        bits = WeightBits({"int4": 4, "int8": 8}[weights])
        export(model, folder, dtype=precision, weights=bits)
    else:
        export(model, folder, dtype=dtype, calibration=data if dtype == "int8" else None)


def _texts() -> list[np.ndarray]:
    """Python sources, as token ids of codelm's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "examples/codelm/checkpoint/tokenizer.json"))
    sources = sorted((ROOT / "runtime").glob("*.py"))
    return [np.array(tokenizer.encode(path.read_text()).ids[:256]) for path in sources]


def _build(
    bundle: Bundle,
    rtx: Library,
    target: int,
    root: Path,
    form: StateForm | None = None,
    capacity: int = CAPACITY,
    largest: Mapping[str, int] | None = None,
) -> EngineSet:
    """Builds everything that a bundle has: segments, heads and projections; for the first target
    unsplit, too.

    Args:
        largest: Largest sizes of axes that the bundle does not limit.
    """
    asked = Asked({}, {}, dict(largest or {}), capacity if bundle.manifest.decoding else None)
    works = work_of(
        bundle.manifest,
        rtx.features,
        asked,
        sample_sizes(bundle),
        form=form,
        unsplit=target == TARGETS[0],
    )
    known = {
        variant.graph
        for component in bundle.manifest.components.values()
        for variant in component.variants
    }
    assert {work.variant.graph for work in works if "projection" not in work.where} <= known
    device = {"ahead_of_time": True, "compute_capability": target}
    _, made = build_engines(bundle, works, rtx, device, root)
    assert [plan.graph for plan in made.plans] == [work.variant.graph for work in works]
    return made


def _products(made: EngineSet) -> dict[str, Mapping[str, int]]:
    """Graph -> types that its matrix products compute in."""
    return {plan.graph: plan.precision.get("MATRIX_MULTIPLY", {}) for plan in made.plans}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dtype, kinds",
    [("float32", {"FLOAT"}), ("float16", {"HALF"}), ("int8", {"INT8", "FLOAT"})],
)
def test_digits(
    dtype: str, kinds: set[str], target: int, examples: Examples, rtx: Library, tmp_path: Path
) -> None:
    made = _build(examples("digits", dtype), rtx, target, tmp_path)
    products = _products(made)
    assert set().union(*products.values()) == kinds
    assert all(kinds - {"FLOAT"} <= set(types) for types in products.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dtype, form, kind",
    [
        ("float32", "append", "FLOAT"),
        ("float16", "append", "HALF"),
        ("float16", "fixed", "HALF"),
        ("int8", "append", "INT8"),
        ("int4 in float32", "append", "FLOAT"),
        ("int4 in float16", "fixed", "HALF"),
        ("int8 in float16", "fixed", "HALF"),
    ],
)
def test_codelm(
    dtype: str,
    form: StateForm,
    kind: str,
    target: int,
    examples: Examples,
    rtx: Library,
    tmp_path: Path,
) -> None:
    bundle = examples("codelm", dtype)
    made = _build(bundle, rtx, target, tmp_path, form)
    layers = {  # a layer keeps keys and values
        variant.graph: len(component.states) // 2
        for component in bundle.manifest.components.values()
        for variant in component.variants
        if component.states
    }
    for graph, types in _products(made).items():
        if graph in layers:  # per layer: queries, keys, values, output, gate, up, down
            assert types[kind] >= 7 * layers[graph], graph
    largest = {plan.graph: plan.largest for plan in made.plans if plan.graph in layers}
    assert {sizes["past"] for sizes in largest.values()} == {CAPACITY}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype, kind", [("float32", "FLOAT"), ("float16", "HALF")])
def test_vlm(
    dtype: str, kind: str, target: int, examples: Examples, rtx: Library, tmp_path: Path
) -> None:
    bundle = examples("vlm", dtype)
    products = _products(_build(bundle, rtx, target, tmp_path))
    graphs = {name.split("/")[1].split(".")[0] for name in products}
    assert {"tower_0", "tower_1", "tower_2", "projector_2", "segment_0", "segment_1"} <= graphs
    assert set().union(*products.values()) == {kind}


@pytest.mark.parametrize("family", [*FAMILIES, "florence2 apart"])
def test_vision_language_models(family: str, rtx: Library, tmp_path: Path) -> None:
    """Tower, projectors, segments, adapters, gates and heads of every family in half precision, for
    two targets; Florence-2 also with image and text read apart."""
    from edgeexit.export import export
    from edgeexit.export.pretrained import from_pretrained

    family, _, apart = family.partition(" ")
    split = from_pretrained(
        save_checkpoint(family, tmp_path / "checkpoint"),
        exits=[2],
        tower_exits=[2],
        encoder_exits=[2] if family == "florence2" else None,
        image_encoder_exits=[2] if apart else None,
        adapters=None if family == "florence2" else [2],
        gates=None if family == "florence2" else [2],
        untrained=True,
    )
    bundle = export(split.split_model(), tmp_path / "bundle", dtype="float16")
    for target in TARGETS[:2]:
        made = _build(bundle, rtx, target, tmp_path / "engines", capacity=96)
        names = {plan.graph.split("/")[1].split(".")[0] for plan in made.plans}
        assert {"tower_0", "tower_1", "projector_2", "segment_0", "segment_1", "head"} <= names
        assert family == "florence2" or {"gate_2", "adapter_2"} <= names
        assert not apart or {"image_encoder_0", "text_encoder_1", "joined"} <= names
        for graph, types in _products(made).items():
            # A gate's mean over tokens is taken in single precision.
            assert set(types) <= {"HALF"} or ("gate_2" in graph and "HALF" in types), graph


@pytest.mark.parametrize("checkpoint", ["checkpoint", "checkpoint-words"])
def test_entailment(checkpoint: str, rtx: Library, tmp_path: Path) -> None:
    """The example of MuE: Florence-2 that reads image and text apart, and BART; each encoder hands
    over from its own exits."""
    from edgeexit.export import export
    from edgeexit.export.pretrained import from_pretrained

    words = checkpoint == "checkpoint-words"
    model = from_pretrained(ROOT / "examples/entailment" / checkpoint, exits=[2, 4])
    bundle = export(model.split_model(), tmp_path / "bundle", dtype="float16")
    encoders = ["encoder"] if words else ["image_encoder", "text_encoder"]
    for target in TARGETS[:2]:
        made = _build(bundle, rtx, target, tmp_path / "engines", capacity=96)
        names = {plan.graph.split("/")[1].split(".")[0] for plan in made.plans}
        assert {f"{encoder}_0" for encoder in encoders} | {"segment_0", "segment_2"} <= names
        assert set().union(*_products(made).values()) == {"HALF"}


def _without_attentions(*, folded: bool) -> Any:
    """A Llama whose second and third layers have adapters in place of their attentions."""
    from edgeexit.export.exits.decoder import ExitDecoder
    from edgeexit.export.families import llama
    from edgeexit.export.methods.eas import fold, rewrite

    model = make_decoder("llama")
    decoder = ExitDecoder(model, llama.trunk(model), [1, 2])  # type: ignore[arg-type]
    rewrite(decoder, [2, 3], 8)
    if folded:
        tokens, labels = torch.ones(2, 5, dtype=torch.long), torch.full((2, 5), -100)
        labels[:, -1] = 1  # a prompt of four tokens
        fold(decoder, [{"input_ids": tokens, "labels": labels}])
    return decoder.eval()


def _hears(folder: Path) -> Any:
    from edgeexit.export.pretrained import from_pretrained

    checkpoint = speech_models.save_checkpoint(speech_models.make_whisper(), folder)
    options = {"exits": [1, 2], "encoder_exits": [1], "adapters": [1], "untrained": True}
    return from_pretrained(checkpoint, **options)  # type: ignore[arg-type]


def _reads(folder: Path) -> Any:
    from edgeexit.export.pretrained import from_pretrained

    checkpoint = encoder_decoders.save_checkpoint(encoder_decoders.make_t5("t5"), folder)
    return from_pretrained(checkpoint, exits=[1, 2], encoder_exits=[1])


@pytest.mark.parametrize("kind", ["t5", "whisper", "adapters for attentions", "folded adapters"])
def test_models_that_write_texts(kind: str, rtx: Library, tmp_path: Path) -> None:
    """Of every further class, in half precision, for two targets."""
    from edgeexit.export import export

    if "adapters" in kind:
        split = _without_attentions(folded=kind.startswith("folded"))
    else:
        split = {"t5": _reads, "whisper": _hears}[kind](tmp_path / "checkpoint")
    bundle = export(split.split_model(), tmp_path / "bundle", dtype="float16")
    for target in TARGETS[:2]:
        longest = {"source": 32} if kind == "t5" else None
        made = _build(bundle, rtx, target, tmp_path / "engines", capacity=48, largest=longest)
        names = {plan.graph.split("/")[1].split(".")[0] for plan in made.plans}
        assert {"segment_0", "segment_1", "head"} <= names
        assert "adapters" in kind or {"encoder_0", "encoder_1"} <= names
        assert all("HALF" in types for types in _products(made).values())
