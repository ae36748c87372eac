"""float16 bundles: half of the weights, float32 where callers look, the same decisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgeexit.bundle.reader import WEIGHTS, Bundle
from edgeexit.errors import UsageError
from edgeexit.export import export
from edgeexit.export.exits.classifier import ExitClassifier
from edgeexit.export.families import bert, vit
from edgeexit.runtime import Rule, load
from tests.checkpoints import make_model

ADAPTERS = {"bert": bert, "vit": vit}


@pytest.fixture(scope="module", params=ADAPTERS)
def half(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExitClassifier, Bundle]:
    model = make_model(request.param)
    torch.manual_seed(1)
    classifier = ExitClassifier(model, ADAPTERS[request.param].trunk(model), [2]).eval()
    output = tmp_path_factory.mktemp("half") / request.param
    return classifier, export(classifier.split_model(), output, dtype="float16")


def test_float16_bundle_computes_in_half_when_asked(half: tuple[ExitClassifier, Bundle]) -> None:
    classifier, bundle = half
    (chain,) = bundle.manifest.chains.values()
    weights = sum(
        parameter.numel()
        for name, parameter in classifier.named_parameters()
        if parameter.numel() >= 512
    )
    assert (bundle.path / WEIGHTS).stat().st_size <= 2 * weights * 1.1 + 4096
    segments = [bundle.manifest.components[name] for name in chain.components]
    for segment in segments:
        assert segment.variants[0].precision == "float16"
        graph = onnx.load(bundle.file(segment.variants[0].graph), load_external_data=False).graph
        large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) >= 512]
        kinds = {tensor.data_type for tensor in large}
        assert kinds == {onnx.TensorProto.FLOAT16}
    assert {t.dtype for t in segments[0].outputs if t.name.startswith("state")} == {"float16"}


def test_float16_bundle_takes_and_answers_float32(half: tuple[ExitClassifier, Bundle]) -> None:
    classifier, bundle = half
    assert {t.dtype for t in bundle.manifest.inputs} <= {"float32", "int64"}
    feeds = {name: value.numpy() for name, value in classifier.trunk.example(3).items()}
    with load(bundle) as model:
        trace = model.trace(feeds)
    for outputs, scores in zip(trace.outputs, trace.scores, strict=True):
        assert outputs["logits"].dtype == np.float32
        assert {value.dtype for value in scores.values()} == {np.dtype("float32")}
        assert set(scores) == {"max_prob", "margin", "entropy"}


def test_float16_bundle_decides_as_float32_torch_when_scores_are_clear(
    half: tuple[ExitClassifier, Bundle],
) -> None:
    classifier, bundle = half
    inputs = classifier.trunk.example(12)
    with torch.no_grad():
        expected = [logits.numpy() for logits in classifier(**inputs)]
    first = torch.from_numpy(expected[0]).softmax(-1).max(-1).values.numpy()
    ordered = np.sort(first)
    gap = 3 + int(np.argmax(np.diff(ordered)[3:8]))
    assert ordered[gap + 1] - ordered[gap] > 4e-3, "the scores leave no clear threshold"
    threshold = float(ordered[gap : gap + 2].mean())
    with load(bundle, policy=Rule(thresholds=threshold)) as model:
        result = model({name: value.numpy() for name, value in inputs.items()})
    leaves = np.where(first >= threshold, 0, 1)
    np.testing.assert_array_equal(result.exits, leaves)
    wanted = np.stack([expected[taken][row] for row, taken in enumerate(leaves)])
    np.testing.assert_allclose(result.outputs["logits"], wanted, atol=3e-2, rtol=0)
    assert not np.array_equal(result.outputs["logits"], wanted), "nothing was rounded"


def test_float16_export_leaves_the_model_in_float32(half: tuple[ExitClassifier, Bundle]) -> None:
    classifier, _ = half
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}


def test_export_refuses_a_precision_when_no_graph_can_have_it(tmp_path: Path) -> None:
    model = make_model("vit")
    classifier = ExitClassifier(model, vit.trunk(model), [1])
    with pytest.raises(UsageError, match="'int4' is not known"):
        export(classifier.split_model(), tmp_path / "bundle", dtype="int4")
    assert not list(tmp_path.iterdir())
