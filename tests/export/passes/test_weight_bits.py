"""Weights in 4 and 8 bits: what is stored, what is computed, and that all modes write one text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeexit.bundle.blocks import dequantised, packed, unpacked
from edgeexit.bundle.manifest import Gather
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.cli import cli
from edgeexit.errors import ExportError, UsageError
from edgeexit.export import export
from edgeexit.export.passes.weight_bits import METHODS, Quantiser, WeightBits, rewrite
from edgeexit.export.pretrained import from_pretrained
from edgeexit.export.walk import table_of
from edgeexit.measure.check import check
from edgeexit.measure.quantisation_effect import count_flips
from edgeexit.runtime import load
from edgeexit.runtime.build.build import build_engines
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import work_of
from edgeexit.runtime.engines.tensorrt.library import find_library
from tests.decoders import EXITS, VOCABULARY, random_prompts

Folders = Callable[[str], Path]
SETTINGS = {
    "int4": WeightBits(4, block=16),
    "int8": WeightBits(8, block=16, method="rtn"),
    "symmetric": WeightBits(4, head=8, block=16, symmetric=True, method="rtn"),
    "float-heads": WeightBits(4, head=32, block=16, method="hqq"),
}


def weight(rows: int = 40, width: int = 64) -> np.ndarray:
    random = np.random.default_rng(3)
    return random.normal(0, 1, (rows, width)).astype(np.float32)


def product(weight: np.ndarray, operator: str) -> ir.Model:
    """A product with a weight ``[rows, width]``, of each kind that exporters write."""
    rows, width = weight.shape
    x = ir.val("x", ir.DataType.FLOAT, ["batch", width])
    turned = operator in ("MatMul", "joined", "Gemm")
    arrays = [weight.T if turned else weight]
    if operator == "joined":
        arrays = [weight[: rows // 4].T, weight[rows // 4 :].T]
    values = []
    for number, array in enumerate(arrays):
        tensor = ir.tensor(np.ascontiguousarray(array), name=f"w{number}")
        values.append(ir.Value(name=tensor.name, const_value=tensor))
    nodes = []
    operand = values[0]
    if operator == "joined":
        nodes.append(ir.node("Concat", values, {"axis": 1}))
        operand = nodes[-1].outputs[0]
    if operator.startswith("Gemm"):
        bias = ir.tensor(np.arange(rows, dtype=np.float32), name="bias")
        values.append(ir.Value(name="bias", const_value=bias))
        transposed = {"transB": int(operator == "Gemm, transposed")}
        nodes.append(ir.node("Gemm", [x, operand, values[-1]], transposed))
    else:
        nodes.append(ir.node("MatMul", [x, operand]))
    y = nodes[-1].outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["batch", rows])
    graph = ir.Graph(
        [x], [y], nodes=nodes, initializers=values, name="product", opset_imports={"": 20}
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_numbers_are_packed_and_unpacked() -> None:
    numbers = np.random.default_rng(0).integers(0, 16, (3, 5, 8)).astype(np.uint8)
    assert np.array_equal(unpacked(packed(numbers, 4), 4), numbers)
    assert packed(numbers, 4).shape == (3, 5, 4)
    assert packed(numbers, 8) is numbers


@pytest.mark.parametrize("operator", ["MatMul", "joined", "Gemm", "Gemm, transposed"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_product_is_that_of_the_stored_numbers(operator: str, settings: WeightBits) -> None:
    given, x = weight(), weight(7)
    model, quantiser = product(given, operator), Quantiser(settings)
    assert rewrite(model, quantiser, lambda node: settings.bits) == 1
    stored = quantiser.blocks(given, settings.bits, "weight")
    expected = x @ stored.floats().T + (np.arange(len(given)) if "Gemm" in operator else 0)
    # ONNX Runtime rounds activations to 8 bits.
    assert np.abs(run(model, x) - expected).max() < 0.02 * np.abs(expected).max()
    assert model.graph[0].op_type == "MatMulNBits"
    assert not {"w0", "w1"} & model.graph.initializers.keys()


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("operator", ["MatMul", "joined", "Gemm", "Gemm, transposed"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_standard_operators_give_the_product_of_the_stored_numbers(
    operator: str, settings: WeightBits, rank: int
) -> None:
    """With an odd number of blocks, so that zero points of neighbouring rows share a byte."""
    given, x = weight(41, 48), weight(6, 48)
    model, quantiser = product(given, operator), Quantiser(settings)
    if rank == 3 and operator.startswith("Gemm"):
        pytest.skip("Gemm takes rows")
    if rank == 3:
        x = x.reshape(2, 3, 48)
        model.graph.inputs[0].shape = ir.Shape(["batch", "new", 48])
        model.graph.outputs[0].shape = ir.Shape(["batch", "new", 41])
    assert rewrite(model, quantiser, lambda node: settings.bits, style="standard") == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {node.domain for node in model.graph} == {""}
    stored = quantiser.blocks(given, settings.bits, "weight")
    expected = x @ stored.floats().T + (np.arange(len(given)) if "Gemm" in operator else 0)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_methods_come_close_and_the_careful_ones_closer(method: str, bits: int) -> None:
    given = weight(64, 256)
    errors = {}
    for name in ("rtn", method):
        settings = WeightBits(bits, method=name)  # type: ignore[arg-type]
        made = Quantiser(settings).blocks(given, bits, "weight").floats()
        errors[name] = float(np.abs(made - given).mean())
    step = np.ptp(given.reshape(64, -1, 32), axis=-1).max() / (2**bits - 1)
    assert errors[method] < 0.3 * step
    assert errors[method] <= 1.02 * errors["rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_the_root_logger_stays_the_programs(method: str) -> None:
    code = f"""
