"""Which engines a bundle needs, and for which shapes: by where components stand, not by what the
program is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeexit.bundle.manifest import (
    Call,
    Chain,
    Component,
    Decoding,
    Exit,
    Gather,
    Manifest,
    PromptState,
    Run,
    Tensor,
    TokenGroup,
    TokenState,
    Variant,
)
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import EngineError, UsageError
from edgeexit.runtime.build.profiles import Asked
from edgeexit.runtime.build.work_list import Work, work_of
from tests.toys import make_toy, write_toy

NOTHING = Asked({}, {}, {})
PLAIN: frozenset[str] = frozenset()
LIMIT, WIDTH = 64, 8


def tensor(name: str, *axes: str | int, dtype: str = "float32") -> Tensor:
    """A tensor of a component."""
    return Tensor(name=name, dtype=dtype, axes=list(axes))  # type: ignore[arg-type]


def component(
    name: str, inputs: list[Tensor], outputs: list[Tensor], **more: object
) -> dict[str, Component]:
    """A component with one variant, by its name."""
    lengths = more.pop("lengths", [])
    variant = Variant(graph=f"graphs/{name}.onnx", lengths=lengths)  # type: ignore[arg-type]
    return {name: Component(variants=[variant], inputs=inputs, outputs=outputs, **more)}  # type: ignore[arg-type]


def keys(name: str) -> TokenState:
    """Keys of a layer."""
    axes: list[str | int | None] = ["batch", 2, "past", 4]
    return TokenState(
        name=f"{name}/key", dtype="float32", axes=axes, past=f"{name}/past", present=f"{name}/new"
    )


MEMORY = tensor("memory", "batch", "source", WIDTH)
POSITIONS = tensor("positions", "batch", "new", dtype="int64")
EMBEDDED = tensor("embedded", "batch", "new", WIDTH)
CROSS = tensor("cross", "batch", 2, "source", 4)
SOURCE_IDS = tensor("source_ids", "batch", "source", dtype="int64")
ANSWERS = [tensor("token", "batch", dtype="int64"), tensor("logits", "batch", 30)]


def components() -> dict[str, Component]:
    """An encoder, a maker of cross keys, a decoder of two, an adapter, a head and a gate."""
    states = [tensor(f"h{n}", "batch", "new", WIDTH) for n in range(3)]
    mask = tensor("image_mask", "batch", "new", dtype="bool")
    reads = PromptState(tensor=CROSS, maker="cross_keys")
    return {
        **component("encoder", [SOURCE_IDS], [MEMORY]),
        **component("cross_keys", [MEMORY], [CROSS]),
        **component(
            "d0", [EMBEDDED, POSITIONS], [states[0]], states=[keys("d0"), reads], lengths=["past"],
            projections=[Variant(graph="graphs/d0_projection.onnx")],
        ),
        **component("d1", [states[0]], [states[1]], states=[reads]),
        **component(
            "adapter", [states[0], POSITIONS], [states[2]], states=[keys("adapter")],
            projections=[Variant(graph="graphs/adapter_projection.onnx")],
        ),
        **component("head", [tensor("state", "batch", WIDTH)], ANSWERS),
        **component(
            "unsplit_decoder", [EMBEDDED, POSITIONS], ANSWERS, states=[keys("unsplit"), reads]
        ),
        **component("gate", [states[0], mask], [tensor("p", "batch")], lengths=["prompt"]),
    }  # fmt: skip


def decoding_exits(*, gate: bool) -> list[Exit]:
    """An exit with an adapter, a gate at the same place, and the last exit."""
    outputs = {"token": "token", "logits": "logits"}
    path = [Call(component="adapter"), Call(component="head", inputs={"state": "h2"})]
    drop = Exit(
        name="gate", behind="d0", path=[Call(component="gate")], scores={"p": "p"}, action="drop",
        tokens="image",
    )  # fmt: skip
    last = [Call(component="head", inputs={"state": "h1"})]
    return [
        Exit(name="early", behind="d0", outputs=outputs, path=path),
        *([drop] if gate else []),
        Exit(name="last", behind="d1", outputs=outputs, path=last),
    ]


def seq2seq(*, gate: bool = False) -> Manifest:
    """An encoder, and a decoder whose second component has no states of its own."""
    encode = Chain(
        components=["encoder"],
        outputs=[MEMORY],
        exits=[Exit(name="only", behind="encoder", outputs={"memory": "memory"})],
    )
    decode = Chain(
        components=["d0", "d1"],
        outputs=ANSWERS,
        exits=decoding_exits(gate=gate),
        unsplit=["unsplit_decoder"],
    )
    return Manifest(
        format="2.0",
        name="seq2seq",
        task="summarization",
        inputs=[SOURCE_IDS, tensor("ids", "batch", "new", dtype="int64")],
        components=components(),
        chains={"encode": encode, "decode": decode},
        steps=[
            Run(chain="encode"),
            Gather(ids="ids", output=EMBEDDED, size=30, offset=0),
            Run(chain="decode", when="token"),
        ],
        decoding=Decoding(
            chain="decode",
            tokens="ids",
            positions=POSITIONS,
            start_tokens=[1],
            groups={"image": TokenGroup(token=9, mask="image_mask")} if gate else {},
        ),
        limits={"source": 48, "positions": LIMIT},
        files={},
    )


def works(manifest: Manifest, asked: Asked = NOTHING, **options: object) -> dict[str, Work]:
    """What `work_of` says, by name."""
    found = work_of(manifest, PLAIN, asked, {}, **options)  # type: ignore[arg-type]
    return {work.where: work for work in found}


def shapes(work: Work, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Per profile, the smallest and the largest shape of an input."""
    return [(profile[name][0], profile[name][2]) for profile in work.profiles]


