"""The sweep against the plainest code that says the same, and traps that others fell into."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.errors import CheckError, DataError, UsageError
from edgeexit.measure.calibrate import (
    Curve,
    auroc,
    calibrate,
    choose,
    default_score,
    figures,
    looser_and_better,
    losses,
    sweep,
)
from edgeexit.measure.rows_needed import doubts, rows_needed
from edgeexit.measure.trace import NO_LABEL, Trace, replay
from edgeexit.runtime import Rule


def make_trace(
    rows: int = 60,
    exits: int = 4,
    seed: int = 0,
    *,
    labels: bool = True,
    levels: int | None = None,
    independent: bool = True,
) -> Trace:
    """A random trace whose scores say something about agreement; `levels` makes ties."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 3, rows)
    right = random.random((exits, rows)) < np.linspace(0.5, 0.9, exits)[:, None]
    predictions = np.where(right, truth, (truth + random.integers(1, 3, (exits, rows))) % 3)
    scores = 0.3 * right + 0.7 * random.random((exits, rows))
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return Trace(
        bundle="b" * 64,
        engine={"engine": "cpu"},
        data={"name": "random", "digest": "d" * 64},
        exits=[f"exit_{number}" for number in range(1, exits + 1)],
        scores={"max_prob": scores.astype(np.float32)},
        predictions=predictions.astype(np.int64),
        labels=truth.astype(np.int64) if labels else None,
        batch_rows=np.full(rows // 2, 2),
        times_ms=random.uniform(1, 2, (rows // 2, exits)),
        batch_size=2,
        independent=independent,
    )


traces = st.builds(
    make_trace,
    rows=st.integers(1, 20).map(lambda n: 2 * n),
    exits=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([None, 3, 10]),
    independent=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(trace=traces, risk=st.sampled_from(["consistency", "performance"]), nans=st.booleans())
def test_sweep_equals_replay_at_every_distinct_score(trace: Trace, risk: str, nans: bool) -> None:
    if nans:
        trace.scores["max_prob"][:, ::5] = np.nan
    curve = sweep(trace, "max_prob", risk)
    assert (np.diff(curve.thresholds) < 0).all()
    loss = losses(trace, risk)
    ms = np.cumsum(np.median(trace.times_ms, axis=0)) / 2
    early = trace.scores["max_prob"][:-1]
    for threshold in np.append(np.unique(early[np.isfinite(early)]), np.inf):
        taken = replay(trace, Rule(thresholds=float(threshold)))
        # The curve is constant between its points: the strictest point not stricter than this one.
        point = int(np.flatnonzero(curve.thresholds >= threshold)[-1])
        share = np.bincount(taken, minlength=len(trace.exits)) / trace.rows
        np.testing.assert_allclose(curve.shares[point], share, atol=1e-12)
        assert curve.risks[point] == pytest.approx(loss[taken, np.arange(trace.rows)].mean())
        assert curve.depths[point] == pytest.approx(taken.mean() + 1)
        assert curve.expected_ms[point] == pytest.approx(ms[taken].mean())


@settings(max_examples=40, deadline=None)
@given(trace=traces, limit=st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.6]), per_exit=st.booleans())
def test_calibrated_policy_holds_its_risk_when_replayed(
    trace: Trace, limit: float, per_exit: bool
) -> None:
    try:
        policy, curve, chosen = calibrate(
            trace, max_risk=limit, score="max_prob", per_exit=per_exit
        )
    except CheckError:
        curve = sweep(trace, "max_prob")
        assert len(curve.risks) == 1 or curve.risks[1] > limit
        return
    taken = replay(trace, policy)
    risk = losses(trace, "consistency")[taken, np.arange(trace.rows)].mean()
    assert risk <= limit + 1e-9
    assert policy.calibration["measured_risk"] == pytest.approx(risk)
    assert policy.calibration["uncertified"] is True
    assert policy.calibration["expected_ms"] <= curve.expected_ms[chosen] + 1e-9
    assert policy.bundle == trace.bundle


def curve_of(risks: list[float]) -> Curve:
    count = len(risks)
    return Curve(
        thresholds=np.array([np.inf, *np.linspace(0.9, 0.1, count - 1)]),
        risks=np.array(risks),
        depths=np.ones(count),
        shares=np.ones((count, 1)),
        expected_ms=np.ones(count),
    )


def test_choose_stops_before_a_gap_when_the_risk_dips_again() -> None:
    assert choose(curve_of([0.0, 0.01, 0.02, 0.09, 0.01, 0.0]), 0.05) == 2


def test_choose_takes_the_last_that_holds_not_the_first_that_fails() -> None:
    assert choose(curve_of([0.0, 0.02, 0.05, 0.06]), 0.05) == 2


def test_choose_takes_the_loosest_when_all_hold() -> None:
    assert choose(curve_of([0.0, 0.01, 0.02]), 0.05) == 2


@pytest.mark.parametrize(
    "risks, found",
    [
        ([0.0, 0.01, 0.02, 0.09, 0.01, 0.0], 5),  # both are better, and the last is faster
        ([0.0, 0.01, 0.02, 0.09, 0.02], None),
        ([0.0, 0.01, 0.02], None),
    ],
)
def test_a_looser_threshold_that_looks_better_is_found(
    risks: list[float], found: int | None
) -> None:
    curve = curve_of(risks)
    curve = dataclasses.replace(curve, expected_ms=np.arange(len(risks), 0.0, -1.0))
    assert looser_and_better(curve, 2) == found
    slower = dataclasses.replace(curve, expected_ms=np.arange(float(len(risks))))
    assert looser_and_better(slower, 2) is None


@pytest.mark.parametrize("risks", [[0.0, 0.06, 0.0], [0.0]])
def test_choose_says_run_the_full_model_when_nothing_passes(risks: list[float]) -> None:
    with pytest.raises(CheckError, match="run the full model") as caught:
        choose(curve_of(risks), 0.05)
    assert caught.value.exit_code == 3


def test_calibrate_accepts_a_risk_of_exactly_the_limit() -> None:
    trace = make_trace(rows=10, exits=2)
    trace.predictions[1] = 0
    trace.predictions[0] = 0
    trace.predictions[0][:3] = 1  # 3 / 10, against the limit 0.3
    policy, _, _ = calibrate(trace, max_risk=0.3, score="max_prob")
    assert replay(trace, policy).tolist() == [0] * 10


def test_performance_risk_counts_only_mistakes_the_last_exit_does_not_make() -> None:
    trace = make_trace(rows=4, exits=2)
    trace.labels[:] = 0
    trace.predictions[1] = [0, 0, 1, 1]
    trace.predictions[0] = [0, 1, 0, 2]
    assert losses(trace, "performance")[0].tolist() == [0, 1, 0, 0]
    assert losses(trace, "consistency")[0].tolist() == [0, 1, 1, 1]


def test_performance_risk_is_refused_when_there_are_no_labels() -> None:
    with pytest.raises(DataError, match="no labels"):
        sweep(make_trace(labels=False), "max_prob", "performance")


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, math.nan]), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_auroc_equals_counting_pairs_when_scores_tie(rows: list[tuple[float, bool]]) -> None:
    positive = [-1.0 if math.isnan(s) else s for s, is_positive in rows if is_positive]
    negative = [-1.0 if math.isnan(s) else s for s, is_positive in rows if not is_positive]
    found = auroc(np.array([s for s, _ in rows]), np.array([p for _, p in rows]))
    if not positive or not negative:
        assert math.isnan(found)
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert found == pytest.approx(wins / (len(positive) * len(negative)))


