"""int8 bundles: what is quantised, what is not, and what it changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.bundle.manifest import Chain, Component, Exit, Run, Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.export import Component as Part
from edgeexit.export import Form, SplitModel, export
from edgeexit.measure.check import check
from edgeexit.measure.quantisation_effect import count_flips, has_float32
from edgeexit.runtime import Rule, load
from edgeexit.runtime.build.build import build_engines
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import work_of
from edgeexit.runtime.engines.tensorrt.library import find_library

WIDTH, CLASSES, DEPTH = 32, 4, 3


class Block(nn.Module):
    """A residual layer and an exit of two products; the last one gives its answer alone."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 64),
            nn.Linear(64, WIDTH),
        )
        self.pool, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.last = last

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = state + self.down(torch.relu(self.up(self.norm(state))))
        logits = self.head(torch.tanh(self.pool(state)))
        return (logits,) if self.last else (state, logits)


class Unsplit(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        for block in list(self.blocks)[:-1]:
            state = block(state)[0]
        logits: torch.Tensor = self.blocks[-1](state)[0]
        return logits


def make() -> SplitModel:
    torch.manual_seed(0)
    blocks = [Block(number == DEPTH - 1).eval() for number in range(DEPTH)]
    x = Tensor(name="x", dtype="float32", axes=["batch", WIDTH])
    answer = Tensor(name="logits", dtype="float32", axes=["batch", CLASSES])
    parts, exits, state = [], [], x
    for number, block in enumerate(blocks):
        logits = Tensor(name=f"logits_{number}", dtype="float32", axes=["batch", CLASSES])
        made = Tensor(name=f"state_{number}", dtype="float32", axes=["batch", WIDTH])
        outputs = (logits,) if block.last else (made, logits)
        parts.append(Part(f"block_{number}", (state,), outputs, (Form(block),)))
        exits.append(
            Exit(name=f"exit_{number}", behind=parts[-1].name, outputs={"logits": logits.name})
        )
        state = made
    unsplit = Part("unsplit", (x,), (answer,), (Form(Unsplit(blocks).eval()),))
    return SplitModel(
        name="residual",
        task="classification",
        inputs=(x,),
        components=[*parts, unsplit],
        chains={
            "main": Chain(
                components=[part.name for part in parts],
                outputs=[answer],
                exits=exits,
                unsplit=["unsplit"],
            )
        },
        steps=[Run(chain="main")],
        example=lambda rows: {"x": torch.randn(rows, WIDTH)},
        labels=("a", "b", "c", "d"),
        limits={"batch": 64},
    )


def segments(bundle: Bundle) -> list[Component]:
    [chain] = bundle.manifest.chains.values()
    return [bundle.manifest.components[name] for name in chain.components]


def rows(count: int, seed: int = 0) -> dict[str, NDArray]:
    return {"x": np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)}


def data(bundle: Bundle) -> Iterator[dict[str, NDArray]]:
    assert bundle.manifest.components["unsplit"].variants[0].precision == "float32"
    for seed in range(50):
        yield rows(8, seed)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """In float32 and in int8."""
    folder = tmp_path_factory.mktemp("quantised")
    whole = export(make(), folder / "float32")
    return whole, export(make(), folder / "int8", dtype="int8", calibration=data)


def test_products_of_layers_are_quantised_and_those_of_heads_are_not(
    bundles: tuple[Bundle, Bundle],
) -> None:
    whole, small = bundles
    assert small.weights_bytes < 0.6 * whole.weights_bytes  # heads stay as they are
    assert {part.variants[0].precision for part in segments(small)} == {"int8"}
    for number, part in enumerate(segments(small)):
        graph = ir.load(small.file(part.variants[0].graph)).graph
        products = [node for node in graph if node.op_type in ("Gemm", "MatMul")]
        assert len(products) == 4
        fed = [node.inputs[0].producer() for node in products]  # type: ignore[union-attr]
        kinds = [None if node is None else node.op_type for node in fed]
        # up and down, and of the last exit the layer before its head too
        assert kinds.count("DequantizeLinear") == (3 if number == DEPTH - 1 else 2)
        scales = [node for node in graph if node.op_type == "QuantizeLinear"]
        assert scales
        for node in graph:
            assert node.op_type != "LayerNormalization" or "Dequantize" not in str(
                node.inputs[0].producer()  # type: ignore[union-attr]
            )


