"""On a machine with a GPU: every exit of every example against the bundle's own reference.

python -m pytest -m gpu
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeexit.bundle.manifest import StateForm
from edgeexit.bundle.policy import OUT_OF_REACH
from edgeexit.bundle.reader import Bundle
from edgeexit.measure.check import check
from edgeexit.runtime import Rule, load

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU"),
]


@pytest.fixture(scope="module", params=["float32", "float16"])
def digits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits example."""
    from edgeexit.export import export
    from edgeexit.export.pretrained import from_pretrained

    model = from_pretrained(ROOT / "examples/digits/checkpoint").split_model()
    return export(model, tmp_path_factory.mktemp("digits") / "bundle", dtype=request.param)


@pytest.fixture(scope="module", params=["float32", "float16"])
def codelm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The codelm example."""
    from edgeexit.export import export
    from edgeexit.export.pretrained import from_pretrained

    model = from_pretrained(ROOT / "examples/codelm/checkpoint").split_model()
    folder = tmp_path_factory.mktemp("codelm") / "bundle"
    return export(model, folder, dtype=request.param)


@pytest.fixture(scope="module", params=["cuda", "tensorrt"])
def engine(request: pytest.FixtureRequest, digits: Bundle) -> Iterator[str]:
    """What this machine can compute with; TensorRT engines are built for it."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == "tensorrt":
            root = digits.path.parent / "engines"
            patch.setenv("EDGEEXIT_ENGINE_DIR", str(root))
            _build(digits, root)
        else:
            _require_cuda_provider()
        yield name


def _require_cuda_provider() -> None:
    """Skips where this onnxruntime is the one without it; whatever else is amiss fails the test."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")


def _build(bundle: Bundle, root: Path, form: StateForm | None = None) -> None:
    from edgeexit.runtime.build.build import build_engines
    from edgeexit.runtime.build.profiles import Asked
    from edgeexit.runtime.build.work_list import sample_sizes, work_of
    from edgeexit.runtime.engines.cuda.driver import describe_device
    from edgeexit.runtime.engines.tensorrt.library import DESKTOP_TARGETS, find_library

    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        pytest.skip("neither TensorRT nor TensorRT-RTX is installed")
    library, device = find_library(), describe_device()
    if library.rtx and device["compute_capability"] not in DESKTOP_TARGETS:
        pytest.skip("TensorRT-RTX does not support this GPU")
    asked = Asked({}, {}, {"batch": 4 if bundle.manifest.decoding else 32})
    sample = sample_sizes(bundle)
    works = work_of(
        bundle.manifest, library.features, asked, sample, form=form, tunes=library.tunes
    )
    build_engines(bundle, works, library, device, root)


def test_every_exit_of_digits_answers_as_torch(digits: Bundle, engine: str) -> None:
    with load(digits, engine, all_scores=True) as model:
        check(model).require()


def test_rows_leave_one_by_one_and_keep_their_order(digits: Bundle, engine: str) -> None:
    inputs = {"pixel_values": np.random.default_rng(0).normal(size=(32, 1, 8, 8))}
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    policy = Rule(score="max_prob", thresholds=0.5)
    with load(digits, engine, policy=policy) as model, load(digits, "cpu", policy=policy) as host:
        ours, theirs = model(inputs), host(inputs)
    assert len(set(theirs.exits.tolist())) > 1
    assert (ours.exits == theirs.exits).mean() > 0.9  # a score at the threshold may fall either way
    same = ours.exits == theirs.exits
    off = np.abs(ours.outputs["logits"] - theirs.outputs["logits"])[same].max()
    assert off < 0.05 * np.abs(theirs.outputs["logits"]).max()


def test_a_warm_call_takes_no_memory_and_fetches_scores_and_answers_only(
    digits: Bundle, engine: str
) -> None:
    inputs = {"pixel_values": np.zeros((8, 1, 8, 8), np.float32)}
    with load(digits, engine, policy=Rule(score="max_prob", thresholds=OUT_OF_REACH)) as model:
        model(inputs)
        assert model.device_counts is not None
        before = dataclasses.replace(model.device_counts)
        logits = model(inputs).outputs["logits"]
        after = model.device_counts
    assert (after.allocations, after.pinned) == (before.allocations, before.pinned)
    exits = len(model.exits)
    assert after.to_host_bytes - before.to_host_bytes == 4 * 8 * exits + logits.nbytes


def test_codelm_writes_as_torch_on_the_cuda_provider(codelm: Bundle) -> None:
    _require_cuda_provider()
    with load(codelm, "cuda") as decoder:
        check(decoder).require()


@pytest.mark.parametrize("form", ["fixed", "append"])
def test_codelm_writes_as_torch_on_tensorrt(
    codelm: Bundle, form: StateForm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [one for made in codelm.manifest.components.values() for one in made.variants]
    if form == "fixed" and all(one.precision == "float32" for one in variants):
        pytest.skip("TensorRT writes caches in place in half precision only")
    monkeypatch.setenv("EDGEEXIT_ENGINE_DIR", str(tmp_path))
    _build(codelm, tmp_path, form)
    with load(codelm, "tensorrt", states=form) as decoder:
        check(decoder).require()
