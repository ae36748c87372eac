"""Decoders into bundles: adapters equal to transformers, forms equal to each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgeexit.bundle.manifest import Call, Component, TokenState
from edgeexit.bundle.onnx_wire import fix_axes
from edgeexit.bundle.reader import MANIFEST, Bundle, open_bundle
from edgeexit.errors import BundleError, EdgeExitError, ExportError, UsageError
from edgeexit.export import SplitModel, export
from edgeexit.export.exits.decoder import POSITIONS, ExitDecoder
from edgeexit.export.exits.origins import note_origins
from edgeexit.export.pretrained import from_pretrained
from edgeexit.export.trace.attention import Heads, forms
from edgeexit.export.trace.component_graphs import graph_of_form
from edgeexit.export.trace.half import to_half
from tests.decoders import (
    ADAPTERS,
    EXITS,
    FAMILIES,
    LAYERS,
    VOCABULARY,
    Reference,
    make_adapted,
    make_decoder,
    save_decoder,
)

Families = Callable[[str], Path]


def segments(bundle: Bundle) -> list[Component]:
    chain = bundle.manifest.chains["main"]
    return [bundle.manifest.components[name] for name in chain.components]


def states(component: Component) -> list[TokenState]:
    return [state for state in component.states if isinstance(state, TokenState)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_computes_what_transformers_does(family: str, decoder_folder: Families) -> None:
    decoder = from_pretrained(decoder_folder(family), exits=EXITS)
    assert isinstance(decoder, ExitDecoder)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = make_decoder(family)(ids).logits
        found = decoder(ids)
    assert sorted(found) == [*EXITS, LAYERS]
    torch.testing.assert_close(found[LAYERS], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_stored_once(
    family: str, decoder_folder: Families, decoder_bundle: Callable[[str], Bundle]
) -> None:
    decoder = from_pretrained(decoder_folder(family), exits=EXITS)
    bundle = decoder_bundle(family)
    rotary = 2 * 96 * 8 * 4  # the tables of sines and cosines are constants of the graphs
    parameters = 4 * sum(p.numel() for p in decoder.model.parameters())
    assert bundle.weights_bytes <= parameters + rotary + 4096 * (LAYERS * 4 + 8)
    opened = open_bundle(bundle.path, verify="full")
    exits = [exit_.name for exit_ in opened.manifest.chains["main"].exits]
    assert exits == ["exit_1", "exit_2", f"exit_{LAYERS}"]
    assert opened.manifest.tokenizer is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_form_takes_caches_of_any_length(
    family: str, decoder_bundle: Callable[[str], Bundle]
) -> None:
    """Tokens in two runs, rows with caches of unlike length, give what one run gives."""
    bundle = decoder_bundle(family)
    segment = segments(bundle)[0]
    own = states(segment)
    session = ort.InferenceSession(str(bundle.file(segment.variants[-1].graph)))
    rng = np.random.default_rng(0)
    width = segment.inputs[0].axes[-1]
    state = rng.normal(size=(2, 7, width)).astype(np.float32)  # type: ignore[arg-type]
    capacity = 12
    shape = (2, own[0].axes[1], capacity, own[0].axes[3])
    empty = {one.past: np.full(shape, 7.0, np.float32) for one in own}

    def run(x: np.ndarray, past: dict[str, np.ndarray], lengths: list[int]) -> list[np.ndarray]:
        places = np.array(lengths)[:, None] + np.arange(x.shape[1])
        feeds = {segment.inputs[0].name: x, "positions": places, **past}
        return session.run(None, feeds | {"lengths/past": np.array(lengths)})

    whole = run(state, empty, [0, 0])
    first = run(state[:, :4], empty, [0, 0])
    kept = {name: value.copy() for name, value in empty.items()}
    for one, made in zip(own, first[len(segment.outputs) :], strict=True):
        kept[one.past][:, :, :4] = made
    # Row 1 forgets its last token: it goes on from three, with the fourth token again.
    shifted = np.stack([state[0, 4:7], state[1, 3:6]])
    second = run(shifted, kept, [4, 3])
    np.testing.assert_allclose(second[0][0], whole[0][0, 4:7], atol=1e-4)
    np.testing.assert_allclose(second[0][1], whole[0][1, 3:6], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fixed_form_may_write_into_the_cache_it_reads(
    family: str, decoder_bundle: Callable[[str], Bundle]
) -> None:
    """One buffer as past and present gives, to the bit, what two buffers give, and what the plain
    form gives but for rounding: several new tokens behind pasts of unlike length, and whatever lay
    beyond them."""
    bundle = decoder_bundle(family)
    segment = segments(bundle)[-1]
    own = states(segment)
    fixed, plain = (
        next(one for one in segment.variants if one.states == form) for form in ("fixed", "append")
    )
    opened = ort.InferenceSession(str(bundle.file(fixed.graph)))
    other = ort.InferenceSession(str(bundle.file(plain.graph)))
    rng = np.random.default_rng(0)
    _, heads, _, size = own[0].axes
    width = segment.inputs[0].axes[-1]
    assert isinstance(width, int) and isinstance(heads, int) and isinstance(size, int)
    for rows, new, capacity, lengths in [
        (1, 1, 9, [8]),
        (1, 4, 9, [0]),
        (3, 1, 40, [0, 39, 17]),
        (3, 5, 40, [0, 35, 17]),
        (2, 12, 12, [0, 0]),
    ]:
        filled = np.array(lengths)
        feeds = {
            segment.inputs[0].name: rng.normal(size=(rows, new, width)).astype(np.float32),
            "positions": filled[:, None] + np.arange(new),
            "lengths/past": filled,
        }
        shape = (rows, heads, capacity, size)
        past = {s.past: rng.normal(size=shape).astype(np.float32) for s in own}
        kept = {name: value.copy() for name, value in past.items()}
        expected = opened.run(None, feeds | past)
        for name, value in past.items():
            np.testing.assert_array_equal(value, kept[name])
        binding = opened.io_binding()
        made = np.empty_like(expected[0])
        state = opened.get_outputs()[0].name
        for name, value in (feeds | past).items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for one in own:
            value = past[one.past]
            binding.bind_output(one.present, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        binding.bind_output(state, "cpu", 0, made.dtype, made.shape, made.ctypes.data)
        opened.run_with_iobinding(binding)
        np.testing.assert_array_equal(made, expected[0])
        for one, present in zip(own, expected[len(segment.outputs) :], strict=True):
            np.testing.assert_array_equal(past[one.past], present)
        appended = other.run(None, feeds | kept)
        np.testing.assert_allclose(appended[0], made, atol=1e-4)
        for one, rest in zip(own, appended[len(segment.outputs) :], strict=True):
            right = kept[one.past]
            for row, length in enumerate(lengths):
                right[row, :, length : length + new] = rest[row]
            np.testing.assert_allclose(past[one.past], right, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fixed_form_is_of_standard_operators_and_the_others_stay_at_opset_20(
    family: str, decoder_bundle: Callable[[str], Bundle]
) -> None:
    manifest = decoder_bundle(family).manifest
    names = ["unsplit", *manifest.chains["main"].components]
    for variants in [manifest.components[name].variants for name in names]:
        assert [one.states for one in variants] == ["in-place", "fixed", "append"]
        for one in variants:
            path = decoder_bundle(family).file(one.graph)
            model = onnx.load(path, load_external_data=False)
            opsets = {entry.domain: entry.version for entry in model.opset_import}
            domains = {node.domain for node in model.graph.node}
            assert model.ir_version == 10
            assert opsets[""] == (24 if one.states == "fixed" else 20)
            assert domains == ({"", "com.microsoft"} if one.states == "in-place" else {""})
            named = {a.dim_param for v in model.graph.input for a in v.type.tensor_type.shape.dim}
            assert {"batch", "new", "past"} <= named
        onnx.checker.check_model(str(decoder_bundle(family).file(variants[1].graph)))


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntimes_own_form_has_its_own_norms_and_one_matrix_before_attention(
    family: str, decoder_bundle: Callable[[str], Bundle]
) -> None:
    bundle = decoder_bundle(family)
    path = bundle.file(bundle.manifest.components["unsplit"].variants[0].graph)
    nodes = onnx.load(path, load_external_data=False).graph.node
    makes = {name: node for node in nodes for name in node.output}
    kinds = Counter(node.op_type for node in nodes)
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert len(attention) == LAYERS
    packed = [node.input[0] for node in attention if not node.input[1] and not node.input[2]]
    before = [makes[name].op_type for name in packed]
    if family == "opt":  # LayerNorm is an operator of ONNX, and its products have a bias
        assert kinds["LayerNormalization"] == 2 * LAYERS + 1
        assert before == ["Add"] * LAYERS
        return
    assert not {"Pow", "ReduceMean", "Sqrt", "Reciprocal"} & set(kinds)
    assert kinds["SkipSimplifiedLayerNormalization"] == 2 * LAYERS - 1
    own = 2 * LAYERS if family == "qwen3" else 0  # of queries and of keys
    assert kinds["SimplifiedLayerNormalization"] == 2 + own
    assert before == (["MatMul"] * LAYERS if family == "llama" else [])  # qwen3 has norms between


@pytest.mark.parametrize("size, expected", [(8, 1), (24, 2), (20, 1), (64, 3), (256, 3), (512, 2)])
def test_heads_have_the_forms_whose_operators_take_their_size(size: int, expected: int) -> None:
    assert len(forms(Heads(queries=2, keys=1, size=size))) == expected
    assert forms(Heads(queries=2, keys=1, size=size))[-1].requires == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tensorrt_builds_the_fixed_form_once_its_capacity_is_a_number(
    family: str, dtype: str, decoder_folder: Families
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = from_pretrained(decoder_folder(family), exits=[2]).split_model()
    segment = to_half(model, getattr(torch, dtype)).component("segment_0")
    form = next(one for one in segment.forms if one.states == "fixed")
    assert set(form.requires) == {"opset-24", "cache-update"}
    raw = ir.to_proto(graph_of_form(segment, form)).SerializeToString()
    assert _tensorrt_plan(trt, raw) is None, "an open capacity is not refused any more"
    assert _tensorrt_plan(trt, fix_axes(raw, {"past": 64})) is not None


def _tensorrt_plan(trt: Any, raw: bytes) -> Any:
    """A plan for two desktop GPUs, made without one; None where the parser or builder refuses."""
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(raw):
        return None
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    sizes = {"batch": (1, 1, 4), "new": (1, 1, 32)}
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        axes = [(tensor.get_dimension_name(n), size) for n, size in enumerate(tensor.shape)]
        shapes = [
            [sizes[name][at] if name in sizes else size for name, size in axes] for at in range(3)
        ]
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 2
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.set_compute_capability(trt.ComputeCapability.SM89, 1)
    return builder.build_serialized_network(network, config)


def test_a_decoder_without_exits_says_how_to_name_them(decoder_folder: Families) -> None:
    with pytest.raises(EdgeExitError, match="where its exits are.*1 to 3, as in 1,2"):
        from_pretrained(decoder_folder("llama"))


@pytest.mark.parametrize("exits", [[0], [LAYERS + 1], [2, 1], [1, 1]])
def test_layers_that_cannot_have_an_exit_are_refused(
    decoder_folder: Families, exits: list[int]
) -> None:
    with pytest.raises(EdgeExitError, match="exits"):
        from_pretrained(decoder_folder("llama"), exits=exits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_answers_through_its_adapter(family: str) -> None:
    decoder = make_adapted(family)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = decoder(ids)
    reference = Reference.of(make_adapted(family))
    for layer in [*EXITS, LAYERS]:
        expected = np.stack([reference.logits(row, layer) for row in ids.tolist()])
        np.testing.assert_allclose(found[layer].numpy(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_as_deep_as_the_rest_answers_as_the_model(family: str) -> None:
    """It is a copy of the last layers; with all of them the exit is the model itself."""
    decoder = make_adapted(family, noise=0.0)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = decoder(ids)
    torch.testing.assert_close(found[2], found[LAYERS])


def test_adapters_are_saved_and_read_back(tmp_path: Path) -> None:
    save_decoder("llama", tmp_path)
    made = make_adapted("llama")
    note_origins(made, dict.fromkeys(made.adapters, "trained"))
    made.save_pretrained(tmp_path)
    read = from_pretrained(tmp_path)
    assert isinstance(read, ExitDecoder)
    assert read.exit_layers == EXITS and read.adapter_sizes == ADAPTERS
    assert read.provenance["adapters"] == "trained"
    for name, weight in made.adapters.state_dict().items():
        assert torch.equal(weight, read.adapters.state_dict()[name])
    fewer = from_pretrained(tmp_path, exits=[2, 3])
    assert isinstance(fewer, ExitDecoder)
    assert fewer.adapter_sizes == {2: 2} and fewer.provenance["adapters"] == "trained"
    without = from_pretrained(tmp_path, adapters=[])
    assert isinstance(without, ExitDecoder)
    assert not without.adapter_sizes and "adapters" not in without.provenance


def test_an_adapter_that_is_not_there_is_made_when_untrained_ones_are_wanted(
    tmp_path: Path,
) -> None:
    make_adapted("llama").save_pretrained(tmp_path)
    for wanted, message in (([3], r"no adapter of 1 layer\(s\) .* layer 3"), ({2: 1}, "layer 2")):
        with pytest.raises(UsageError, match=message):
            from_pretrained(tmp_path, exits=[2, 3], adapters=wanted)  # type: ignore[arg-type]
    mixed = from_pretrained(tmp_path, exits=[2, 3], adapters={2: 2, 3: 1}, untrained=True)
    assert isinstance(mixed, ExitDecoder)
    assert mixed.provenance["adapters"] == "untrained"
    saved = make_adapted("llama").adapters.state_dict()
    own = mixed.adapters.state_dict()
    held = [name for name in saved if name.startswith("exit_2")]
    assert held and all(torch.equal(saved[name], own[name]) for name in held)
    last = mixed.layers[-1].state_dict()
    new = {k.removeprefix("exit_3.0."): v for k, v in own.items() if k.startswith("exit_3")}
    assert new.keys() == last.keys() and all(torch.equal(new[name], last[name]) for name in last)


@pytest.mark.parametrize(
    "adapters, message",
    [
        ([3], "no early exit behind layer 3"),
        ([LAYERS], f"no early exit behind layer {LAYERS}"),
        ({2: 0}, "0 layers"),
        ({2: LAYERS + 1}, f"{LAYERS + 1} layers"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    decoder_folder: Families, adapters: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        from_pretrained(decoder_folder("llama"), exits=EXITS, adapters=adapters, untrained=True)


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    make_adapted("llama").save_pretrained(tmp_path)
    weights = tmp_path / "exits.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match=r"exits\.safetensors is incomplete"):
        from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ExportError, match=r"exits\.safetensors: does not fit the model"):
        from_pretrained(tmp_path)
    config = tmp_path / "edgeexit.json"
    config.write_text('{"format": 1, "exits": [1, 2], "adapters": {"1": 0}}')
    with pytest.raises(ExportError, match=r"edgeexit\.json: cannot be read"):
        from_pretrained(tmp_path)


def test_a_bundle_with_adapters_stores_the_projection_once(
    adapted_bundle: Callable[[str], Bundle],
) -> None:
    decoder = make_adapted("llama")
    bundle = adapted_bundle("llama")
    rotary = 2 * 96 * 8 * 4  # the tables of sines and cosines are constants of the graphs
    parameters = 4 * sum(p.numel() for p in decoder.parameters())
    assert bundle.weights_bytes <= parameters + rotary + 4096 * ((LAYERS + 3) * 6 + 8)
    manifest = open_bundle(bundle.path, verify="full").manifest
    paths = [[call.component for call in e.path] for e in manifest.chains["main"].exits]
    assert paths == [["adapter_1", "head"], ["adapter_2", "head"], ["head"]]
    adapters = [manifest.components[f"adapter_{n}"] for n in ADAPTERS]
    assert [len(one.states) for one in adapters] == [2, 4]
    for one in adapters:
        assert [v.states for v in one.variants] == ["in-place", "fixed", "append"]


def _paths(raw: Any) -> list[Any]:
    return [exit_["path"] for exit_ in raw["chains"]["main"]["exits"]]


def _unknown(raw: Any) -> None:
    _paths(raw)[0][0]["component"] = "adapter_9"


def _of_another(raw: Any) -> None:
    first, second, _ = _paths(raw)
    first[0], second[0] = second[0], first[0]


def _headless(raw: Any) -> None:
    del _paths(raw)[0][1]


def _at_the_end(raw: Any) -> None:
    first, _, last = _paths(raw)
    last[:] = [{"component": "adapter_1", "inputs": {"state_1": "state_4"}}, first[1]]


def _of_another_width(raw: Any) -> None:
    raw["components"]["adapter_1"]["outputs"][0]["axes"][-1] = 32


@pytest.mark.parametrize(
    "change, message",
    [
        (_unknown, "there is no component adapter_9"),
        (_of_another, "exit_1, adapter_2 takes state_2"),
        (_headless, "exit_1 names logits, which is not an output of adapter_1"),
        (_at_the_end, "the last exit, exit_4, has an adapter"),
        (_of_another_width, "head takes state .* but adapted_1 float32"),
    ],
)
def test_a_manifest_whose_adapters_do_not_fit_is_refused(
    adapted_bundle: Callable[[str], Bundle],
    tmp_path: Path,
    change: Callable[[Any], None],
    message: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapted_bundle("llama").path, copy)
    (copy / MANIFEST).chmod(0o644)
    raw = json.loads((copy / MANIFEST).read_text())
    change(raw)
    (copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def _adapted_at_the_end(model: SplitModel) -> SplitModel:
    chain = model.chains["main"]
    last = msgspec.structs.replace(chain.exits[-1], path=chain.exits[0].path)
    return _with(model, exits=[*chain.exits[:-1], last])


def _one_name_for_two(model: SplitModel) -> SplitModel:
    return dataclasses.replace(model, components=[*model.components, model.component("adapter_1")])


def _nowhere(model: SplitModel) -> SplitModel:
    chain = model.chains["main"]
    lost = msgspec.structs.replace(chain.exits[0], path=[Call(component="adapter_3")])
    return _with(model, exits=[lost, *chain.exits[1:]])


def _without_exits(model: SplitModel) -> SplitModel:
    return _with(model, exits=[])


def _open_end(model: SplitModel) -> SplitModel:
    return _with(model, exits=model.chains["main"].exits[:-1])


def _unmade(model: SplitModel) -> SplitModel:
    state = msgspec.structs.replace(model.component("segment_1").inputs[0], name="gone")
    changed = dataclasses.replace(model.component("segment_1"), inputs=(state, POSITIONS))
    others = [one for one in model.components if one.name != changed.name]
    return dataclasses.replace(model, components=[*others, changed])


def _of_an_unknown_axis(model: SplitModel) -> SplitModel:
    state = msgspec.structs.replace(model.component("adapter_1").outputs[0], axes=["rows", 64])
    changed = dataclasses.replace(model.component("adapter_1"), outputs=(state,))
    others = [one for one in model.components if one.name != changed.name]
    return dataclasses.replace(model, components=[*others, changed])


def _with(model: SplitModel, **changes: Any) -> SplitModel:
    chain = msgspec.structs.replace(model.chains["main"], **changes)
    return dataclasses.replace(model, chains={"main": chain})


@pytest.mark.parametrize(
    "change, message",
    [
        (_adapted_at_the_end, "the last exit, exit_4, has an adapter"),
        (_one_name_for_two, "two components named adapter_1"),
        (_nowhere, "there is no component adapter_3"),
        (_without_exits, "the model has no exits"),
        (_open_end, "chain main does not end with an exit"),
        (_unmade, "segment_1 takes gone, which nothing computes before"),
        (_of_an_unknown_axis, "adapted_1 has the axis 'rows', which no input"),
    ],
)
def test_a_contract_that_cannot_be_exported_is_refused(
    tmp_path: Path, change: Callable[[SplitModel], SplitModel], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(change(make_adapted("llama").split_model()), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