def test_every_component_of_the_program_has_an_engine_and_the_unsplit_ones_come_last() -> None:
    order = [
        "encoder", "d0", "projection of d0", "d1", "adapter", "projection of adapter", "head",
        "cross_keys",
        "unsplit_decoder",
    ]  # fmt: skip
    assert list(works(seq2seq())) == order
    assert list(works(seq2seq(), unsplit=False)) == order[:-1]


def test_what_runs_once_per_request_takes_the_axes_of_the_inputs() -> None:
    [profile] = works(seq2seq())["encoder"].profiles
    assert profile == {"source_ids": ((1, 1), (1, 48), (8, 48))}


def test_what_runs_for_every_token_has_profiles_for_steps_and_prompts() -> None:
    found = works(seq2seq(), chunk=32)
    for name in ("d0", "unsplit_decoder"):
        work = found[name]
        assert shapes(work, "embedded") == [((1, 1, 8), (8, 16, 8)), ((1, 1, 8), (8, 32, 8))]
        assert shapes(work, "cross") == [((1, 2, 1, 4), (8, 2, 48, 4))] * 2
        assert work.largest == {"batch": 8, "new": 32, "past": LIMIT, "source": 48}
    assert shapes(found["d0"], "d0/past") == [((1, 2, 1, 4), (8, 2, LIMIT, 4))] * 2
    assert found["d0"].profiles[0]["lengths/past"] == ((1,), (1,), (8,))
    assert found["d0"].outputs == ("h0", "d0/new")
    assert shapes(found["adapter"], "positions") == [((1, 1), (8, 16)), ((1, 1), (8, 32))]


def test_a_component_without_token_states_has_no_past() -> None:
    work = works(seq2seq())["d1"]
    assert all(profile.keys() == {"h0", "cross"} for profile in work.profiles)
    assert work.largest == {"batch": 8, "new": LIMIT, "source": 48} and work.fixed == {}


def test_makers_take_the_axes_of_what_they_read() -> None:
    [profile] = works(seq2seq(), tunes=True)["cross_keys"].profiles
    assert profile == {"memory": ((1, 1, 8), (1, 48, 8), (8, 48, 8))}


def test_heads_take_states_of_drafts_and_of_all_rows() -> None:
    assert shapes(works(seq2seq())["head"], "state") == [((1, 8), (128, 8))]
    tuned = works(seq2seq(), tunes=True)["head"]
    assert shapes(tuned, "state") == [((1, 8), (2, 8)), ((3, 8), (128, 8))]


def test_projections_take_one_token_and_limit_no_other_engine() -> None:
    work = works(seq2seq(), tunes=True)["projection of d0"]
    [profile] = work.profiles
    assert profile["embedded"] == ((1, 1, 8), (1, 1, 8), (8, 1, 8))
    assert work.outputs == ("d0/new",) and work.largest == {"batch": 8}
    assert work.variant.graph == "graphs/d0_projection.onnx"


def test_projections_of_adapters_take_prompts() -> None:
    """Of a prompt's tokens, only the last one is asked."""
    [profile] = works(seq2seq(), tunes=True)["projection of adapter"].profiles
    assert profile["h0"][2][1] == profile["positions"][2][1] == 64
    assert profile["h0"][0] == (1, 1, 8)


def test_a_gate_over_prompts_makes_prompts_pass_in_one_run() -> None:
    found = works(seq2seq(gate=True), Asked({}, {}, {"batch": 2}, capacity=40), chunk=32)
    assert shapes(found["gate"], "image_mask") == [((1, 1), (2, 40))]
    assert found["gate"].profiles[0]["lengths/prompt"] == ((1,), (1,), (2,))
    assert shapes(found["d1"], "h0")[-1] == ((1, 1, 8), (2, 40, 8))
    shorter = works(seq2seq(gate=True), Asked({}, {}, {"new": 24}), chunk=32)
    assert shapes(shorter["gate"], "image_mask") == [((1, 1), (8, 24))]


def test_only_components_with_token_states_have_the_form_that_was_asked_for() -> None:
    with pytest.raises(EngineError, match=r"d0 has no form fixed .*append .needs nothing"):
        works(seq2seq(), form="fixed")
    assert works(seq2seq(), form="append")["d1"].variant.states == "append"


@pytest.mark.parametrize("asked, message", [
    (Asked({}, {}, {}, capacity=LIMIT + 1), r"--capacity 65 is out of range \(2 to 64\)"),
    (Asked({}, {}, {"new": 50}, capacity=40), "50 new tokens exceed the capacity of 40"),
    (Asked({}, {"new": 8}, {}), "ids:4x1"),
    (Asked({"new": 2}, {}, {}), "ids:4x1"),
    (Asked({}, {}, {"source": 49}), "source is 49, the model takes at most 48"),
    (Asked({"batch": 9}, {}, {"batch": 3}), "not in order"),
])  # fmt: skip
def test_sizes_out_of_range_are_refused(asked: Asked, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        works(seq2seq(), asked)


def test_states_of_open_sizes_are_refused(tmp_path: Path) -> None:
    bundle = write_toy(make_toy(open_axes=True), tmp_path / "open")
    with pytest.raises(UsageError, match=r"s1: the bundle gives no limit for the axis \?"):
        work_of(bundle.manifest, PLAIN, NOTHING, {})


def test_an_exported_decoder_in_float32_has_no_form_with_fixed_states(
    decoder_bundle: Callable[[str], Bundle],
) -> None:
    manifest = decoder_bundle("llama").manifest
    with pytest.raises(EngineError, match=r"no form fixed that this TensorRT can build: .*append"):
        work_of(manifest, PLAIN, NOTHING, {}, form="fixed")