import logging
import numpy as np
from edgeexit.export.passes.weight_bits import Quantiser, WeightBits
Quantiser(WeightBits(4, method="{method}")).blocks(np.ones((8, 64), np.float32), 4, "a")
root = logging.getLogger()
print(root.handlers, root.level == logging.WARNING)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["[]", "True"]


def test_equal_numbers_and_zeros_are_kept() -> None:
    given = np.zeros((32, 64), np.float32)
    given[1] = 0.25
    for method in METHODS:
        stored = Quantiser(WeightBits(method=method)).blocks(given, 4, "weight")
        np.testing.assert_allclose(stored.floats(), given, atol=1e-6)


def test_gates_and_other_operators_stay() -> None:
    narrow = product(weight(4), "MatMul")
    assert rewrite(narrow, Quantiser(WeightBits()), lambda node: 4) == 0
    assert rewrite(product(weight(), "MatMul"), Quantiser(WeightBits()), lambda node: None) == 0


def _export(folder: Path, output: Path, settings: WeightBits, **more: Any) -> Bundle:
    split = from_pretrained(folder, exits=EXITS, adapters=EXITS[:1], untrained=True)
    return export(split.split_model(), output, weights=settings, **more)


@pytest.fixture(scope="module", params=SETTINGS)
def bundle(
    request: pytest.FixtureRequest, decoder_folder: Folders, tmp_path_factory: Any
) -> Bundle:
    folder = tmp_path_factory.mktemp("bits") / "bundle"
    _export(decoder_folder("llama"), folder, SETTINGS[request.param])
    return open_bundle(folder, verify="full")


def test_all_products_with_weights_are_quantised(bundle: Bundle) -> None:
    for name, component in bundle.manifest.components.items():
        for variant in component.variants:
            graph = ir.load(bundle.file(variant.graph)).graph
            kinds = [node.op_type for node in graph]
            whole = [
                node
                for node in graph
                if node.op_type in ("MatMul", "Gemm")
                and any(v is not None and v.is_initializer() for v in node.inputs)
            ]
            if not whole and "blocked-weights" in variant.requires:
                assert "DequantizeLinear" in kinds and "MatMulNBits" not in kinds, name
                assert "onnxruntime-operators" not in variant.requires
            elif not whole:
                assert "MatMulNBits" in kinds, name
                assert "onnxruntime-operators" in variant.requires
            else:  # heads that stay in float32
                assert variant.precision == "float32" or name == "unsplit"
                assert len(whole) == 1


