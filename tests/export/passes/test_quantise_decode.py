"""Language models in int8: what is quantised, what is not, and that the modes still agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import UsageError
from edgeexit.export import DecodeModel, export_int8_decoder
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check_decode import check_decoder
from edgeexit.runtime import load_decoder
from edgeexit.runtime.build.build import build_engines, work_of
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.engines.tensorrt.library import find_library
from tests.decoders import EXITS, VOCABULARY, random_prompts

PRODUCTS_OF_WEIGHTS = 7  # of a layer: queries, keys, values, output, gate, up, down
Folders = Callable[[str], Path]


def _model(decoder_folder: Folders) -> DecodeModel:
    model = from_pretrained(decoder_folder("llama"), exits=EXITS).exit_model()
    assert isinstance(model, DecodeModel)
    return model


@pytest.fixture(scope="module")
def small(decoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    random = np.random.default_rng(0)
    texts = [random.integers(1, VOCABULARY, 60) for _ in range(8)]
    folder = tmp_path_factory.mktemp("small") / "bundle"
    export_int8_decoder(_model(decoder_folder), folder, calibration=lambda bundle: texts)
    return open_bundle(folder, verify="full")


def test_products_of_weights_are_quantised_and_attentions_own_are_not(small: Bundle) -> None:
    [chain] = small.manifest.chains.values()
    for segment in chain.segments:
        [variant] = segment.variants
        assert (variant.precision, variant.caches, variant.requires) == ("int8", "append", [])
        graph = ir.load(small.file(variant.graph)).graph
        products = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
        quantised = [
            all(v is not None and _made_by(v) == "DequantizeLinear" for v in node.inputs[:2])
            for node in products
        ]
        assert sum(quantised) == PRODUCTS_OF_WEIGHTS * len(segment.caches) // 2
        assert len(products) > sum(quantised)  # queries with keys, chances with values
    [head] = small.manifest.heads.values()
    assert [variant.precision for variant in head.variants] == ["float32"]


def _made_by(value: ir.Value) -> str | None:
    node = value.producer()
    return None if node is None else node.op_type


def test_it_answers_nearly_as_torch_and_drafts_the_text_of_full(small: Bundle) -> None:
    with load_decoder(small) as decoder:
        check_decoder(decoder).require()
        prompts = random_prompts(3, [6, 3, 11], seed=1)
        full = decoder.generate(prompts, max_new_tokens=12).finish()
        fast = decoder.generate(prompts, max_new_tokens=12, mode="fast").finish()
        assert fast.tokens == full.tokens  # without a policy nothing leaves early
        with pytest.raises(UsageError, match="has no projections"):
            decoder.generate(prompts, mode="approximate")


def test_unsplit_has_the_scales_of_the_segments(small: Bundle) -> None:
    """Both were measured on the same texts, so scales of a product's input are the same."""
    [chain] = small.manifest.chains.values()
    paths = [segment.variants[0].graph for segment in chain.segments]
    ours = [scale for path in paths for scale in _scales(small, path)]
    np.testing.assert_allclose(ours, _scales(small, small.manifest.unsplit[0].graph), rtol=1e-4)


def _scales(bundle: Bundle, path: str) -> list[float]:
    found = []
    for node in ir.load(bundle.file(path)).graph:
        if node.op_type == "QuantizeLinear":
            scale = node.inputs[1]
            assert scale is not None and scale.const_value is not None
            found.append(float(scale.const_value.numpy().reshape(-1)[0]))
    return found


def test_tensorrt_builds_it_and_computes_in_int8(small: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    library = find_library(rtx=True)
    asked = Asked({}, {}, {"batch": 2}, capacity=64)
    work = work_of(small.manifest, library.features, asked, {}, chunk=32, unsplit=False)[0]
    target = {"ahead_of_time": True, "compute_capability": 86}
    _, made = build_engines(small, [work], library, target, tmp_path)
    [plan] = made.plans
    [chain] = small.manifest.chains.values()
    layers = len(chain.segments[0].caches) // 2
    assert plan.precision["MATRIX_MULTIPLY"]["INT8"] == PRODUCTS_OF_WEIGHTS * layers


def test_no_text_is_refused_and_leaves_nothing(decoder_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs texts"):
        export_int8_decoder(
            _model(decoder_folder), tmp_path / "bundle", calibration=lambda bundle: iter([])
        )
    assert list(tmp_path.iterdir()) == []