def test_figures_are_per_exit_when_labels_are_there() -> None:
    trace = make_trace(rows=200)
    found = figures(trace, "max_prob")
    assert [one.name for one in found] == trace.exits
    assert found[-1].agreement == 1
    assert math.isnan(found[-1].auroc)
    for number, one in enumerate(found[:-1]):
        assert one.accuracy == pytest.approx((trace.predictions[number] == trace.labels).mean())
        assert 0.5 < one.auroc < 1
    assert np.all(np.diff([one.cumulative_ms for one in found]) > 0)


def test_default_score_is_refused_when_the_trace_has_no_such() -> None:
    trace = make_trace()
    assert default_score(trace, None) == "max_prob"
    with pytest.raises(UsageError, match="--score energy"):
        default_score(trace, "energy")


def test_risks_of_texts_are_reported_when_rows_are_tokens() -> None:
    trace = make_trace(rows=10, exits=2, labels=False)
    trace.predictions[:] = 0
    trace.predictions[0][[0, 1, 4]] = 1
    trace.scores["max_prob"][:] = 0.5
    groups = np.array([7, 7, 7, 7, 2, 2, 2, 2, 5, 5])
    policy, _, _ = calibrate(
        dataclasses.replace(trace, groups=groups), max_risk=0.3, score="max_prob"
    )
    assert policy.calibration["measured_risk"] == pytest.approx(0.3)
    assert policy.calibration["texts"] == 3
    assert policy.calibration["risk_of_texts"] == {
        "mean": pytest.approx((0.5 + 0.25 + 0) / 3),
        "largest": 0.5,
        "share_without_loss": pytest.approx(1 / 3),
    }


