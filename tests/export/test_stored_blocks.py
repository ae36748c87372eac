"""Checkpoints whose weights are in few bits already: read as their own libraries read them, and
their integers are those of the bundle."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgeexit.bundle.blocks import dequantised
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import ExportError
from edgeexit.export import export
from edgeexit.export.passes.weight_bits import WeightBits
from edgeexit.export.pretrained import from_pretrained
from edgeexit.export.stored_blocks import AWQ_ORDER, Matrix, StoredRows, read_stored
from edgeexit.measure.check import check
from edgeexit.runtime import load
from tests.decoders import random_prompts, save_decoder

GROUP = 16
Tensors = dict[str, torch.Tensor]


class Rounded:
    """A weight ``[out, in]`` rounded in groups of columns."""

    def __init__(
        self, weight: torch.Tensor, bits: int, group: int, *, order: bool = False, sym: bool = False
    ) -> None:
        width = weight.shape[1]
        self.bits, most = bits, (1 << bits) - 1
        self.groups = torch.arange(width) // group
        if order:  # as GPTQ with desc_act: columns of a group are no neighbours
            self.groups = self.groups[
                torch.randperm(width, generator=torch.Generator().manual_seed(1))
            ]
        scales, zero = [], []
        for number in range(width // group):
            part = weight[:, self.groups == number]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if sym:
                high = part.abs().amax(1)
                low = -high
            scale = ((high - low) / most).half().clamp(min=1e-4)
            scales.append(scale)
            middle = torch.full_like(low, 1 << (bits - 1))
            zero.append(middle if sym else (-low / scale.float()).round().clamp(1, most))
        self.scales, self.zero = torch.stack(scales, 1), torch.stack(zero, 1).int()
        steps = weight / self.scales.float()[:, self.groups] + self.zero[:, self.groups]
        self.numbers = steps.round().clamp(0, most).int()

    @property
    def floats(self) -> torch.Tensor:
        shifted = (self.numbers - self.zero[:, self.groups]).float()
        return shifted * self.scales.float()[:, self.groups]


def words(values: torch.Tensor, bits: int, axis: int, order: Any = None) -> torch.Tensor:
    """int32 words of values, packed along an axis from the lowest bits up."""
    each = 32 // bits
    moved = values.movedim(axis, -1).reshape(*values.movedim(axis, -1).shape[:-1], -1, each).long()
    if order is not None:
        moved = moved[..., list(order)]
    shifts = torch.arange(each) * bits
    packed = (moved << shifts).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    return packed.movedim(-1, axis).contiguous()


def gptq(one: Rounded, *, first: bool = True) -> Tensors:
    zero = (one.zero - 1) & ((1 << one.bits) - 1) if first else one.zero
    return {
        "qweight": words(one.numbers.T, one.bits, 0),
        "qzeros": words(zero.T, one.bits, 1),
        "scales": one.scales.T.contiguous(),
        "g_idx": one.groups.int(),
    }


def awq(one: Rounded) -> Tensors:
    return {
        "qweight": words(one.numbers.T, 4, 1, AWQ_ORDER),
        "qzeros": words(one.zero.T, 4, 1, AWQ_ORDER),
        "scales": one.scales.T.contiguous(),
    }


def compressed(one: Rounded) -> Tensors:
    """By the library's own packing."""
    from compressed_tensors.compressors.pack_quantized import helpers

    half = 1 << (one.bits - 1)
    found = {
        "weight_packed": helpers.pack_to_int32((one.numbers - half).to(torch.int8), one.bits),
        "weight_scale": one.scales,
        "weight_shape": torch.tensor(one.numbers.shape),
    }
    if (one.zero != half).any():
        zero = (one.zero - half).to(torch.int8)
        found["weight_zero_point"] = helpers.pack_to_int32(
            zero, one.bits, packed_dim=0
        ).contiguous()
    return found


def whole_rows(one: Rounded) -> Tensors:
    half = 1 << (one.bits - 1)
    return {"weight": (one.numbers - half).to(torch.int8), "weight_scale": one.scales}


