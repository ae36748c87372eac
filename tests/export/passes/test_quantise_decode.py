"""Language models in int8: what is quantised, what is not, and that the modes still agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeexit.bundle.manifest import Component
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli import cli
from edgeexit.errors import DataError, UsageError
from edgeexit.export import export
from edgeexit.export.pretrained import from_pretrained
from edgeexit.measure.check import check
from edgeexit.measure.quantisation_effect import count_flips
from edgeexit.runtime import load
from edgeexit.runtime.build.build import build_engines
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import work_of
from edgeexit.runtime.engines.tensorrt.library import find_library
from tests.decoders import EXITS, VOCABULARY, random_prompts
from tests.encoder_decoders import make_bart
from tests.encoder_decoders import save_checkpoint as save_encoder_decoder
from tests.export.passes.test_quantise import scales

PRODUCTS_OF_WEIGHTS = 7  # of a layer: queries, keys, values, output, gate, up, down
Folders = Callable[[str], Path]


def _export(decoder_folder: Folders, folder: Path, texts: list[np.ndarray]) -> None:
    model = from_pretrained(decoder_folder("llama"), exits=EXITS).split_model()
    batches = [{"tokens": text[None]} for text in texts]
    export(model, folder, dtype="int8", calibration=lambda bundle: batches)


@pytest.fixture(scope="module")
def small(decoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    random = np.random.default_rng(0)
    texts = [random.integers(1, VOCABULARY, 60) for _ in range(8)]
    folder = tmp_path_factory.mktemp("small") / "bundle"
    _export(decoder_folder, folder, texts)
    return open_bundle(folder, verify="full")


def segments(bundle: Bundle) -> list[Component]:
    return [bundle.manifest.components[f"segment_{number}"] for number in range(3)]


def test_products_of_weights_are_quantised_and_attentions_own_are_not(small: Bundle) -> None:
    for segment in segments(small):
        [variant] = segment.variants
        assert (variant.precision, variant.states, variant.requires) == ("int8", "append", [])
        graph = ir.load(small.file(variant.graph)).graph
        products = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
        quantised = [
            all(v is not None and _made_by(v) == "DequantizeLinear" for v in node.inputs[:2])
            for node in products
        ]
        assert sum(quantised) == PRODUCTS_OF_WEIGHTS * len(segment.states) // 2
        assert len(products) > sum(quantised)  # queries with keys, chances with values
    head = small.manifest.components["head"]
    assert [variant.precision for variant in head.variants] == ["float32"]


def _made_by(value: ir.Value) -> str | None:
    node = value.producer()
    return None if node is None else node.op_type


def test_it_answers_nearly_as_torch_and_drafts_the_text_of_full(small: Bundle) -> None:
    with load(small) as decoder:
        check(decoder).require()
        prompts = random_prompts(3, [6, 3, 11], seed=1)
        full = decoder.generate(prompts, max_new_tokens=12).finish()
        fast = decoder.generate(prompts, max_new_tokens=12, mode="fast").finish()
        assert fast.tokens == full.tokens  # without a policy nothing leaves early
        with pytest.raises(UsageError, match="has no projections"):
            decoder.generate(prompts, mode="approximate")


def test_unsplit_has_the_scales_of_the_segments(small: Bundle) -> None:
    """Both were measured on the same texts, so scales of a product's input are the same."""
    ours = [scale for segment in segments(small) for scale in scales(small, segment)]
    unsplit = scales(small, small.manifest.components["unsplit"])
    np.testing.assert_allclose(ours, unsplit, rtol=1e-4)


def test_flips_are_counted_over_the_tokens_of_the_texts(small: Bundle) -> None:
    with load(small, all_scores=True) as model:
        flips = count_flips(model)
    assert [one.rows for one in flips] == [8 * 60] * 3
    assert all(one.answers < 100 and 0 < one.score < 0.2 for one in flips)


def test_tensorrt_builds_it_and_computes_in_int8(small: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    library = find_library(rtx=True)
    asked = Asked({}, {}, {"batch": 2}, capacity=64)
    work = work_of(small.manifest, library.features, asked, {}, chunk=32, unsplit=False)[0]
    target = {"ahead_of_time": True, "compute_capability": 86}
    _, made = build_engines(small, [work], library, target, tmp_path)
    [plan] = made.plans
    layers = len(segments(small)[0].states) // 2
    assert plan.precision["MATRIX_MULTIPLY"]["INT8"] == PRODUCTS_OF_WEIGHTS * layers


def test_no_text_is_refused_and_leaves_nothing(decoder_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs texts"):
        _export(decoder_folder, tmp_path / "bundle", [])
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit_is_refused_before_anything_is_traced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_encoder_decoder(make_bart(), tmp_path / "checkpoint")
    data = tmp_path / "texts.jsonl"
    rows = [{"text": "abc", "target": "cba"}, {"text": "bcd"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["export", "-m", str(folder), "--exits", "1", "-o", str(tmp_path / "bundle")]
    arguments += ["--dtype", "int8", "--calibration-data", str(data)]
    with pytest.raises(DataError, match=r"texts.jsonl: line 2: there is no 'target'"):
        cli.main(arguments, standalone_mode=False)
    assert not [one for one in caplog.records if one.name == "edgeexit.export.write"]
    assert not (tmp_path / "bundle").exists()
