"""Which tokens may follow in a text with times, held against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from edgeexit.bundle.manifest import Timestamps
from edgeexit.runtime.programs.sampling import Sampler, Sampling
from edgeexit.runtime.programs.times import WrittenTimes, forbid

END, WITHOUT, FIRST, VOCABULARY = 20, 23, 24, 40
PROMPT = [21, 22]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    wide=st.sampled_from([0.3, 1.0, 4.0]),
    written=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    latest=st.sampled_from([None, 0, 3]),
)
def test_the_same_tokens_may_follow_as_in_transformers(
    seed: int, wide: float, written: list[int], latest: int | None
) -> None:
    logits = np.random.default_rng(seed).normal(0, wide, VOCABULARY).astype(np.float32)
    config = GenerationConfig(eos_token_id=END)
    config.no_timestamps_token_id = WITHOUT
    config.max_initial_timestamp_index = latest
    own = WhisperTimeStampLogitsProcessor(config, begin_index=len(PROMPT))
    expected = own(torch.tensor([PROMPT + written]), torch.tensor(logits[None]))[0].numpy()
    found = logits.astype(np.float64)
    forbid(found, Timestamps(first=FIRST, without=WITHOUT, end=END, latest=latest), written)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    allowed = ~np.isneginf(found)
    np.testing.assert_array_equal(found[allowed].astype(np.float32), logits[allowed])


@pytest.mark.parametrize("written", [[], [3], [3, 30]])
def test_drafts_follow_the_rules_of_the_tokens_before_them(written: list[int]) -> None:
    times = Timestamps(first=FIRST, without=WITHOUT, end=END, latest=2)
    sampling = Sampling(suppressed=(1,), suppressed_first=(FIRST,))
    logits = np.random.default_rng(1).normal(0, 1, VOCABULARY).astype(np.float32)
    ids = torch.tensor([PROMPT + written])
    config = GenerationConfig(eos_token_id=END)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = WITHOUT, 2
    scores = torch.tensor(logits[None])
    for processor in (
        SuppressTokensAtBeginLogitsProcessor([FIRST], begin_index=len(PROMPT)),
        SuppressTokensLogitsProcessor([1]),
        WhisperTimeStampLogitsProcessor(config, begin_index=len(PROMPT)),
    ):
        scores = processor(ids, scores)
    for count in range(len(written) + 1):  # so many tokens are drafts
        sampler = Sampler(sampling, [list(PROMPT)], times)
        kept = len(written) - count
        sampler.histories[0] += written[:kept]
        chances = sampler.chances(0, logits, written[kept:])
        assert chances.argmax() == scores[0].argmax()


def test_times_are_written_as_transformers_writes_them() -> None:
    times = WrittenTimes(Timestamps(first=FIRST, without=WITHOUT, end=END), shown=True)
    assert [times.text(token) for token in (3, FIRST, FIRST + 60)] == [None, "<|0.00|>", "<|1.20|>"]
    times.offset_s = 29.98
    assert times.text(FIRST + 1) == "<|30.00|>"
    assert WrittenTimes(times.times, shown=False).text(FIRST) == ""
