"""Drawing: what processors do, and that drafting leaves the distribution as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
from scipy.stats import chisquare

from edgeexit.bundle.reader import Bundle
from edgeexit.errors import UsageError
from edgeexit.runtime import Model, Sampling, load
from edgeexit.runtime.programs.sampling import Sampler, distribution
from tests.decoders import Reference, make_decoder

CHANCE = 1e-4
"""A right implementation fails a test with this chance; seeds are fixed, so it does or does not."""


def test_temperature_sharpens_and_flattens() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    np.testing.assert_allclose(distribution(logits, Sampling(temperature=1.0), ()), [0.5, 0.3, 0.2])
    squared = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(distribution(logits, Sampling(temperature=0.5), ()), squared)


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    only = distribution(logits, Sampling(temperature=1.0, top_k=2), ())
    np.testing.assert_allclose(only, [0, 4 / 7, 0, 3 / 7])
    only = distribution(logits, Sampling(temperature=1.0, top_p=0.7), ())
    np.testing.assert_allclose(only, [0, 4 / 7, 0, 3 / 7], atol=1e-12)
    np.testing.assert_allclose(
        distribution(logits, Sampling(temperature=1.0, top_p=0.01), ()), [0, 1, 0, 0]
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("penalty", [5e-324, 1.0, 1.7e308])
def test_extreme_settings_give_chances_all_the_same(temperature: float, penalty: float) -> None:
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    chances = distribution(np.array([1.0, 3.0, -2.0, 0.5]), sampling, [0, 2])
    assert np.isfinite(chances).all() and chances.sum() == pytest.approx(1.0)
    if penalty == 1.0 and temperature < 1:
        assert chances.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_the_repetition_penalty_counts_what_was_there() -> None:
    logits = np.array([2.0, -1.0, 1.0])
    found = distribution(logits, Sampling(temperature=1.0, repetition_penalty=2.0), [0, 1, 1])
    expected = np.exp([1.0, -2.0, 1.0])
    np.testing.assert_allclose(found, expected / expected.sum())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_settings_are_checked_too_when_some_are_replaced() -> None:
    with pytest.raises(UsageError, match="top_p 2.0 is out of range"):
        msgspec.structs.replace(Sampling(temperature=0.5), top_p=2.0)


def test_verified_drafts_are_distributed_as_the_full_model_draws() -> None:
    p = [np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.1, 0.8])]
    q = [np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])]
    sampler = Sampler(Sampling(temperature=1.0, seed=5), [[]])
    firsts: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    for _ in range(20000):
        drafts = [sampler.draw(0, one) for one in q]
        kept, after = sampler.verify(0, drafts, q, p)
        tokens = [*drafts[:kept], after]
        firsts[tokens[0]] += 1
        if len(tokens) > 1:
            seconds[tokens[1]] += 1
    for found, expected in ((firsts, p[0]), (seconds, p[1])):
        counts = np.array([found[token] for token in range(3)])
        assert chisquare(counts, expected * counts.sum()).pvalue > CHANCE


@pytest.fixture(scope="module")
def llama(decoder_bundle: Callable[[str], Bundle]) -> Iterator[Model]:
    with load(decoder_bundle("llama"), capacity=24) as decoder:
        yield decoder


@pytest.mark.parametrize("draft_threshold", [0.0, 0.06])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_exact_sampling_is_distributed_as_the_reference(
    llama: Model, draft_threshold: float, penalty: float
) -> None:
    """Three tokens behind one prompt, with processors, and with drafts that stop early."""
    prompt, rows, rounds = [7, 8, 9, 9], 64, 40
    reference = Reference(make_decoder("llama"))
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    settings = Sampling(temperature=0.7, top_k=3, top_p=0.95, repetition_penalty=penalty)
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, chance in expected.items():
            logits = reference.logits([*prompt, *tokens])[-1]
            chances = distribution(logits, settings, [*prompt, *tokens])
            for token in np.flatnonzero(chances):
                longer[(*tokens, int(token))] = chance * float(chances[token])
        expected = longer
    assert not any(0 in tokens for tokens in expected), "an end token would cut texts short"
    found: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for seed in range(rounds):
        made = llama.generate(
            [prompt] * rows,
            max_new_tokens=3,
            mode="exact",
            drafts=2,
            draft_threshold=draft_threshold,
            sampling=Sampling(
                temperature=0.7, top_k=3, top_p=0.95, repetition_penalty=penalty, seed=seed
            ),
        ).finish()
        found.update(map(tuple, made.tokens))
        drafted += made.statistics.drafted
        accepted += made.statistics.accepted
    assert set(found) <= set(expected)
    assert 0 < accepted < drafted
    keys = [key for key in expected if expected[key] * rows * rounds >= 5]
    counts = np.array([found[key] for key in keys] + [sum(found.values())])
    counts[-1] -= counts[:-1].sum()
    chances = np.array([expected[key] for key in keys])
    chances = np.append(chances, 1 - chances.sum())
    if chances[-1] * rows * rounds < 5:
        counts, chances = counts[:-1], chances[:-1] / chances[:-1].sum()
    assert chisquare(counts, chances * counts.sum()).pvalue > CHANCE


def test_the_same_seed_gives_the_same_text_and_another_seed_another(llama: Model) -> None:
    def text(seed: int, mode: str) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        made = llama.generate([5, 6, 7], max_new_tokens=12, mode=mode, sampling=sampling)  # type: ignore[arg-type]
        return made.finish().tokens[0]

    for mode in ("full", "exact", "fast"):
        assert text(3, mode) == text(3, mode)
        assert text(3, mode) != text(4, mode)


def test_temperature_zero_is_greedy(llama: Model) -> None:
    greedy = llama.generate([5, 6, 7], max_new_tokens=12).finish().tokens
    cold = llama.generate([5, 6, 7], max_new_tokens=12, sampling=Sampling(temperature=0.0))
    assert cold.finish().tokens == greedy
