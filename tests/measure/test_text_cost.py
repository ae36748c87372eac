"""What a text costs: memory follows from the manifest, times come from runs behind set lengths."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError, UsageError
from edgeexit.measure.inspect import axis_sizes
from edgeexit.measure.text_cost import text_cost
from edgeexit.measure.text_times import pasts_to_time
from edgeexit.runtime import load
from edgeexit.runtime.executor.blocks import even_chunk
from edgeexit.runtime.memory import available_bytes
from tests.decoder_toys import make_decoder_toy, write_decoder_toy


def cost(bundle: Bundle, capacity: int, **sizes: int) -> dict[str, Any]:
    return text_cost(bundle, capacity, axis_sizes(bundle, sizes))


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    """The bundle with other fields in its manifest."""
    return dataclasses.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, **fields))


@pytest.mark.parametrize("rows", [1, 3])
def test_memory_is_what_a_session_allocates(
    decoder_bundle: Callable[[str], Bundle], rows: int
) -> None:
    bundle = decoder_bundle("llama")
    memory = cost(bundle, 64, batch=rows)["memory"]
    with load(bundle, capacity=64) as model:
        session = model.session(rows)
        per_token = sum(part.states.token_bytes for part in session.parts)
        assert memory["state_bytes_per_token"] == per_token == 1024
        assert memory["states_bytes"] == per_token * 64 * rows
        chunk = memory["chunk_tokens"]
        assert chunk == even_chunk(63, session.chunk)
        bound = [
            session.bindings.bound(name, {"batch": rows, "new": chunk})
            for name in [*session.boundaries, *session.token_scores.tensors]
        ]
        hidden = {
            id(slot): math.prod(shape) * dtype.itemsize for slot, dtype, shape in bound
        }  # tensors that share memory count once
        assert memory["hidden_states_bytes"] == sum(hidden.values())
        logits = session.head(len(session.parts) - 1, logits=True)(
            session.boundary(len(session.parts), 1)[:, 0]
        )["logits"]
        assert memory["logits_bytes"] == logits.nbytes
    assert memory["prompt_states_bytes"] == 0


def test_a_long_prompt_is_told_from_three_of_its_runs(tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(capacity=2000), tmp_path / "bundle")
    found = cost(bundle, 2000, batch=2)
    time = found["time"]
    assert found["no_time"] is None and time["no_prefill"] is None
    assert (time["prompt_tokens"], time["prompt_runs"]) == (1999, 6)
    chunk = found["memory"]["chunk_tokens"]
    assert [(one["past_tokens"], one["new_tokens"]) for one in time["measured"]] == [
        (0, chunk),
        (2 * chunk, chunk),
        (1999 - chunk, chunk),
    ]
    assert [step["past_tokens"] for step in time["steps"]] == [1, 1999]
    all_ms = [time["prefill_ms"], *(one["ms"] for one in time["measured"] + time["steps"])]
    assert all(math.isfinite(ms) and ms > 0 for ms in all_ms)
    assert time["engine"]["engine"] == "cpu" and time["engine_bytes"] >= 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("capacity", [2, 3, 64])
def test_texts_of_any_length_are_told(
    decoder_bundle: Callable[[str], Bundle], family: str, capacity: int
) -> None:
    """Also where the prompt is one token."""
    time = cost(decoder_bundle(family), capacity)["time"]
    assert time["prompt_tokens"] == capacity - 1 and time["prefill_ms"] > 0
    assert [step["past_tokens"] for step in time["steps"]] == sorted({1, capacity - 1})


@given(prompt=st.integers(1, 20_000), most=st.integers(1, 500))
def test_timed_runs_are_whole_and_within_the_prompt(prompt: int, most: int) -> None:
    chunk = even_chunk(prompt, most)
    pasts = pasts_to_time(prompt, chunk)
    assert pasts[0] == 0 and pasts[-1] == prompt - chunk and len(pasts) <= 3
    assert pasts == sorted(set(pasts))


@pytest.mark.parametrize(
    "options",
    [
        {"gate": True, "prefix": True},
        {"stateless": True},
        {"stateless": True, "own_mean": True, "layers": (1, 3), "exits": (0,)},
        {"adapter": 1},
    ],
    ids=str,
)
def test_texts_of_every_kind_of_program_are_told(tmp_path: Path, options: dict[str, Any]) -> None:
    bundle = write_decoder_toy(make_decoder_toy(**options), tmp_path / "bundle")
    found = cost(bundle, 48, batch=2)
    assert found["time"]["prefill_ms"] > 0 and found["memory"]["chunk_tokens"] == 47


def test_a_long_prompt_is_not_run_when_it_is_read_in_one_run(tmp_path: Path) -> None:
    toy = make_decoder_toy(stateless=True, capacity=600)
    found = cost(write_decoder_toy(toy, tmp_path / "bundle"), 600)
    assert found["memory"]["chunk_tokens"] == 599
    time = found["time"]
    assert time["prefill_ms"] is None and "in one run" in time["no_prefill"]
    assert len(time["steps"]) == 2 and time["measured"] == []


@pytest.mark.parametrize("source", [3, 8])
def test_steps_are_told_when_an_encoder_reads_the_prompt(tmp_path: Path, source: int) -> None:
    bundle = write_decoder_toy(make_decoder_toy(encoder=True), tmp_path / "bundle")
    found = cost(bundle, 48, source=source)
    time = found["time"]
    assert time["prefill_ms"] is None and "encoder" in time["no_prefill"]
    assert all(step["ms"] > 0 for step in time["steps"])
    once = found["memory"]["prompt_states_bytes"]
    assert once > 0 and once == source * cost(bundle, 48, source=1)["memory"]["prompt_states_bytes"]


def test_time_is_not_told_when_the_size_of_an_axis_is_unknown(tmp_path: Path) -> None:
    bundle = write_decoder_toy(make_decoder_toy(encoder=True), tmp_path / "bundle")
    found = text_cost(bundle, 48, {"batch": 1})
    assert found["memory"]["prompt_states_bytes"] is None
    assert found["time"] is None and "--axis source=100" in found["no_time"]


def test_steps_of_speech_are_told(speech_bundle: Bundle) -> None:
    found = cost(speech_bundle, 16)
    assert found["memory"]["prompt_states_bytes"] > 0
    assert all(step["ms"] > 0 for step in found["time"]["steps"])


def test_memory_is_told_without_an_engine(
    decoder_bundle: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    found = cost(decoder_bundle("llama"), 64)
    assert found["memory"]["states_bytes"] == 64 * 1024
    assert found["time"] is None and 'pip install "edgeexit[cpu]"' in found["no_time"]


def test_memory_is_told_when_the_engine_has_no_form_of_the_model(
    decoder_bundle: Callable[[str], Bundle],
) -> None:
    bundle = decoder_bundle("llama")
    components = {
        name: msgspec.structs.replace(
            component,
            variants=[
                msgspec.structs.replace(variant, requires=["unheard-of"])
                for variant in component.variants
            ],
        )
        for name, component in bundle.manifest.components.items()
    }
    found = cost(changed(bundle, components=components), 64)
    assert found["memory"]["states_bytes"] == 64 * 1024
    assert found["time"] is None and "no form for this engine" in found["no_time"]


def test_a_text_that_memory_does_not_hold_is_not_timed(
    decoder_bundle: Callable[[str], Bundle],
) -> None:
    bundle = changed(decoder_bundle("llama"), limits={})
    tokens = available_bytes() // 1024 * 2
    found = cost(bundle, tokens)
    assert found["memory"]["states_bytes"] == tokens * 1024
    assert found["time"] is None and "bytes free" in found["no_time"]


@pytest.mark.parametrize("capacity", [-1, 0, 1, 49])
def test_a_capacity_out_of_range_is_refused(tmp_path: Path, capacity: int) -> None:
    bundle = write_decoder_toy(make_decoder_toy(), tmp_path / "bundle")
    with pytest.raises(UsageError, match=rf"capacity {capacity} is out of range \(2 to 48\)"):
        cost(bundle, capacity)


def test_a_bundle_that_does_not_write_text_is_refused(toy_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="does not write text") as refused:
        cost(toy_bundle, 64)
    assert "--capacity" in refused.value.fix


def test_more_rows_than_the_bundle_takes_are_refused(
    decoder_bundle: Callable[[str], Bundle],
) -> None:
    bundle = changed(decoder_bundle("llama"), limits={"batch": 1})
    with pytest.raises(InputError, match="at most 1 rows at a time, not 4") as refused:
        cost(bundle, 64, batch=4)
    assert "--axis batch=1" in refused.value.fix
