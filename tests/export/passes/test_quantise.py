"""int8 bundles: what is quantised, what is not, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.export import Exit, ExitModel, Segment, export_int8, export_model
from edgeexit.measure.check import check
from edgeexit.measure.quantisation_effect import count_flips, has_float32
from edgeexit.runtime import Policy, load
from edgeexit.runtime.build.build import build_engines, work_of
from edgeexit.runtime.build.profiles import Asked
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


def make() -> ExitModel:
    torch.manual_seed(0)
    blocks = [Block(number == DEPTH - 1).eval() for number in range(DEPTH)]
    x = Tensor(name="x", dtype="float32", axes=["batch", WIDTH])
    segments, state = [], x
    for number, block in enumerate(blocks):
        logits = Tensor(name=f"logits_{number}", dtype="float32", axes=["batch", CLASSES])
        made = Tensor(name=f"state_{number}", dtype="float32", axes=["batch", WIDTH])
        segments.append(
            Segment(
                name=f"block_{number}",
                module=block,
                inputs=(state,),
                outputs=(logits,) if block.last else (made, logits),
                exits=(Exit(name=f"exit_{number}", outputs={"logits": logits.name}),),
            )
        )
        state = made
    return ExitModel(
        name="residual",
        task="classification",
        inputs=(x,),
        outputs=(Tensor(name="logits", dtype="float32", axes=["batch", CLASSES]),),
        chains={"main": segments},
        unsplit=Unsplit(blocks).eval(),
        example=lambda rows: {"x": torch.randn(rows, WIDTH)},
        labels=("a", "b", "c", "d"),
        limits={"batch": 64},
    )


def rows(count: int, seed: int = 0) -> dict[str, NDArray]:
    return {"x": np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)}


def data(bundle: Bundle) -> Iterator[dict[str, NDArray]]:
    assert bundle.manifest.unsplit[0].precision == "float32"
    for seed in range(50):
        yield rows(8, seed)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """In float32 and in int8."""
    folder = tmp_path_factory.mktemp("quantised")
    whole = export_model(make(), folder / "float32")
    return whole, export_int8(make(), folder / "int8", calibration=data)


def test_products_of_layers_are_quantised_and_those_of_heads_are_not(
    bundles: tuple[Bundle, Bundle],
) -> None:
    whole, small = bundles
    assert small.weights_bytes < 0.6 * whole.weights_bytes  # heads stay as they are
    [chain] = small.manifest.chains.values()
    assert {part.variants[0].precision for part in chain.segments} == {"int8"}
    for number, part in enumerate(chain.segments):
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
    assert [leave.name for leave in bundles[1].exits()] == ["exit_0", "exit_1", "exit_2"]
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
        never = count_flips(model, Policy())
        tight = count_flips(model, Policy(score="max_prob", thresholds=0.4))
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
    with pytest.raises(UsageError, match="two rows at least"):
        export_int8(make(), tmp_path / "bundle", calibration=lambda bundle: iter([]))
    assert list(tmp_path.iterdir()) == []


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