def test_the_bundle_keeps_what_the_model_says_of_itself(bundles: tuple[Bundle, Bundle]) -> None:
    whole, small = (bundle.manifest for bundle in bundles)
    for name in ("name", "task", "labels", "limits", "inputs", "preprocessing"):
        assert getattr(small, name) == getattr(whole, name)
    assert whole.chains == small.chains
    assert small.provenance["calibration_rows"] == "256"


def test_the_chain_answers_as_unsplit_and_nearly_as_float32(bundles: tuple[Bundle, Bundle]) -> None:
    whole, small = bundles
    inputs = rows(32, seed=99)
    with load(small, all_scores=True) as model, load(whole, all_scores=True) as exact:
        check(model).require()
        ours, theirs = model.trace(inputs), exact.trace(inputs)
        for got, expected in zip(ours.outputs, theirs.outputs, strict=True):
            off = np.abs(got["logits"] - expected["logits"]).max()
            assert 0 < off < 0.1 * np.abs(expected["logits"]).max()


def test_flips_are_counted_against_float32(bundles: tuple[Bundle, Bundle]) -> None:
    whole, small = bundles
    assert has_float32(small) and not has_float32(whole)
    with load(small, all_scores=True) as model:
        flips = count_flips(model)
        never = count_flips(model, Rule())
        tight = count_flips(model, Rule(score="max_prob", thresholds=0.4))
    assert [one.exit for one in flips] == ["exit_0", "exit_1", "exit_2"]
    assert {one.rows for one in flips} == {144}  # 400 less the 256 that set the ranges
    assert flips[-1].decisions is None and all(one.decisions is None for one in never)
    with load(small, all_scores=True) as model, load(whole, all_scores=True) as exact:
        expected = [0, 0]
        for seed in range(32, 50):
            ours, theirs = (one.trace(rows(8, seed)).scores for one in (model, exact))
            for number in range(2):
                pair = [one[number]["max_prob"] >= 0.4 for one in (ours, theirs)]
                expected[number] += int((pair[0] != pair[1]).sum())
    found = [one.decisions or 0 for one in tight[:2]]
    assert found == pytest.approx(expected, abs=1)  # float32 is computed by another kernel there


def test_too_little_data_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two rows or more"):
        export(make(), tmp_path / "bundle", dtype="int8", calibration=lambda bundle: iter([]))
    assert list(tmp_path.iterdir()) == []


def test_int8_needs_calibration_and_nothing_else_takes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int8' needs calibration"):
        export(make(), tmp_path / "bundle", dtype="int8")
    with pytest.raises(UsageError, match="'float16' takes no calibration"):
        export(make(), tmp_path / "bundle", dtype="float16", calibration=data)


def test_unsplit_has_the_scales_of_the_segments(bundles: tuple[Bundle, Bundle]) -> None:
    _, small = bundles
    ours = [scale for part in segments(small) for scale in scales(small, part)]
    theirs = scales(small, small.manifest.components["unsplit"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def scales(bundle: Bundle, component: Component) -> list[float]:
    """Scales of the activations that a component quantises, in order."""
    found = []
    for node in ir.load(bundle.file(component.variants[0].graph)).graph:
        if node.op_type == "QuantizeLinear":
            scale = node.inputs[1]
            assert scale is not None and scale.const_value is not None
            found.append(float(scale.const_value.numpy().reshape(-1)[0]))
    return found


def test_tensorrt_builds_it_and_computes_in_int8(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    library, [_, small] = find_library(rtx=True), bundles
    works = work_of(small.manifest, library.features, Asked({}, {}, {}), {})
    for capability in (86, 89, 120):
        target = {"ahead_of_time": True, "compute_capability": capability}
        _, made = build_engines(small, works, library, target, tmp_path)
        types: dict[str, int] = {}
        for plan in made.plans[:DEPTH]:
            for dtype, count in plan.precision["MATRIX_MULTIPLY"].items():
                types[dtype] = types.get(dtype, 0) + count
        assert types == {"INT8": 7, "FLOAT": 5}


def test_int8_is_measured_beside_the_pool_of_the_process(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tests.export.passes.test_quantise import data, make, rows\n"
        "from edgeexit.export import export\n"
        "from edgeexit.runtime import load\n"
        "folder = sys.argv[1]\n"
        "with load(export(make(), f'{folder}/whole'), threads='process') as model:\n"
        "    model(rows(2))\n"
        "export(make(), f'{folder}/small', dtype='int8', calibration=data)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small/manifest.json").is_file()
    assert done.stdout == ""  # ONNX Runtime prints there when its own fallback has to help
