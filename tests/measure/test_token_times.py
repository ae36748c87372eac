"""Times of single tokens: an interruption does not decide them, and a wide spread is said."""

from __future__ import annotations

import numpy as np
import pytest

from edgeexit.measure.token_times import MIN_RUNS, median_of_tokens, run_until_settled, spread_of


def test_one_interrupted_token_does_not_change_the_time_of_a_run() -> None:
    steps = [[1.0, 2.0]] * 30 + [[500.0, 2.0], [1.0, 700.0]]
    assert median_of_tokens(steps) == [1.0, 2.0]


def test_one_interrupted_run_does_not_change_the_median(caplog: pytest.LogCaptureFixture) -> None:
    runs = run_until_settled(lambda number: [90.0, 90.0] if number == 1 else [1.0, 2.0])
    assert np.median(runs, axis=0).tolist() == [1.0, 2.0]
    assert MIN_RUNS <= len(runs) <= 3 * MIN_RUNS
    assert not caplog.text


def test_runs_go_on_and_a_warning_is_logged_when_their_times_differ_widely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    random = np.random.default_rng(0)
    runs = run_until_settled(lambda number: [float(2.0 ** random.integers(0, 4))])
    assert len(runs) > MIN_RUNS and spread_of(np.sum(runs, axis=1)) > 0.2
    assert "expected times are uncertain" in caplog.text
