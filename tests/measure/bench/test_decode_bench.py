"""Bench of decoders: what is compared, and prompts that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import DataError, MeasurementError, UsageError
from edgeexit.measure.bench.decode_bench import (
    Writer,
    bench_decoder,
    compare,
    differences,
    read_prompts,
    summary,
)
from edgeexit.runtime import Policy, write_policy
from tests.decoders import VOCABULARY

Bundles = Callable[[str], Bundle]


def writer(*records: dict[str, Any]) -> Writer:
    """A writer that has written already, each time to another prompt."""
    numbered = [{"prompt": number} | one for number, one in enumerate(records)]
    return Writer("one", None, "case", numbered)  # type: ignore[arg-type]


def record(first_token_s: float, decode_s: float, tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"first_token_s": first_token_s, "decode_s": decode_s, "tokens": tokens} | more


def test_comparing_gives_speed_above_one_for_the_faster() -> None:
    fast = writer(record(0.1, 1.0, [1] * 11), record(0.2, 2.0, [1] * 11))
    slow = writer(record(0.3, 2.0, [1] * 11), record(0.4, 2.0, [1] * 11))
    found = compare(fast, slow)
    assert found["decode"] == pytest.approx(1.5)  # the median of 2 and 1
    assert found["decode_total"] == pytest.approx((20 / 3) / (20 / 4), abs=1e-4)
    assert found["prefill"] == pytest.approx(2.5)
    assert compare(slow, fast)["decode"] == pytest.approx(0.75)


def test_texts_that_ended_at_once_count_for_nothing_and_are_not_all_there_may_be() -> None:
    long, ended = record(0.1, 1.0, [1] * 11), record(0.1, 1e-9, [1])
    assert compare(writer(ended, long), writer(long, long))["decode"] == pytest.approx(1.0)
    assert compare(writer(record(0.1, 0.0, []), long), writer(ended, long))["decode_total"] == 1.0
    with pytest.raises(MeasurementError, match="no text got longer"):
        compare(writer(ended, ended), writer(long, long))
    with pytest.raises(MeasurementError, match="in no turn"):
        compare(writer(ended, long), writer(long, ended))


def test_of_several_turns_on_a_prompt_the_usual_one_counts() -> None:
    first, other = {"prompt": 0}, {"prompt": 1}
    found = writer(
        record(0.1, 1.0, [1] * 11, **first),
        record(0.1, 9.0, [1] * 11, **first),
        record(0.1, 2.0, [1] * 11, **first),
        record(0.1, 3.0, [1] * 21, **other),
        record(0.1, 4.0, [1] * 21, **other),
    )
    assert [one["decode_s"] for one in found.usual()] == [2.0, 3.0]
    assert found.total_tokens_per_s() == pytest.approx(30 / 5)


def test_differences_count_texts_that_are_not_equal() -> None:
    ours = writer(record(1, 1, [1, 2]), record(1, 1, [1, 3]), record(1, 1, [4]))
    theirs = writer(record(1, 1, [1, 2]), record(1, 1, [1, 2]), record(1, 1, [4, 5]))
    assert differences(ours, theirs) == 2


def test_a_summary_adds_up_what_the_turns_counted() -> None:
    counted = {"exits": {"a": 3, "b": 1}, "drafted": 4, "accepted": 3, "tested": 4, "catch_ups": 1}
    made = writer(
        record(1, 1.0, [1] * 4, **counted, audited=4, agreed=3),
        record(1, 3.0, [1] * 4, **counted, audited=0, agreed=0),
    )
    found = summary(made)
    assert found["exits"] == {"a": 6, "b": 2}
    assert found["tokens_per_s"] == pytest.approx(1.5)
    assert found["accepted_of_drafted"] == 0.75 and found["agreement"] == 0.75
    assert found["agreement_of_all_tokens"] == pytest.approx(7 / 8)


def test_bench_compares_every_mode_with_unsplit(decoder_bundle: Bundles, tmp_path: Path) -> None:
    bundle = decoder_bundle("llama")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x):"}\n\n{"tokens": [5, 6, 7]}\n')
    policy = tmp_path / "policy.json"
    write_policy(Policy(thresholds=0.5), policy)
    found = bench_decoder(
        bundle,
        data=str(prompts),
        policy=policy,
        new_tokens=6,
        seconds=0.01,
        threads="blocking",
    )
    assert set(found["modes"]) == {"full", "exact", "fast"}
    assert found["data"] == {"name": "prompts.jsonl", "prompts": 2, "tokens": [3, 9]}
    assert found["turns"] == 5 and found["unsplit"]["tokens"] <= 5 * 6
    assert found["modes"]["full"]["tokens"] == found["unsplit"]["tokens"]
    assert found["modes"]["exact"]["turns_with_other_tokens_than_full"] == 0
    assert sum(found["modes"]["fast"]["exits"].values()) >= found["modes"]["fast"]["tokens"]
    assert found["split_tax"] == pytest.approx(
        1 / found["modes"]["full"]["against_unsplit"]["decode"], abs=2e-4
    )


def test_bench_without_prompts_takes_random_ones_and_full_depth(decoder_bundle: Bundles) -> None:
    found = bench_decoder(
        decoder_bundle("llama"), prompt_tokens=5, new_tokens=4, seconds=0.01, threads=1
    )
    assert set(found["modes"]) == {"full"}
    assert found["data"]["tokens"] == [5, 5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no prompts"),
        ("prompt\n", "line 1"),
        ('{"prompt": "a"}\n{"words": "b"}\n', "line 2"),
        ('{"tokens": [1, "x"]}\n', "line 1"),
        ('{"tokens": []}\n', "prompt 1 is empty"),
        (f'{{"tokens": [{VOCABULARY}]}}\n', "no token id"),
        ('{"prompt": 5}\n', "prompt 1"),
    ],
)
def test_prompts_that_cannot_be_used_name_file_and_line(
    decoder_bundle: Bundles, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(str(path), decoder_bundle("llama"))


def test_prompts_longer_than_the_model_are_refused(decoder_bundle: Bundles) -> None:
    with pytest.raises(MeasurementError, match="made for"):
        bench_decoder(decoder_bundle("llama"), prompt_tokens=90, new_tokens=64, threads=1)
    with pytest.raises(UsageError, match="--time"):
        bench_decoder(decoder_bundle("llama"), seconds=0, threads=1)