def test_both_styles_have_the_same_bytes(bundle: Bundle) -> None:
    def offsets(path: Path) -> set[int]:
        tensors = (value.const_value for value in ir.load(path).graph.initializers.values())
        stored = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        return {t.offset or 0 for t in stored if t.name.endswith(("/numbers", "/scales"))}

    for component in bundle.manifest.components.values():
        own, standard = (
            {
                n
                for v in component.variants
                if style in v.requires
                for n in offsets(bundle.file(v.graph))
            }
            for style in ("onnxruntime-operators", "blocked-weights")
        )
        assert standard <= own  # some join queries, keys and values
        assert bool(standard) == bool(own)


def test_tensorrt_builds_them_without_zero_points(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    library = find_library(rtx=True)
    asked = Asked({}, {}, {"batch": 2}, capacity=64)
    works = work_of(bundle.manifest, library.features, asked, {}, chunk=32, unsplit=False)
    device = {"ahead_of_time": True, "compute_capability": 86}
    _, made = build_engines(bundle, works[:2], library, device, tmp_path)
    for plan in made.plans:
        assert plan.graph.endswith(".standard.onnx")
        assert set(plan.precision["MATRIX_MULTIPLY"]) == {"FLOAT"}


def test_half_precision_beside_weights_in_few_bits(decoder_folder: Folders, tmp_path: Path) -> None:
    made = _export(decoder_folder("llama"), tmp_path / "b", WeightBits(4), dtype="float16")
    [step] = [step for step in made.manifest.steps if isinstance(step, Gather)]
    assert step.blocks is not None and step.output.dtype == "float16"
    assert table_of(made, step).take(np.array([[3, 1]])).dtype == np.float16
    assert made.manifest.components["segment_1"].states[0].dtype == "float16"
    with load(made, threads=1, all_scores=True) as model:
        check(model).require()


def test_a_width_that_32_does_not_divide_gets_blocks_of_16() -> None:
    quantiser = Quantiser(WeightBits())
    assert quantiser.blocks(weight(8, 64), 4, "w").block == 32
    assert quantiser.blocks(weight(8, 80), 4, "w").block == 16
    model = product(weight(40, 40), "MatMul")  # stays as it is
    assert not quantiser.takes(weight(40, 40)) and rewrite(model, quantiser, lambda node: 4) == 0


def test_the_embedding_is_stored_as_the_head_is(bundle: Bundle) -> None:
    [step] = [step for step in bundle.manifest.steps if isinstance(step, Gather)]
    table = table_of(bundle, step)
    head = ir.load(bundle.file(bundle.manifest.components["head"].variants[0].graph)).graph
    products = [node for node in head if node.op_type == "MatMulNBits"]
    if step.blocks is None:
        assert not products
        return
    numbers, scales = (products[0].inputs[n].const_value for n in (1, 2))  # type: ignore[union-attr]
    assert isinstance(numbers, ir.ExternalTensor) and isinstance(scales, ir.ExternalTensor)
    assert (numbers.offset, scales.offset) == (step.offset, step.blocks.scales)
    ids = np.array([[3, 1], [0, 3]])
    zero = None if table.zero_points is None else table.zero_points[ids]
    assert table.scales is not None
    expected = dequantised(table.rows[ids], table.scales[ids], zero, table.bits, table.width)
    assert np.array_equal(table.take(ids), expected) and expected.shape == (2, 2, table.width)


def test_split_and_unsplit_write_one_text(bundle: Bundle) -> None:
    prompts = random_prompts(3, [6, 6, 6], seed=1)
    with load(bundle.path, threads=1) as model, load(bundle.path, threads=1, unsplit=True) as whole:
        check(model).require()
        expected = whole.generate(prompts, max_new_tokens=12).finish().tokens
        for mode in ("full", "fast"):
            assert model.generate(prompts, max_new_tokens=12, mode=mode).finish().tokens == expected


def test_it_answers_nearly_as_the_float32_model(
    decoder_folder: Folders, bundle: Bundle, tmp_path: Path
) -> None:
    split = from_pretrained(decoder_folder("llama"), exits=EXITS)
    whole = export(split.split_model(), tmp_path / "float32")
    name = f"exit_{EXITS[-1]}/logits"
    expected, found = (
        np.load(one.file("samples/reference.npz"))[name].ravel() for one in (whole, bundle)
    )
    least = 0.995 if bundle.manifest.components["head"].variants[0].precision == "int8" else 0.9
    assert least < np.corrcoef(expected, found)[0, 1] < 1


def test_check_counts_what_changed(decoder_folder: Folders, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    batches = [{"tokens": random.integers(1, VOCABULARY, (1, 20))} for _ in range(70)]
    _export(
        decoder_folder("llama"),
        tmp_path / "b",
        WeightBits(4, block=16),
        calibration=lambda bundle: batches,
    )
    with load(tmp_path / "b", threads=1) as model:
        flips = count_flips(model)
    assert len(flips) == len(EXITS) + 1
    assert all(0 <= one.answers < one.rows and one.score > 0 for one in flips)
    tokens = np.load(open_bundle(tmp_path / "b").file("samples/float32.npz"))["input/tokens"]
    whole = AutoModelForCausalLM.from_pretrained(decoder_folder("llama"))
    given = torch.from_numpy(tokens)
    with torch.no_grad():
        loss = float(whole(input_ids=given, labels=given).loss)
    assert flips[-1].perplexity is not None
    in_float32, here = flips[-1].perplexity
    assert in_float32 == pytest.approx(math.exp(loss), rel=1e-4)
    assert here != in_float32 and here == pytest.approx(in_float32, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"block": 24}, "block is 24"),
        ({"head": 16}, "head is 16"),
        ({"method": "awq"}, "method is 'awq'"),
        ({"symmetric": True}, "k-quant chooses zero points"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeightBits(**settings)


def test_blocks_that_do_not_divide_are_refused(decoder_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="rows of 64 cannot be divided into blocks of 256"
    ) as refused:
        _export(decoder_folder("llama"), tmp_path / "b", WeightBits(block=256))
    assert "blocks of" in str(refused.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights-block", "64"], "--weights-block needs --weights"),
        (["--head-weights", "int8"], "--head-weights needs --weights"),
        (["--weights-symmetric"], "--weights-symmetric needs --weights"),
        (["--weights", "int4", "--dtype", "int8"], "exclude each other"),
        (["--weights", "int4", "--weights-block", "24"], "block is 24"),
        (["--weights", "int4", "--weights-symmetric", "--weights-method", "hqq"], "zero points"),
    ],
)
def test_the_command_line_refuses(
    decoder_folder: Folders, tmp_path: Path, options: list[str], message: str
) -> None:
    given = ["export", "-m", str(decoder_folder("llama")), "--exits", "1", *options]
    with pytest.raises(UsageError, match=message):
        cli.main([*given, "-o", str(tmp_path / "b")], standalone_mode=False)
    assert not (tmp_path / "b").exists()


def test_the_command_line_exports(
    decoder_folder: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["export", "-m", str(decoder_folder("llama")), "--exits", "1", "--weights", "int8"]
    more = ["--head-weights", "int4", "--weights-block", "16", "--json"]
    cli.main([*given, *more, "-o", str(tmp_path / "b")], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["exits"] == ["exit_1", "exit_4"]
    components = open_bundle(tmp_path / "b").manifest.components
    assert components["segment_0"].variants[0].precision == "int8"
