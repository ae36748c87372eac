"""Policies on given texts: agreement and perplexity, against the plainest code over a float64
reference; and what is said of thresholds that nobody calibrated."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeexit.bundle.cautions import cautions
from edgeexit.bundle.policy import Policy, Rule, policy_for
from edgeexit.bundle.reader import Bundle
from edgeexit.bundle.writer import BundleWriter
from edgeexit.measure.calibrate import calibrate
from edgeexit.measure.given_text import judge, on_given_texts
from edgeexit.measure.texts import Text, as_data
from edgeexit.measure.trace import record
from edgeexit.measure.trace_file import read_trace, write_trace
from edgeexit.runtime import load
from tests.decoder_reference import Reference, Row
from tests.decoder_toys import fill_decoder_toy, make_decoder_toy, write_decoder_toy

TEXTS = [[5, 6, 7, 8, 9, 10], [3], [11, 4, 4, 20], [7, 12, 21, 1, 2, 9, 9]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_decoder_toy(make_decoder_toy(), tmp_path_factory.mktemp("writer") / "bundle")


def expected(threshold: float) -> tuple[int, int, int, float, float]:
    """Tokens, those that leave early, those of them that the last exit agrees with, and the mean
    log-probability of the next token, by the exits taken and by the last one."""
    reference = Reference(make_decoder_toy())
    tokens, early, agreed = 0, 0, 0
    taken, full = [], []
    for text in TEXTS:
        said = reference.trace(Row(text))
        *exits, last = said
        for place, following in enumerate(text[1:]):
            chosen = next((e for e in exits if said[e]["max_prob"][place] >= threshold), last)
            tokens += 1
            if chosen != last:
                early += 1
                agreed += int(said[chosen]["token"][place] == said[last]["token"][place])
            for found, exit_ in ((taken, chosen), (full, last)):
                logits = said[exit_]["logits"][place]
                found.append(logits[following] - math.log(np.exp(logits).sum()))
    return tokens, early, agreed, float(np.mean(taken)), float(np.mean(full))


@pytest.mark.parametrize("threshold", [0.3, 0.6, math.inf])
def test_given_texts_are_judged_as_the_reference_does(bundle: Bundle, threshold: float) -> None:
    tokens, early, agreed, taken, full = expected(threshold)
    with load(bundle, policy=Rule(thresholds=threshold)) as model:
        found = on_given_texts(model, TEXTS)
    assert found is not None
    assert (found.tokens, sum(found.exits.values())) == (tokens, tokens)
    assert tokens - found.exits[list(found.exits)[-1]] == early
    assert found.agreement == (pytest.approx(agreed / early) if early else None)
    assert found.agreement_of_all_tokens == pytest.approx(1 - (early - agreed) / tokens)
    assert found.perplexity == pytest.approx(math.exp(-taken), rel=1e-4)
    assert found.perplexity_full == pytest.approx(math.exp(-full), rel=1e-4)
    if not early:
        assert found.perplexity == found.perplexity_full


def test_texts_of_one_token_say_nothing(bundle: Bundle) -> None:
    with load(bundle) as model:
        assert on_given_texts(model, [[4], [5]]) is None


def test_a_trace_keeps_what_perplexity_is_made_of(bundle: Bundle, tmp_path: Path) -> None:
    data = as_data([Text(text) for text in TEXTS], bundle, "texts")
    with load(bundle, all_scores=True) as model:
        trace = record(model, data, 2)
        there = on_given_texts(model, TEXTS)
    write_trace(trace, tmp_path / "trace.npz")
    again = read_trace(tmp_path / "trace.npz")
    found = judge(again, Rule())
    assert found is not None and found == there
    policy, _, _ = calibrate(again, max_risk=0.9, score="max_prob")
    measured = judge(again, policy)
    assert measured is not None
    assert policy.calibration["perplexity"] == measured.perplexity
    assert policy.calibration["perplexity_full"] == found.perplexity_full


def test_cautions_are_for_early_answers_that_nobody_vouches_for(
    bundle: Bundle, tmp_path: Path
) -> None:
    with BundleWriter(tmp_path / "untrained") as writer:
        manifest = fill_decoder_toy(make_decoder_toy(), writer.folder)
        untrained = writer.commit(
            msgspec.structs.replace(manifest, provenance={"exits": "untrained"})
        )
    never, early = (Policy(rules={"decoder": Rule(thresholds=t)}) for t in (math.inf, 0.5))
    calibrated = msgspec.structs.replace(early, calibration={"method": "sweep"})
    assert cautions(policy_for(None, untrained), untrained) == []
    assert cautions(never, untrained) == []
    assert cautions(calibrated, bundle) == []
    assert [word for word in cautions(early, bundle) if "not calibrated" in word]
    assert len(cautions(early, untrained)) == 2
    [untrained_alone] = cautions(calibrated, untrained)
    assert "are untrained" in untrained_alone
    assert cautions(early, untrained, []) == []