def groups_of(bits: int) -> dict[str, Any]:
    return {"group_0": {"weights": {"num_bits": bits, "type": "int", "symmetric": True}}}


COMPRESSED = {"quant_method": "compressed-tensors"}
KINDS: dict[str, tuple[Callable[[Rounded], Tensors], dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {"bits": 4}, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq, 8 bits": (gptq, {"bits": 8}, {"quant_method": "gptq", "bits": 8}),
    "gptq, second format": (
        lambda one: gptq(one, first=False),
        {"bits": 4},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    ),
    "gptq, one group a row": (gptq, {"bits": 4, "group": 0}, {"quant_method": "gptq", "bits": 4}),
    "awq": (awq, {"bits": 4}, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "compressed": (
        compressed,
        {"bits": 4},
        {**COMPRESSED, "format": "pack-quantized", "config_groups": groups_of(4)},
    ),
    "compressed, symmetric": (
        compressed,
        {"bits": 4, "sym": True},
        {**COMPRESSED, "format": "pack-quantized", "config_groups": groups_of(4)},
    ),
    "compressed, 8 bits": (
        whole_rows,
        {"bits": 8, "group": 0, "sym": True},
        {**COMPRESSED, "format": "int-quantized", "config_groups": groups_of(8)},
    ),
}


def quantise(folder: Path, kind: str, **more: Any) -> Tensors:
    """Quantises the layers of a checkpoint in its folder. Returns its weights in float32."""
    pack, how, settings = KINDS[kind]
    weights = load_file(folder / "model.safetensors")
    expected, stored = dict(weights), dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 2 or ".layers." not in name:
            continue
        options = {"group": GROUP, **how, **more}
        options["group"] = options["group"] or weight.shape[1]
        one = Rounded(weight.float(), **options)
        expected[name] = one.floats
        del stored[name]
        place = name.removesuffix("weight")
        stored |= {f"{place}{part}": tensor for part, tensor in pack(one).items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_decoder("llama", tmp_path / "checkpoint")


def products(bundle: Bundle) -> list[tuple[str, int, np.ndarray]]:
    """Graph, bits and weight ``[rows, width]`` of every product in few bits."""
    found = []
    for component in bundle.manifest.components.values():
        for variant in component.variants:
            model = ir.load(bundle.path / variant.graph)
            for node in model.graph:
                if node.op_type != "MatMulNBits":
                    continue
                arrays = [value.const_value.numpy() for value in node.inputs[1:] if value]  # type: ignore[union-attr]
                zero = arrays[2] if len(arrays) > 2 else None
                attributes = {key: one.value for key, one in node.attributes.items()}
                bits = int(attributes["bits"])
                scales = arrays[1].reshape(attributes["N"], -1)
                weight = dequantised(arrays[0], scales, zero, bits, attributes["K"])
                found.append((variant.graph, bits, weight))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_those_of_the_bundle(kind: str, folder: Path, tmp_path: Path) -> None:
    expected = quantise(folder, kind)
    split: Any = from_pretrained(folder, exits=[1, 2])
    for name, weight in split.model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(weight, expected[name].float()), name
    bundle = export(split.split_model(), tmp_path / "bundle")
    bits = KINDS[kind][1]["bits"]
    assert bundle.manifest.provenance["quantised_by"] == KINDS[kind][2]["quant_method"]
    kept = {row.tobytes() for name, one in expected.items() if ".layers." in name and one.ndim == 2
            for row in one.float().numpy()}  # fmt: skip
    layers = [(own, weight) for graph, own, weight in products(bundle) if "segment" in graph]
    assert layers
    for own, weight in layers:
        assert own == bits
        assert all(row.tobytes() in kept for row in weight)
    with load(bundle) as model:
        assert check(model).passed
        made = model.generate(random_prompts(1, [9])[0], max_new_tokens=6).finish()
        assert len(made.tokens[0]) > 0


def test_what_cannot_be_kept_is_rounded_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Groups of columns that are no neighbours."""
    expected = quantise(folder, "gptq", order=True)
    with caplog.at_level(logging.WARNING):
        split: Any = from_pretrained(folder, exits=[1])
    assert "28 of 28 matrices cannot keep their integers" in caplog.text
    assert "no neighbours (desc_act)" in caplog.text
    for name, weight in split.model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(weight, expected[name].float()), name
    bundle = export(split.split_model(), tmp_path / "bundle", weights=WeightBits(8, block=16))
    assert {bits for _, bits, _ in products(bundle)} == {8}


def test_weights_can_become_float32(folder: Path, tmp_path: Path) -> None:
    quantise(folder, "gptq")
    split = from_pretrained(folder, exits=[1]).split_model()
    assert products(export(split, tmp_path / "whole", weights="float32")) == []
    assert products(export(split, tmp_path / "half", dtype="float16")) == []


UNKNOWN: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq with 3 bits": {"quant_method": "gptq", "bits": 3},
    "gptq with 4 bits in the format marlin": {
        "quant_method": "gptq",
        "bits": 4,
        "checkpoint_format": "marlin",
    },
    "gptq with 8 bits in the format marlin": {
        "quant_method": "gptq",
        "bits": 8,
        "is_marlin_format": True,
    },
    "gptq with 4 bits in the format bitblas": {
        "quant_method": "gptq",
        "bits": 4,
        "format": "bitblas",
    },
    "awq with 4 bits in the version gemv": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "awq with 4 bits in the version llm-awq": {
        "quant_method": "awq",
        "bits": 4,
        "backend": "llm-awq",
    },
    "compressed-tensors of the format pack-quantized": {
        **COMPRESSED,
        "format": "pack-quantized",
        "config_groups": [groups_of(4)],
    },
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors of the format float-quantized": {
        **COMPRESSED,
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
    },
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_ways_that_are_not_known_are_named(kind: str, folder: Path) -> None:
    quantise(folder, "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = UNKNOWN[kind]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=f"already quantised by {kind}.*known are GPTQ"):
        from_pretrained(folder, exits=[1])


@pytest.mark.parametrize(
    "named", [{"checkpoint_format": "gptq_v2"}, {"format": "GPTQ_V2"}, {"checkpoint_format": None}]
)
def test_the_format_of_gptq_decides_the_zero_points(named: dict[str, Any], folder: Path) -> None:
    is_first = None in named.values()
    expected = quantise(folder, "gptq" if is_first else "gptq, second format")
    weights, _ = read_stored(folder, folder, {"quant_method": "gptq", "bits": 4, **named})
    assert all(torch.equal(weights[name], one.float()) for name, one in expected.items())


def test_quantised_activations_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = quantise(folder, "compressed, 8 bits")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    _, rows = read_stored(folder, folder, settings)
    assert rows.matrices and not caplog.text
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    weights, rows = read_stored(folder, folder, settings)
    assert "input_activations of config.json: ignored, only the quantisation of weights" in (
        caplog.text
    )
    assert rows.matrices and all(torch.equal(weights[k], x.float()) for k, x in expected.items())


MATRIX = "model.layers.1.mlp.down_proj"
"""A matrix ``[64, 48]``."""
Change = Callable[[torch.Tensor], torch.Tensor]
FIT, INT32, FINITE = (
    " does not fit ",
    ", not int32 with two axes",
    " has values that are not finite",
)
DAMAGED: list[tuple[str, str, Change, str]] = [
    ("gptq", "qweight", lambda x: x[:-1], f"g_idx [48]{FIT}qweight [5, 64]"),
    ("gptq", "qweight", lambda x: x[:, :-1], f"scales [3, 64]{FIT}qweight [6, 63]"),
    ("gptq", "qweight", lambda x: x.flatten(), f"qweight is int32 [384]{INT32}"),
    ("gptq", "qweight", lambda x: x.long(), f"qweight is int64 [6, 64]{INT32}"),
    ("gptq", "qweight", lambda x: x.float(), f"qweight is float32 [6, 64]{INT32}"),
    ("gptq", "qzeros", lambda x: x[:-1], f"qzeros [2, 8]{FIT}scales [3, 64]"),
    ("gptq", "qzeros", lambda x: x[:, :-1], f"qzeros [3, 7]{FIT}scales [3, 64]"),
    ("gptq", "scales", lambda x: x[:-1], f"qzeros [3, 8]{FIT}scales [2, 64]"),
    ("gptq", "scales", lambda x: x * torch.nan, f"scales [3, 64]{FINITE}"),
    ("gptq", "scales", lambda x: x[:0], f"scales [0, 64]{FINITE}, or none"),
    ("gptq", "g_idx", lambda x: x + 1, "g_idx names groups 1 to 3; there are 0 to 2"),
    ("gptq", "g_idx", lambda x: x - 1, "g_idx names groups -1 to 1; there are 0 to 2"),
    ("gptq", "g_idx", lambda x: x[:-4], f"g_idx [44]{FIT}qweight [6, 64]"),
    ("awq", "scales", lambda x: x[:-1], f"qzeros [3, 8]{FIT}scales [2, 64]"),
    ("awq", "qweight", lambda x: x[:, :-1], f"scales [3, 64]{FIT}qweight [48, 7]"),
    ("awq", "qweight", lambda x: x[:-1], f"scales [3, 64]{FIT}qweight [47, 8]"),
    (
        "compressed",
        "weight_shape",
        lambda x: x * 2,
        f"weight_packed [64, 6]{FIT}weight_shape [128, 96]",
    ),
    (
        "compressed",
        "weight_shape",
        lambda x: x // 2,
        f"weight_packed [64, 6]{FIT}weight_shape [32, 24]",
    ),
    ("compressed", "weight_shape", lambda x: x[:1], f"weight_packed [64, 6]{FIT}weight_shape [64]"),
    (
        "compressed",
        "weight_scale",
        lambda x: x[:-1],
        f"weight_scale [63, 3]{FIT}weight_packed [64, 6]",
    ),
    (
        "compressed",
        "weight_zero_point",
        lambda x: x[:-1],
        f"weight_zero_point [7, 3]{FIT}weight_scale [64, 3]",
    ),
    (
        "compressed, 8 bits",
        "weight_scale",
        lambda x: x[:-1],
        f"weight_scale [63, 1]{FIT}weight [64, 48]",
    ),
    (
        "compressed, 8 bits",
        "weight_scale",
        lambda x: x.repeat(1, 5),
        f"weight_scale [64, 5]{FIT}weight [64, 48]",
    ),
]


@pytest.mark.parametrize(("kind", "part", "change", "message"), DAMAGED)
def test_tensors_that_do_not_fit_are_named_with_their_shapes(
    kind: str, part: str, change: Change, message: str, folder: Path
) -> None:
    quantise(folder, kind)
    weights = load_file(folder / "model.safetensors")
    weights[f"{MATRIX}.{part}"] = change(weights[f"{MATRIX}.{part}"]).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=re.escape(f"{folder}: {MATRIX}.{message}")) as told:
        from_pretrained(folder, exits=[1])
    assert "The checkpoint is damaged" in told.value.fix


def test_the_size_of_groups_is_that_of_the_configuration(folder: Path) -> None:
    """Scales and zero points may be cut alike."""
    quantise(folder, "awq")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings["group_size"] = GROUP
    assert read_stored(folder, folder, settings)[1].matrices
    weights = load_file(folder / "model.safetensors")
    for part in ("scales", "qzeros"):
        weights[f"{MATRIX}.{part}"] = weights[f"{MATRIX}.{part}"][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    expected = (
        rf"scales \[2, 64\] does not fit qweight \[48, 8\] with 4 bits and group_size {GROUP}"
    )
    with pytest.raises(ExportError, match=expected):
        read_stored(folder, folder, settings)


def test_zero_points_and_numbers_are_in_range(folder: Path) -> None:
    quantise(folder, "compressed, 8 bits")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    file = folder / "model.safetensors"
    whole = load_file(file)
    for value, fits in ((-3, True), (-3.0, True), (0.5, False), (200, False)):
        given = torch.full((64, 1), value, dtype=torch.float32 if type(value) is float else None)
        save_file({**whole, f"{MATRIX}.weight_zero_point": given}, file, {"format": "pt"})
        if fits:
            weights, _ = read_stored(folder, folder, settings)
            plain = (whole[f"{MATRIX}.weight"] + 3.0) * whole[f"{MATRIX}.weight_scale"]
            torch.testing.assert_close(weights[f"{MATRIX}.weight"], plain, rtol=1e-6, atol=0)
            continue
        with pytest.raises(ExportError, match="weight_zero_point has zero points that are not"):
            read_stored(folder, folder, settings)
    save_file(whole, file, {"format": "pt"})
    settings["config_groups"] = groups_of(4)
    with pytest.raises(ExportError, match="weight has numbers that need more than 4 bits"):
        read_stored(folder, folder, settings)


def test_a_tensor_that_is_missing_is_named(folder: Path) -> None:
    quantise(folder, "gptq")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.scales"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj has no tensor scales"):
        from_pretrained(folder, exits=[1])


def test_rows_are_found_wherever_they_went() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = StoredRows()
    whole = []
    for sym in (False, True):
        one = Rounded(torch.randn(12, 64, generator=generator), 4, 32, sym=sym)
        arrays = (one.numbers.numpy(), one.scales.numpy(), one.zero.numpy())
        whole.append(rows.add(Matrix(arrays[0].astype(np.uint8), *arrays[1:], 4).blocks()))
    joined = np.concatenate(whole)[np.random.default_rng(0).permutation(24)]
    found = rows.find(joined)
    assert found is not None and np.array_equal(found.floats(), joined)
    joined[3] += 1
    assert rows.find(joined) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_gguf_file_is_read(kind: str, tmp_path: Path) -> None:
    """Written by the package gguf; transformers orders the rows of queries and keys anew."""
    import gguf

    source = save_decoder("llama", tmp_path / "checkpoint")
    file = write_gguf(gguf, source, tmp_path / "model.gguf", kind)
    split: Any = from_pretrained(file, exits=[1, 2])
    weights = split.model.state_dict()
    for tensor in gguf.GGUFReader(str(file)).tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(weights["model.layers.0.mlp.up_proj.weight"].numpy(), theirs)
    bundle = export(split.split_model(), tmp_path / "bundle")
    found = [(bits, weight) for graph, bits, weight in products(bundle) if "segment" in graph]
    kept = {row.tobytes() for name, one in weights.items() if "layers" in name and one.ndim == 2
            for row in one.numpy()}  # fmt: skip
    stored = [(bits, weight) for bits, weight in found if weight.shape[1] == 64]
    assert stored and {bits for bits, _ in stored} == {4 if kind == "Q4_0" else 8}
    assert all(row.tobytes() in kept for _, weight in stored for row in weight)
    floats = [(bits, weight) for bits, weight in found if weight.shape[1] == 48]
    assert len(stored) + len(floats) == len(found)
    assert floats and {bits for bits, _ in floats} == {8}  # GGUF's blocks do not divide 48
    assert not any(row.tobytes() in kept for _, weight in floats for row in weight)
    with load(bundle) as model:
        assert check(model).passed


def write_gguf(gguf: Any, source: Path, file: Path, kind: str) -> Path:
    """A checkpoint of Llama as llama.cpp's converter writes it."""
    config = transformers.AutoConfig.from_pretrained(source)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    names = [*tokens] + [f"<{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_eos_token_id(0)
    own: Mapping[str, torch.Tensor] = load_file(source / "model.safetensors")
    places = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, weight in own.items():
        array = weight.float().numpy()
        if ".layers." in name:
            _, _, number, *rest, _ = name.split(".")
            place = places[".".join(rest)]
            target = f"blk.{number}.{place}.weight"
            if place in ("attn_q", "attn_k"):  # the halves that rotate stand side by side
                count = heads if place == "attn_q" else groups
                halves = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2)
                array = np.ascontiguousarray(halves.reshape(array.shape))
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight"}.get(
                name, "output_norm.weight"
            )
        if array.ndim == 2 and "blk" in target and array.shape[1] % 32 == 0:
            of = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, gguf.quants.quantize(array, of), raw_dtype=of)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