def test_tokens_without_a_label_do_not_count_for_what_needs_labels() -> None:
    trace = make_trace(rows=10, exits=2)
    trace.labels[:] = [0, 0, 0, 0, NO_LABEL, 0, 0, 0, 0, NO_LABEL]
    trace.predictions[1] = 0
    trace.predictions[0] = [1, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    trace.scores["max_prob"][:] = 0.5
    trace = dataclasses.replace(trace, groups=np.repeat([0, 1], 5))
    policy, _, _ = calibrate(trace, max_risk=0.25, score="max_prob", risk="performance")
    assert policy.calibration["n"] == 8
    assert policy.calibration["measured_risk"] == 0.25
    assert figures(trace, "max_prob")[0].accuracy == 0.75


def test_other_chains_with_exits_get_a_rule_that_never_stops() -> None:
    trace = dataclasses.replace(
        make_trace(), chain="decoder", other_chains={"encoder": "saturation"}
    )
    policy, _, _ = calibrate(trace, max_risk=0.5, score="max_prob")
    assert policy.rules["encoder"] == Rule(score="saturation")
    assert policy.rules["decoder"].thresholds < 1


@given(risk=st.floats(1e-4, 0.5))
def test_rows_needed_is_the_fewest_that_show_the_risk(risk: float) -> None:
    count = rows_needed(risk)
    assert count is not None
    assert (1 - risk) ** count <= 0.05 + 1e-9
    assert (1 - risk) ** (count - 1) > 0.05 - 1e-9


def test_a_calibration_on_four_rows_says_that_they_show_no_risk_of_half_a_percent() -> None:
    trace = make_trace(rows=4, exits=2)
    trace.predictions[:] = 0
    policy, _, _ = calibrate(trace, max_risk=0.005, score="max_prob")
    [warning] = policy.calibration["warnings"]
    assert warning.startswith("4 rows cannot show a risk of 0.5 %")
    assert "up to 53 %" in warning and "at least 598 rows" in warning
    assert policy.calibration["rows_needed"] == 598


def test_texts_count_and_not_their_tokens_where_rows_are_tokens() -> None:
    trace = make_trace(rows=1000, exits=2, labels=False)
    trace.predictions[:] = 0
    trace = dataclasses.replace(trace, groups=np.repeat(np.arange(10), 100))
    policy, _, _ = calibrate(trace, max_risk=0.05, score="max_prob")
    [warning] = policy.calibration["warnings"]
    assert warning.startswith("10 texts cannot show a risk of 5 %") and "59 texts" in warning


def test_batches_count_and_not_their_rows_where_exits_apply_to_the_whole_batch() -> None:
    trace = make_trace(rows=118, exits=2, labels=False, independent=False)
    trace.predictions[:] = 0
    policy, _, _ = calibrate(trace, max_risk=0.05, score="max_prob")
    assert policy.calibration["warnings"] == []  # 59 batches of 2 rows
    trace = dataclasses.replace(trace, batch_rows=np.array([59, 59]), batch_size=59)
    policy, _, _ = calibrate(
        dataclasses.replace(trace, times_ms=trace.times_ms[:2]), max_risk=0.05, score="max_prob"
    )
    [warning] = policy.calibration["warnings"]
    assert warning.startswith("2 batches cannot show a risk of 5 %") and "59 batches" in warning


def test_a_calibration_on_enough_rows_has_no_warning() -> None:
    assert doubts(598, "rows", 0.005) == []
    assert len(doubts(597, "rows", 0.005)) == 1
    assert doubts(10**9, "rows", 0.0)[0].startswith("no number of rows can show a risk of 0 %")
    assert doubts(1, "rows", 0.1)[0].startswith("1 row cannot")
