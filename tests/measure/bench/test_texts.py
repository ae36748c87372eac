"""Figures of texts: what is compared between writers that took turns."""

from __future__ import annotations

from typing import Any

import pytest

from edgeexit.errors import MeasurementError
from edgeexit.measure.bench.texts import (
    Writer,
    compare,
    differences,
    few_prompts,
    summary,
    time_against,
)


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


def test_time_below_one_is_faster() -> None:
    fast = writer(record(0.1, 1.0, [1] * 11))
    slow = writer(record(0.4, 2.0, [1] * 11))
    found = time_against(fast, slow)
    assert found["decode"] == 0.5 and found["prefill"] == 0.25 and found["decode_total"] == 0.5


def test_few_prompts_are_told() -> None:
    assert few_prompts(5) == []
    assert "are of 1 prompt only" in few_prompts(1)[0]


def test_texts_that_ended_at_once_count_for_nothing_and_are_not_all_there_may_be() -> None:
    long, ended = record(0.1, 1.0, [1] * 11), record(0.1, 1e-9, [1])
    assert compare(writer(ended, long), writer(long, long))["decode"] == pytest.approx(1.0)
    assert compare(writer(record(0.1, 0.0, []), long), writer(ended, long))["decode_total"] == 1.0
    with pytest.raises(MeasurementError, match="no text has more than one token"):
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
